"""A restore beside servers that still hold the lost log's views and messages."""

from collections.abc import AsyncIterator

import aio_pika
import pytest
from redis.asyncio import Redis

from app.backup.failure import RestoreRefused
from app.backup.surroundings import forget_views_and_messages
from events.bus import ALL_QUEUES, OUTCOMES
from events.rabbit_bus import RabbitBus
from events.redis_bus import RedisBus

SOMEBODY_ELSES = "billing.invoices"
NOBODY_LISTENS_HERE = "127.0.0.1:9"


@pytest.fixture
async def rabbit(rabbitmq_vhost_url: str) -> AsyncIterator[RabbitBus]:
    bus = RabbitBus(rabbitmq_vhost_url)
    await bus.start()
    yield bus
    await bus.stop()


async def taken_from(url: str, *names: str) -> dict[str, bytes | None]:
    """One message of each queue, taken for good: one given back might come to the queue after the purge that was to meet it."""
    taken: dict[str, bytes | None] = {}
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        for name in names:
            message = await (await channel.declare_queue(name, passive=True)).get(fail=False)
            taken[name] = None if message is None else message.body
            if message is not None:
                await message.ack()
    return taken


async def test_every_queue_of_ours_is_emptied_and_the_broker_belongs_to_no_log(
    rabbit: RabbitBus, rabbitmq_vhost_url: str, redis_url: str
) -> None:
    ours = [queue.name for queue in ALL_QUEUES]
    for queue in ALL_QUEUES * 2:
        await rabbit.publish(queue, b"of the lost log")
    await rabbit.read_epoch()
    await rabbit.write_epoch("the lost log")
    assert await taken_from(rabbitmq_vhost_url, *ours) == dict.fromkeys(ours, b"of the lost log")
    assert await rabbit.read_epoch() == "the lost log"

    await forget_views_and_messages(redis_url, rabbitmq_vhost_url)

    assert await taken_from(rabbitmq_vhost_url, *ours) == dict.fromkeys(ours)
    assert await rabbit.read_epoch() is None
    await forget_views_and_messages(redis_url, rabbitmq_vhost_url)


async def test_what_others_keep_on_the_same_servers_stays(rabbit: RabbitBus, rabbitmq_vhost_url: str, redis_url: str) -> None:
    async with await aio_pika.connect(rabbitmq_vhost_url) as connection, connection.channel() as channel:
        await channel.declare_queue(SOMEBODY_ELSES, durable=True)
        await channel.default_exchange.publish(aio_pika.Message(b"theirs"), SOMEBODY_ELSES)
    bus = RedisBus(redis_url)
    await bus.start()
    await bus.publish(OUTCOMES, b"of the lost log")
    await bus.stop()
    async with Redis.from_url(redis_url) as redis:
        await redis.set(SOMEBODY_ELSES, b"theirs")
        assert await redis.dbsize() > 1

        await forget_views_and_messages(redis_url, rabbitmq_vhost_url)

        assert await redis.keys("*") == [SOMEBODY_ELSES.encode()]
    assert await taken_from(rabbitmq_vhost_url, SOMEBODY_ELSES) == {SOMEBODY_ELSES: b"theirs"}


async def test_a_broker_that_lacks_a_queue_is_emptied_of_the_others(
    rabbit: RabbitBus, rabbitmq_vhost_url: str, redis_url: str
) -> None:
    """The broker closes the channel on which somebody asks for a queue that is not there."""
    gone, *others = (queue.name for queue in ALL_QUEUES)
    for queue in ALL_QUEUES:
        await rabbit.publish(queue, b"of the lost log")
    async with await aio_pika.connect(rabbitmq_vhost_url) as connection, connection.channel() as channel:
        await channel.queue_delete(gone)

    await forget_views_and_messages(redis_url, rabbitmq_vhost_url)

    assert await taken_from(rabbitmq_vhost_url, *others) == dict.fromkeys(others)


async def test_servers_that_cannot_be_reached_are_named(redis_url: str) -> None:
    with pytest.raises(
        RestoreRefused, match=r"^Redis cannot be reached, and may hold views of the lost log\. Start it first\.$"
    ):
        await forget_views_and_messages(f"redis://{NOBODY_LISTENS_HERE}/0", None)
    with pytest.raises(RestoreRefused, match=r"^RabbitMQ cannot be reached, and may hold the lost log's messages\."):
        await forget_views_and_messages(redis_url, f"amqp://guest:guest@{NOBODY_LISTENS_HERE}/")
