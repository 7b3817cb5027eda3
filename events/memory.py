"""The in-memory twins of the event store and the bus. They ship with the product and pass the same contract suites."""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from typing import cast
from uuid import UUID

from events.bus import Delivery, Queue
from events.record import StoredFact
from events.store import AppendUnit, Scribe, StreamHead, VersionConflict, heads_of


class MemoryStore:
    """An `EventStore` for tests and simulations. Nothing outlives the process."""

    def __init__(self, scribe: Scribe, log_id: UUID) -> None:
        self._scribe = scribe
        self._log_id = log_id
        self._log: list[StoredFact] = []
        self._streams: dict[UUID, list[StoredFact]] = {}

    async def append(self, unit: AppendUnit) -> Sequence[StreamHead]:
        for new in unit.streams:
            if len(self._streams.get(new.stream_id, [])) != new.head.version:
                raise VersionConflict
        rows = self._scribe.write(unit)
        first = len(self._log) + 1
        written = [row for stream in rows for row in stream]
        for position, row in enumerate(written, start=first):
            stored = StoredFact(position, row.stream_id, row.stream_version, row.topic, row.state)
            self._log.append(stored)
            self._streams.setdefault(row.stream_id, []).append(stored)
        return heads_of(rows, range(first, first + len(written)))

    async def read(self, stream_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[StoredFact]]:
        return {stream_id: tuple(self._streams[stream_id]) for stream_id in stream_ids if stream_id in self._streams}

    async def read_all(self, after: int, limit: int) -> Sequence[StoredFact]:
        return self._log[after : after + limit]

    async def head(self) -> int:
        return len(self._log)

    async def open_streams(self, opening: str, closing: Sequence[str], after: UUID | None, limit: int) -> Sequence[UUID]:
        open_ids = sorted(
            stream_id
            for stream_id, stream in self._streams.items()
            if stream[0].topic == opening and not any(stored.topic in closing for stored in stream)
        )
        return [stream_id for stream_id in open_ids if after is None or stream_id > after][:limit]

    async def log_id(self) -> UUID:
        return self._log_id


class MemoryBus:
    """A `Bus` inside one process: at least once, at most `in_hand_max` deliveries per inbox in hand."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[tuple[bytes, Mapping[str, str], int]]] = {}
        self._arrived = asyncio.Condition()
        self._epoch: str | None = None

    async def start(self) -> None:
        """Nothing to connect."""

    async def stop(self) -> None:
        """Nothing to close."""

    async def publish(self, queue: Queue, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        async with self._arrived:
            self._queues.setdefault(queue.name, deque()).append((body, headers or {}, 0))
            self._arrived.notify_all()

    def subscribe(self, queue: Queue, *, in_hand_max: int) -> "MemoryInbox":
        return MemoryInbox(self._queues.setdefault(queue.name, deque()), self._arrived, in_hand_max)

    async def read_epoch(self) -> str | None:
        return self._epoch

    async def write_epoch(self, epoch: str) -> None:
        self._epoch = epoch


class MemoryInbox:
    """One reader of a queue. What it took and did not acknowledge comes back with `give_back`."""

    def __init__(
        self, waiting: deque[tuple[bytes, Mapping[str, str], int]], arrived: asyncio.Condition, in_hand_max: int
    ) -> None:
        self._waiting = waiting
        self._arrived = arrived
        self._in_hand_max = in_hand_max
        self._in_hand: dict[int, Delivery] = {}
        self._taken = 0

    async def take(self, limit: int) -> list[Delivery]:
        async with self._arrived:
            await self._arrived.wait_for(lambda: self._waiting and len(self._in_hand) < self._in_hand_max)
            taken: list[Delivery] = []
            while self._waiting and len(taken) < limit and len(self._in_hand) < self._in_hand_max:
                body, headers, earlier = self._waiting.popleft()
                self._taken += 1
                delivery = Delivery(body, headers, earlier + 1, self._taken)
                self._in_hand[self._taken] = delivery
                taken.append(delivery)
            return taken

    def waiting(self) -> list[Delivery]:
        return []

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        async with self._arrived:
            for delivery in deliveries:
                self._in_hand.pop(cast("int", delivery.token), None)
            self._arrived.notify_all()

    async def give_back(self) -> None:
        """What a crash of this reader does: everything in hand is delivered again."""
        async with self._arrived:
            for delivery in reversed(self._in_hand.values()):
                self._waiting.appendleft((delivery.body, delivery.headers, delivery.delivery_count))
            self._in_hand.clear()
            self._arrived.notify_all()
