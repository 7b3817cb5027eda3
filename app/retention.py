"""What `lookup retention` does: one run of the retention, told to people or scripts."""

import asyncio
import json
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import psycopg

from app.logs import set_up_logs
from app.running import settings_of_running
from app.settings import Settings
from app.wiring import Wiring
from events.segment_files import SegmentUnreadable
from events.store import OutcomeUnknown, StoreUnavailable
from write_side.retention import SegmentNotKept, SomebodyElseSeals, Tally, open_retention_table

UNREACHABLE = 3
OFF = "retention is off. Set LOOKUP_LOG_RETENTION_DAYS, or give --days."
NO_ROLE = "LOOKUP_DATABASE_RETENTION_URL and LOOKUP_DATABASE_URL are not set, and nothing runs here."
NOT_REACHED = "The database cannot be reached, or `lookup migrate` has not been run. What was sealed so far stays so."


def run_retention(data_dir: Path | None, *, days: float | None, dry_run: bool, as_json: bool) -> int:
    settings = Settings() if data_dir is None else Settings(data_dir=data_dir)
    set_up_logs(settings.log_format, settings.log_level)
    settings = settings_of_running(settings)
    keep = settings.log_retention if days is None else timedelta(days=days)
    if keep is None:
        return _say(OFF, 2)
    if settings.database_retention_url is None or settings.database_url is None:
        return _say(NO_ROLE, UNREACHABLE)
    try:
        tally = asyncio.run(_run(Wiring(settings), settings.database_retention_url, keep, dry_run=dry_run))
    except (SomebodyElseSeals, SegmentNotKept, SegmentUnreadable) as refusal:
        return _say(str(refusal), 1)
    except (psycopg.Error, StoreUnavailable, OutcomeUnknown):
        return _say(NOT_REACHED, UNREACHABLE)
    except OSError:
        return _say(f"Segments cannot be written to {settings.segments}: is it writable, and is there space left?", 1)
    print(json.dumps(asdict(tally), indent=2) if as_json else _sentences(tally, dry_run=dry_run))  # noqa: T201 - a command prints
    return 0


async def _run(wiring: Wiring, url: str, keep: timedelta, *, dry_run: bool) -> Tally:
    try:
        async with open_retention_table(url) as table:
            return await wiring.retention_of(table, keep).run(dry_run=dry_run)
    finally:
        await wiring.aclose()


def _sentences(tally: Tally, *, dry_run: bool) -> str:
    what = f"{tally.jobs} jobs ({tally.facts} facts, {tally.documents} documents)"
    said = [f"Would seal {what}." if dry_run else f"Sealed {what} into {len(tally.segments)} segments."]
    said += [f"  {name}" for name in tally.segments]
    if tally.unknown_files:
        said += ["Segment files that this log does not tell of, left alone:", *(f"  {name}" for name in tally.unknown_files)]
    return "\n".join(said)


def _say(sentence: str, code: int) -> int:
    print(f"lookup: {sentence}", file=sys.stderr)  # noqa: T201 - for the person who typed the command
    return code
