"""The in-memory twins of the event store and the bus. They ship with the product and pass the same contract suites."""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast
from uuid import UUID

from events.bus import DEAD_LETTERS, DELIVERY_LIMIT, Delivery, Queue
from events.dead_letters import Reason, letter_headers
from events.record import StoredFact
from events.store import AppendUnit, Scribe, StreamHead, VersionConflict, heads_of


class MemoryStore:
    """An `EventStore` for tests and simulations. Nothing outlives the process."""

    def __init__(self, scribe: Scribe, log_id: UUID) -> None:
        self._scribe = scribe
        self._log_id = log_id
        self._log: list[StoredFact] = []
        self._streams: dict[UUID, list[StoredFact]] = {}
        self._listeners: list[asyncio.Event] = []

    def listen(self, listener: asyncio.Event) -> None:
        """Each append sets this event from now on, as the database's NOTIFY wakes who listens."""
        self._listeners.append(listener)

    def unlisten(self, listener: asyncio.Event) -> None:
        if listener in self._listeners:
            self._listeners.remove(listener)

    async def append(self, unit: AppendUnit) -> Sequence[StreamHead]:
        for new in unit.streams:
            if len(self._streams.get(new.stream_id, [])) != new.head.version:
                raise VersionConflict
        rows = self._scribe.write(unit)
        first = len(self._log) + 1
        written = [row for stream in rows for row in stream]
        for position, row in enumerate(written, start=first):
            stored = row.at(position)
            self._log.append(stored)
            self._streams.setdefault(row.stream_id, []).append(stored)
        for listener in self._listeners:
            listener.set()
        return heads_of(rows, range(first, first + len(written)))

    async def read(self, stream_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[StoredFact]]:
        return {stream_id: tuple(self._streams[stream_id]) for stream_id in stream_ids if stream_id in self._streams}

    async def read_behind(self, stream_id: UUID, version: int) -> Sequence[StoredFact]:
        return self._streams.get(stream_id, [])[version:]

    async def read_all(self, after: int, limit: int) -> Sequence[StoredFact]:
        return self._log[after : after + limit]

    async def head(self) -> int:
        return len(self._log)

    async def open_streams(
        self, opening: Sequence[str], closing: Sequence[str], after: UUID | None, limit: int
    ) -> Sequence[UUID]:
        open_ids = sorted(
            stream_id
            for stream_id, stream in self._streams.items()
            if stream[0].topic in opening and not any(stored.topic in closing for stored in stream)
        )
        return [stream_id for stream_id in open_ids if after is None or stream_id > after][:limit]

    async def stream_ids(self, after: UUID | None, limit: int) -> Sequence[UUID]:
        return sorted(stream_id for stream_id in self._streams if after is None or stream_id > after)[:limit]

    async def log_id(self) -> UUID:
        return self._log_id


class MemoryBus:
    """A `Bus` inside one process: at least once, at most `in_hand_max` deliveries per inbox in hand.

    Nothing is ever awaited while something is half done, so that a reader may vanish at any of its awaits.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[Message]] = {}
        self._inboxes: list[MemoryInbox] = []
        self.losses = 0
        """How often it lost something."""
        self._read_losses = 0
        self._mark: tuple[int, str | None] = (0, None)
        self._published = 0

    async def start(self) -> None:
        """Nothing to connect."""

    async def stop(self) -> None:
        """Nothing to close."""

    async def publish(self, queue: Queue, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.put(queue.name, Message(body, headers or {}))

    async def publish_each(self, bodies: Mapping[Queue, bytes]) -> None:
        for queue, body in bodies.items():
            await self.publish(queue, body)

    def subscribe(self, queue: Queue, *, in_hand_max: int) -> "MemoryInbox":
        inbox = MemoryInbox(self, queue.name, in_hand_max)
        self._inboxes.append(inbox)
        return inbox

    async def read_epoch(self) -> str | None:
        self._read_losses = self.losses
        return self.epoch()

    async def write_epoch(self, epoch: str) -> None:
        self.mark(epoch, self._read_losses)

    # --- The broker's side --------------------------------------------------------------------------------------------

    def put(self, queue_name: str, message: "Message", *, first: bool = False) -> None:
        if not message.message_id:
            self._published += 1
            message = replace(message, message_id=str(self._published))
        waiting = self.waiting(queue_name)
        (waiting.appendleft if first else waiting.append)(message)
        self.tell(queue_name)

    def put_back(self, queue_name: str, delivery: Delivery) -> None:
        """At its old place, unless it was handed out too often."""
        if delivery.delivery_count < DELIVERY_LIMIT or queue_name == DEAD_LETTERS.name:
            message = Message(delivery.body, delivery.headers, delivery.delivery_count, delivery.message_id)
            self.put(queue_name, message, first=True)
        else:
            headers = letter_headers(queue_name, delivery, Reason.DELIVERED_TOO_OFTEN)
            self.put(DEAD_LETTERS.name, Message(delivery.body, headers))

    def waiting(self, queue_name: str) -> "deque[Message]":
        return self._queues.setdefault(queue_name, deque())

    def tell(self, queue_name: str) -> None:
        """Wake the readers of a queue."""
        for inbox in self._inboxes:
            if inbox.queue_name == queue_name:
                inbox.news.set()

    def leave(self, inbox: "MemoryInbox") -> None:
        if inbox in self._inboxes:
            self._inboxes.remove(inbox)

    def epoch(self) -> str | None:
        """None when something was lost since it was written, or rather since it was read before that."""
        losses, epoch = self._mark
        return epoch if losses == self.losses else None

    def mark(self, epoch: str, losses: int) -> None:
        self._mark = losses, epoch

    def lose(self, queue: Queue) -> None:
        """What the deletion of a queue does, or the loss of a disk."""
        self.losses += 1
        self.waiting(queue.name).clear()
        for inbox in self._inboxes:
            if inbox.queue_name == queue.name:
                inbox.forget()


@dataclass(frozen=True, slots=True)
class Message:
    """A message that waits in a queue, and how often it was handed out before."""

    body: bytes
    headers: Mapping[str, str]
    deliveries: int = 0
    message_id: str = ""


class MemoryInbox:
    """One reader of a queue. What it took and did not acknowledge comes back with `give_back`."""

    def __init__(self, bus: MemoryBus, queue_name: str, in_hand_max: int) -> None:
        self.queue_name = queue_name
        self.news = asyncio.Event()
        self._bus = bus
        self._in_hand_max = in_hand_max
        self._in_hand: dict[int, Delivery] = {}
        self._taken = 0
        self._closed = False

    async def take(self, limit: int) -> list[Delivery]:
        while not (taken := self.take_now(limit)):
            self.news.clear()
            await self.news.wait()
        return taken

    def take_now(self, limit: int) -> list[Delivery]:
        """What is there and may be in hand, at most `limit`; nothing if there is nothing."""
        waiting = self._bus.waiting(self.queue_name)
        taken: list[Delivery] = []
        while not self._closed and waiting and len(taken) < limit and len(self._in_hand) < self._in_hand_max:
            message = waiting.popleft()
            self._taken += 1
            delivery = Delivery(message.body, message.headers, message.deliveries + 1, self._taken, message.message_id)
            self._in_hand[self._taken] = delivery
            taken.append(delivery)
        return taken

    def waiting(self) -> list[Delivery]:
        return []

    async def close(self) -> None:
        self._closed = True

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        self.ack_now(deliveries)

    async def drain(self) -> None:
        """Nothing is ever on its way."""

    def ack_now(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self._in_hand.pop(cast("int", delivery.token), None)
        self.news.set()

    async def give_back(self) -> None:
        """What a crash of this reader does: everything in hand is delivered again."""
        self.give_back_now(self.in_hand())

    def give_back_now(self, deliveries: Sequence[Delivery]) -> None:
        """Those of them that are still in hand are delivered again."""
        for delivery in reversed(deliveries):
            if self._in_hand.pop(cast("int", delivery.token), None) is not None:
                self._bus.put_back(self.queue_name, delivery)
        self.news.set()

    def in_hand(self) -> Sequence[Delivery]:
        return tuple(self._in_hand.values())

    def forget(self) -> None:
        self._in_hand.clear()
        self.news.set()
