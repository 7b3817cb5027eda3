"""What `lookup show`, `history` and `why` do: ask over HTTP, print what is told. Exit codes as in `app/client.py`."""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import quote

import orjson
from pydantic import ValidationError
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from app.client import Exit, LookupApi, Stopped, open_client
from app.rendering import JobView, job_report, safe

PAGES_MAX = 100
PAGE = 500
EVIDENCE = {
    "service": "Service",
    "attempt": "Attempt",
    "worker": "Worker",
    "provider": "Provider",
    "parser": "Parser",
    "source": "Source",
    "observedAt": "Observed",
    "result": "Result",
    "raw": "Raw answer",
    "rawAbsent": "Raw answer",
}
"""What is printed of a reason, in this order, and how it is called."""

Told = tuple[Any, RenderableType]
"""What to print as JSON, and what to print for people."""
Question = Callable[[LookupApi], Awaitable[Told]]


async def printed(
    question: Question, *, base_url: str, as_json: bool, out: Console | None = None, err: Console | None = None
) -> int:
    """Ask, and print the answer to `out`; what went wrong to `err`. Gives the exit status (`Exit`)."""
    out, err = out or Console(), err or Console(stderr=True)
    try:
        async with open_client(base_url) as http:
            as_data, for_people = await question(LookupApi(http, base_url))
    except Stopped as stopped:
        err.print(Text(stopped.message), soft_wrap=True)
        return stopped.status
    if as_json:
        # Escaped down to ASCII: nothing in it can steer the terminal.
        out.out(json.dumps(as_data, indent=2), highlight=False)
    else:
        out.print(for_people)
    return Exit.COMPLETED


def show(job: str, as_of: str | None) -> Question:
    async def ask(api: LookupApi) -> Told:
        body = await api.read(_path(job), asOf=as_of)
        try:
            return orjson.loads(body), job_report(JobView.model_validate_json(body))
        except ValidationError:
            raise api.strange() from None

    return ask


def history(job: str) -> Question:
    async def ask(api: LookupApi) -> Told:
        facts: list[dict[str, Any]] = []
        for _ in range(PAGES_MAX):
            after = facts[-1]["position"] if facts else 0
            page = orjson.loads(await api.read(f"{_path(job)}/history", after=after, limit=PAGE))
            facts += page.get("facts") or []
            if not page.get("next"):
                break
        return facts, _timeline(facts)

    return ask


def why(job: str, path: str, as_of: str | None) -> Question:
    async def ask(api: LookupApi) -> Told:
        reason = orjson.loads(await api.read(f"{_path(job)}/why", path=path, asOf=as_of))
        return reason, _reason(reason)

    return ask


def _path(job: str) -> str:
    return f"/api/lookup/{quote(job, safe='')}"


def _timeline(facts: list[dict[str, Any]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="dim")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for fact in facts:
        table.add_row(*(Text(safe(fact.get(name, ""))) for name in ("position", "recordedAt", "sentence")))
    return table


def _reason(reason: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    fact = reason.get("fact") or {}
    rows = [
        (str(reason.get("path")) or "the whole", json.dumps(reason.get("value"), ensure_ascii=False)),
        ("Because", reason.get("because")),
        *((name, _short(reason[key])) for key, name in EVIDENCE.items() if reason.get(key) is not None),
        ("Fact", f"{fact.get('type')} at position {fact.get('position')}, recorded {fact.get('recordedAt')}"),
        ("Hash", fact.get("hash")),
    ]
    for name, value in rows:
        table.add_row(Text(safe(name)), Text(safe(value)))
    return table


def _short(value: Any) -> Any:
    """A document by its hash and size."""
    return f"sha256 {value.get('sha256')}, {value.get('sizeBytes')} bytes" if isinstance(value, dict) else value
