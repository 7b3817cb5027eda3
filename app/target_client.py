"""What `lookup target-history` and `lookup diff` do: ask over HTTP, and print tables for people or JSON for scripts.

Whatever an answer holds was written by strangers, and is made `safe` before it is printed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import orjson
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from app.client import Exit, LookupApi, Stopped, open_client
from app.rendering import safe, safe_text, status_text, words

SHOWN_MAX = 50
"""So many changes of a service are shown; `--json` has them all."""

VALUE_CHARS_MAX = 200
OUTCOME_STYLES = {"same": "green", "changed": "bold yellow", "unknown": "dim"}
SIGNS = {"added": "+", "removed": "-", "changed": "~"}

Told = Mapping[str, Any]


async def history(
    target: str, before: int | None, limit: int, *, base_url: str, as_json: bool, out: Console, err: Console
) -> int:
    """Prints a page of the target's history; gives the exit status (`Exit`)."""
    path = f"/api/targets/{quote(target, safe='')}/history"
    return await _show(path, {"before": before, "limit": limit}, _history_report, base_url, as_json=as_json, out=out, err=err)


async def diff(
    target: str, from_: str | None, to: str | None, *, base_url: str, as_json: bool, out: Console, err: Console
) -> int:
    """Prints what changed between two jobs; gives the exit status (`Exit`), which does not depend on whether anything did."""
    path = f"/api/targets/{quote(target, safe='')}/diff"
    return await _show(path, {"from": from_, "to": to}, _diff_report, base_url, as_json=as_json, out=out, err=err)


async def _show(
    path: str,
    query: Mapping[str, object],
    report: Callable[[Told], RenderableType],
    base_url: str,
    *,
    as_json: bool,
    out: Console,
    err: Console,
) -> int:
    try:
        async with open_client(base_url) as http:
            body = await LookupApi(http, base_url).read(path, **query)
    except Stopped as stopped:
        err.print(Text(stopped.message), soft_wrap=True)
        return stopped.status
    told = orjson.loads(body)
    if as_json:
        # Escaped down to ASCII: nothing in the document can steer the terminal, and nothing of it is lost.
        out.out(json.dumps(told, indent=2), highlight=False)
    else:
        out.print(report(told))
    return Exit.COMPLETED


# ---- A history


def _history_report(told: Told) -> RenderableType:
    jobs = _items(told, "jobs")
    if not jobs:
        return Text(f"Nobody has asked about {safe(told.get('target'))}, as far as is remembered.")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for column in ("position", "submitted", "job", "status", "changed", "not known"):
        table.add_column(column, no_wrap=column not in {"changed", "not known"})
    for job in jobs:
        table.add_row(
            safe_text(job.get("position")),
            Text(_time(job.get("submittedAt"))),
            safe_text(job.get("jobId")),
            status_text(str(job.get("status"))),
            _what_changed(job),
            Text(_names(job.get("unknown")), style="dim"),
        )
    older = Text(f"Older jobs: --before {safe(jobs[-1].get('position'))}", style="dim") if told.get("next") else Text()
    return Group(Text(safe(told.get("target")), style="bold"), Text(), table, older)


def _what_changed(job: Told) -> Text:
    """Against the completed job before it."""
    if job.get("comparedWith") is None:
        return Text("", style="dim")
    names = _names(job.get("changed"))
    return Text(names, style=OUTCOME_STYLES["changed"]) if names else Text("nothing", style="dim")


# ---- A diff


def _diff_report(told: Told) -> RenderableType:
    sections = [_service_section(part) for part in _items(told, "services")]
    outcome = str(told.get("outcome"))
    headline = Text(safe(told.get("target")), style="bold")
    headline.append("  ").append_text(_outcome_text(outcome))
    return Group(headline, _job_line("from", told.get("from")), _job_line("to", told.get("to")), *sections)


def _job_line(name: str, job: Any) -> Text:
    named = job if isinstance(job, dict) else {}
    line = f"{name:<5}{safe(named.get('jobId'))}  position {safe(named.get('position'))}  {_time(named.get('submittedAt'))}"
    return Text(line, style="dim")


def _service_section(part: Told) -> RenderableType:
    headline = Text(f"{safe(part.get('service'), 20):<12}", style="bold")
    headline.append_text(_outcome_text(str(part.get("outcome"))))
    headline.append(_why(part) + _set_aside(part), style="not bold dim")
    changes = _items(part, "changes")
    more = _more(len(changes[SHOWN_MAX:]) + _count(part.get("unlistedChanges")))
    return Group(Text(), headline, *([_change_table(changes[:SHOWN_MAX])] if changes else []), *more)


def _change_table(changes: Sequence[Told]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, pad_edge=False)
    table.add_column(width=3, justify="right")
    table.add_column(overflow="fold", style="bold")
    table.add_column(overflow="fold")
    for change in changes:
        kind = str(change.get("kind"))
        note = safe(change.get("note"), VALUE_CHARS_MAX) if change.get("note") else ""
        what = Text(_values(kind, change))
        what.append(f"  ({note})" if note else "", style="dim")
        table.add_row(Text(SIGNS.get(kind, "?")), safe_text(change.get("path")), what)
    return table


def _values(kind: str, change: Told) -> str:
    before, after = (safe(change.get(side), VALUE_CHARS_MAX) for side in ("from", "to"))
    return {"added": after, "removed": before}.get(kind, f"{before} -> {after}")


def _why(part: Told) -> str:
    """Why nothing is known, or by whom answers were brought that cannot be held against each other."""
    sides: list[str] = []
    for name, side in (("unknown", "from"), ("unknown", "to"), ("measuredBy", "from"), ("measuredBy", "to")):
        told = part.get(name)
        if isinstance(told, dict) and told.get(side):
            sides.append(f"{side}: {safe(told[side]).replace('_', ' ')}")
    return f"  ({'; '.join(sides)})" if sides else ""


def _set_aside(part: Told) -> str:
    count = _count(part.get("ignored"))
    return f"  {count} difference{'s' if count > 1 else ''} set aside as noise" if count else ""


def _more(count: int) -> list[Text]:
    return [Text(f"  and {count} more changes", style="dim")] if count else []


def _outcome_text(outcome: str) -> Text:
    return Text(words(outcome), style=f"not bold {OUTCOME_STYLES.get(outcome, 'cyan')}")


def _names(values: Any) -> str:
    return ", ".join(safe(value, 20) for value in values) if isinstance(values, list) else ""


def _time(value: Any) -> str:
    """To the second: more of it tells a person nothing."""
    return safe(value)[:19].replace("T", " ") if isinstance(value, str) else ""


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _items(told: Told, key: str) -> list[Told]:
    items = told.get(key)
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []
