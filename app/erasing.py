"""The places of an erasure outside of the database: the views of all generations, and what still waits on the bus."""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from uuid import UUID

from redis.asyncio import Redis

from events.bus import COMMANDS, OUTCOMES, Bus
from events.record import read
from events.redis_bus import take_out
from events.store import HistoryReader
from projections.folding import fold_stream
from projections.job_status import value_of
from projections.job_views import Terms
from projections.views import Keys, target_key
from write_side.erasure import JobPages, NotYet
from write_side.erasure_table import Subject

KEYS_PAGE = 1_000
ROUNDS_MAX = 20
PAUSE_S = 0.5
CAUGHT_UP_WITHIN_S = 30.0
_META = re.compile(r"(?P<generation>[^:]+):meta")
_LINES = frozenset(queue.name for queue in (*COMMANDS.values(), OUTCOMES))

REPLACE = """
-- KEYS: a view. ARGV: what it was seen to hold, what it is to hold. Keeps the time at which it goes.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'KEEPTTL')
return 1
"""


@dataclass
class ViewSweep:
    """Makes the views show what they would show if they were built now, from facts of which the target is gone.

    Raises `RedisError`, `StoreUnavailable` or `NotYet`.
    """

    redis: Redis
    keys: Keys
    history: HistoryReader
    terms: Terms
    caught_up_within_s: float = CAUGHT_UP_WITHIN_S

    async def __call__(self, subject: Subject, jobs: JobPages, position: int) -> int:
        """Until a whole round finds nothing: a replay may write for some moments what it read before the erasure."""
        await self._caught_up(position)
        cleared = 0
        for _ in range(ROUNDS_MAX):
            found = await self._sweep(subject, jobs)
            cleared += found
            if not found:
                return cleared
            await asyncio.sleep(PAUSE_S)
        raise NotYet("Views about the target are still being written. Is a replay under way?")

    async def _caught_up(self, position: int) -> None:
        """A projector that leads may have in hand what it read before; one that is not there reads the log when it starts."""
        clock = asyncio.get_running_loop().time
        give_up_at = clock() + self.caught_up_within_s
        while await self.redis.exists(self.keys.lease):
            checkpoints = [await self._checkpoint(generation) for generation in await self._generations()]
            if all(checkpoint is None or checkpoint >= position for checkpoint in checkpoints):
                return
            if clock() > give_up_at:
                raise NotYet("The views are behind: see that `lookup projector` runs, and let it catch up first.")
            await asyncio.sleep(PAUSE_S)

    async def _generations(self) -> list[str]:
        names = [_META.fullmatch(key.removeprefix(self.keys.prefix)) async for key in self._scan()]
        return [name["generation"] for name in names if name]

    async def _checkpoint(self, generation: str) -> int | None:
        """None of one that is not fed any more."""
        if not await cast("Any", self.redis.hexists(self.keys.fed, generation)):
            return None
        told = await cast("Any", self.redis.hget(self.keys.meta(generation), "checkpoint"))
        return int(told or 0)

    async def _scan(self) -> AsyncIterator[str]:
        async for key in self.redis.scan_iter(f"{self.keys.prefix}*", count=KEYS_PAGE):
            yield key.decode(errors="surrogateescape")

    async def _sweep(self, subject: Subject, jobs: JobPages) -> int:
        generations = await self._generations()
        cleared = 0
        async for job_ids in jobs():
            for generation in generations:
                cleared += await self._documents(generation, job_ids)
        return cleared + (await self._of_target(subject.canonical) if subject.canonical else 0)

    async def _documents(self, generation: str, job_ids: Sequence[UUID]) -> int:
        keys = {job_id: self.keys.job(generation, job_id) for job_id in job_ids}
        shown = dict(zip(keys, await self.redis.mget(list(keys.values())), strict=True))
        present = {job_id: cast("bytes", value) for job_id, value in shown.items() if value is not None}
        right = await self._right(present) if present else {}
        cleared = 0
        for job_id, value in present.items():
            if right.get(job_id) is None:
                cleared += await self.redis.unlink(keys[job_id])
            elif right[job_id] != value:
                cleared += int(await cast("Any", self.redis.eval(REPLACE, 1, keys[job_id], value, right[job_id])))
        return cleared

    async def _right(self, shown: Mapping[UUID, bytes]) -> dict[UUID, bytes]:
        """What the facts of each job give, up to the one that its view stands at. Its documents are erased."""
        streams = await self.history.read(list(shown))
        right: dict[UUID, bytes] = {}
        for job_id, rows in streams.items():
            position = _position_of(shown[job_id])
            facts = [read(row) for row in rows if row.position <= position]
            if facts:
                right[job_id] = value_of(fold_stream(facts, self.terms))
        return right

    async def _of_target(self, canonical: str) -> int:
        """Keys that are named by a hash of the target, and the notes of when they go."""
        name, cleared = target_key(canonical), 0
        async for key in self._scan():
            if name in key:
                cleared += await self.redis.unlink(key)
            elif key.endswith(":expiry"):
                async for member, _ in self.redis.zscan_iter(key, match=f"*{name}*"):
                    cleared += await self.redis.zrem(key, member)
        return cleared


@dataclass
class MessageSweep:
    """Takes messages about the target off the bus, as far as the transport lets anybody look: Redis streams do.

    Other items of the same message are published again without it. A stretch of facts goes as a whole: its reader notices the
    gap, and reads the log. Raises `RedisError` or `BusUnavailable`.
    """

    redis: Redis
    bus: Bus

    async def __call__(self, subject: Subject, jobs: JobPages, position: int) -> int:  # noqa: ARG002 - the port's signature
        def split(queue_name: str, body: bytes) -> bytes | None:
            """What is left of a message, None if it says nothing of the target."""
            if not subject.is_mentioned_in(body):
                return None
            lines = body.split(b"\n") if queue_name in _LINES else []
            return b"\n".join(line for line in lines if not subject.is_mentioned_in(line))

        return await take_out(self.redis, self.bus, split)


async def nothing_can_be_taken_out(_subject: Subject, _jobs: JobPages, _position: int) -> int:
    """The sweep of a broker that lets nobody look into a queue: its messages go when they are consumed."""
    return 0


def _position_of(value: bytes) -> int:
    try:
        return int(value.partition(b"\n")[0])
    except ValueError:
        return 0
