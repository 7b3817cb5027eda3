"""The bus: every queue name of the program, and what its parts may expect of a transport.

Promises, held by `tests/contract/test_bus.py` for RabbitMQ, Redis streams and the in-memory twin alike:

- **Confirmed.** `publish` returns when the message is stored in a queue that exists, else it raises `BusUnavailable`.
- **At least once.** A delivery that was not acknowledged comes again, with a higher `delivery_count`.
- **From the start.** What was published before any consumer existed is delivered.
- **Bounded.** At most `in_hand_max` deliveries of an inbox are in hand.
- **Not for ever.** What was handed out `DELIVERY_LIMIT` times and never acknowledged goes to the dead letters instead.

Order is promised by nobody: readers go by position, version and attempt.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from events.facts import Priority, Service


@dataclass(frozen=True, slots=True)
class Queue:
    """A named place where messages wait. `exchange` is set where copies of published facts arrive."""

    name: str
    exchange: str | None = None


EVENTS_EXCHANGE = "lookup.events"
DELIVERY_LIMIT = 20
"""The last net: readers give up earlier on what they can tell to be at fault (`workers/runner.py`)."""

COMMANDS: Mapping[tuple[Service, Priority], Queue] = {
    (service, priority): Queue(f"lookup.commands.{service.value}.{priority.value}")
    for service in Service
    for priority in Priority
}
OUTCOMES = Queue("lookup.outcomes")
FACTS = Queue("lookup.events.projector", exchange=EVENTS_EXCHANGE)
DEAD_LETTERS = Queue("lookup.dead-letters")

ALL_QUEUES: tuple[Queue, ...] = (*COMMANDS.values(), OUTCOMES, FACTS, DEAD_LETTERS)


class BusUnavailable(Exception):  # noqa: N818 - a state, in the field's words
    """The broker did not confirm. The message may or may not be there: publish it again."""


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """One message as it was handed out. `delivery_count` is 1 the first time; `token` is the transport's own.

    `message_id` is the same each time that the message is handed out, and no other message of its queue has it.
    """

    body: bytes
    headers: Mapping[str, str]
    delivery_count: int
    token: object = field(repr=False)
    message_id: str = ""


class Inbox(Protocol):
    """One reader's end of a queue."""

    async def take(self, limit: int) -> list[Delivery]:
        """Wait for at least one delivery, then give what is there, at most `limit`."""

    def waiting(self) -> list[Delivery]:
        """What has been handed to us and not been taken yet; taken by this call."""

    async def close(self) -> None:
        """Take nothing more in. When this returns, all that was handed to us has been taken or is in `waiting`.

        Who gives something back closes first: what is published again would else come straight back to its publisher.
        """

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        """These are done with. Losing an acknowledgement means a second delivery, never a lost one."""

    async def drain(self) -> None:
        """Wait until what was acknowledged has reached the broker, or could not."""


class Arrivals:
    """What a transport has handed to a reader and nobody has taken yet: the half of an inbox that all transports share."""

    def __init__(self) -> None:
        self._arrived: asyncio.Queue[Delivery] = asyncio.Queue()

    async def take(self, limit: int) -> list[Delivery]:
        taken = [await self._arrived.get()]
        while len(taken) < limit and not self._arrived.empty():
            taken.append(self._arrived.get_nowait())
        return taken

    def waiting(self) -> list[Delivery]:
        waiting: list[Delivery] = []
        while not self._arrived.empty():
            waiting.append(self._arrived.get_nowait())
        return waiting


class Bus(Protocol):
    """A transport. `subscribe` before `start`; nothing is read earlier."""

    async def start(self) -> None: ...

    async def stop(self) -> None:
        """Stop reading and close. What is in hand and not acknowledged is delivered again, to somebody."""

    async def publish(self, queue: Queue, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Store one message; returns when the broker has confirmed it. Raises `BusUnavailable`."""

    async def publish_each(self, bodies: Mapping[Queue, bytes]) -> None:
        """Store in each of these queues a message of its own; returns when the broker has confirmed all of them.

        Raises `BusUnavailable`: any of the queues may have its message or not. Of several queues, one that is missing may go
        unnoticed; the next `read_epoch` tells.
        """

    def subscribe(self, queue: Queue, *, in_hand_max: int) -> Inbox: ...

    async def read_epoch(self) -> str | None:
        """The marker that the relay left in the broker; None when it has lost that or a queue, and with it who knows what.

        Queues that are missing are made again. What is lost between this call and `write_epoch` is told by the next one.
        """

    async def write_epoch(self, epoch: str) -> None: ...
