"""Lists of jobs and how the services fare, in one round trip to Redis each: views alone, as for polling.

A page goes from the newest job to older ones. Its cursor is the position of a job's first fact, which never changes:
whatever is taken on meanwhile comes before the first page, so that who follows `next` sees each job exactly once.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import orjson
from aiohttp import web
from redis.asyncio import Redis
from redis.exceptions import RedisError

from events.facts import Service
from projections.views import (
    BANDS,
    HOUR_S,
    JOB_STATUS,
    JOBS_BY_TARGET,
    JOBS_BY_TIME,
    SERVICE_STATS,
    STATS_HOURS_MAX,
    STATS_TOTAL,
    Keys,
    target_key,
)
from read_side.api import (
    BEHIND,
    MIN_POSITION_INVALID,
    REACH_MAX_S,
    REBUILDING,
    RETRY_AFTER_S,
    UNAVAILABLE,
    Problem,
    preferred_wait_s,
)
from read_side.moments import position_of
from read_side.queries import LOOK_MAX_S, JobQueries, ViewBehind, ViewsRebuilding, ViewsUnavailable
from read_side.targets_api import Canonical, NoTarget

LIMIT_DEFAULT = 50
LIMIT_MAX = 200
LOOKED_AT_MAX = 2_000
"""So many entries of the lists a page may look at: those whose document has gone, or has another status, are passed over."""
STATUSES = ("Pending", "Processing", "Completed", "Failed", "Cancelled")
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
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

LIMIT_INVALID = f"limit must be a whole number from 1 to {LIMIT_MAX}."
AFTER_INVALID = "after must be a position: the `next` of an earlier page."
STATUS_INVALID = f"status must be one of {', '.join(STATUSES)}."
HOURS_INVALID = f"hours must be a whole number from 1 to {STATS_HOURS_MAX}."
PARAMETER_UNKNOWN = "There is no such parameter, or it was given twice. Known ones are {known}."


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


# --- HTTP -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ListingApi:
    """The routes over `listing`; `queries` waits for `minPosition`.

    `canonical` gives the canonical form of a target as typed, or raises `NoTarget`.
    """

    listing: Listing
    queries: JobQueries
    problem: Problem
    canonical: Canonical
    now: Callable[[], datetime]

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/api/lookup", self.list_jobs), web.get("/api/stats", self.tell_stats)]

    async def list_jobs(self, request: web.Request) -> web.Response:
        """Newest first."""
        wanted = self._wanted(request)
        if isinstance(wanted, web.Response):
            return wanted
        try:
            return await self._answered(self._page(wanted, preferred_wait_s(request) or REACH_MAX_S))
        except ViewBehind:
            message = BEHIND.format(position=wanted.min_position)
            return self.problem(503, "view_behind", message, headers={"Retry-After": str(RETRY_AFTER_S)})

    async def tell_stats(self, request: web.Request) -> web.Response:
        text = request.query.get("hours")
        if (unknown := self._unknown_parameter(request, "hours")) is not None:
            return unknown
        if text is None:
            return await self._answered(self._told_stats(None))
        count = _number(text, STATS_HOURS_MAX)
        if count is None:
            return self.problem(400, "hours_invalid", HOURS_INVALID)
        this_hour = int(self.now().timestamp()) // HOUR_S
        return await self._answered(self._told_stats(range(this_hour - count + 1, this_hour + 1)))

    async def _page(self, wanted: Wanted, within_s: float) -> bytes:
        if wanted.min_position:
            await self.queries.reached(wanted.min_position, within_s)
        page = await self.listing.jobs(wanted)
        if page.position < wanted.min_position:
            raise ViewBehind  # The list may be of another generation than the documents, which were waited for.
        return b'{"jobs":[%b],"next":%b,"position":%d}' % (b",".join(page.jobs), orjson.dumps(page.next), page.position)

    async def _told_stats(self, hours: Sequence[int] | None) -> bytes:
        stats, position = await self.listing.stats(hours)
        services = [_told(service, of_service) for service, of_service in stats.items()]
        told = {"services": services, "hours": None if hours is None else len(hours), "relativeError": RELATIVE_ERROR}
        return orjson.dumps({**told, "position": position})

    async def _answered(self, body: Awaitable[bytes]) -> web.Response:
        retry = {"Retry-After": str(RETRY_AFTER_S)}
        try:
            answer = await body
        except ViewsRebuilding:
            return self.problem(503, "views_rebuilding", REBUILDING, headers=retry)
        except ViewsUnavailable:
            return self.problem(503, "views_unavailable", UNAVAILABLE, headers=retry)
        return web.Response(body=answer, content_type="application/json", headers={"Cache-Control": "no-cache"})

    def _wanted(self, request: web.Request) -> Wanted | web.Response:
        """What the query asks for, or what is wrong with it."""
        query = request.query
        if (unknown := self._unknown_parameter(request, "limit", "after", "status", "target", "minPosition")) is not None:
            return unknown
        limit = _number(query.get("limit", str(LIMIT_DEFAULT)), LIMIT_MAX)
        if limit is None:
            return self.problem(400, "limit_invalid", LIMIT_INVALID)
        status = query.get("status")
        if status is not None and status not in STATUSES:
            return self.problem(400, "status_invalid", STATUS_INVALID)
        try:
            after = position_of(query["after"]) if "after" in query else None
        except ValueError:
            return self.problem(400, "after_invalid", AFTER_INVALID)
        try:
            target = self.canonical(query["target"]) if "target" in query else None
        except NoTarget as refused:
            return self.problem(400, refused.code, refused.message)
        try:
            min_position = position_of(query.get("minPosition", "0"))
        except ValueError:
            return self.problem(400, "min_position_invalid", MIN_POSITION_INVALID)
        return Wanted(limit, after, status, target, min_position)

    def _unknown_parameter(self, request: web.Request, *known: str) -> web.Response | None:
        """A filter that is misspelled would list everything."""
        if set(request.query) <= set(known) and len(request.query) == len(set(request.query)):
            return None
        return self.problem(400, "parameter_unknown", PARAMETER_UNKNOWN.format(known=", ".join(known)))


def _number(text: str, greatest: int) -> int | None:
    """A whole number from 1 to `greatest`; None for anything else."""
    if not (text.isascii() and text.isdecimal()) or len(text) > len(str(greatest)):
        return None
    return int(text) if 1 <= int(text) <= greatest else None


def _told(service: Service, stats: ServiceStats) -> dict[str, Any]:
    return {
        "service": service,
        "succeeded": stats.outcomes.get("succeeded", 0),
        "failed": stats.outcomes.get("failed", 0),
        "timedOut": stats.outcomes.get("timed_out", 0),
        "skipped": stats.outcomes.get("skipped", 0),
        "successShare": stats.success_share,
        "errors": dict(sorted(stats.errors.items())),
        "durationMs": {name: stats.duration_ms(quantile) for name, quantile in QUANTILES.items()},
    }
