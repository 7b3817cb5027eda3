"""Where views lie, the end of those who build generations: `lookup replay`, and the projector when a view's code has changed.

The life of a generation: it is *built* beside what is shown, by one builder at a time, which reads the log itself. When it
has come as far as what is shown it is *attached*: from then on the projector feeds it in the same step as all others, so that
they stand at equal positions. Then it is *shown*, view by view, with one step that is refused unless it is at least as far as
what was shown before. That is *kept* and fed for a while, so that a rollback does not go backwards either; then it is
*dropped*, and its keys are removed bit by bit.

Promises, held by `tests/contract/test_generations.py` for Redis and the in-memory twin alike:

- **One builder.** Building is a lease; who fell silent and was succeeded is fenced off, and neither builds, attaches nor shows.
- **Never backwards.** What is not at least as far as what is shown of its log is neither attached nor shown.
- **No second writer.** What is attached is the projector's: a builder cannot write to it any more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol
from uuid import uuid4

from redis.asyncio import Redis

from projections.view_store import Move, RedisViews, Standing, Verdict
from projections.views import LEAD, Keys

BUILD_LEASE_MS = 5_000
FORGOTTEN_AFTER_MS = 24 * 3_600_000
"""A half-built generation that nobody has gone on with for so long is dropped by the next builder."""


class Step(StrEnum):
    """What became of a step of a builder: made, or refused and why."""

    OK = "ok"
    FENCED = "fenced"
    GONE = "gone"
    BEHIND = "behind"


class GenerationStore(Protocol):
    """The store of the views, as builders see it. An unreachable one raises what its driver raises."""

    async def lead_build(self) -> str | None:
        """Our fence, when we may build from now on; None while somebody else builds."""

    async def renew(self, fence: str) -> bool:
        """Keep the lead for another `BUILD_LEASE_MS`, also if it is over and nobody has taken it. False when it is lost."""

    async def end_build(self, fence: str) -> None:
        """Let the next builder in at once."""

    async def standing(self) -> Standing: ...

    async def begin_build(self, fence: str, generation: str, log_id: str, views: Mapping[str, int]) -> Step:
        """Start an empty generation of these views that nobody is shown and the projector does not feed."""

    async def commit_build(self, move: Move) -> Verdict:
        """Move the one generation that `move.fed` names, if it is ours to build and stands where the move begins."""

    async def attach(self, fence: str, generation: str, until_ms: int) -> Step:
        """Have it fed from now on, until then at most. `BEHIND` unless it is as far as all that is shown of its log."""

    async def show(self, fence: str, shown: Mapping[str, str], keep_until_ms: int) -> Step:
        """Show each of these views of that generation, and keep what was shown before until then.

        `BEHIND` unless each is as far as what is shown, `GONE` unless each is fed and holds its view.
        """

    async def drop(self, fence: str, generation: str) -> Step:
        """Give a generation up that is not shown."""


@dataclass
class RedisGenerations:
    """The `GenerationStore` on Redis."""

    redis: Redis
    keys: Keys = field(default_factory=Keys)

    def __post_init__(self) -> None:
        own = self.keys
        self._views = RedisViews(self.redis, own)
        self._lead = self.redis.register_script(LEAD)
        self._renew = self.redis.register_script(RENEW)
        self._end = self.redis.register_script(END_BUILD)
        self._begin = self.redis.register_script(BEGIN_BUILD)
        self._attach = self.redis.register_script(ATTACH)
        self._show = self.redis.register_script(SHOW)
        self._drop = self.redis.register_script(DROP)
        self._arranged = [own.builder, own.roster, own.live, own.fed, own.kept, own.before, own.built, own.dropped]

    async def lead_build(self) -> str | None:
        fence = await self._lead(keys=[self.keys.builder, self.keys.fence], args=[BUILD_LEASE_MS, f"b{uuid4().hex}"])
        return None if fence is None else fence.decode()

    async def renew(self, fence: str) -> bool:
        return bool(await self._renew(keys=[self.keys.builder], args=[fence, BUILD_LEASE_MS]))

    async def end_build(self, fence: str) -> None:
        await self._end(keys=[self.keys.builder], args=[fence])

    async def standing(self) -> Standing:
        return await self._views.standing()

    async def begin_build(self, fence: str, generation: str, log_id: str, views: Mapping[str, int]) -> Step:
        keys = [self.keys.builder, self.keys.built, self.keys.meta(generation), self.keys.marker(generation)]
        versions = [text for view in views.items() for text in view]
        return _step(await self._begin(keys=keys, args=[fence, generation, log_id, *versions]))

    async def commit_build(self, move: Move) -> Verdict:
        (built,) = move.fed
        return await self._views.commit_under(self.keys.builder, self.keys.marker(built.name), move, BUILD_LEASE_MS)

    async def attach(self, fence: str, generation: str, until_ms: int) -> Step:
        return await self._step(self._attach, fence, generation, until_ms)

    async def show(self, fence: str, shown: Mapping[str, str], keep_until_ms: int) -> Step:
        return await self._step(self._show, fence, keep_until_ms, *(text for pair in shown.items() for text in pair))

    async def drop(self, fence: str, generation: str) -> Step:
        return await self._step(self._drop, fence, generation)

    async def _step(self, script: Any, fence: str, *args: str | int) -> Step:
        told = [fence, uuid4().hex, self.keys.prefix, self.keys.moved, *args]
        return _step(await script(keys=self._arranged, args=told))


RENEW = """
-- KEYS: builder. ARGV: fence, lease (ms).
-- A lease that is over is taken again: what a successor has done since, marker and checkpoint of the generation tell.
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""

END_BUILD = """
-- KEYS: builder. ARGV: fence.
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""

BEGIN_BUILD = """
-- KEYS: builder, built, meta and marker of the new generation.
-- ARGV: fence, generation, log id, then for each view: name, version.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 'fenced' end
redis.call('HSET', KEYS[3], 'log_id', ARGV[3], 'checkpoint', 0, 'hash', '', 'complete', 0, 'caught_up_ms', 0, 'checked_ms', 0,
  'log_s', 0)
for at = 4, #ARGV, 2 do redis.call('HSET', KEYS[3], 'view:' .. ARGV[at], ARGV[at + 1]) end
redis.call('SADD', KEYS[2], ARGV[2])
redis.call('SET', KEYS[4], 'built')
return 'ok'
"""

_ARRANGED = """
-- KEYS: builder, roster, live, fed, kept, before, built, dropped. ARGV: fence, new roster, key prefix, channel, …
local call, prefix = redis.call, ARGV[3]
if call('GET', KEYS[1]) ~= ARGV[1] then return 'fenced' end
local function meta(generation, field) return call('HGET', prefix .. generation .. ':meta', field) end
local function position(generation) return tonumber(meta(generation, 'checkpoint') or -1) end
local function inherit(generation, from)
  -- Who is at least as far knows all that the other one knew.
  local key = prefix .. generation .. ':meta'
  if meta(from, 'complete') == '1' then call('HSET', key, 'complete', 1) end
  local caught_up_ms = math.max(tonumber(meta(from, 'caught_up_ms')), tonumber(meta(generation, 'caught_up_ms')))
  call('HSET', key, 'caught_up_ms', string.format('%d', caught_up_ms))
end
"""

ATTACH = (
    _ARRANGED
    + """
-- … generation, until when at most (ms).
local generation = ARGV[5]
if call('SISMEMBER', KEYS[7], generation) == 0 then return 'gone' end
local shown = call('HVALS', KEYS[3])
for _, other in ipairs(shown) do
  if meta(other, 'log_id') == meta(generation, 'log_id') and position(other) > position(generation) then return 'behind' end
end
for _, other in ipairs(shown) do
  if meta(other, 'log_id') == meta(generation, 'log_id') then inherit(generation, other) end
end
call('HSET', KEYS[4], generation, 0)
for _, field in ipairs(call('HKEYS', prefix .. generation .. ':meta')) do
  if string.sub(field, 1, 5) == 'view:' then call('HSET', KEYS[5], generation .. ':' .. string.sub(field, 6), ARGV[6]) end
end
call('SREM', KEYS[7], generation)
call('DEL', prefix .. generation .. ':marker')
call('SET', KEYS[2], ARGV[2])
return 'ok'
"""
)

SHOW = (
    _ARRANGED
    + """
-- … keep until (ms), then for each view: its name, the generation.
for at = 6, #ARGV, 2 do
  local view, generation = ARGV[at], ARGV[at + 1]
  if call('HEXISTS', KEYS[4], generation) == 0 or not meta(generation, 'view:' .. view) then return 'gone' end
  local before = call('HGET', KEYS[3], view)
  if before and meta(before, 'log_id') == meta(generation, 'log_id') and position(before) > position(generation) then
    return 'behind'
  end
end
local reached = 0
for at = 6, #ARGV, 2 do
  local view, generation = ARGV[at], ARGV[at + 1]
  local before = call('HGET', KEYS[3], view)
  if before ~= generation then
    if before and meta(before, 'log_id') == meta(generation, 'log_id') then inherit(generation, before) end
    if before and call('HEXISTS', KEYS[4], before) == 1 then
      call('HSET', KEYS[5], before .. ':' .. view, ARGV[5])
      call('HSET', KEYS[6], view, before)
    else
      call('HDEL', KEYS[6], view)
    end
    call('HSET', KEYS[3], view, generation)
  end
  call('HDEL', KEYS[5], generation .. ':' .. view)
  reached = math.max(reached, position(generation))
end
call('SET', KEYS[2], ARGV[2])
call('PUBLISH', ARGV[4], string.format('%d', reached))
return 'ok'
"""
)

DROP = (
    _ARRANGED
    + """
-- … generation.
local generation = ARGV[5]
for _, shown in ipairs(call('HVALS', KEYS[3])) do
  if shown == generation then return 'gone' end
end
for _, field in ipairs(call('HKEYS', prefix .. generation .. ':meta')) do
  if string.sub(field, 1, 5) == 'view:' then
    local view = string.sub(field, 6)
    call('HDEL', KEYS[5], generation .. ':' .. view)
    if call('HGET', KEYS[6], view) == generation then call('HDEL', KEYS[6], view) end
  end
end
if call('HDEL', KEYS[4], generation) == 1 then call('SET', KEYS[2], ARGV[2]) end
call('SREM', KEYS[7], generation)
call('SADD', KEYS[8], generation)
return 'ok'
"""
)


def _step(answer: Any) -> Step:
    return Step(answer.decode())
