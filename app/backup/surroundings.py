"""What Redis and the broker still hold of a log that was lost: pollers must never see it again, nor workers carry it out.

All of it can be made again from the log: the views are built anew, and the broker is told of all open tasks.
"""

from aio_pika.exceptions import AMQPError, ChannelNotFoundEntity
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.backup.failure import RestoreRefused
from app.doctor.redis_keys import VIEWS_PREFIX
from app.rabbitmq import connected
from events.bus import ALL_QUEUES
from events.rabbit_bus import EPOCH_QUEUE
from events.redis_bus import PREFIX as BUS_PREFIX

CONNECT_TIMEOUT_S = 5.0
KEYS_AT_ONCE = 1_000


async def forget_views_and_messages(redis_url: str, broker_url: str | None) -> None:
    """Take all views and everything that waits in a queue away. Raises `RestoreRefused`. Twice is the same as once."""
    try:
        async with Redis.from_url(redis_url, socket_connect_timeout=CONNECT_TIMEOUT_S) as redis:
            for prefix in (VIEWS_PREFIX, BUS_PREFIX):
                await _remove(redis, prefix)
    except (RedisError, OSError):
        raise RestoreRefused("Redis cannot be reached, and may hold views of the lost log. Start it first.") from None
    if broker_url is not None:
        try:
            await _empty(broker_url)
        except (AMQPError, OSError, TimeoutError):
            raise RestoreRefused("RabbitMQ cannot be reached, and may hold the lost log's messages. Start it first.") from None


async def _remove(redis: Redis, prefix: str) -> None:
    keys: list[bytes] = []
    async for key in redis.scan_iter(f"{prefix}*", count=KEYS_AT_ONCE):
        keys.append(key)
        if len(keys) == KEYS_AT_ONCE:
            await redis.unlink(*keys)
            keys.clear()
    if keys:
        await redis.unlink(*keys)


async def _empty(broker_url: str) -> None:
    async with connected(broker_url, CONNECT_TIMEOUT_S) as connection:
        for name in (EPOCH_QUEUE, *(queue.name for queue in ALL_QUEUES)):
            # A queue that is not there closes the channel that asked for it.
            try:
                async with connection.channel() as channel:
                    await (await channel.declare_queue(name, passive=True)).purge()
            except ChannelNotFoundEntity:
                continue
