"""The bus on Redis streams and consumer groups, through FastStream: the embedded default, and a deployment without RabbitMQ.

What Redis streams force on us: a group must exist before the first message (created at id 0, else what was published earlier
is never delivered) and again after a FLUSHALL; an entry that a dead reader took is only handed out again to somebody who
claims it; an acknowledged entry stays in memory until it is deleted. That a reader is dead is told by the age of what it has in
hand, so each reader that lives keeps what it has in hand young.

A server that was started again, or whose groups had to be made again, may have lost messages that it confirmed: the epoch names
the run of the server and the last making of groups.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self, cast
from uuid import uuid4

from faststream import AckPolicy
from faststream.message import StreamMessage
from faststream.redis import RedisBroker, StreamSub
from faststream.redis.parser import BinaryMessageFormatV1
from redis.exceptions import RedisError

from events.acknowledging import Acknowledgements
from events.batching import Batcher, Overloaded, happens_within
from events.bus import ALL_QUEUES, DEAD_LETTERS, DELIVERY_LIMIT, Arrivals, Bus, BusUnavailable, Delivery, Queue
from events.dead_letters import Reason, letter_headers
from events.redis_packing import pack_in_c

if TYPE_CHECKING:
    from redis.asyncio import Redis

PREFIX = "bus:"
GROUP = "lookup"
EPOCH_KEY = f"{PREFIX}epoch"
MADE_KEY = f"{PREFIX}made"
ALL_KEYS = frozenset({EPOCH_KEY, MADE_KEY, *(PREFIX + queue.name for queue in ALL_QUEUES)})
"""Every key of ours: `lookup doctor` calls any other below the prefix an orphan, and may remove it."""
READ_BLOCK_MS = 2_000
CLAIM_INTERVAL_MS = 2_000
WATCH_INTERVAL_S = 1.0
PIPELINE_MAX = 100
HANDED_OUT_MAX = 1_000
STOP_S = 5.0
_BODY_FIELD = b"__data__"
_Entries = list[tuple[bytes, Mapping[bytes, bytes]]]

_MAKE_GROUPS = """
-- KEYS: made, then the streams. ARGV: group, a fresh id. Notes the id when a group had to be made.
local made = false
for at = 2, #KEYS do
  local answer = redis.pcall('XGROUP', 'CREATE', KEYS[at], ARGV[1], '0', 'MKSTREAM')
  if not answer.err then
    made = true
  elseif not string.find(answer.err, 'BUSYGROUP') then
    return answer
  end
end
if made then redis.call('SET', KEYS[1], ARGV[2]) end
return redis.status_reply('OK')
"""

_LEAVE_GROUP = """
-- KEYS: stream. ARGV: group, consumer. Looks and leaves in one step: what hangs on a name that goes, nobody is ever given.
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2])
if #pending == 0 then redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2]) end
return #pending
"""


class RedisBus:
    """A `Bus` on one Redis or Valkey.

    A reader that has not been heard of for `claim_idle_s` is taken for dead, and what it had in hand is handed to others. Well
    above `WATCH_INTERVAL_S`, or live work comes twice.
    """

    def __init__(self, redis_url: str, *, claim_idle_s: float = 5.0, delivery_limit: int = DELIVERY_LIMIT) -> None:
        self._consumer = f"reader-{uuid4().hex}"
        self._broker = RedisBroker(
            _with_name(redis_url, self._consumer),
            apply_types=False,
            logger=None,  # type: ignore[arg-type]  # FastStream's own way to be silent; its stub for Redis forgets it
            graceful_timeout=2.0,
            socket_connect_timeout=2.0,
            socket_timeout=10.0,
        )
        self._claim_idle_ms = int(claim_idle_s * 1000)
        self._delivery_limit = delivery_limit
        self._inboxes: list[RedisInbox] = []
        self._watcher: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._stamp = ""
        self._publishes: Batcher[tuple[Queue, bytes, Mapping[str, str] | None], None] = Batcher(
            self._publish_group, batch_max=PIPELINE_MAX
        )

    async def start(self) -> None:
        try:
            await self._broker.connect()
            pack_in_c(self._redis)
            await self._create_groups()
            await self._broker.start()
        except (RedisError, OSError, TimeoutError) as error:
            raise BusUnavailable("Redis cannot be reached.") from error
        if self._inboxes:
            self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        self._stopping.set()
        if self._watcher is not None:
            await asyncio.wait({self._watcher}, timeout=STOP_S)
        for inbox in self._inboxes:
            await inbox.stop_reading()
        with suppress(RedisError, OSError, TimeoutError):
            await self._leave_groups()
        await self._broker.stop()

    async def publish(self, queue: Queue, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        try:
            await self._publishes.add((queue, body, headers))
        except (RedisError, OSError, TimeoutError, Overloaded) as error:
            raise BusUnavailable("Redis did not confirm the message.") from error

    async def publish_each(self, bodies: Mapping[Queue, bytes]) -> None:
        """They wait together, so they go in one pipeline."""
        await asyncio.gather(*(self.publish(queue, body) for queue, body in bodies.items()))

    def subscribe(self, queue: Queue, *, in_hand_max: int) -> "RedisInbox":
        """A reader for new entries and a claimer for those that a dead reader left behind, into one inbox."""
        inbox = RedisInbox(self._broker, queue, self._consumer, in_hand_max, self._give_up)
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
            inbox.subscribers.append(subscriber)
        self._inboxes.append(inbox)
        return inbox

    async def read_epoch(self) -> str | None:
        try:
            await self._create_groups()
            server = await self._redis.info("server")
            made, found = await self._redis.mget(MADE_KEY, EPOCH_KEY)
        except (RedisError, OSError, TimeoutError) as error:
            raise BusUnavailable("Redis cannot be reached.") from error
        self._stamp = f"{server['run_id']}/{_text(made)}"
        stamp, _, epoch = _text(found).partition(" ")
        return epoch if stamp == self._stamp else None

    async def write_epoch(self, epoch: str) -> None:
        """With the stamp that was read: what has been lost since then shows at the next reading."""
        try:
            await self._redis.set(EPOCH_KEY, f"{self._stamp} {epoch}")
        except (RedisError, OSError, TimeoutError) as error:
            raise BusUnavailable("Redis cannot be reached.") from error

    async def _give_up(self, queue: Queue, delivery: Delivery) -> bool:
        """Put a message aside that was handed out too often; False when it was not. RabbitMQ does this by itself."""
        if delivery.delivery_count <= self._delivery_limit or queue == DEAD_LETTERS:
            return False
        await self.publish(DEAD_LETTERS, delivery.body, letter_headers(queue.name, delivery, Reason.DELIVERED_TOO_OFTEN))
        return True

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
        keys = [MADE_KEY, *(PREFIX + queue.name for queue in ALL_QUEUES)]
        await self._redis.eval(_MAKE_GROUPS, len(keys), *keys, GROUP, uuid4().hex)

    async def _watch(self) -> None:
        """Keep what is in hand young. After a FLUSHALL the groups are gone, and FastStream stops reading for good: read on.

        Ended by a flag, not by a cancellation, which the calls below may take for a timeout of their own.
        """
        while not await happens_within(self._stopping, WATCH_INTERVAL_S):
            for inbox in self._inboxes:
                await inbox.keep_in_hand()
            with suppress(RedisError, OSError, TimeoutError):
                fallen_silent = [
                    subscriber
                    for inbox in self._inboxes
                    for subscriber in inbox.subscribers
                    if not (inbox.is_closed or subscriber.running)
                ]
                if fallen_silent:
                    await self._create_groups()
                for subscriber in fallen_silent:
                    await subscriber.start()

    async def _leave_groups(self) -> None:
        """Take our reader's name out of the groups, unless entries hang on it: then a claimer needs it."""
        for inbox in self._inboxes:
            await self._redis.eval(_LEAVE_GROUP, 1, PREFIX + inbox.queue.name, GROUP, self._consumer)


class _Stream(StreamSub[Any]):
    """FastStream asks for the stream under its prefix at every read, and copies it deeply each time. We have no prefix."""

    def add_prefix(self, prefix: str) -> Self:
        return super().add_prefix(prefix) if prefix else self


class RedisInbox(Arrivals):
    """An `Inbox` on one stream."""

    def __init__(
        self,
        broker: RedisBroker,
        queue: Queue,
        consumer: str,
        in_hand_max: int,
        give_up: Callable[[Queue, Delivery], Awaitable[bool]],
    ) -> None:
        super().__init__()
        self.queue = queue
        self.subscribers: list[Any] = []
        self._broker = broker
        self._consumer = consumer
        self._give_up = give_up
        self._seen: set[bytes] = set()
        self._handed_out: set[bytes] = set()
        self._room = asyncio.Semaphore(in_hand_max)
        self._closed = asyncio.Event()
        self._acknowledgements = Acknowledgements(self._acknowledge_in_redis)

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        tokens = [cast("bytes", delivery.token) for delivery in deliveries]
        for token in tokens:
            self._seen.discard(token)
            self._handed_out.discard(token)
            self._room.release()
        self._acknowledgements.add(tokens)

    async def drain(self) -> None:
        await self._acknowledgements.drain()

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    async def stop_reading(self) -> None:
        """Nothing more is taken in, and what was acknowledged is so in Redis, or could not be."""
        self._closed.set()
        for subscriber in self.subscribers:
            await subscriber.stop()
        with suppress(RedisError, OSError, TimeoutError):
            await self._end_waiting_reads()
        await self.drain()

    async def close(self) -> None:
        """A reader may be ended between Redis handing entries out and us hearing of them: so Redis is asked what we have."""
        await self.stop_reading()
        with suppress(RedisError, OSError, TimeoutError):
            ours = await _client(self._broker).xreadgroup(
                GROUP, self._consumer, {PREFIX + self.queue.name: "0"}, HANDED_OUT_MAX
            )
            for _, entries in cast("list[tuple[bytes, list[tuple[bytes, Mapping[bytes, bytes]]]]]", ours):
                for entry_id, fields in entries:
                    if entry_id not in self._seen and fields:
                        self._arrive(_delivery(entry_id, fields, 1))

    async def keep_in_hand(self) -> None:
        """Tell Redis that we live and still have them. That this is no delivery, JUSTID says."""
        if self._handed_out:
            with suppress(RedisError, OSError, TimeoutError):
                await _client(self._broker).xclaim(
                    PREFIX + self.queue.name, GROUP, self._consumer, 0, list(self._handed_out), justid=True
                )

    async def _end_waiting_reads(self) -> None:
        """Until Redis notices that a reader hung up, it still hands it the next entry: what we are about to give back."""
        client = _client(self._broker)
        for other in await client.client_list():
            if other["name"] == self._consumer and "b" in other["flags"]:
                await client.client_unblock(int(other["id"]))

    async def receive(self, message: Mapping[str, Any]) -> None:
        """A batch of new entries, as FastStream read them."""
        self._handed_out.update(message["message_ids"])
        for entry_id, fields in zip(message["message_ids"], message["data"], strict=True):
            await self._put(_delivery(entry_id, fields, 1))

    async def receive_claimed(self, message: Mapping[str, Any]) -> None:
        """One entry that somebody took long ago and never acknowledged."""
        (entry_id,) = message["message_ids"]
        if entry_id in self._handed_out:
            return  # Ours: we stood still for so long that we took ourselves for dead.
        client = _client(self._broker)
        pending = await client.xpending_range(PREFIX + self.queue.name, GROUP, entry_id, entry_id, 1)
        if not pending:
            return
        delivery = _delivery(entry_id, message["data"], int(pending[0]["times_delivered"]))
        if await self._give_up(self.queue, delivery):
            await self._acknowledge_in_redis([entry_id])
            return
        self._handed_out.add(entry_id)
        await self._put(delivery)

    async def _put(self, delivery: Delivery) -> None:
        if await self._has_room():
            self._arrive(delivery)

    def _arrive(self, delivery: Delivery) -> None:
        self._seen.add(cast("bytes", delivery.token))
        self._arrived.put_nowait(delivery)

    async def _has_room(self) -> bool:
        """Wait until one more may be in hand; False when the inbox was closed instead."""
        if not self._room.locked():
            return await self._room.acquire()
        room, closed = asyncio.ensure_future(self._room.acquire()), asyncio.ensure_future(self._closed.wait())
        await asyncio.wait({room, closed}, return_when=asyncio.FIRST_COMPLETED)
        closed.cancel()
        room.cancel()
        return room.done() and not room.cancelled()

    async def _acknowledge_in_redis(self, entry_ids: Sequence[bytes]) -> None:
        key = PREFIX + self.queue.name
        with suppress(RedisError, OSError, TimeoutError):
            async with _client(self._broker).pipeline(transaction=False) as pipe:
                for first in range(0, len(entry_ids), PIPELINE_MAX):
                    some = entry_ids[first : first + PIPELINE_MAX]
                    pipe.xack(key, GROUP, *some)
                    pipe.xdel(key, *some)
                await pipe.execute()


async def take_out(redis: "Redis", bus: Bus, split: Callable[[str, bytes], bytes | None]) -> int:
    """Remove messages from all queues, also those that a reader has in hand; gives how many.

    `split` says of a queue and a body what is to be left of it: None leaves the message as it is; what else is not empty is
    published again in its place, before it is removed. Raises `RedisError` or `BusUnavailable`.
    """
    removed = 0
    for queue in ALL_QUEUES:
        key, after = PREFIX + queue.name, "-"
        while entries := cast("_Entries", await redis.xrange(key, min=after, count=PIPELINE_MAX)):
            for entry_id, fields in entries:
                delivery = _delivery(entry_id, fields, 1)
                left = split(queue.name, delivery.body)
                if left:
                    await bus.publish(queue, left, delivery.headers)
                if left is not None:
                    await redis.xack(key, GROUP, entry_id)
                    removed += int(await redis.xdel(key, entry_id))
            after = f"({entries[-1][0].decode()}"
    return removed


def _delivery(entry_id: bytes, fields: Mapping[bytes, bytes], delivery_count: int) -> Delivery:
    """What others wrote into the stream is delivered, too, if only to be put aside: nothing may stay there for ever."""
    body, headers = cast(
        "tuple[bytes, Any]", BinaryMessageFormatV1.parse(fields.get(_BODY_FIELD) or b" ".join(fields.values()))
    )
    told = {str(name): str(value) for name, value in headers.items()} if isinstance(headers, Mapping) else {}
    return Delivery(body, told, delivery_count, entry_id, entry_id.decode())


def _with_name(redis_url: str, name: str) -> str:
    """FastStream hands on to its connections what stands in the URL, and nothing else."""
    return f"{redis_url}{'&' if '?' in redis_url else '?'}client_name={name}"


def _client(broker: RedisBroker) -> "Redis":
    return cast("Redis", broker.config.broker_config.connection.client)


def _text(value: Any) -> str:
    """What Redis holds under a key, empty when it holds nothing."""
    return value.decode() if isinstance(value, bytes) else value or ""


async def _as_it_came(message: Any) -> StreamMessage[Any]:
    """Skips FastStream's parse of a batch into one JSON array: the items are parsed once, by whom they are for."""
    return StreamMessage(raw_message=message, body=b"")


async def _raw(message: StreamMessage[Any]) -> Any:
    return message.raw_message
