"""The drain: moves dead letters from their queue into the table, where somebody can look at them.

Promises:

- **Kept, then acknowledged.** What dies in between is drained again, and is one row (`write_side/dead_letters.py`). While the
  database is away the drain waits, with at most `IN_HAND_MAX` letters in hand; the rest waits in the queue.
- **A task is told of its end.** A command that a transport gave up on has no worker left to say so: the drain says it.
- **Whatever it is, it is kept.** No letter is so odd that it stops the others.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import Any
from uuid import UUID

import orjson
import psycopg
from pydantic import ValidationError

from domain.commands import WORKER_CRASHED, Failed, LookUp, TaskOutcome, lines_of
from events import dead_letters as written
from events.bus import ALL_QUEUES, COMMANDS, DEAD_LETTERS, OUTCOMES, Bus, Delivery, Inbox
from events.dead_letters import Reason
from events.facts import Service
from write_side.dead_letters import Keep, open_letters

IN_HAND_MAX = 100
OUTCOMES_PER_MESSAGE = 100
PAUSE_S = 0.5
PAUSE_MAX_S = 5.0
INTEGER_MAX = 2**31 - 1
UNKNOWN_QUEUE = "unknown"
NAME = "drain"

_KNOWN_QUEUES = {queue.name for queue in ALL_QUEUES}
_COMMAND_QUEUES = {queue.name for queue in COMMANDS.values()}
_QUEUES_OF_LINES = _COMMAND_QUEUES | {OUTCOMES.name}
# What RabbitMQ writes on a message that it puts aside itself.
_RABBIT_REASON = "x-first-death-reason"
_RABBIT_TOO_OFTEN = "delivery_limit"

log = logging.getLogger(__name__)


@dataclass
class DrainCounters:
    """Dead letters that were not in the table before."""

    kept: int = 0


@dataclass
class Drain:
    """Keeps dead letters, until cancelled. Any number may run."""

    database_url: str
    bus: Bus
    now: Callable[[], datetime]
    counters: DrainCounters = field(default_factory=DrainCounters)

    def subscribe(self) -> Inbox:
        return self.bus.subscribe(DEAD_LETTERS, in_hand_max=IN_HAND_MAX)

    async def run(self, inbox: Inbox) -> None:
        while True:
            await self.drain(inbox, await inbox.take(IN_HAND_MAX))

    async def drain(self, inbox: Inbox, deliveries: Sequence[Delivery]) -> None:
        """Keep what is in these deliveries, then acknowledge them."""
        letters = [letter for delivery in deliveries for letter in letters_of(delivery, self.now())]
        await self._keep(letters)
        await self._end_tasks(letters)
        await inbox.ack(deliveries)

    async def _keep(self, letters: Sequence[Keep]) -> None:
        pause = PAUSE_S
        while True:
            try:
                async with open_letters(self.database_url) as table:
                    self.counters.kept += await table.keep(letters)
            except psycopg.Error:
                log.warning("The database does not take %d dead letters; they wait.", len(letters))
                await asyncio.sleep(pause)
                pause = min(2 * pause, PAUSE_MAX_S)
            else:
                return

    async def _end_tasks(self, letters: Iterable[Keep]) -> None:
        """The saga counts an end once: that a worker may have told it already does no harm."""
        ends = [end for letter in letters if (end := _end_of_task(letter, self.now())) is not None]
        for first in range(0, len(ends), OUTCOMES_PER_MESSAGE):
            await self.bus.publish(OUTCOMES, lines_of(ends[first : first + OUTCOMES_PER_MESSAGE]))


def letters_of(delivery: Delivery, now: datetime) -> list[Keep]:
    """The letters of a delivery: more than one, if a transport gave up on a whole batch."""
    headers = delivery.headers
    queue = headers.get(written.QUEUE) or headers.get(written.DIED_IN)
    name = queue if queue in _KNOWN_QUEUES else UNKNOWN_QUEUE
    first = _whole_number(headers.get(written.ITEM)) or 0
    bodies = delivery.body.split(b"\n") if name in _QUEUES_OF_LINES else [delivery.body]
    return [_letter(delivery, name, body, item, now) for item, body in enumerate(bodies, start=first)]


def _letter(delivery: Delivery, queue: str, body: bytes, item: int, now: datetime) -> Keep:
    headers = delivery.headers
    told = _told(body) if queue in _QUEUES_OF_LINES else {}
    message = headers.get(written.MESSAGE) or delivery.message_id
    return Keep(
        message=sha256(f"{queue}\n{message}\n{item}".encode(errors="replace")).hexdigest(),
        queue=queue,
        reason=_reason(headers.get(written.REASON), headers.get(_RABBIT_REASON)),
        body=body,
        headers=written.own_headers(headers),
        job_id=_uuid(told.get("job_id")),
        command_id=_uuid(told.get("command_id")),
        service=_service(told.get("service")),
        attempt=_whole_number(told.get("attempt")),
        deliveries=_whole_number(headers.get(written.DELIVERIES)),
        died_at=_time(headers.get(written.DIED_AT)) or now,
    )


def _end_of_task(letter: Keep, now: datetime) -> TaskOutcome | None:
    if letter.reason != Reason.DELIVERED_TOO_OFTEN or letter.queue not in _COMMAND_QUEUES:
        return None
    try:
        command = LookUp.model_validate_json(letter.body)
    except ValidationError:
        return None
    return TaskOutcome(
        job_id=command.job_id,
        command_id=command.command_id,
        service=command.service,
        attempt=command.attempt,
        worker=NAME,
        duration_ms=0,
        ended_at=now,
        ending=Failed(error=WORKER_CRASHED, transient=False),
    )


# --- What strangers may have written: None instead of what the table would not take ------------------------------------


def _told(body: bytes) -> dict[str, Any]:
    with suppress(orjson.JSONDecodeError):
        document = orjson.loads(body)
        if isinstance(document, dict):
            return document
    return {}


def _reason(ours: str | None, rabbits: str | None) -> Reason:
    if ours in set(Reason):
        return Reason(ours)
    return Reason.DELIVERED_TOO_OFTEN if rabbits == _RABBIT_TOO_OFTEN else Reason.UNKNOWN


def _uuid(value: object) -> UUID | None:
    with suppress(ValueError):
        return UUID(value) if isinstance(value, str) else None
    return None


def _service(value: object) -> str | None:
    return value if isinstance(value, str) and value in set(Service) else None


def _whole_number(value: object) -> int | None:
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(INTEGER_MAX))):
        return None
    return int(text) if int(text) <= INTEGER_MAX else None


def _time(value: str | None) -> datetime | None:
    with suppress(ValueError):
        at = datetime.fromisoformat(value or "")
        return at if at.tzinfo is not None else None
    return None
