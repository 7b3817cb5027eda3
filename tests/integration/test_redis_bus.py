"""What only Redis streams can get wrong: who lives is known by the age of what he has in hand, and what was lost by a stamp."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis

from events.bus import OUTCOMES
from events.redis_bus import CLAIM_INTERVAL_MS, EPOCH_KEY, GROUP, PREFIX, RedisBus

CLAIM_IDLE_S = 2.0
PATIENCE_S = 20.0
LEAVES = 100


async def test_what_a_living_reader_has_in_hand_is_not_handed_to_another_however_long_it_takes(redis_url: str) -> None:
    busy, idle = (RedisBus(redis_url, claim_idle_s=CLAIM_IDLE_S) for _ in range(2))
    inbox = busy.subscribe(OUTCOMES, in_hand_max=1)
    await busy.start()
    await busy.publish(OUTCOMES, b"long work")
    (delivery,) = await inbox.take(1)
    others = idle.subscribe(OUTCOMES, in_hand_max=1)
    await idle.start()
    try:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(CLAIM_IDLE_S + 2 * CLAIM_INTERVAL_MS / 1000):
                await others.take(1)
        async with Redis.from_url(redis_url) as redis:
            (pending,) = await redis.xpending_range(PREFIX + OUTCOMES.name, GROUP, "-", "+", 10)
        await inbox.ack([delivery])
    finally:
        await busy.stop()
        await idle.stop()

    assert pending["times_delivered"] == 1


async def test_an_entry_that_no_bus_wrote_is_delivered_all_the_same(redis_url: str) -> None:
    """Left where it is, it would be claimed again and again for ever."""
    bus = RedisBus(redis_url, claim_idle_s=CLAIM_IDLE_S)
    inbox = bus.subscribe(OUTCOMES, in_hand_max=4)
    await bus.start()
    try:
        async with Redis.from_url(redis_url) as redis:
            await redis.xadd(PREFIX + OUTCOMES.name, {"nobody": "knows"})
            await redis.xadd(PREFIX + OUTCOMES.name, {"__data__": '{"data": "text", "headers": {"a": 1}}'})
        async with asyncio.timeout(PATIENCE_S):
            deliveries = await inbox.take(4)
            while len(deliveries) < 2:
                deliveries += await inbox.take(4)
        await inbox.ack(deliveries)
    finally:
        await bus.stop()

    assert [(delivery.body, dict(delivery.headers)) for delivery in deliveries] == [(b"knows", {}), (b"text", {"a": "1"})]


async def test_a_stream_that_was_deleted_and_made_again_takes_the_epoch_along(redis_url: str) -> None:
    reader = RedisBus(redis_url, claim_idle_s=CLAIM_IDLE_S)
    inbox = reader.subscribe(OUTCOMES, in_hand_max=4)
    async with started(redis_url) as relay:
        await reader.start()
        try:
            assert await relay.read_epoch() is None
            await relay.write_epoch("log-1")
            assert await relay.read_epoch() == "log-1"

            async with Redis.from_url(redis_url) as redis:
                await redis.delete(PREFIX + OUTCOMES.name)
            await reader.publish(OUTCOMES, b"after the deletion")
            async with asyncio.timeout(PATIENCE_S):
                await inbox.ack(await inbox.take(1))

            assert await relay.read_epoch() is None
        finally:
            await reader.stop()


async def test_what_is_lost_while_a_loss_is_being_mended_shows_too(redis_url: str) -> None:
    async with started(redis_url) as relay, started(redis_url) as other:
        await relay.read_epoch()
        async with Redis.from_url(redis_url) as redis:
            await redis.flushdb()
        await other.read_epoch()

        await relay.write_epoch("log-1")

        assert await relay.read_epoch() is None


async def test_a_server_that_was_started_again_takes_the_epoch_along(redis_url: str) -> None:
    """It may have lost the last second of what it confirmed. Its run id tells; here the marker is of another run."""
    async with started(redis_url) as relay, Redis.from_url(redis_url, decode_responses=True) as redis:
        await relay.read_epoch()
        await relay.write_epoch("log-1")
        run_id = (await redis.info("server"))["run_id"]
        marker = str(await redis.get(EPOCH_KEY))
        assert run_id in marker

        await redis.set(EPOCH_KEY, marker.replace(run_id, "0" * len(run_id)))

        assert await relay.read_epoch() is None


@asynccontextmanager
async def started(redis_url: str) -> AsyncIterator[RedisBus]:
    bus = RedisBus(redis_url, claim_idle_s=CLAIM_IDLE_S)
    await bus.start()
    try:
        yield bus
    finally:
        await bus.stop()


async def test_nothing_is_lost_that_is_published_while_readers_take_their_leave(redis_url: str) -> None:
    """A reader's name leaves the group only with nothing on it: what hangs on a name that is deleted, nobody is ever given."""
    sent: set[bytes] = set()
    async with started(redis_url) as publisher:
        for number in range(LEAVES):
            reader = RedisBus(redis_url, claim_idle_s=CLAIM_IDLE_S)
            reader.subscribe(OUTCOMES, in_hand_max=64)
            await reader.start()
            leaving = asyncio.create_task(reader.stop())
            await asyncio.sleep(number % 20 * 0.0003)  # Each comes at another moment of the leave.
            await publisher.publish(OUTCOMES, str(number).encode())
            sent.add(str(number).encode())
            await leaving
    successor = RedisBus(redis_url, claim_idle_s=CLAIM_IDLE_S)
    inbox = successor.subscribe(OUTCOMES, in_hand_max=64)
    await successor.start()
    got: set[bytes] = set()
    try:
        async with asyncio.timeout(PATIENCE_S):
            while got != sent:
                deliveries = await inbox.take(64)
                got |= {delivery.body for delivery in deliveries}
                await inbox.ack(deliveries)
    except TimeoutError:
        pass
    finally:
        await successor.stop()

    assert sent - got == set()
