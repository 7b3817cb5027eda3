"""What `lookup erase` does: carries erasures out and gives a receipt. And every start: it holds the log against the list."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from redis.exceptions import RedisError

from app.compaction import compact_database, compact_redis
from app.erasing import MessageSweep, ViewSweep, nothing_can_be_taken_out
from app.logs import set_up_logs
from app.running import CannotRun, settings_of_running, user_name
from app.settings import Settings
from app.wiring import Wiring, new_id, utc_now
from domain.target import InvalidTarget, parse_target
from events.bus import EVENTS_EXCHANGE, BusUnavailable
from events.store import OutcomeUnknown, StoreUnavailable
from projections.job_views import Terms
from write_side.erasure import Erasure, NotYet, Receipt, Sweep, apply_erasures, not_done_here
from write_side.erasure_list import ErasureList
from write_side.erasure_table import Subject
from write_side.retention import SomebodyElseSeals, open_retention_table
from write_side.sagas import Sagas, TooManyConflicts

UNREACHABLE = 3
SALT_BYTES = 16
POSITIONS_PRINTED_MAX = 20
NOT_REACHED = "A server cannot be reached. What has begun goes on with `lookup erase --resume`."
MISSING = "nothing runs here, and {} not set."
BEYOND_REACH = (
    f"Subscribers of {EVENTS_EXCHANGE}: they were sent the target with the facts at the positions above. Ask them to erase it.",
    "Those who were asked about the target (RDAP, GeoIP and name servers, and the target itself): they know that they were.",
    "Answers that clients have fetched, and caches between us and them.",
    "Backups that were made before: they hold it until they are deleted. Restored, they are held against the erasure list.",
    "Logs of the machine, of gateways and terminals; and the memory of running processes, until they are started again.",
)


@dataclass(frozen=True, slots=True)
class Order:
    """What the command line asks for. A target, or (`resume`, `apply_list`) what has been begun or listed before."""

    target: str | None = None
    reason: str = ""
    actor: str | None = None
    dry_run: bool = False
    apply_list: bool = False
    compact: bool = False
    receipt: Path | None = None
    as_json: bool = False


def erase(data_dir: Path | None, order: Order) -> int:
    settings = Settings() if data_dir is None else Settings(data_dir=data_dir)
    set_up_logs(settings.log_format, settings.log_level)
    settings = settings_of_running(settings)
    wanted = {
        "LOOKUP_DATABASE_URL": settings.database_url,
        "LOOKUP_DATABASE_RETENTION_URL": settings.database_retention_url,
        "LOOKUP_REDIS_URL": settings.redis_url,
    }
    missing = [name for name, value in wanted.items() if value is None]
    if missing:
        return _say(MISSING.format(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'}"), UNREACHABLE)
    try:
        canonical = None if order.target is None else parse_target(order.target).canonical
        return asyncio.run(_run(settings, order, canonical))
    except InvalidTarget as invalid:
        return _say(invalid.message, 2)
    except (SomebodyElseSeals, NotYet, TooManyConflicts) as not_now:
        return _say(str(not_now), 1)
    except (psycopg.Error, RedisError, StoreUnavailable, OutcomeUnknown, BusUnavailable):
        return _say(NOT_REACHED, UNREACHABLE)
    except OSError:
        return _say(f"A file in {settings.segments} or {settings.erasures} cannot be written.", 1)


async def _run(settings: Settings, order: Order, canonical: str | None) -> int:
    wiring = Wiring(settings)
    try:
        async with erasure_of(wiring, on_step=lambda name: _tell(f"{name} …", order)) as erasure:
            if order.dry_run:
                return await _dry_run(erasure, canonical or "", order)
            await erasure.retention.lock()
            by = order.actor or user_name()
            if canonical is not None:
                await erasure.begin(canonical, salt=os.urandom(SALT_BYTES).hex(), by=by, reason=order.reason)
            receipts = await (apply_erasures(erasure, by) if order.apply_list else erasure.run())
        left = await _compact(wiring, order)
        _hand_over(receipts, left, order)
        return 0
    finally:
        await wiring.aclose()


@asynccontextmanager
async def erasure_of(wiring: Wiring, *, on_step: Callable[[str], None] = lambda _: None) -> AsyncIterator[Erasure]:
    """An erasure over everything that the settings name. Raises `psycopg.Error` or `BusUnavailable`."""
    settings = wiring.settings
    assert settings.database_retention_url is not None
    async with open_retention_table(settings.database_retention_url) as table, _message_sweep(wiring) as messages:
        yield Erasure(
            store=wiring.store,
            archive=wiring.whole_log,
            # Of its own: what others remember of a job must not decide here.
            sagas=Sagas(wiring.store),
            retention=table,
            folder=settings.segments,
            listed=ErasureList(settings.erasures),
            sweep_messages=messages,
            sweep_views=ViewSweep(wiring.redis, wiring.keys, wiring.whole_log, Terms(settings.rules, settings.retention)),
            now=utc_now,
            new_id=new_id,
            on_step=on_step,
        )


@asynccontextmanager
async def _message_sweep(wiring: Wiring) -> AsyncIterator[Sweep]:
    if wiring.settings.broker_url is not None:
        yield nothing_can_be_taken_out
        return
    bus = wiring.bus()
    await bus.start()
    try:
        yield MessageSweep(wiring.redis, bus)
    finally:
        await bus.stop()


async def _dry_run(erasure: Erasure, canonical: str, order: Order) -> int:
    jobs, facts = await erasure.find(Subject(canonical))
    if order.as_json:
        print(json.dumps({"jobs": jobs, "facts": facts}))  # noqa: T201 - a command prints
    else:
        print(f"Would erase {canonical}: {jobs} jobs, {facts} facts that tell of it, and what hangs on them.")  # noqa: T201
    return 0


async def _compact(wiring: Wiring, order: Order) -> list[str]:
    """What is left in the servers' files."""
    if not order.compact:
        return ["The servers' own files, until they are compacted: `lookup erase --compact`."]
    owner_url = wiring.settings.database_owner_url
    _tell("compact …", order)
    left = await compact_redis(wiring.redis)
    if owner_url is None:
        return [*left, "PostgreSQL's files: LOOKUP_DATABASE_OWNER_URL is not set."]
    return left + await asyncio.to_thread(compact_database, owner_url)


# --- A restored backup ------------------------------------------------------------------------------------------------


async def apply_list(wiring: Wiring, by: str) -> Sequence[Receipt]:
    """Erase again whatever the list names and this log still tells. For `lookup restore`, and for `lookup up` at its start.

    Raises what `Erasure.run` raises.
    """
    async with erasure_of(wiring) as erasure:
        await erasure.retention.lock()
        return await apply_erasures(erasure, by)


def hold_against_list(settings: Settings, *, mend: bool) -> None:
    """Before anything serves: raise `CannotRun` if this log still tells what was erased from a newer one; or erase it again."""
    listed = ErasureList(settings.erasures)
    if not settings.erasures.exists() or settings.database_url is None:
        return
    left = asyncio.run(_left_to_erase(Wiring(settings), listed))
    if not left:
        return
    if not mend or settings.database_retention_url is None:
        raise CannotRun(
            f"This log is older than {len(left)} erasures. Run `lookup erase --apply-list` before anything serves it."
        )
    receipts = asyncio.run(_applied(Wiring(settings)))
    print(f"Erased again what {len(receipts)} erasures had erased from this log.", file=sys.stderr)  # noqa: T201


async def _left_to_erase(wiring: Wiring, listed: ErasureList) -> Sequence[UUID]:
    try:
        return await not_done_here(listed, wiring.whole_log)
    except StoreUnavailable:
        return ()  # Then nothing serves it, either; a part that comes up later meets a log that others were held against.
    finally:
        await wiring.aclose()


async def _applied(wiring: Wiring) -> Sequence[Receipt]:
    try:
        return await apply_list(wiring, user_name())
    except (psycopg.Error, RedisError, StoreUnavailable, OutcomeUnknown, BusUnavailable, SomebodyElseSeals, NotYet) as error:
        raise CannotRun("What was erased could not be erased again. Run `lookup erase --apply-list`.") from error
    finally:
        await wiring.aclose()


# --- Telling ----------------------------------------------------------------------------------------------------------


def receipt_as_json(receipt: Receipt, left: Sequence[str]) -> dict[str, Any]:
    """What a receipt says, for programs. `target_sha256` is SHA-256(salt || canonical target), hex of UTF-8 text."""
    return {
        "erasure_id": str(receipt.erasure_id),
        "target_sha256": receipt.target_sha256,
        "salt": receipt.salt,
        "by": receipt.by,
        "reason": receipt.reason,
        "started_at": receipt.started_at.isoformat(),
        "erased_at": receipt.erased_at.isoformat(),
        "counts": dict(receipt.counts),
        "jobs": [str(job_id) for job_id in receipt.told],
        "jobs_not_named": receipt.jobs_cut,
        "sent_to_subscribers": {
            "exchange": EVENTS_EXCHANGE,
            "facts": receipt.counts["told_facts"],
            "positions": {str(job_id): list(positions) for job_id, positions in receipt.told.items() if positions},
        },
        "beyond_reach": [*BEYOND_REACH, *left],
    }


def _hand_over(receipts: Sequence[Receipt], left: Sequence[str], order: Order) -> None:
    told = [receipt_as_json(receipt, left) for receipt in receipts]
    if order.receipt is not None:
        order.receipt.write_text(json.dumps(told, indent=2) + "\n")
    if order.as_json:
        print(json.dumps(told, indent=2))  # noqa: T201 - a command prints
    elif not told:
        print("\n".join(["Nothing was under way.", *left]))  # noqa: T201
    else:
        print("\n\n".join(map(_readable, told)))  # noqa: T201


def _readable(receipt: dict[str, Any]) -> str:
    counts = receipt["counts"]
    sent = [position for positions in receipt["sent_to_subscribers"]["positions"].values() for position in positions]
    shown = ", ".join(map(str, sent[:POSITIONS_PRINTED_MAX])) + (", …" if len(sent) > POSITIONS_PRINTED_MAX else "")
    lines = [
        f"Erasure {receipt['erasure_id']}, by {receipt['by']}: {receipt['reason']}",
        f"From {receipt['started_at']} to {receipt['erased_at']}",
        f"Target: SHA-256 {receipt['target_sha256']} with salt {receipt['salt'] or '(unknown here)'}",
        "",
        f"  {counts['jobs']:>7} jobs",
        f"  {counts['facts']:>7} facts that told of it",
        f"  {counts['documents']:>7} result documents and raw answers",
        f"  {counts['views']:>7} views",
        f"  {counts['letters']:>7} dead letters",
        f"  {counts['messages']:>7} messages on the bus",
        f"  {counts['segments']:>7} segment files written anew",
        "",
        f"Sent to subscribers of {EVENTS_EXCHANGE}: {counts['told_facts']} facts" + (f", at positions {shown}" if sent else ""),
        "",
        "Beyond our reach:",
        *(f"- {sentence}" for sentence in receipt["beyond_reach"]),
    ]
    return "\n".join(lines)


def _tell(sentence: str, order: Order) -> None:
    if not order.as_json:
        print(sentence, file=sys.stderr)  # noqa: T201 - for the person who waits


def _say(sentence: str, code: int) -> int:
    print(f"lookup: {sentence}", file=sys.stderr)  # noqa: T201 - for the person who typed the command
    return code
