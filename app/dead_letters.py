"""What `lookup dead-letters` does: reads the table, has decisions carried out, and prints both for people or scripts."""

import asyncio
import base64
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import psycopg
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.logs import set_up_logs
from app.rendering import safe
from app.running import settings_of_running, user_name
from app.settings import Settings
from app.wiring import Wiring, new_id, utc_now
from events.bus import Bus, BusUnavailable
from events.dead_letters import SENTENCES, Reason
from events.memory import MemoryBus
from events.store import OutcomeUnknown, StoreUnavailable
from write_side.dead_letters import DeadLetters, Letter, LetterCount, LetterHead, LetterState, open_letters
from write_side.redelivery import Judgement, Redelivery, Tally

STATES = tuple(LetterState)
BODY_CHARS_MAX = 65_536
UNREACHABLE = 3

Done = TypeVar("Done")


@dataclass(frozen=True, slots=True)
class Choice:
    """Which letters (None = all that wait), and how."""

    letter_ids: Sequence[int] | None
    dry_run: bool = False
    rate: float | None = None


class NotNow(Exception):  # noqa: N818 - a state, in our words
    """The command cannot do its work; the message says why. `code` is its exit code."""

    def __init__(self, sentence: str, code: int = UNREACHABLE) -> None:
        super().__init__(sentence)
        self.code = code


# --- The commands ---------------------------------------------------------------------------------------------------------


def list_letters(data_dir: Path | None, state: str, *, limit: int, after: int, as_json: bool) -> int:
    async def work(wiring: Wiring) -> int:
        async with _table(wiring) as table:
            counts, oldest = await table.counts(), await table.oldest_waiting()
            letters = await table.list(LetterState(state), after=after, limit=limit)
        if as_json:
            _print_json(
                {
                    "waiting": _number_of(counts, LetterState.WAITING),
                    "oldest_waiting": oldest,
                    "counts": [asdict(count) for count in counts],
                    "letters": [_head_as_json(letter) for letter in letters],
                }
            )
        else:
            _print_list(counts, oldest, letters, Console())
        return 0

    return _run(data_dir, work)


def show_letter(data_dir: Path | None, letter_id: int, *, as_json: bool) -> int:
    async def work(wiring: Wiring) -> int:
        async with _table(wiring) as table:
            letter = (await _chosen(table, [letter_id]))[0]
        if as_json:
            body = letter.body.decode(errors="replace")
            whole = {"headers": dict(letter.headers), "body": body, "body_base64": base64.b64encode(letter.body).decode()}
            _print_json(_head_as_json(letter) | whole)
        else:
            _print_letter(letter, Console())
        return 0

    return _run(data_dir, work)


def retry_letters(data_dir: Path | None, choice: Choice, *, reason: str | None, actor: str | None, as_json: bool) -> int:
    judgement = Judgement(actor or user_name(), reason)

    async def retry(redelivery: Redelivery, letters: Sequence[Letter] | None) -> None:
        await redelivery.retry(letters, judgement, rate=choice.rate, dry_run=choice.dry_run)

    return _decide(data_dir, choice, retry, "retried", as_json=as_json)


def discard_letters(data_dir: Path | None, choice: Choice, *, reason: str, actor: str | None, as_json: bool) -> int:
    judgement = Judgement(actor or user_name(), reason)

    async def discard(redelivery: Redelivery, letters: Sequence[Letter] | None) -> None:
        await redelivery.discard(letters, judgement, dry_run=choice.dry_run)

    return _decide(data_dir, choice, discard, "discarded", as_json=as_json)


def _decide(
    data_dir: Path | None,
    choice: Choice,
    decide: Callable[[Redelivery, Sequence[Letter] | None], Awaitable[None]],
    done: str,
    *,
    as_json: bool,
) -> int:
    async def work(wiring: Wiring) -> int:
        async with _table(wiring) as table, _bus(wiring, needed=done == "retried" and not choice.dry_run) as bus:
            if not choice.dry_run and not await table.become_decider():
                raise NotNow("Somebody else decides about dead letters right now. Try again when that is done.", 1)
            letters = None if choice.letter_ids is None else await _chosen(table, choice.letter_ids)
            redelivery = Redelivery(table, wiring.store, bus, utc_now, new_id)
            try:
                await decide(redelivery, letters)
            finally:
                _print_tally(redelivery.tally, done, dry_run=choice.dry_run, as_json=as_json)
        return 1 if choice.letter_ids is not None and redelivery.tally.left else 0

    return _run(data_dir, work)


# --- Connections ----------------------------------------------------------------------------------------------------------


def _run(data_dir: Path | None, work: Callable[[Wiring], Awaitable[int]]) -> int:
    settings = Settings() if data_dir is None else Settings(data_dir=data_dir)
    set_up_logs(settings.log_format, settings.log_level)

    async def run() -> int:
        wiring = Wiring(settings_of_running(settings))
        try:
            return await work(wiring)
        finally:
            await wiring.aclose()

    try:
        return asyncio.run(run())
    except NotNow as not_now:
        print(f"lookup: {not_now}", file=sys.stderr)  # noqa: T201 - for the person who typed the command
        return not_now.code


@asynccontextmanager
async def _table(wiring: Wiring) -> AsyncIterator[DeadLetters]:
    url = wiring.settings.database_url
    if url is None:
        raise NotNow("nothing runs here, and LOOKUP_DATABASE_URL is not set.")
    try:
        async with open_letters(url) as table:
            yield table
    except (psycopg.Error, StoreUnavailable) as error:
        raise NotNow("The database cannot be reached, or `lookup migrate` has not been run.") from error
    except OutcomeUnknown as error:
        raise NotNow("The database broke off: some of this may or may not be recorded. Type it again to find out.") from error


@asynccontextmanager
async def _bus(wiring: Wiring, *, needed: bool) -> AsyncIterator[Bus]:
    """The transport, or where nothing is published a stand-in for it that needs no server."""
    if not needed:
        yield MemoryBus()
        return
    if wiring.settings.broker_url is None and wiring.settings.redis_url is None:
        raise NotNow("nothing runs here, and neither LOOKUP_BROKER_URL nor LOOKUP_REDIS_URL is set.")
    bus = wiring.bus()
    try:
        await bus.start()
        yield bus
    except BusUnavailable as error:
        raise NotNow("The broker cannot be reached. What was not retried still waits.") from error
    finally:
        await bus.stop()


async def _chosen(table: DeadLetters, letter_ids: Sequence[int]) -> list[Letter]:
    found = [(letter_id, await table.read(letter_id)) for letter_id in dict.fromkeys(letter_ids)]
    missing = [str(letter_id) for letter_id, letter in found if letter is None]
    if missing:
        raise NotNow(f"There is no dead letter {', '.join(missing)}.", 1)
    return sorted((letter for _, letter in found if letter is not None), key=lambda letter: (letter.died_at, letter.id))


# --- Printing -------------------------------------------------------------------------------------------------------------


def _print_list(
    counts: Sequence[LetterCount], oldest: datetime | None, letters: Sequence[LetterHead], console: Console
) -> None:
    if not counts:
        console.print("There are no dead letters.")
        return
    numbers = Table("state", "reason", "queue", "letters", box=None, pad_edge=False)
    for count in counts:
        numbers.add_row(count.state, count.reason, count.queue, str(count.count))
    console.print(numbers)
    console.print(f"\n{_number_of(counts, LetterState.WAITING)} wait" + (f", the oldest since {oldest}" if oldest else ""))
    if not letters:
        return
    listed = Table("id", "died", "queue", "reason", "job", "service", "bytes", "decided by", "why", box=None, pad_edge=False)
    for letter in letters:
        when = f"{letter.died_at:%Y-%m-%d %H:%M:%S}"
        job = str(letter.job_id or "")
        listed.add_row(
            *(str(letter.id), when, letter.queue, letter.reason, job, letter.service or "", str(letter.body_bytes)),
            *(Text(safe(said)) for said in (letter.decided_by or "", letter.why or "")),
        )
    console.print()
    console.print(listed)


def _print_letter(letter: Letter, console: Console) -> None:
    fields = _head_as_json(letter) | {"reason": f"{letter.reason}: {SENTENCES[_reason(letter.reason)]}"}
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in (fields | dict(letter.headers)).items():
        if value is not None:
            table.add_row(Text(safe(name), style="dim"), Text(safe(str(value))))
    console.print(table)
    console.print()
    for line in letter.body.decode(errors="replace").split("\n"):
        console.print(Text(safe(line, BODY_CHARS_MAX)), soft_wrap=True)


def _print_tally(tally: Tally, done: str, *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        _print_json(
            {done: tally.done, "left_alone": {reason.name.lower(): n for reason, n in tally.left.items()}, "dry_run": dry_run}
        )
        return
    console = Console()
    console.print(f"{'Would be ' if dry_run else ''}{done}: {tally.done}")
    for reason, number in sorted(tally.left.items()):
        console.print(f"left alone: {number} ({reason.value})")


def _reason(code: str) -> Reason:
    return Reason(code) if code in set(Reason) else Reason.UNKNOWN


def _number_of(counts: Sequence[LetterCount], state: LetterState) -> int:
    return sum(count.count for count in counts if count.state == state)


def _head_as_json(letter: LetterHead) -> dict[str, Any]:
    names = [name for name in LetterHead.__slots__ if name != "message"]
    return {name: getattr(letter, name) for name in names}


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, default=_as_text))  # noqa: T201 - a command prints


def _as_text(value: datetime | UUID) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
