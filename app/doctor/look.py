"""What the doctor asks the servers: the views of many jobs at one moment, and how far relay and projector have come."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, LiteralString
from uuid import UUID

from redis.asyncio import Redis

from app.audit.rows import told_hash
from app.doctor.jobs import Shown
from app.doctor.machinery import Machinery, Projection
from app.health import view_meta
from app.heartbeat import heartbeats
from app.lag import at_of, reached
from app.self_check import last_check
from events.connections import BoundedAsyncConnection
from events.store import HistoryReader
from projections.views import Keys
from write_side import checkpoints, dead_letters
from write_side.checkpoints import RELAY_LOCK

CONNECT_TIMEOUT_S = 2
_SELECT_RELAY_LEADS: LiteralString = """
SELECT EXISTS (
    SELECT FROM pg_locks JOIN pg_database ON pg_database.oid = pg_locks.database
    WHERE datname = current_database() AND locktype = 'advisory' AND objsubid = 1 AND granted
    AND (classid::bigint << 32 | objid::bigint) = %s
)
"""

LOOK = """
-- All of one moment. KEYS: live. ARGV: key prefix, job ids.
-- Gives the generation of the jobs' views, its log id, its checkpoint; the generation of the to-do list, '' without one that
-- stands there too; then for each job its view, the ms that it has left, its due ms.
local generation = redis.call('HGET', KEYS[1], 'job_status')
if not generation then return false end
local base = ARGV[1] .. generation
local meta = redis.call('HMGET', base .. ':meta', 'log_id', 'checkpoint')
local list = redis.call('HGET', KEYS[1], 'deadlines') or ''
if list ~= '' and redis.call('HGET', ARGV[1] .. list .. ':meta', 'checkpoint') ~= meta[2] then list = '' end
local answer = {generation, meta[1], meta[2], list}
for at = 2, #ARGV do
  local key = base .. ':job_status:' .. ARGV[at]
  answer[#answer + 1] = redis.call('GET', key)
  answer[#answer + 1] = redis.call('PTTL', key)
  answer[#answer + 1] = list ~= '' and redis.call('ZSCORE', ARGV[1] .. list .. ':deadlines', ARGV[at])
end
return answer
"""

PUT_RIGHT = """
-- Changes one job's view and its place on the to-do list, if both are still as they were seen: then no fact of the job was
-- folded since, and what is right for the facts up to then is right now. KEYS: live, view, deadlines.
-- ARGV: generation, view seen ('' = none), right view, second at which it expires (0 = never), job id, due ms ('' = nothing),
-- generation of the to-do list.
if redis.call('HGET', KEYS[1], 'job_status') ~= ARGV[1] then return 0 end
if redis.call('HGET', KEYS[1], 'deadlines') ~= ARGV[7] then return 0 end
if (redis.call('GET', KEYS[2]) or '') ~= ARGV[2] then return 0 end
if ARGV[4] == '0' then
  redis.call('SET', KEYS[2], ARGV[3])
else
  redis.call('SET', KEYS[2], ARGV[3], 'EXAT', ARGV[4])
end
if ARGV[6] == '' then
  redis.call('ZREM', KEYS[3], ARGV[5])
else
  redis.call('ZADD', KEYS[3], ARGV[6], ARGV[5])
end
return 1
"""


@dataclass(frozen=True, slots=True)
class ShownJobs:
    """What is shown of some jobs at one moment: the generation of their views and its checkpoint.

    `to_do_list` is the generation of the to-do list, empty unless it stands at the same checkpoint.
    """

    generation: str
    to_do_list: str
    log_id: str
    checkpoint: int
    jobs: Mapping[UUID, Shown]


async def look_at(redis: Redis, keys: Keys, job_ids: Sequence[UUID]) -> ShownJobs | None:
    """The views of these jobs, None without a live generation. Raises `RedisError`."""
    script = redis.register_script(LOOK)
    answer: Any = await script(keys=[keys.live], args=[keys.prefix, *(str(job_id) for job_id in job_ids)])
    if answer is None:
        return None
    generation, log_id, checkpoint, to_do_list, *of_jobs = answer
    jobs = {
        job_id: Shown(value, left_ms >= 0, None if due is None else int(float(due)), is_listed=bool(to_do_list))
        for job_id, value, left_ms, due in zip(job_ids, of_jobs[::3], of_jobs[1::3], of_jobs[2::3], strict=True)
    }
    return ShownJobs(generation.decode(), to_do_list.decode(), (log_id or b"").decode(), int(checkpoint or 0), jobs)


# --- How far they have come -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Relay:
    """What the database knows of the relay: a position and a log head for each checkpoint, and whether anybody leads."""

    checkpoints: Mapping[str, tuple[int, bytes]]
    leads: bool


async def look_at_relay(database_url: str) -> Relay:
    """Raises `psycopg.Error`."""
    connecting = BoundedAsyncConnection.connect(database_url, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S)
    async with await connecting as conn:
        rows = await (await conn.execute(checkpoints.SELECT)).fetchall()
        leads = await (await conn.execute(_SELECT_RELAY_LEADS, (RELAY_LOCK,))).fetchone()
    return Relay({name: (position, bytes(log_head)) for name, position, log_head in rows}, leads == (True,))


async def look_at_machinery(
    database_url: str, store: HistoryReader, dead_letter_max_age: timedelta, lag_max: timedelta, now: datetime
) -> Machinery:
    """What the database knows. Raises `StoreUnavailable` or `psycopg.Error`."""
    relay = await look_at_relay(database_url)
    began = await reached(store, 0)
    relayed = {name: await reached(store, position) for name, (position, _) in relay.checkpoints.items()}
    oldest = await dead_letters.oldest_waiting(database_url)
    head = await store.head()
    return Machinery(now, head, relayed, relay.leads, oldest, dead_letter_max_age, lag_max, began.waiting_since)


async def with_redis(
    machinery: Machinery, store: HistoryReader, redis: Redis, keys: Keys, self_check_every: timedelta
) -> Machinery:
    """And what Redis knows. Raises `StoreUnavailable` or `RedisError`."""
    parts = await heartbeats(redis)
    meta = await view_meta(redis, keys)
    projection = await _projection(store, meta) if meta else None
    last = await last_check(redis)
    is_ours = last is not None and last.log_id == str(await store.log_id())
    return replace(
        machinery,
        redis_answers=True,
        projection=projection,
        parts=parts,
        self_check=last if is_ours else None,
        self_check_every=self_check_every,
    )


async def _projection(store: HistoryReader, meta: Mapping[str, str]) -> Projection:
    position = int(meta.get("checkpoint", 0))
    stands = meta.get("log_id") == str(await store.log_id()) and await _has_fact(store, position, meta.get("hash", ""))
    return Projection(meta["generation"], await reached(store, position), stands, at_of(meta, "checked_ms"))


async def _has_fact(store: HistoryReader, position: int, fact_hash: str) -> bool:
    if position == 0:
        return True
    found = await store.read_all(position - 1, 1)
    return bool(found) and found[0].position == position and told_hash(found[0]).hex() == fact_hash
