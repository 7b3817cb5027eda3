"""Lists of jobs and how the services fare, in one round trip to Redis each: views alone, as for polling.

A page goes from the newest job to older ones. Its cursor is the position of a job's first fact, which never changes:
whatever is taken on meanwhile comes before the first page, so that who follows `next` sees each job exactly once.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from events.facts import Service
from projections.views import (
    BANDS,
    JOB_STATUS,
    JOBS_BY_TARGET,
    JOBS_BY_TIME,
    SERVICE_STATS,
    STATS_TOTAL,
    Keys,
    target_key,
)
from read_side.queries import LOOK_MAX_S, ViewsRebuilding, ViewsUnavailable

LIMIT_DEFAULT = 50
LOOKED_AT_MAX = 2_000
"""So many entries of the lists a page may look at: those whose document has gone, or has another status, are passed over."""
RELATIVE_ERROR = 0.05
"""How far a quantile may be off: the bands of durations are a tenth wide (`projections/views.py:BANDS`)."""

LIST = """
-- KEYS: live. ARGV: key prefix, the list's view, its sub-keys before and after the hour, what a document must say ('' = any),
-- the view of documents, behind which position ('+inf' = none), at most so many rows, so many looked at.
-- Gives: complete, checkpoint, behind which position it goes on ('' = nowhere), then for each row its position and its head:
-- what the document says before its results.
local call, views = redis.call, redis.call('HMGET', KEYS[1], ARGV[2], ARGV[6])
if not views[1] or not views[2] then return {false, false, ''} end
local list, documents = ARGV[1] .. views[1], ARGV[1] .. views[2] .. ':' .. ARGV[6] .. ':'
local meta = call('HMGET', list .. ':meta', 'complete', 'checkpoint')
list = list .. ':' .. ARGV[2]
local hours = call('ZREVRANGE', list, 0, -1)

local function next_entries(behind, count)
  -- Positions of one hour lie between those of the hours around it, but for the clocks: one more hour is read than is needed.
  local found, is_last = {}, false
  for _, hour in ipairs(hours) do
    local key = list .. ':' .. ARGV[3] .. hour .. ARGV[4]
    local some = call('ZRANGE', key, behind, '-inf', 'BYSCORE', 'REV', 'LIMIT', 0, count, 'WITHSCORES')
    for at = 1, #some, 2 do found[#found + 1] = {some[at], tonumber(some[at + 1])} end
    if is_last and #some > 0 then break end
    is_last = is_last or #found >= count
  end
  table.sort(found, function(one, other) return one[2] > other[2] end)
  return found
end

local function head_of(job)
  local ends
  for _, size in ipairs({1023, 16383}) do
    local head = call('GETRANGE', documents .. job, 0, size)
    ends = string.find(head, ',"completionPercentage":', 1, true)
    if ends then return string.sub(head, string.find(head, '\\n', 1, true) + 1, ends - 1) end
    if #head <= size then return nil end
  end
end

local rows, behind, looked, more = {}, ARGV[7], 0, true
local rows_max, looked_max = 2 * tonumber(ARGV[8]), tonumber(ARGV[9])
while more and #rows < rows_max and looked < looked_max do
  local entries = next_entries(behind, tonumber(ARGV[8]) + 1)
  more = #entries > 0
  for number, entry in ipairs(entries) do
    if number > tonumber(ARGV[8]) or #rows == rows_max then break end
    local head = head_of(entry[1])
    if head and (ARGV[5] == '' or string.find(head, ARGV[5], 1, true)) then
      rows[#rows + 1] = string.format('%.0f', entry[2])
      rows[#rows + 1] = head
    end
    behind, looked, more = string.format('(%.0f', entry[2]), looked + 1, number < #entries
  end
end
return {meta[1], meta[2], more and string.sub(behind, 2) or '', unpack(rows)}
"""

STATS = """
-- KEYS: live. ARGV: key prefix, the view, its sub-keys. Gives: complete, checkpoint, then the counters of each sub-key.
local generation = redis.call('HGET', KEYS[1], ARGV[2])
if not generation then return {false, false} end
local base = ARGV[1] .. generation
local answer = redis.call('HMGET', base .. ':meta', 'complete', 'checkpoint')
for at = 3, #ARGV do answer[#answer + 1] = redis.call('HGETALL', base .. ':' .. ARGV[2] .. ':' .. ARGV[at]) end
return answer
"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which jobs, and which page of them. `target` is in its canonical form; `after` is where the page before ended.

    The views have to show all facts up to `min_position`.
    """

    limit: int = LIMIT_DEFAULT
    after: int | None = None
    status: str | None = None
    target: str | None = None
    min_position: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """Jobs as JSON objects, newest first. `next` is None on the last page; `position` is how far the views show the log."""

    jobs: Sequence[bytes]
    next: int | None
    position: int


@dataclass(frozen=True, slots=True)
class ServiceStats:
    """How the tasks of one service ended. `bands` counts answers by the band of their duration."""

    outcomes: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    bands: Mapping[int, int] = field(default_factory=dict)

    @property
    def success_share(self) -> float | None:
        """Of those that were asked and ended; what was skipped was not asked."""
        asked = sum(self.outcomes.get(name, 0) for name in ("succeeded", "failed", "timed_out"))
        return self.outcomes.get("succeeded", 0) / asked if asked else None

    def duration_ms(self, quantile: float) -> int | None:
        """A duration that this share of answers did not take longer than, off by at most `RELATIVE_ERROR`."""
        left = quantile * sum(self.bands.values())
        for band in sorted(self.bands):
            left -= self.bands[band]
            if left <= 0:
                return _middle_of(band)
        return None


@dataclass
class Listing:
    """Reads the views. Methods raise `ViewsUnavailable` or `ViewsRebuilding`."""

    redis: Redis
    keys: Keys = field(default_factory=Keys)

    def __post_init__(self) -> None:
        self._list = self.redis.register_script(LIST)
        self._stats = self.redis.register_script(STATS)

    async def jobs(self, wanted: Wanted) -> Page:
        view, before, after_hour, says = JOBS_BY_TIME, "", "", ""
        if wanted.target is not None:
            view, before = JOBS_BY_TARGET, f"{target_key(wanted.target)}:"
            says = f',"status":"{wanted.status}",' if wanted.status else ""
        elif wanted.status is not None:
            after_hour = f":{wanted.status}"
        behind = "+inf" if wanted.after is None else f"({wanted.after}"
        args: list[str | int] = [
            self.keys.prefix,
            view,
            before,
            after_hour,
            says,
            JOB_STATUS,
            behind,
            wanted.limit,
            LOOKED_AT_MAX,
        ]
        complete, checkpoint, goes_on, *rows = await _asked(self._list(keys=[self.keys.live], args=args))
        if complete != b"1":
            raise ViewsRebuilding
        jobs = [b'%b,"position":%b}' % (head, position) for position, head in zip(rows[::2], rows[1::2], strict=True)]
        return Page(jobs, int(goes_on) if goes_on else None, int(checkpoint))

    async def stats(self, hours: Sequence[int] | None) -> tuple[Mapping[Service, ServiceStats], int]:
        """Of these hours since 1970 together, None: of all that the log tells of; and how far the views show the log."""
        sub_keys = [STATS_TOTAL] if hours is None else [str(hour) for hour in hours]
        args = [self.keys.prefix, SERVICE_STATS, *sub_keys]
        complete, checkpoint, *hashes = await _asked(self._stats(keys=[self.keys.live], args=args))
        if complete != b"1":
            raise ViewsRebuilding
        counters: Counter[str] = Counter()
        for fields in hashes:
            names = [name.decode() for name in fields[::2]]
            counters.update(dict(zip(names, map(int, fields[1::2]), strict=True)))
        return {service: _stats_of(service, counters) for service in Service}, int(checkpoint)


async def _asked(answer: Awaitable[Any]) -> Any:
    try:
        async with asyncio.timeout(LOOK_MAX_S):
            return await answer
    except (RedisError, OSError, TimeoutError) as error:
        raise ViewsUnavailable from error


def _stats_of(service: Service, counters: Mapping[str, int]) -> ServiceStats:
    stats: dict[str, dict[str, int]] = {"": {}, "error": {}, "ms": {}}
    for name, count in counters.items():
        of, _, what = name.partition(":")
        if of == service:
            kind, _, rest = what.rpartition(":")
            stats[kind][rest] = count
    return ServiceStats(stats[""], stats["error"], {int(band): count for band, count in stats["ms"].items()})


def _middle_of(band: int) -> int:
    """Of all durations of a band none is further from it than `RELATIVE_ERROR`."""
    if band >= len(BANDS):
        return BANDS[-1]
    lowest, highest = BANDS[band - 1] + 1 if band else 0, BANDS[band]
    return round(2 * lowest * highest / (lowest + highest)) if highest else 0
