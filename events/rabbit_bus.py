"""The bus on RabbitMQ, through FastStream: durable quorum queues, publisher confirms, `mandatory`.

A confirm alone does not mean that a message was put into a queue, so every publish is mandatory: one that no queue takes comes
back, the queues are declared again, and it is sent once more. A queue deleted by hand takes its consumers with it; the broker
tells them, and aio-pika consumes again.

A queue that is made again does not show that it was gone. So each queue is bound to an exchange of its own that the broker
deletes with its last binding: as long as that mark is there, it is still the queue which it was set for.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import aio_pika
from aio_pika.exceptions import AMQPError, ChannelClosed, ChannelNotFoundEntity, DeliveryError, PublishError
from aio_pika.robust_channel import RobustChannel
from aio_pika.robust_connection import RobustConnection
from aio_pika.robust_queue import RobustQueue
from aiormq import spec
from aiormq.abc import DeliveredMessage
from faststream import AckPolicy
from faststream.rabbit import Channel, ExchangeType, QueueType, RabbitBroker, RabbitExchange, RabbitQueue
from faststream.rabbit.schemas.queue import QuorumQueueArgs

from events.acknowledging import Acknowledgements
from events.bus import ALL_QUEUES, DEAD_LETTERS, DELIVERY_LIMIT, EVENTS_EXCHANGE, Arrivals, BusUnavailable, Delivery, Queue
from events.dead_letters import DIED_IN

if TYPE_CHECKING:
    from faststream.rabbit.subscriber.usecase import RabbitSubscriber

EPOCH_QUEUE = "lookup.epoch"
MARK_PREFIX = "lookup.mark."
NO_LIMIT: QuorumQueueArgs = {"x-delivery-limit": 1_000_000}
"""RabbitMQ 4 drops what a quorum queue handed out 20 times, unless told otherwise: nothing may be lost that is dead already."""
CONFIRM_TIMEOUT_S = 10.0
DECLARE_AFTER_S = 1.0
STOP_S = 5.0
EVERY_EVENT = "lookup.#"
SHARES = "shares"
STEPS_OF_A_DELIVERY = 3
"""In so many steps of the loop at most a delivery comes from the connection to us: through a task of aiormq's and, sometimes,
one of aio-pika's.

Before Python 3.12 the answer to a cancellation takes more steps than that anyway.
"""

_DOWN = (AMQPError, ConnectionError, OSError, TimeoutError, RuntimeError)


class RabbitBus:
    """A `Bus` on RabbitMQ 3.10 or later."""

    def __init__(self, broker_url: str) -> None:
        self._broker = RabbitBroker(
            broker_url,
            apply_types=False,
            logger=None,
            graceful_timeout=2.0,
            reconnect_interval=1.0,
        )
        # Known as soon as it is made: one that does not come about has to be closed as well, or it goes on trying for ever.
        self._broker._connection_kwargs["connection_class"] = self._make_connection  # noqa: SLF001 - it offers no other way
        self._connection: _DirectConnection | None = None
        self._publishing: Any = None
        self._inboxes: list[RabbitInbox] = []

    async def start(self) -> None:
        try:
            connection = await self._broker.connect()
            await self._declare_all()
            self._publishing = await connection.channel(publisher_confirms=True, on_return_raises=True)
            await self._broker.start()
        except _DOWN as error:
            await self._close_quietly()
            raise BusUnavailable("RabbitMQ cannot be reached.") from error
        except asyncio.CancelledError:
            await self._close_quietly()
            raise

    async def stop(self) -> None:
        await self._close_quietly()

    def _make_connection(self, *args: Any, **kwargs: Any) -> "_DirectConnection":
        self._connection = _DirectConnection(*args, **kwargs)
        return self._connection

    async def publish(self, queue: Queue, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        await self._publish_surely(queue, body, headers or {}, no_queue=(PublishError, DeliveryError))

    async def publish_each(self, bodies: Mapping[Queue, bytes]) -> None:
        """As one message, which the broker puts into all of these queues; a reader cuts its own share out of it.

        That is one publish and one confirm, and all queues have it at the same time: what several workers are asked at once
        comes back at once, and is one decision.
        """
        first, *others = bodies
        headers = {SHARES: _shares(bodies), "BCC": [queue.name for queue in others]} if others else {}
        # One that was refused, and not returned, is in some of them: it is not published again.
        await self._publish_surely(first, b"".join(bodies.values()), headers, no_queue=(PublishError,))

    async def _publish_surely(
        self, queue: Queue, body: bytes, headers: Mapping[str, Any], *, no_queue: tuple[type[Exception], ...]
    ) -> None:
        try:
            await self._publish(queue, body, headers)
        except no_queue:
            # No queue took it: somebody deleted the queue. Declare it and try again, once. Not at once: RabbitMQ 3.10 takes a
            # moment to tell the consumers, and those of a queue that is made again before that are never sent a message.
            try:
                await asyncio.sleep(DECLARE_AFTER_S)
                await self._declare_all()
                await self._publish(queue, body, headers)
            except _DOWN as error:
                raise BusUnavailable(f"RabbitMQ has no queue {queue.name} and would not make one.") from error
        except _DOWN as error:
            raise BusUnavailable("RabbitMQ did not confirm the message.") from error

    def subscribe(self, queue: Queue, *, in_hand_max: int) -> "RabbitInbox":
        subscriber = self._broker.subscriber(
            _declared(queue),
            exchange=_exchange(queue),
            channel=Channel(prefetch_count=in_hand_max),
            ack_policy=AckPolicy.MANUAL,
        )
        inbox = RabbitInbox(queue, subscriber)
        subscriber(inbox.receive)
        # What FastStream does with a message before our handler has it, for handlers of other kinds, costs more than all that
        # we do; and it drops what comes before its `start` has returned. (What aio-pika does: see `_DirectQueue`.)
        subscriber.consume = inbox.receive  # type: ignore[method-assign, assignment]
        self._inboxes.append(inbox)
        return inbox

    async def read_epoch(self) -> str | None:
        try:
            async with self._channel() as channel:
                marked = await _all_exist(channel.declare_exchange, [MARK_PREFIX + queue.name for queue in ALL_QUEUES])
            if not marked:
                await self._mark_anew()
            async with self._channel() as channel:
                message = await (await channel.declare_queue(EPOCH_QUEUE, durable=True)).get(fail=False, no_ack=False)
                if message is None:
                    return None
                await message.nack(requeue=True)
                return str(message.body, "utf-8")
        except _DOWN as error:
            raise BusUnavailable("RabbitMQ cannot be reached.") from error

    async def write_epoch(self, epoch: str) -> None:
        try:
            async with self._channel() as channel:
                queue = await channel.declare_queue(EPOCH_QUEUE, durable=True)
                await queue.purge()
                message = aio_pika.Message(epoch.encode(), delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
                await channel.default_exchange.publish(message, EPOCH_QUEUE, mandatory=True)
        except _DOWN as error:
            raise BusUnavailable("RabbitMQ cannot be reached.") from error

    async def _mark_anew(self) -> None:
        """The marker goes first, so that nobody who ends in the middle of this leaves a loss that does not show."""
        async with self._channel() as channel:
            await (await channel.declare_queue(EPOCH_QUEUE, durable=True)).purge()
            whole = await _all_exist(channel.declare_queue, [queue.name for queue in ALL_QUEUES])
        if not whole:
            await asyncio.sleep(DECLARE_AFTER_S)
            await self._declare_all()
        async with self._channel() as channel:
            for queue in ALL_QUEUES:
                mark = await channel.declare_exchange(
                    MARK_PREFIX + queue.name, durable=True, auto_delete=True, internal=True, robust=False
                )
                declared = await channel.declare_queue(queue.name, passive=True, robust=False)
                await declared.bind(mark, queue.name, robust=False)

    @asynccontextmanager
    async def _channel(self) -> AsyncIterator[Any]:
        assert self._connection is not None
        channel: Any = await self._connection.channel()
        try:
            yield channel
        finally:
            await channel.close()

    async def _publish(self, queue: Queue, body: bytes, headers: Mapping[str, Any]) -> None:
        # As aiormq has it: what FastStream and aio-pika would add to a message (its type, the time, …) nobody of ours reads.
        if self._publishing.is_closed:  # As it is until a lost connection was restored: that may take for ever.
            raise ChannelClosed
        async with asyncio.timeout(CONFIRM_TIMEOUT_S):
            channel = await self._publishing.get_underlay_channel()
            await channel.basic_publish(
                body,
                exchange=queue.exchange or "",
                routing_key=EVERY_EVENT.replace("#", "facts") if queue.exchange else queue.name,
                properties=spec.Basic.Properties(headers=dict(headers), delivery_mode=aio_pika.DeliveryMode.PERSISTENT),
                mandatory=True,
                wait=False,
            )

    async def _declare_all(self) -> None:
        """Declare every queue on a channel of our own: FastStream remembers what it declared and would not do it again."""
        async with self._channel() as channel:
            exchange = await channel.declare_exchange(EVENTS_EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
            for queue in ALL_QUEUES:
                declared = await channel.declare_queue(
                    queue.name, durable=True, arguments=_declared(queue).arguments, robust=False
                )
                if queue.exchange:
                    await declared.bind(exchange, EVERY_EVENT, robust=False)

    async def _close_quietly(self) -> None:
        """Within a bound: without a broker, closing a channel waits for the connection to be restored."""
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await asyncio.gather(*(inbox.drain() for inbox in self._inboxes))
        with suppress(*_DOWN):
            async with asyncio.timeout(STOP_S):
                await self._broker.stop()
        if self._connection is not None:
            with suppress(*_DOWN):
                async with asyncio.timeout(STOP_S):
                    await self._connection.close()


class RabbitInbox(Arrivals):
    """An `Inbox` on one queue. The broker holds back what is over the channel's prefetch."""

    def __init__(self, queue: Queue, subscriber: "RabbitSubscriber") -> None:
        super().__init__()
        self._queue_name = queue.name
        self._subscriber = subscriber
        self._acknowledgements = Acknowledgements(_acknowledge)

    async def close(self) -> None:
        """The broker answers a cancellation after the last delivery. FastStream's own stop drops what still comes."""
        queue, tag = self._subscriber._queue_obj, self._subscriber._consumer_tag  # noqa: SLF001 - it offers no other way
        if queue is None or tag is None:
            return
        with suppress(*_DOWN):  # Without a connection nothing more comes either.
            async with asyncio.timeout(STOP_S):
                await queue.cancel(tag)
        for _ in range(STEPS_OF_A_DELIVERY):
            await asyncio.sleep(0)

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        self._acknowledgements.add(cast("_Message", delivery.token) for delivery in deliveries)

    async def drain(self) -> None:
        await self._acknowledgements.drain()

    async def receive(self, message: "_Message") -> None:
        headers = {name: str(value) for name, value in message.headers.items()}
        shares = headers.pop(SHARES, None)
        # What RabbitMQ gave up on comes from the dead letters, and is the share of the queue that it died in.
        body = _share_of(headers.get(DIED_IN, self._queue_name), shares, message.body) if shares else message.body
        # A quorum queue counts earlier deliveries in a header that is absent the first time (and then may be anybody's).
        earlier = headers.get("x-delivery-count", "")
        delivery_count = int(earlier) + 1 if earlier.isdecimal() else 1
        # Of our own messages each has an id, which aiormq makes. What came without any counts as another message each time.
        message_id = message.message_id or message.correlation_id or uuid4().hex
        self._arrived.put_nowait(Delivery(body, headers, delivery_count, message, message_id))


async def _acknowledge(messages: Sequence["_Message"]) -> None:
    for message in messages:
        with suppress(*_DOWN):  # Lost with the connection: it is delivered again, which is promised.
            await message.ack()


class _Message:
    """What we need of an aio-pika message, which takes a good part of a millisecond to be made."""

    __slots__ = ("_acknowledged", "body", "channel", "correlation_id", "delivery_tag", "headers", "message_id")

    def __init__(self, delivered: DeliveredMessage) -> None:
        properties = delivered.header.properties
        self.headers: Mapping[str, Any] = properties.headers or {}
        self.message_id = properties.message_id
        self.correlation_id = properties.correlation_id
        self.body = delivered.body
        self.channel = delivered.channel
        self.delivery_tag = cast("int", delivered.delivery_tag)
        self._acknowledged = False

    async def ack(self) -> None:
        """Only once: RabbitMQ closes a channel that acknowledges what it has not in hand, and gives back the rest of it."""
        if not self._acknowledged:
            self._acknowledged = True
            await self.channel.basic_ack(self.delivery_tag)


class _DirectQueue(RobustQueue):
    """Hands a consumer a `_Message`.

    Who is to consume again because the queue was deleted gets aio-pika's messages, which have all that ours have.
    """

    __slots__ = ()

    async def consume(  # type: ignore[override]
        self,
        callback: Callable[[_Message], Awaitable[None]],
        no_ack: bool = False,
        exclusive: bool = False,
        arguments: Any = None,
        consumer_tag: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the library's signature
        robust: bool = True,
    ) -> str:
        async def hand_over(delivered: DeliveredMessage) -> None:
            await callback(_Message(delivered))

        how = {"no_ack": no_ack, "exclusive": exclusive, "arguments": arguments}
        channel = await self.channel.get_underlay_channel()
        consuming = await channel.basic_consume(self.name, hand_over, consumer_tag=consumer_tag, timeout=timeout, **how)
        if consuming.consumer_tag is None:
            raise AMQPError("RabbitMQ gave a consumer no tag.")
        if robust:
            self._consumers[consuming.consumer_tag] = {"callback": callback} | how
        return consuming.consumer_tag


class _DirectChannel(RobustChannel):
    QUEUE_CLASS = _DirectQueue


class _DirectConnection(RobustConnection):
    CHANNEL_CLASS = _DirectChannel


def _shares(bodies: Mapping[Queue, bytes]) -> str:
    """How many bytes of a message for several queues are whose, in the order of its body."""
    return " ".join(f"{queue.name}={len(body)}" for queue, body in bodies.items())


def _share_of(queue_name: str, shares: str, body: bytes) -> bytes:
    """The bytes that are for one queue. All of them, when nobody of ours wrote it: then the reader puts them aside."""
    start = 0
    for share in shares.split(" "):
        name, _, size = share.partition("=")
        if not size.isdecimal():
            break
        if name == queue_name:
            return body[start : start + int(size)]
        start += int(size)
    return body


async def _all_exist(declare: Callable[..., Awaitable[Any]], names: Iterable[str]) -> bool:
    """Asks until one is missing; then the broker has closed the channel that was asked on."""
    try:
        for name in names:
            await declare(name, passive=True, robust=False)
    except ChannelNotFoundEntity:
        return False
    return True


def _declared(queue: Queue) -> RabbitQueue:
    dead_letters: QuorumQueueArgs = {
        "x-delivery-limit": DELIVERY_LIMIT,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": DEAD_LETTERS.name,
    }
    return RabbitQueue(
        queue.name,
        QueueType.QUORUM,
        arguments=NO_LIMIT if queue == DEAD_LETTERS else dead_letters,
        routing_key=EVERY_EVENT if queue.exchange else queue.name,
    )


def _exchange(queue: Queue) -> RabbitExchange | None:
    if queue.exchange is None:
        return None
    return RabbitExchange(queue.exchange, type=ExchangeType.TOPIC, durable=True)
