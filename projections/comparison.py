"""Holds one generation of views against another, key by key, each at one moment at which both stand at the same position; and
digests a generation. Reads only, page by page, in constant memory, while the projector goes on.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from redis.asyncio import Redis

from projections.views import Keys

PAGE = 1_000
RANGE = 1_000
"""Members of a sorted set that are compared in one step."""
SAMPLE_MAX = 5
LOOK_AGAIN_S = 0.02
PATIENCE_S = 15.0
SAME, CHANGED, ADDED, GONE = "same", "changed", "added", "gone"


class NotAtRest(Exception):  # noqa: N818 - a state, in our words
    """The generations did not stand at equal positions for a moment, or one of them moved while it was digested."""


@dataclass(slots=True)
class Differences:
    """What another generation has of one view: how many keys are the same, changed, added or gone, and some of each."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys((SAME, CHANGED, ADDED, GONE), 0))
    samples: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in (CHANGED, ADDED, GONE)})

    @property
    def is_none(self) -> bool:
        return not any(self.counts[kind] for kind in (CHANGED, ADDED, GONE))

    def note(self, kind: str, key: str) -> None:
        self.counts[kind] += 1
        if kind != SAME and len(self.samples[kind]) < SAMPLE_MAX:
            self.samples[kind].append(key)


@dataclass(frozen=True, slots=True)
class Digest:
    """Of all keys of some views: the same keys, contents and expiries give the same one, in whatever order they are read."""

    hex: str
    keys: int
    checkpoint: int


Name = tuple[str, str, str]
"""The generation, the view and the sub-key of a key."""


class Comparer:
    """Compares and digests on one Redis. Raises `RedisError`, and `NotAtRest` when it had to wait for too long."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self._contents = redis.register_script(CONTENTS)

    async def compare(self, shown: Mapping[str, str], new: str) -> dict[str, Differences]:
        """What `new` has of each view, against the generation that is shown of it (view by name -> generation)."""
        found = {view: Differences() for view in shown}
        for generation in {new, *shown.values()}:
            async for page in self._names(generation):
                for old in set(shown.values()) - {new}:
                    names = [name for name in page if shown.get(name[1]) == old]
                    if generation in {old, new} and names:
                        await self._compare(names, old, new, found)
        return found

    async def digest(self, shown: Mapping[str, str]) -> Digest:
        """Of these views, each of the generation that is named. Raises `NotAtRest` if one moved meanwhile."""
        before = await self._checkpoints(shown)
        total, count = 0, 0
        for generation in set(shown.values()):
            async for page in self._names(generation):
                names = [name for name in page if shown.get(name[1]) == generation]
                for (_, view, key), contents in zip(names, await self._all_contents(names, generation), strict=True):
                    if contents:
                        total += int.from_bytes(sha256(f"{view}\n{key}\n{contents}".encode()).digest(), "big")
                        count += 1
        if await self._checkpoints(shown) != before:
            raise NotAtRest("The views moved while they were digested.")
        return Digest(f"{total % 2**256:064x}", count, max(before, default=0))

    async def _compare(self, names: Sequence[Name], old: str, new: str, found: Mapping[str, Differences]) -> None:
        """Keys of one of both: of the old one those are told that the new one has not, of the new one all."""
        of_old, of_new = await self._pairs(names, old, new)
        for (generation, view, key), was, now in zip(names, of_old, of_new, strict=True):
            if generation == old and was and not now:
                found[view].note(GONE, key)
            elif generation == new and now:
                is_same = was == now and (not was.startswith(LONG) or await self._is_same_set(view, key, old, new))
                found[view].note(ADDED if not was else SAME if is_same else CHANGED, key)

    async def _is_same_set(self, view: str, key: str, old: str, new: str) -> bool:
        """Large sorted sets, range by range, each range of one moment: at equal positions both have the same ranges."""
        first = 0
        while True:
            (was,), (now,) = await self._pairs([(new, view, key)], old, new, first)
            if was != now or not was:
                return was == now
            first += RANGE

    async def _pairs(self, names: Sequence[Name], old: str, new: str, first: int = -1) -> tuple[list[str], list[str]]:
        """The contents of these keys in both generations, at a moment at which they stand at the same position."""
        clock = asyncio.get_running_loop().time
        give_up_at = clock() + PATIENCE_S
        bases = [f"{self._keys.prefix}{generation}" for generation in (old, new)]
        while True:
            texts = await self._ask(first, bases, names)
            if texts is not None:
                return texts[: len(names)], texts[len(names) :]
            if clock() > give_up_at:
                raise NotAtRest("The new views and the shown ones do not come to the same position: no projector feeds them.")
            await asyncio.sleep(LOOK_AGAIN_S)

    async def _all_contents(self, names: Sequence[Name], generation: str) -> list[str]:
        contents = await self._contents_of(names, generation, -1)
        for at, (name, told) in enumerate(zip(names, contents, strict=True)):
            first = 0
            while told.startswith(LONG) and (more := (await self._contents_of([name], generation, first))[0]):
                contents[at] = sha256((contents[at] + more).encode()).hexdigest()
                first += RANGE
        return contents

    async def _contents_of(self, names: Sequence[Name], generation: str, first: int) -> list[str]:
        return await self._ask(first, [f"{self._keys.prefix}{generation}"], names) or []

    async def _ask(self, first: int, bases: Sequence[str], names: Sequence[Name]) -> list[str] | None:
        args: list[str | int] = [RANGE, first, len(bases), *bases, *map(_spelled, names)]
        answer: Any = await self._contents(args=args)
        return None if answer is None else [text.decode() for text in answer]

    async def _names(self, generation: str) -> AsyncIterator[list[Name]]:
        """Pages of keys. One may come twice if Redis makes its table of keys smaller meanwhile."""
        base = f"{self._keys.prefix}{generation}:"
        cursor = 0
        while True:
            found: Any = await self._redis.scan(cursor, match=f"{base}*", count=PAGE)
            cursor, page = found
            parted = {raw.decode().removeprefix(base).partition(":")[::2] for raw in page}
            yield [(generation, view, key) for view, key in sorted(parted)]
            if cursor == 0:
                return

    async def _checkpoints(self, shown: Mapping[str, str]) -> list[int]:
        pipe = self._redis.pipeline(transaction=True)
        for generation in sorted(set(shown.values())):
            pipe.hget(self._keys.meta(generation), "checkpoint")
        found: list[Any] = await pipe.execute()
        return [int(checkpoint or 0) for checkpoint in found]


def _spelled(name: Name) -> str:
    _, view, key = name
    return f":{view}:{key}" if key else f":{view}"


LONG = "#"

CONTENTS = """
-- ARGV: members of a range, the first one of it (-1: whole keys), number of generations, their bases, then keys below a base.
-- Gives what each key holds in each generation, as a digest, '' for a key that is not there; of a long sorted set '#' and how
-- many it has, unless a range of it was asked for. Nothing at all if the generations do not stand at the same position.
local call, size, first, bases = redis.call, tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local checkpoint = call('HGET', ARGV[4] .. ':meta', 'checkpoint')
for at = 5, 3 + bases do
  if call('HGET', ARGV[at] .. ':meta', 'checkpoint') ~= checkpoint then return false end
end
local function contents(key)
  local kind = call('TYPE', key).ok
  if kind == 'none' then return '' end
  if kind == 'string' then return redis.sha1hex(call('GET', key)) .. '@' .. call('EXPIRETIME', key) end
  if kind == 'hash' then
    local all, fields = call('HGETALL', key), {}
    for at = 1, #all, 2 do fields[#fields + 1] = #all[at] .. ':' .. all[at] .. '=' .. all[at + 1] end
    table.sort(fields)
    return redis.sha1hex(table.concat(fields, '\\n'))
  end
  if first >= 0 then
    local range = call('ZRANGE', key, first, first + size - 1, 'WITHSCORES')
    return #range == 0 and '' or redis.sha1hex(table.concat(range, '\\n'))
  end
  local count = call('ZCARD', key)
  if count > size then return '#' .. count end
  return redis.sha1hex(table.concat(call('ZRANGE', key, 0, -1, 'WITHSCORES'), '\\n'))
end
local answer = {}
for base = 4, 3 + bases do
  for at = 4 + bases, #ARGV do answer[#answer + 1] = contents(ARGV[base] .. ARGV[at]) end
end
return answer
"""
