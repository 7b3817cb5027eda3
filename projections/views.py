"""The views' types, key names and scripts: all that the query service knows of the projections.

Everything is per partition (today there is one) and per generation: a rebuild fills new keys beside the live ones, and a
pointer says which generation is live. Keys of one partition share a hash tag, so that one script may touch them on a Redis
Cluster too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any
from uuid import UUID

import orjson

from events.facts import ResultReference, Service, TargetType

JOB_STATUS_VERSION = 1
"""Part of the ETag: raised when the same facts give other bytes."""

ERASED_TEXT = "[erased]"
MISSING_RESULT = "The stored result of {service} is missing or damaged."


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """One service's part of a job, as a poller sees it. `result` says where its document lies."""

    status: str = "Pending"
    attempt: int = 1
    error_message: str | None = None
    completed_at: datetime | None = None
    duration_ms: int | None = None
    result: ResultReference | None = None


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job as a poller sees it."""

    job_id: UUID
    target: str
    target_type: TargetType
    services: tuple[Service, ...]
    created_at: datetime
    status: str = "Pending"
    completed_at: datetime | None = None
    tasks: Mapping[Service, TaskStatus] = field(default_factory=lambda: MappingProxyType({}))


ENDED = frozenset({"Succeeded", "Failed", "TimedOut", "Skipped"})


def document_of(job: JobStatus, documents: Mapping[str, bytes]) -> bytes:
    """The JSON that a poller gets. `documents` are the results by their key; one that is missing becomes null and a warning."""
    warnings: list[str] = []
    results = [_result(service, job.tasks[service], documents, warnings) for service in job.services]
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


def _result(service: Service, task: TaskStatus, documents: Mapping[str, bytes], warnings: list[str]) -> dict[str, Any]:
    data: orjson.Fragment | None = None
    if task.result is not None:
        document = documents.get(task.result.location.key)
        if document is None:
            warnings.append(MISSING_RESULT.format(service=service))
        else:
            data = orjson.Fragment(document)
    return {
        "serviceType": service,
        "success": task.status == "Succeeded",
        "status": task.status,
        "data": data,
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
        """Names the live generation."""
        return f"{self.prefix}live"

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
        """The channel that tells each new checkpoint."""
        return f"{self.prefix}moved"

    def meta(self, generation: str) -> str:
        """Hash: log_id, checkpoint, hash, complete (0 or 1), caught_up_ms, checked_ms."""
        return f"{self.prefix}{generation}:meta"

    def job(self, generation: str, job_id: UUID | str) -> str:
        """A poller's document: the position of the job's last fact, a line feed, the JSON."""
        return f"{self.prefix}{generation}:job:{job_id}"

    def deadlines(self, generation: str) -> str:
        """Sorted set: job id by the millisecond at which something is due."""
        return f"{self.prefix}{generation}:deadlines"


LEAD = """
-- KEYS: lease, fence. ARGV: lease in ms, a fresh id. Gives our fence, or nothing while somebody else leads.
-- The id keeps a fence from coming again when a wiped Redis counts from one anew.
if redis.call('EXISTS', KEYS[1]) == 1 then return false end
local fence = redis.call('INCR', KEYS[2]) .. '-' .. ARGV[2]
redis.call('SET', KEYS[1], fence, 'PX', ARGV[1])
return fence
"""

BEGIN = """
-- KEYS: lease, live, meta of the new generation. ARGV: fence, generation, log id. Starts an empty generation and makes it live.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[3], 'log_id', ARGV[3], 'checkpoint', 0, 'hash', '', 'complete', 0, 'caught_up_ms', 0, 'checked_ms', 0)
redis.call('SET', KEYS[2], ARGV[2])
return 1
"""

COMMIT = """
-- Moves views and checkpoint in one step, or nothing. KEYS: lease, live, meta, deadlines.
-- ARGV: fence, generation, log id, expected checkpoint, new checkpoint, its hash, complete, caught up until (ms), now (ms),
-- lease (ms), channel, number of documents, then for each: key, value, second at which it expires (0 = never),
-- then for each job whose due time changed: job id, due ms ('' = nothing is due any more).
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 'fenced' end
if redis.call('GET', KEYS[2]) ~= ARGV[2] then return 'generation' end
local meta = redis.call('HMGET', KEYS[3], 'log_id', 'checkpoint')
if meta[1] ~= ARGV[3] or meta[2] ~= ARGV[4] then return 'checkpoint' end
local at = 13
for _ = 1, tonumber(ARGV[12]) do
  if ARGV[at + 2] == '0' then
    redis.call('SET', ARGV[at], ARGV[at + 1])
  else
    redis.call('SET', ARGV[at], ARGV[at + 1], 'EXAT', ARGV[at + 2])
  end
  at = at + 3
end
while at < #ARGV do
  if ARGV[at + 1] == '' then
    redis.call('ZREM', KEYS[4], ARGV[at])
  else
    redis.call('ZADD', KEYS[4], ARGV[at + 1], ARGV[at])
  end
  at = at + 2
end
redis.call('HSET', KEYS[3], 'checkpoint', ARGV[5], 'hash', ARGV[6], 'complete', ARGV[7], 'caught_up_ms', ARGV[8],
  'checked_ms', ARGV[9])
redis.call('PEXPIRE', KEYS[1], ARGV[10])
if ARGV[5] ~= ARGV[4] then redis.call('PUBLISH', ARGV[11], ARGV[5]) end
return 'ok'
"""

GET_JOBS = """
-- KEYS: live. ARGV: key prefix, job ids. Gives: generation's complete, caught_up_ms, then the document of each job.
local generation = redis.call('GET', KEYS[1])
local answer = {false, false}
if not generation then
  for at = 2, #ARGV do answer[at + 1] = false end
  return answer
end
local base = ARGV[1] .. generation
local meta = redis.call('HMGET', base .. ':meta', 'complete', 'caught_up_ms')
answer = {meta[1], meta[2]}
for at = 2, #ARGV do answer[at + 1] = redis.call('GET', base .. ':job:' .. ARGV[at]) end
return answer
"""

DUE = """
-- KEYS: live. ARGV: key prefix, now (ms), how long a check is good for (ms), at most so many.
-- Gives the ids of jobs with something due, or nothing when the list is absent or not looked after.
local generation = redis.call('GET', KEYS[1])
if not generation then return false end
local base = ARGV[1] .. generation
local meta = redis.call('HMGET', base .. ':meta', 'complete', 'checked_ms')
if meta[1] ~= '1' or tonumber(meta[2]) + tonumber(ARGV[3]) < tonumber(ARGV[2]) then return false end
return redis.call('ZRANGE', base .. ':deadlines', '-inf', ARGV[2], 'BYSCORE', 'LIMIT', 0, ARGV[4])
"""
