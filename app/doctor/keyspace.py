"""All keys and to-do entries that Redis has, each held against whom it belongs to."""

from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any
from uuid import UUID

from redis.asyncio import Redis

from app.doctor.checks import ORPHAN_KEY, UNKNOWN_TO_DO
from app.doctor.findings import KEPT_MAX, Finding
from app.doctor.redis_keys import Owner, all_of, as_job_id, generation_of, job_of, owner_of
from events.store import HistoryReader
from projections.generations import FORGOTTEN_AFTER_MS
from projections.view_store import RedisViews
from projections.views import DEADLINES, Keys

KEYS_PAGE = 1_000
STREAMS_PAGE = 200
NOBODYS = "It belongs to nothing that this program knows."
OF_AN_UNKNOWN_JOB = "It is the view of a job that the log does not know."
UNKNOWN = "It is on the to-do list, and the log does not know it."


class Keyspace:
    """One pass over Redis. Methods raise `RedisError` or `StoreUnavailable`; `examined` counts the keys of ours."""

    def __init__(self, redis: Redis, store: HistoryReader, keys: Keys) -> None:
        self._redis = redis
        self._store = store
        self._keys = keys
        self.examined = 0

    async def orphans(self) -> list[Finding]:
        """Keys that belong to nothing, at most `KEPT_MAX`; the keys of a generation that is not shown are one finding."""
        used = await generations_in_use(self._redis, self._keys)
        old: Counter[str] = Counter()
        nobodys: dict[str, str] = {}
        async for page in self._pages():
            by_owner: dict[Owner, list[str]] = {}
            for key in page:
                by_owner.setdefault(owner_of(key, used, self._keys), []).append(key)
            self.examined += len(page) - len(by_owner.get(Owner.SOMEBODY_ELSE, ()))
            old.update(generation_of(key, self._keys) or "" for key in by_owner.get(Owner.OLD_GENERATION, ()))
            if len(nobodys) < KEPT_MAX:
                nobodys |= dict.fromkeys(by_owner.get(Owner.NOBODY, ()), NOBODYS)
                nobodys |= dict.fromkeys(await self._of_unknown_jobs(by_owner.get(Owner.JOB, ())), OF_AN_UNKNOWN_JOB)
        if await generations_in_use(self._redis, self._keys) != used:
            return []  # The views have been built anew meanwhile: another run has to tell.
        return [*self._old_generations(old), *[_orphan(key, nobodys[key]) for key in nobodys if await self._exists(key)]]

    async def unknown_to_dos(self) -> list[Finding]:
        """Entries of the to-do list that are no job of the log. The others are looked at with their jobs."""
        live = await shown_generation(self._redis, self._keys, DEADLINES)
        unknown: dict[str, None] = {}
        cursor: int | None = None if live is None else 0
        while live is not None and cursor is not None:
            cursor, entries = await self._redis.zscan(self._keys.deadlines(live), cursor, count=KEYS_PAGE)
            members = [_text(member) for member, _ in entries]
            ids = {member: job_id for member in members if (job_id := as_job_id(member)) is not None and str(job_id) == member}
            known = await self._known(list(ids.values()))
            unknown |= dict.fromkeys(member for member in members if ids.get(member) not in known)
            cursor = cursor or None
        return [Finding(UNKNOWN_TO_DO.name, member, UNKNOWN) for member in unknown]

    async def _pages(self) -> AsyncIterator[list[str]]:
        cursor = 0
        while True:
            cursor, keys = await self._redis.scan(cursor, count=KEYS_PAGE)
            yield [_text(key) for key in keys]
            if cursor == 0:
                return

    async def _of_unknown_jobs(self, views: Sequence[str]) -> list[str]:
        jobs = {key: job_of(key, self._keys) for key in views}
        known = await self._known([job_id for job_id in jobs.values() if job_id is not None])
        return [key for key, job_id in jobs.items() if job_id not in known]

    async def _known(self, job_ids: Sequence[UUID]) -> set[UUID]:
        """Those that the log knows. What Redis had before we ask was in the log before."""
        known: set[UUID] = set()
        for first in range(0, len(job_ids), STREAMS_PAGE):
            known |= (await self._store.read(job_ids[first : first + STREAMS_PAGE])).keys()
        return known

    def _old_generations(self, old: Mapping[str, int]) -> list[Finding]:
        return [
            _orphan(all_of(generation, self._keys), f"{count} keys of views that nobody is shown any more.")
            for generation, count in old.items()
        ]

    async def _exists(self, key: str) -> bool:
        return bool(await self._redis.exists(raw(key)))


async def shown_generation(redis: Redis, keys: Keys, view: str) -> str | None:
    """The generation that a view is shown of."""
    shown: Any = await redis.hget(keys.live, view)
    return None if shown is None else shown.decode()


async def generations_in_use(redis: Redis, keys: Keys) -> frozenset[str]:
    """Those that are shown, fed, being built (or were so a while ago), or being removed bit by bit."""
    standing = await RedisViews(redis, keys).standing()
    dropped: Any = await redis.smembers(keys.dropped)
    clock: Any = await redis.time()
    young_ms = clock[0] * 1000 - FORGOTTEN_AFTER_MS
    built = {one.name for one in standing.built if one.checked_ms >= young_ms or one.checkpoint == 0}
    fed = {one.name for one in standing.fed}
    return frozenset({*standing.live.values(), *fed, *built, *(name.decode().partition(":")[0] for name in dropped)})


def raw(name: str) -> bytes:
    """The bytes of a name in Redis, whatever they are."""
    return name.encode(errors="surrogateescape")


def _text(name: Any) -> str:
    return bytes(name).decode(errors="surrogateescape")


def _orphan(about: str, problem: str) -> Finding:
    return Finding(ORPHAN_KEY.name, about, problem)
