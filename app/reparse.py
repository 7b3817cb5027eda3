"""What `lookup replay --reparse SERVICE` does: answers are read again from what was kept, and told or corrected."""

import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psycopg
from rich.console import Console
from rich.text import Text

from app.logs import set_up_logs
from app.rendering import safe
from app.running import settings_of_running, user_name
from app.settings import Settings
from app.wiring import Wiring, utc_now
from events.catalog import UnknownFact
from events.facts import Service
from events.store import OutcomeUnknown, StoreUnavailable
from results.documents import ResultDocuments, ResultsUnavailable
from workers.lookup import LookupFailed, Parser, RawAnswer, Result
from workers.parsers import PARSERS
from write_side.corrections import SENTENCES, Correcting, Finding, NoAnswer, Reader, Reparse, Tally, Verdict
from write_side.retention import SomebodyElseSeals, open_retention_table

PLACES_MAX = 8
TEXT_CHARS_MAX = 80
NOT_NOW, UNREACHABLE = 1, 3


@dataclass(frozen=True, slots=True)
class Wish:
    """What was typed. `reason` = None: nothing is written. `every`: also what was read by this version already."""

    service: Service
    every: bool = False
    reason: str | None = None
    actor: str | None = None
    samples_max: int = 5


def reparse(data_dir: Path | None, wish: Wish, *, as_json: bool) -> int:
    """The command; gives its exit code."""
    settings = Settings() if data_dir is None else Settings(data_dir=data_dir)
    set_up_logs(settings.log_format, settings.log_level)
    settings = settings_of_running(settings)
    if settings.database_url is None:
        return _say("nothing runs here, and LOOKUP_DATABASE_URL is not set.", UNREACHABLE)
    try:
        report = asyncio.run(_run(Wiring(settings), wish))
    except SomebodyElseSeals as busy:
        return _say(str(busy), NOT_NOW)
    except UnknownFact as unknown:
        return _say(str(unknown), NOT_NOW)
    except OutcomeUnknown:
        return _say("The database broke off: the last corrections may or may not be recorded. Type it again.", UNREACHABLE)
    except (StoreUnavailable, ResultsUnavailable, psycopg.Error):
        return _say("The database cannot be reached. What was corrected stays; type it again for the rest.", UNREACHABLE)
    if as_json:
        print(json.dumps(report, indent=2))  # noqa: T201 - a command prints
    else:
        print_report(report, Console())
    return 0


async def _run(wiring: Wiring, wish: Wish) -> dict[str, Any]:
    try:
        if wish.reason is None:
            return await look(wiring, wish, None)
        assert wiring.settings.database_url is not None
        # Nothing may be sealed or erased meanwhile: a raw answer that was read before could outlive its job's erasure.
        async with open_retention_table(wiring.settings.database_url) as table:
            await table.lock()
            return await look(wiring, wish, Correcting(f"reparse:{wish.actor or user_name()}", wish.reason))
    finally:
        await wiring.aclose()


async def look(wiring: Wiring, wish: Wish, correcting: Correcting | None) -> dict[str, Any]:
    """Read again, correct if told to, and tell what came of it."""
    documents = await wiring.all_documents()
    work = Reparse(
        wiring.whole_log,
        wiring.store,
        documents,
        READERS,
        wish.service,
        utc_now,
        every=wish.every,
        samples_max=wish.samples_max,
    )
    tally = await work.run(correcting)
    return await _report(wish, tally, documents, applied=correcting is not None)


def _reader(parser: Parser[Result]) -> Reader:
    def read(stored: bytes) -> bytes:
        try:
            return parser.parse(RawAnswer.of(stored)).model_dump_json().encode()
        except LookupFailed as failed:
            raise NoAnswer(failed.message) from failed
        except (ValueError, KeyError, TypeError) as error:
            raise NoAnswer("What was kept is not in the form that this parser reads.") from error

    return Reader(parser.name, parser.version, read)


READERS = {name: _reader(parser) for name, parser in PARSERS.items()}


# --- Telling --------------------------------------------------------------------------------------------------------------


async def _report(wish: Wish, tally: Tally, documents: ResultDocuments, *, applied: bool) -> dict[str, Any]:
    before = await documents.get([finding.answered.result for finding in tally.samples])
    return {
        "service": wish.service,
        "applied": applied,
        "jobs": tally.jobs,
        "answers": tally.answers,
        "counts": {verdict: tally.counts[verdict] for verdict in Verdict},
        "corrected": tally.corrected,
        "samples": [_sample(finding, before.get(finding.answered.result.location.key)) for finding in tally.samples],
    }


def _sample(finding: Finding, before: bytes | None) -> dict[str, Any]:
    completed = finding.answered.completed
    changes = [] if finding.document is None or before is None else changes_of(before, finding.document)
    return {
        "job_id": str(completed.job_id),
        "attempt": completed.attempt,
        "verdict": finding.verdict,
        "parser_before": finding.answered.parser,
        "parser": finding.parser,
        "refusal": finding.refusal,
        "changes": [{"path": path, "before": then, "after": now} for path, then, now in changes[:PLACES_MAX]],
        "more_changes": max(0, len(changes) - PLACES_MAX),
    }


def changes_of(before: bytes, after: bytes) -> list[tuple[str, Any, Any]]:
    """Where two documents differ: (JSON pointer of RFC 6901, before, after). What is on one side only is null on the other."""
    return list(_changes(orjson.loads(before), orjson.loads(after), ""))


def _changes(before: Any, after: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys([*before, *after]):
            step = name.replace("~", "~0").replace("/", "~1")
            yield from _changes(before.get(name), after.get(name), f"{path}/{step}")
    elif before != after:
        yield path, before, after


def print_report(report: dict[str, Any], console: Console) -> None:
    counts = report["counts"]
    console.print(f"{report['jobs']} jobs, {report['answers']} answers of {report['service']}. Of these", highlight=False)
    for verdict in Verdict:
        if counts[verdict]:
            console.print(f"  {counts[verdict]:>7} {SENTENCES[verdict]}", highlight=False)
    for sample in report["samples"]:
        _print_sample(sample, console)
    if report["applied"]:
        console.print(f"{report['corrected']} corrections are recorded.", highlight=False)
    elif counts[Verdict.CHANGED]:
        console.print("Nothing was written. With --apply and a --reason they are corrected.", highlight=False)


def _print_sample(sample: dict[str, Any], console: Console) -> None:
    console.print(f"{sample['job_id']}  {sample['parser_before']} -> {sample['parser']}", highlight=False)
    if sample["refusal"]:
        console.print(Text(f"    {safe(sample['refusal'])}"))
    for change in sample["changes"]:
        console.print(Text(f"    {safe(change['path'])}: {_short(change['before'])} -> {_short(change['after'])}"))
    if sample["more_changes"]:
        console.print(f"    and {sample['more_changes']} more places", highlight=False)


def _short(value: Any) -> str:
    text = safe(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= TEXT_CHARS_MAX else f"{text[:TEXT_CHARS_MAX]}…"


def service_named(name: str, services: Sequence[Service] = tuple(Service)) -> Service | None:
    """In any case, as on the command line elsewhere."""
    return next((service for service in services if service.lower() == name.lower()), None)


def _say(sentence: str, code: int) -> int:
    print(f"lookup: {sentence}", file=sys.stderr)  # noqa: T201 - for the person who typed the command
    return code
