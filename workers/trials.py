"""Trials: which suspected item was begun, noted where the death of the worker that began it does not undo the note."""

import logging
from datetime import timedelta
from typing import Protocol
from uuid import UUID

from redis.asyncio import Redis
from redis.exceptions import RedisError

KEPT_FOR = timedelta(hours=1)
PREFIX = "trials:"

log = logging.getLogger(__name__)


class Trials(Protocol):
    """Notes by command id."""

    async def begin(self, command_id: UUID) -> int:
        """Note that the item is begun; gives how often it was begun before and did not come to an end."""

    async def forget(self, command_id: UUID) -> None:
        """It came to an end, whatever end."""


class MemoryTrials:
    """`Trials` inside one process, for tests: a real worker's death would take them along."""

    def __init__(self) -> None:
        self.begun: dict[UUID, int] = {}

    async def begin(self, command_id: UUID) -> int:
        before = self.begun.get(command_id, 0)
        self.begun[command_id] = before + 1
        return before

    async def forget(self, command_id: UUID) -> None:
        self.begun.pop(command_id, None)


class RedisTrials:
    """`Trials` in Redis. Without Redis nobody is found guilty; the transport's own limit is the last net."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def begin(self, command_id: UUID) -> int:
        key = f"{PREFIX}{command_id}"
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.incr(key)
                pipe.expire(key, KEPT_FOR)
                begun, _ = await pipe.execute()
        except (RedisError, OSError):
            log.warning("Redis cannot be reached: that command %s was begun is not noted.", command_id)
            return 0
        return int(begun) - 1

    async def forget(self, command_id: UUID) -> None:
        try:
            await self._redis.delete(f"{PREFIX}{command_id}")
        except (RedisError, OSError):
            log.warning("Redis cannot be reached: that command %s came to an end is not noted.", command_id)
