"""The bus on Redis streams and consumer groups, through FastStream: the embedded default, and a deployment without RabbitMQ.

What Redis streams force on us: a group must exist before the first message (created at id 0, else what was published earlier
is never delivered) and again after a FLUSHALL; an entry that a dead reader took is only handed out again to somebody who
claims it; an acknowledged entry stays in memory until it is deleted.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self, cast
from uuid import uuid4

from faststream import AckPolicy
from faststream.message import StreamMessage
from faststream.redis import RedisBroker, StreamSub
from faststream.redis.parser import BinaryMessageFormatV1
from redis.exceptions import RedisError, ResponseError

from events.batching import Batcher, Overloaded, happens_within
from events.bus import ALL_QUEUES, Arrivals, BusUnavailable, Delivery, Queue

if TYPE_CHECKING:
    from redis.asyncio import Redis

PREFIX = "bus:"
GROUP = "lookup"
EPOCH_KEY = f"{PREFIX}epoch"
READ_BLOCK_MS = 2_000
CLAIM_INTERVAL_MS = 3_000
WATCH_INTERVAL_S = 1.0
PIPELINE_MAX = 100
STOP_S = 5.0
_BODY_FIELD = b"__data__"


class RedisBus:
    """A `Bus` on one Redis or Valkey. `claim_idle_s` must be above the longest attempt: below it, live work comes twice."""

    def __init__(self, redis_url: str, *, claim_idle_s: float = 120.0) -> None:
        self._broker = RedisBroker(
            redis_url,
            apply_types=False,
            logger=None,  # type: ignore[arg-type]  # FastStream's own way to be silent; its stub for Redis forgets it
            graceful_timeout=2.0,
            socket_connect_timeout=2.0,
            socket_timeout=10.0,
        )
        self._consumer = f"reader-{uuid4().hex}"
        self._claim_idle_ms = int(claim_idle_s * 1000)
        self._inboxes: list[RedisInbox] = []
        self._subscribers: list[Any] = []
        self._watcher: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._publishes: Batcher[tuple[Queue, bytes, Mapping[str, str] | None], None] = Batcher(
            self._publish_group, batch_max=PIPELINE_MAX
        )

    async def start(self) -> None:
        try:
            await self._broker.connect()
            await self._create_groups()
            await self._broker.start()
        except (RedisError, OSError, TimeoutError) as error:
            raise BusUnavailable("Redis cannot be reached.") from error
        if self._subscribers:
            self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        self._stopping.set()
        if self._watcher is not None:
            await asyncio.wait({self._watcher}, timeout=STOP_S)
        for inbox in self._inboxes:
            inbox.close()
            await inbox.drain()
        with suppress(RedisError, OSError):
            await self._leave_groups()
        await self._broker.stop()

    async def publish(self, queue: Queue, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        try:
            await self._publishes.add((queue, body, headers))
        except (RedisError, OSError, TimeoutError, Overloaded) as error:
            raise BusUnavailable("Redis did not confirm the message.") from error

    def subscribe(self, queue: Queue, *, in_hand_max: int) -> "RedisInbox":
        """A reader for new entries and a claimer for those that a dead reader left behind, into one inbox."""
        inbox = RedisInbox(self._broker, queue, in_hand_max)
        key = PREFIX + queue.name
        reader = _Stream(
            key, group=GROUP, consumer=self._consumer, batch=True, max_records=in_hand_max, polling_interval=READ_BLOCK_MS
        )
        claimer = _Stream(
            key,
            group=GROUP,
            consumer=self._consumer,
            min_idle_time=self._claim_idle_ms,
            polling_interval=CLAIM_INTERVAL_MS,
        )
        for stream, handler in ((reader, inbox.receive), (claimer, inbox.receive_claimed)):
            subscriber = self._broker.subscriber(stream=stream, parser=_as_it_came, decoder=_raw, ack_policy=AckPolicy.MANUAL)
            subscriber(handler)
            self._subscribers.append(subscriber)
        self._inboxes.append(inbox)
        return inbox

    async def read_epoch(self) -> str | None:
        try:
            epoch = await self._redis.get(EPOCH_KEY)
        except (RedisError, OSError, TimeoutError) as error:
            raise BusUnavailable("Redis cannot be reached.") from error
        return epoch.decode() if isinstance(epoch, bytes) else epoch

    async def write_epoch(self, epoch: str) -> None:
        try:
            await self._redis.set(EPOCH_KEY, epoch)
        except (RedisError, OSError, TimeoutError) as error:
            raise BusUnavailable("Redis cannot be reached.") from error

    @property
    def _redis(self) -> "Redis":
        return _client(self._broker)

    async def _publish_group(self, items: Sequence[tuple[Queue, bytes, Mapping[str, str] | None]]) -> Sequence[None]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for queue, body, headers in items:
                await self._broker.publish(body, stream=PREFIX + queue.name, headers=dict(headers or {}), pipeline=pipe)
            await pipe.execute()
        return [None] * len(items)

    async def _create_groups(self) -> None:
        """At id 0, not at the end: what was published before any reader existed must be delivered."""
        for queue in ALL_QUEUES:
            with suppress(ResponseError):  # It exists already.
                await self._redis.xgroup_create(PREFIX + queue.name, GROUP, id="0", mkstream=True)

    async def _watch(self) -> None:
        """After a FLUSHALL the groups are gone and FastStream stops reading for good: make them again, read on.

        Ended by a flag, not by a cancellation, which the calls below may take for a timeout of their own.
        """
        while not await happens_within(self._stopping, WATCH_INTERVAL_S):
            with suppress(RedisError, OSError, TimeoutError):
                if all(subscriber.running for subscriber in self._subscribers):
                    continue
                await self._create_groups()
                for subscriber in self._subscribers:
                    if not subscriber.running:
                        await subscriber.start()

    async def _leave_groups(self) -> None:
        """Take our reader's name out of the groups, unless entries still hang on it: then a claimer needs it."""
        for inbox in self._inboxes:
            key = PREFIX + inbox.queue.name
            pending = await self._redis.xpending_range(key, GROUP, "-", "+", 1, consumername=self._consumer)
            if not pending:
                await self._redis.xgroup_delconsumer(key, GROUP, self._consumer)


class _Stream(StreamSub[Any]):
    """FastStream asks for the stream under its prefix at every read, and copies it deeply each time. We have no prefix."""

    def add_prefix(self, prefix: str) -> Self:
        return super().add_prefix(prefix) if prefix else self


class RedisInbox(Arrivals):
    """An `Inbox` on one stream."""

    def __init__(self, broker: RedisBroker, queue: Queue, in_hand_max: int) -> None:
        super().__init__()
        self.queue = queue
        self._broker = broker
        self._room = asyncio.Semaphore(in_hand_max)
        self._closed = asyncio.Event()
        self._acks: Batcher[Sequence[bytes], None] = Batcher(self._ack_group, batch_max=100)

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        entry_ids = [cast("bytes", delivery.token) for delivery in deliveries]
        for _ in entry_ids:
            self._room.release()
        # Nobody waits for it: one that is lost means a second delivery, which is promised.
        with suppress(Overloaded):
            self._acks.add_and_go_on(entry_ids)

    async def drain(self) -> None:
        """Wait until what was acknowledged is so in Redis, or could not be."""
        await self._acks.drain()

    def close(self) -> None:
        """Let go of the reader that waits for room: nothing more is taken in."""
        self._closed.set()

    async def receive(self, message: Mapping[str, Any]) -> None:
        """A batch of new entries, as FastStream read them."""
        for entry_id, fields in zip(message["message_ids"], message["data"], strict=True):
            await self._put(entry_id, fields, delivery_count=1)

    async def receive_claimed(self, message: Mapping[str, Any]) -> None:
        """One entry that somebody took long ago and never acknowledged."""
        (entry_id,) = message["message_ids"]
        client = _client(self._broker)
        pending = await client.xpending_range(PREFIX + self.queue.name, GROUP, entry_id, entry_id, 1)
        if pending:
            await self._put(entry_id, message["data"], delivery_count=int(pending[0]["times_delivered"]))

    async def _put(self, entry_id: bytes, fields: Mapping[bytes, bytes], *, delivery_count: int) -> None:
        if not await self._has_room():
            return
        body, headers = BinaryMessageFormatV1.parse(fields[_BODY_FIELD])
        self._arrived.put_nowait(Delivery(body, headers, delivery_count, entry_id))

    async def _has_room(self) -> bool:
        """Wait until one more may be in hand; False when the inbox was closed instead."""
        if not self._room.locked():
            return await self._room.acquire()
        room, closed = asyncio.ensure_future(self._room.acquire()), asyncio.ensure_future(self._closed.wait())
        await asyncio.wait({room, closed}, return_when=asyncio.FIRST_COMPLETED)
        closed.cancel()
        room.cancel()
        return room.done() and not room.cancelled()

    async def _ack_group(self, groups: Sequence[Sequence[bytes]]) -> Sequence[None]:
        entry_ids = [entry_id for group in groups for entry_id in group]
        client = _client(self._broker)
        key = PREFIX + self.queue.name
        async with client.pipeline(transaction=False) as pipe:
            pipe.xack(key, GROUP, *entry_ids)
            pipe.xdel(key, *entry_ids)
            await pipe.execute()
        return [None] * len(groups)


def _client(broker: RedisBroker) -> "Redis":
    return cast("Redis", broker.config.broker_config.connection.client)


async def _as_it_came(message: Any) -> StreamMessage[Any]:
    """Skips FastStream's parse of a batch into one JSON array: the items are parsed once, by whom they are for."""
    return StreamMessage(raw_message=message, body=b"")


async def _raw(message: StreamMessage[Any]) -> Any:
    return message.raw_message
