"""The notes about suspected items, where the death of a worker does not undo them."""

from uuid import uuid4

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from workers.trials import KEPT_FOR, PREFIX, RedisTrials


async def test_a_note_outlives_who_made_it_until_the_item_comes_to_an_end(redis_url: str) -> None:
    command_id = uuid4()
    async with Redis.from_url(redis_url) as first, Redis.from_url(redis_url) as second:
        before = [await RedisTrials(redis).begin(command_id) for redis in (first, first, second)]
        expires_in_s = await second.ttl(f"{PREFIX}{command_id}")

        await RedisTrials(second).forget(command_id)
        after = await RedisTrials(first).begin(command_id)

    assert (before, after) == ([0, 1, 2], 0)
    assert 0 < expires_in_s <= KEPT_FOR.total_seconds()


async def test_without_redis_nobody_is_found_guilty() -> None:
    async with Redis.from_url("redis://127.0.0.1:9", retry=Retry(NoBackoff(), 0)) as nowhere:
        trials = RedisTrials(nowhere)
        command_id = uuid4()

        assert [await trials.begin(command_id) for _ in range(3)] == [0, 0, 0]
        await trials.forget(command_id)
