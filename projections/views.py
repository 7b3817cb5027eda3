"""The views' types, key names and scripts: all that the query service knows of the projections.

Everything is per partition (today there is one) and per generation: a rebuild fills new keys beside the live ones, and a
pointer says for each view which generation is shown. Keys of one partition share a hash tag, so that one script may touch
them on a Redis Cluster too.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from hashlib import sha256
from types import MappingProxyType
from typing import Any, NamedTuple
from uuid import UUID

import orjson

from events.facts import ResultReference, Service, TargetType

JOB_STATUS = "job_status"
DEADLINES = "deadlines"
TARGET_HISTORY = "target_history"
JOBS_BY_TIME = "jobs_by_time"
JOBS_BY_TARGET = "jobs_by_target"
SERVICE_STATS = "service_stats"
"""The names of views that others read."""

ERASED_TEXT = "[erased]"
MISSING_RESULT = "The stored result of {service} is missing or damaged."
ERASED_RESULT = "The result of {service} was erased."


@lru_cache(1_000)
def target_key(canonical: str) -> str:
    """The sub-key of a target in the views that are about targets: a key's name tells nothing of whom was asked about."""
    return sha256(f"target:{canonical}".encode()).hexdigest()


HOUR_S = 3_600
STATS_TOTAL = "total"
STATS_HOURS_MAX = 168
"""So many hours `service_stats` keeps beside the total, by the log's time."""


def _bands() -> tuple[int, ...]:
    """Each is a tenth above the one before it, and at least 1 ms: whole numbers, so that every machine has the same."""
    bands = [0]
    while bands[-1] < 3_600_000:  # noqa: PLR2004 - an hour, in ms: no attempt takes as long
        bands.append(max(bands[-1] + 1, bands[-1] * 11 // 10))
    return tuple(bands)


BANDS = _bands()
"""The longest duration of each band of durations, in ms. What is longer than the last one is in one more band."""


def band_of(duration_ms: int) -> int:
    return bisect_left(BANDS, duration_ms)


class TaskStatus(NamedTuple):
    """One service's part of a job, as a poller sees it. `result` says where its document lies."""

    status: str = "Pending"
    attempt: int = 1
    error_message: str | None = None
    completed_at: datetime | None = None
    duration_ms: int | None = None
    result: ResultReference | None = None
    error_code: str | None = None


class JobStatus(NamedTuple):
    """A job as a poller sees it."""

    job_id: UUID
    target: str
    target_type: TargetType
    services: tuple[Service, ...]
    created_at: datetime
    status: str = "Pending"
    completed_at: datetime | None = None
    tasks: Mapping[Service, TaskStatus] = MappingProxyType({})


ENDED = frozenset({"Succeeded", "Failed", "TimedOut", "Skipped"})


def document_of(job: JobStatus, documents: Mapping[str, bytes]) -> bytes:
    """The JSON that a poller gets. `documents` are the results by their key; one that is missing becomes null and a warning."""
    warnings: list[str] = []
    missing = ERASED_RESULT if job.target == ERASED_TEXT else MISSING_RESULT
    results = [_result(service, job.tasks[service], documents, warnings, missing) for service in job.services]
    ended = sum(task.status in ENDED for task in job.tasks.values())
    return orjson.dumps(
        {
            "jobId": job.job_id,
            "target": job.target,
            "targetType": job.target_type,
            "status": job.status,
            "createdAt": job.created_at,
            "completedAt": job.completed_at,
            "completionPercentage": 100 * ended // len(job.services),
            "requestedServices": job.services,
            "results": results,
            "warnings": warnings,
        },
        option=orjson.OPT_UTC_Z,
    )


def _result(
    service: Service, task: TaskStatus, documents: Mapping[str, bytes], warnings: list[str], missing: str
) -> dict[str, Any]:
    data: orjson.Fragment | None = None
    if task.result is not None:
        document = documents.get(task.result.location.key)
        if document is None:
            warnings.append(missing.format(service=service))
        else:
            data = orjson.Fragment(document)
    return {
        "serviceType": service,
        "success": task.status == "Succeeded",
        "status": task.status,
        "data": data,
        "errorCode": task.error_code,
        "errorMessage": task.error_message,
        "completedAt": task.completed_at,
        "durationMs": task.duration_ms,
        "attempt": task.attempt,
    }


@dataclass(frozen=True, slots=True)
class Keys:
    """The key names of one partition."""

    partition: int = 0

    @property
    def prefix(self) -> str:
        return f"views:{{{self.partition}}}:"

    @property
    def live(self) -> str:
        """Hash: which generation of a view is shown, by the view's name."""
        return f"{self.prefix}shown"

    @property
    def fed(self) -> str:
        """Hash: the generations that the projector feeds (each with a 0)."""
        return f"{self.prefix}fed"

    @property
    def kept(self) -> str:
        """Hash: what is fed and not shown, as GENERATION:VIEW, by the Unix ms until which it is."""
        return f"{self.prefix}kept"

    @property
    def before(self) -> str:
        """Hash: of which generation a view was shown before, by the view's name: there a rollback goes."""
        return f"{self.prefix}before"

    @property
    def built(self) -> str:
        """Set: the generations that are being built, or were left half-built."""
        return f"{self.prefix}built"

    @property
    def builder(self) -> str:
        """The fence of who builds a generation now; expires when it falls silent."""
        return f"{self.prefix}builder"

    @property
    def roster(self) -> str:
        """A fresh id at each change of what is shown or fed: who commits tells which one it knows."""
        return f"{self.prefix}roster"

    @property
    def dropped(self) -> str:
        """Set: what is to be removed: whole generations, or single views as GENERATION:VIEW."""
        return f"{self.prefix}dropped"

    @property
    def fence(self) -> str:
        """Counts projectors that ever led."""
        return f"{self.prefix}fence"

    @property
    def lease(self) -> str:
        """The fence of the projector that leads now; expires when it falls silent."""
        return f"{self.prefix}lease"

    @property
    def moved(self) -> str:
        """The channel that tells each new checkpoint, and the ids of the jobs that ended with it: only their views expire.

        When one job ended alone, its view follows as it is shown now: after a space and a newline, the version of the view, a
        newline, and what lies under the job's key.
        """
        return f"{self.prefix}moved"

    def meta(self, generation: str) -> str:
        """Hash: log_id, checkpoint, hash, complete (0 or 1), caught_up_ms, checked_ms, log_s, and view:NAME, its version."""
        return f"{self.prefix}{generation}:meta"

    def marker(self, generation: str) -> str:
        """There while the generation is being built: `built`."""
        return f"{self.prefix}{generation}:marker"

    def expiry(self, generation: str) -> str:
        """Sorted set: keys that go by the log's time (the view's name and the sub-key), by the Unix second."""
        return f"{self.prefix}{generation}:expiry"

    def key(self, generation: str, view: str, key: str = "") -> str:
        """A key of a view."""
        return f"{self.prefix}{generation}:{view}:{key}" if key else f"{self.prefix}{generation}:{view}"

    def job(self, generation: str, job_id: UUID | str) -> str:
        """A poller's document: the position of the job's last fact, a line feed, the JSON."""
        return f"{self.prefix}{generation}:{JOB_STATUS}:{job_id}"

    def deadlines(self, generation: str) -> str:
        """Sorted set: job id by the millisecond at which something is due."""
        return self.key(generation, DEADLINES)


LEAD = """
-- KEYS: lease, fence. ARGV: lease in ms, a fresh id. Gives our fence, or nothing while somebody else leads.
-- The id keeps a fence from coming again when a wiped Redis counts from one anew.
if redis.call('EXISTS', KEYS[1]) == 1 then return false end
local fence = redis.call('INCR', KEYS[2]) .. '-' .. ARGV[2]
redis.call('SET', KEYS[1], fence, 'PX', ARGV[1])
return fence
"""

STANDING = """
-- KEYS: roster, live, kept, before, fed, built. ARGV: key prefix. Gives the roster; what is shown (view, generation, …), kept
-- and was shown before; and for each generation that is fed, then for each that is being built: its name, its meta.
local function told(names)
  local answer = {}
  for _, name in ipairs(names) do answer[#answer + 1] = {name, redis.call('HGETALL', ARGV[1] .. name .. ':meta')} end
  return answer
end
local answer = {redis.call('GET', KEYS[1])}
for number = 2, 4 do answer[number] = redis.call('HGETALL', KEYS[number]) end
return {answer[1], answer[2], answer[3], answer[4], told(redis.call('HKEYS', KEYS[5])), told(redis.call('SMEMBERS', KEYS[6]))}
"""

BEGIN = """
-- KEYS: lease, roster, live, fed, dropped, meta of the new generation, kept, before. ARGV: fence, new roster, generation,
-- log id, then for each view: name, version. Starts an empty generation of all views, shows it, and drops what was fed before.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
for _, generation in ipairs(redis.call('HKEYS', KEYS[4])) do redis.call('SADD', KEYS[5], generation) end
redis.call('DEL', KEYS[3], KEYS[4], KEYS[7], KEYS[8])
redis.call('HSET', KEYS[6], 'log_id', ARGV[4], 'checkpoint', 0, 'hash', '', 'complete', 0, 'caught_up_ms', 0, 'checked_ms', 0,
  'log_s', 0)
for at = 5, #ARGV, 2 do
  redis.call('HSET', KEYS[6], 'view:' .. ARGV[at], ARGV[at + 1])
  redis.call('HSET', KEYS[3], ARGV[at], ARGV[3])
end
redis.call('HSET', KEYS[4], ARGV[3], 0)
redis.call('SET', KEYS[2], ARGV[2])
return 1
"""

ARRANGE = """
-- Puts right what is fed and shown. KEYS: lease, roster, live, fed, kept, before, dropped.
-- ARGV: fence, the roster that is known, a new one, key prefix, then three words for each change: 'mark', GENERATION:VIEW, its
-- version (it is not what that version alone would have made of it any more); 'retire', GENERATION:VIEW, '' (it is not fed any
-- more); 'lose', generation, '' (nor shown).
local call = redis.call
if call('GET', KEYS[1]) ~= ARGV[1] then return 'fenced' end
if call('GET', KEYS[2]) ~= ARGV[2] then return 'generation' end
local function forget(hash, generation)
  local all = call('HGETALL', hash)
  for at = 1, #all, 2 do
    local is_of_it = all[at + 1] == generation or string.sub(all[at], 1, #generation + 1) == generation .. ':'
    if is_of_it then call('HDEL', hash, all[at]) end
  end
end
local function lose(generation)
  forget(KEYS[3], generation)
  forget(KEYS[5], generation)
  forget(KEYS[6], generation)
  call('HDEL', KEYS[4], generation)
  for _, name in ipairs(call('SMEMBERS', KEYS[7])) do
    if string.sub(name, 1, #generation + 1) == generation .. ':' then call('SREM', KEYS[7], name) end
  end
  call('SADD', KEYS[7], generation)
end
for at = 5, #ARGV, 3 do
  local generation, view = string.match(ARGV[at + 1], '^([^:]+):?(.*)$')
  local meta = ARGV[4] .. generation .. ':meta'
  if ARGV[at] == 'mark' then
    call('HSET', meta, 'view:' .. view, ARGV[at + 2])
  elseif ARGV[at] == 'lose' then
    lose(generation)
  elseif call('HGET', KEYS[3], view) ~= generation then
    call('HDEL', meta, 'view:' .. view)
    call('HDEL', KEYS[5], ARGV[at + 1])
    if call('HGET', KEYS[6], view) == generation then call('HDEL', KEYS[6], view) end
    call('SADD', KEYS[7], ARGV[at + 1])
    local holds = false
    for _, field in ipairs(call('HKEYS', meta)) do holds = holds or string.sub(field, 1, 5) == 'view:' end
    if not holds then lose(generation) end
  end
end
call('SET', KEYS[2], ARGV[3])
return 'ok'
"""

APPLY = """
-- The writes of a batch, made to one generation. Needs `names` (views by number) and `first` (where the writes begin in ARGV).
-- Writes of one kind are told together: what, the view's number, a colon and the sub-key, how many words follow, these words.
local call, byte = redis.call, string.byte
local function apply(base, held)
  local at = first
  while at <= #ARGV do
    local op, view = ARGV[at], tonumber(ARGV[at + 1])
    local name, from, last = names[view] .. ARGV[at + 2], at + 4, at + 3 + tonumber(ARGV[at + 3])
    local key = base .. name
    if byte(held, view) ~= 49 then
    elseif op == 'put' then
      for word = from, last, 3 do
        if ARGV[word + 2] == '0' then
          call('SET', key .. ARGV[word], ARGV[word + 1])
        else
          call('SET', key .. ARGV[word], ARGV[word + 1], 'EXAT', ARGV[word + 2])
        end
      end
    elseif op == 'rank' then
      call('ZADD', key, unpack(ARGV, from, last))
    elseif op == 'unrank' then
      call('ZREM', key, unpack(ARGV, from, last))
    elseif op == 'count' then
      for word = from, last, 2 do call('HINCRBY', key, ARGV[word], ARGV[word + 1]) end
    elseif op == 'below' then
      for word = from, last do call('ZREMRANGEBYSCORE', key, '-inf', ARGV[word]) end
    elseif op == 'keep' then
      for word = from, last do call('ZREMRANGEBYRANK', key, 0, -1 - tonumber(ARGV[word])) end
    elseif op == 'expire' then
      for word = from, last, 2 do call('ZADD', base .. ':expiry', 'GT', ARGV[word + 1], name .. ARGV[word]) end
    elseif op == 'remove' then
      call('UNLINK', key)
      call('ZREM', base .. ':expiry', name)
    else
      error('no such write: ' .. op)
    end
    at = last + 1
  end
end
local function expire(base, log_s, limit)
  local gone = call('ZRANGE', base .. ':expiry', '-inf', log_s, 'BYSCORE', 'LIMIT', 0, limit)
  for _, name in ipairs(gone) do
    call('UNLINK', base .. name)
    call('ZREM', base .. ':expiry', name)
  end
end
"""

COMMIT = (
    """
-- Moves the views and checkpoints of all generations that are fed in one step, or nothing. KEYS: lease, roster, live.
-- ARGV: fence, roster, log id, expected checkpoint, new checkpoint, its hash, complete, caught up until (ms), now (ms),
-- the log's time (s), lease (ms), channel, its message ('' = none), how many keys may expire, key prefix, a view of jobs, the
-- job whose view is told with the message ('' = none), number of views, their names, number of generations, then for each:
-- base of its keys, its checkpoint, which views it holds ('101'); then the writes.
-- A generation whose checkpoint is not the expected one is ahead: it is passed by until the others have come there.
local first, names = 0, {}
"""
    + APPLY
    + """
if call('GET', KEYS[1]) ~= ARGV[1] then return 'fenced' end
if call('GET', KEYS[2]) ~= ARGV[2] then return 'generation' end
local at = 19 + tonumber(ARGV[18])
for number = 19, at - 1 do names[#names + 1] = ':' .. ARGV[number] end
local generations = tonumber(ARGV[at])
first = at + 1 + 3 * generations
for number = at + 1, first - 1, 3 do
  local meta = call('HMGET', ARGV[number] .. ':meta', 'log_id', 'checkpoint')
  if meta[1] ~= ARGV[3] or meta[2] ~= ARGV[number + 1] then return 'checkpoint' end
end
for number = at + 1, first - 1, 3 do
  local base = ARGV[number]
  if ARGV[number + 1] == ARGV[4] then
    apply(base, ARGV[number + 2])
    local log_s = math.max(tonumber(call('HGET', base .. ':meta', 'log_s') or 0), tonumber(ARGV[10]))
    expire(base, log_s, ARGV[14])
    call('HSET', base .. ':meta', 'checkpoint', ARGV[5], 'hash', ARGV[6], 'complete', ARGV[7], 'caught_up_ms', ARGV[8],
      'checked_ms', ARGV[9], 'log_s', log_s)
  end
end
call('PEXPIRE', KEYS[1], ARGV[11])
if ARGV[13] ~= '' then
  local message = ARGV[13]
  local generation = ARGV[17] ~= '' and call('HGET', KEYS[3], ARGV[16])
  if generation then
    local base = ARGV[15] .. generation
    local document = call('GET', base .. ':' .. ARGV[16] .. ':' .. ARGV[17])
    local version = call('HGET', base .. ':meta', 'view:' .. ARGV[16])
    if document then message = message .. ' \\n' .. (version or '') .. '\\n' .. document end
  end
  call('PUBLISH', ARGV[12], message)
end
return 'ok'
"""
)

GET_JOBS = """
-- KEYS: live. ARGV: key prefix, the view, job ids. Gives: complete, caught_up_ms and checkpoint of the generation that is
-- shown, the view's version in it, then the document of each job.
local generation = redis.call('HGET', KEYS[1], ARGV[2])
local answer = {false, false, false, false}
if not generation then
  for at = 3, #ARGV do answer[at + 2] = false end
  return answer
end
local base = ARGV[1] .. generation
local meta = redis.call('HMGET', base .. ':meta', 'complete', 'caught_up_ms', 'checkpoint', 'view:' .. ARGV[2])
answer = {meta[1], meta[2], meta[3], meta[4]}
for at = 3, #ARGV do answer[at + 2] = redis.call('GET', base .. ':' .. ARGV[2] .. ':' .. ARGV[at]) end
return answer
"""

GET_RANKED = """
-- KEYS: live. ARGV: key prefix, the view, a sub-key. Gives whether the generation that is shown is complete, then all members
-- of a sorted set, the last first.
local generation = redis.call('HGET', KEYS[1], ARGV[2])
if not generation then return {false} end
local base = ARGV[1] .. generation
local answer = redis.call('ZRANGE', base .. ':' .. ARGV[2] .. ':' .. ARGV[3], 0, -1, 'REV')
table.insert(answer, 1, redis.call('HGET', base .. ':meta', 'complete'))
return answer
"""

DUE = """
-- KEYS: live. ARGV: key prefix, the view, now (ms), how far the list may be behind (ms), at most so many.
-- Gives the ids of jobs with something due, or nothing when the list is absent, or so far behind that jobs may be missing.
local generation = redis.call('HGET', KEYS[1], ARGV[2])
if not generation then return false end
local base = ARGV[1] .. generation
local meta = redis.call('HMGET', base .. ':meta', 'complete', 'caught_up_ms')
if meta[1] ~= '1' or tonumber(meta[2]) + tonumber(ARGV[4]) < tonumber(ARGV[3]) then return false end
return redis.call('ZRANGE', base .. ':' .. ARGV[2], '-inf', ARGV[3], 'BYSCORE', 'LIMIT', 0, ARGV[5])
"""
