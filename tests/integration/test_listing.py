"""Lists of jobs and the services' numbers over HTTP, from a real Redis that a real projector has filled. No PostgreSQL."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import orjson
import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from redis.asyncio import Redis
from uuid_utils.compat import uuid7

from app.http.middlewares import with_problems, with_request_id
from app.http.problem import problem
from app.wiring import _canonical_target
from events.facts import JobFact, Target, TargetType, TaskCompleted
from events.memory import MemoryBus, MemoryStore
from events.store import AppendUnit, NewFacts, StreamHead
from projections.projector import Projector
from projections.view_store import RedisViews
from projections.views import JOB_STATUS, JOBS_BY_TARGET, JOBS_BY_TIME, Keys
from read_side import listing as module
from read_side.listing import RELATIVE_ERROR, Listing
from read_side.listing_api import STATUSES, ListingApi
from read_side.queries import JobQueries
from results.documents import MemoryDocuments
from tests.builders import (
    ADDRESS,
    CAUSE,
    DOMAIN,
    PING,
    RDAP,
    RULES,
    Clock,
    completed,
    counts,
    deferred,
    dispatched,
    eventually,
    failed,
    job_cancelled,
    job_completed,
    job_failed,
    memory_store,
    submitted,
    timed_out,
)
from tests.peers.lookups import closed_port

KEYS = Keys()
RETENTION = timedelta(hours=24)
NOW = datetime.now(UTC).replace(microsecond=0)
"""Of today: Redis lets documents go by its own clock."""
Get = Callable[..., Awaitable[tuple[int, Any]]]


class Shelf:
    """A log, the views that a projector makes of it in Redis, and what lists them."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.clock = Clock(NOW)
        self.store: MemoryStore = memory_store(self.clock)
        self.documents = MemoryDocuments()
        self._projector: Projector | None = None

    async def happened(self, *facts: JobFact) -> int:
        """Appends the facts of one job; gives the position of its first fact."""
        job_id = facts[0].job_id
        stream = (await self.store.read([job_id])).get(job_id, ())
        version = stream[-1].stream_version if stream else 0
        await self.store.append(AppendUnit([NewFacts(job_id, StreamHead(version), facts)], CAUSE))
        return (await self.store.read([job_id]))[job_id][0].position

    async def job(self, ending: str = "Completed", target: Target = ADDRESS, when: datetime | None = None) -> tuple[UUID, int]:
        """A job with this status; gives its id and its place on the lists."""
        of, at = uuid7(), when or self.clock.now
        ends: dict[str, list[JobFact]] = {
            "Pending": [
                deferred(PING, until=at, job_id=of, when=at),
                deferred(RDAP, until=at, job_id=of, when=at),
            ],
            "Processing": [],
            "Completed": [completed(PING, job_id=of, when=at), job_completed(counts(succeeded=1), job_id=of, when=at)],
            "Failed": [failed(PING, job_id=of, when=at), job_failed(counts(failed=1), job_id=of, reason="none", when=at)],
            "Cancelled": [job_cancelled(job_id=of, when=at)],
        }
        await self.documents.put(of, b'{"answer":42}')
        first = submitted(PING, RDAP, job_id=of, target=target, when=at)
        return of, await self.happened(first, dispatched(PING, RDAP, job_id=of, when=at), *ends[ending])

    async def jobs(self, count: int, **how: Any) -> list[int]:
        """Gives their places on the lists, in order."""
        return [(await self.job(**how))[1] for _ in range(count)]

    async def project(self) -> None:
        if self._projector is None:
            views = RedisViews(self.redis)
            self._projector = Projector(views, self.store, self.documents, MemoryBus(), RULES, RETENTION, self.clock)
            await self._projector._become_leader()
            self._projector._log_id = str(await self.store.log_id())
            await self._projector._take_over()
        await self._projector.catch_up()

    async def document(self, job_id: UUID) -> Any:
        """What a poller gets."""
        found: Any = await self.redis.get(KEYS.job(await self.generation(), job_id))
        return orjson.loads(found.partition(b"\n")[2])

    async def generation(self) -> str:
        """Of the documents that are shown."""
        shown: Any = await self.redis.hget(KEYS.live, JOB_STATUS)
        return str(shown.decode())


@pytest.fixture
async def shelf(redis_url: str) -> AsyncIterator[Shelf]:
    async with Redis.from_url(redis_url) as redis:
        yield Shelf(redis)


@asynccontextmanager
async def listing(
    redis: Redis,
    now: Callable[[], datetime] = Clock(NOW),  # noqa: B008 - it stands still
    queries: JobQueries | None = None,
) -> AsyncIterator[Get]:
    app = web.Application(middlewares=[with_request_id, with_problems])
    queries = queries or JobQueries(redis, now, KEYS)
    app.add_routes(ListingApi(Listing(redis), queries, problem, _canonical_target, now).routes())
    async with TestServer(app) as server, ClientSession() as http:

        async def get(
            path: str = "/api/lookup", *pairs: tuple[str, str], prefer: str = "", **query: str | int
        ) -> tuple[int, Any]:
            params = [*pairs, *((name, str(value)) for name, value in query.items())]
            async with http.get(server.make_url(path), params=params, headers={"Prefer": prefer}) as answer:
                return answer.status, orjson.loads(await answer.read())

        yield get


async def followed(get: Get, *, then: Callable[[], Awaitable[object]] | None = None, **query: str | int) -> list[list[int]]:
    """All pages from the first one on, as the positions on each; `then` is done after each page."""
    pages: list[list[int]] = []
    after: dict[str, int] = {}
    while True:
        status, page = await get(**query, **after)
        assert status == 200, page
        pages.append([job["position"] for job in page["jobs"]])
        if page["next"] is None:
            return pages
        after = {"after": page["next"]}
        assert len(pages) < 1_000
        if then is not None:
            await then()


def flat(pages: Sequence[Sequence[int]]) -> list[int]:
    return [position for page in pages for position in page]


# --- Pages ------------------------------------------------------------------------------------------------------------


async def test_a_row_is_what_the_jobs_own_document_says_before_its_results(shelf: Shelf) -> None:
    awkward = Target(raw='B\u00fc"cher\\,"status":"Failed",\u00e9.example', canonical="xn--x.example", type=TargetType.DOMAIN)
    job_id, position = await shelf.job(target=awkward)
    await shelf.project()

    async with listing(shelf.redis) as get:
        status, page = await get()

    document = await shelf.document(job_id)
    names = ("jobId", "target", "targetType", "status", "createdAt", "completedAt")
    assert status == 200
    assert page == {
        "jobs": [{**{name: document[name] for name in names}, "position": position}],
        "next": None,
        "position": await shelf.store.head(),
    }


async def test_pages_go_from_the_newest_job_to_the_oldest_and_hold_each_once(shelf: Shelf) -> None:
    places: list[int] = []
    for hour in range(4):
        shelf.clock.move_to(NOW + timedelta(hours=hour))
        places += await shelf.jobs(7)
    await shelf.project()

    async with listing(shelf.redis) as get:
        pages = await followed(get, limit=5)

    assert flat(pages) == places[::-1]
    assert [len(page) for page in pages] == [5, 5, 5, 5, 5, 3]


async def test_jobs_that_are_taken_on_meanwhile_move_nothing_on_the_pages_behind(shelf: Shelf) -> None:
    """Exactly once each: those that were there when the first page was asked for, none of them twice and none left out."""
    places = await shelf.jobs(23)
    await shelf.project()

    async def more_come() -> None:
        await shelf.jobs(3)
        await shelf.project()

    async with listing(shelf.redis) as get:
        pages = await followed(get, limit=4, then=more_come)

    assert flat(pages) == places[::-1]


async def test_the_order_is_that_of_the_log_although_clocks_differ_at_the_turn_of_an_hour(shelf: Shelf) -> None:
    turn = NOW.replace(minute=0, second=0) + timedelta(hours=1)
    chance = random.Random(4)
    places = [(await shelf.job(when=turn + timedelta(seconds=number - 20 + chance.uniform(-9, 9))))[1] for number in range(40)]
    await shelf.project()

    async with listing(shelf.redis) as get:
        for limit in (1, 3, 200):
            assert flat(await followed(get, limit=limit)) == places[::-1]


async def test_a_job_whose_document_has_gone_is_passed_over(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOKED_AT_MAX", 6)
    jobs = [await shelf.job() for _ in range(30)]
    await shelf.project()
    generation = await shelf.generation()
    await shelf.redis.delete(*(KEYS.job(generation, job_id) for job_id, _ in jobs[4:27]))

    async with listing(shelf.redis) as get:
        pages = await followed(get, limit=2)

    assert flat(pages) == [place for _, place in (*jobs[:4], *jobs[27:])][::-1]
    assert max(map(len, pages)) == 2


# --- Filters ----------------------------------------------------------------------------------------------------------


async def test_a_status_lists_the_jobs_that_have_it_now(shelf: Shelf) -> None:
    of_each = {status: await shelf.jobs(3, ending=status) for status in STATUSES}
    open_job, place = await shelf.job("Processing")
    await shelf.project()
    await shelf.happened(completed(PING, job_id=open_job), job_completed(counts(succeeded=1), job_id=open_job, when=NOW))
    await shelf.project()

    async with listing(shelf.redis) as get:
        listed = {status: flat(await followed(get, status=status, limit=2)) for status in STATUSES}

    of_each["Completed"].append(place)
    assert listed == {status: places[::-1] for status, places in of_each.items()}


async def test_a_target_is_found_by_whatever_names_it_and_may_be_narrowed_to_a_status(shelf: Shelf) -> None:
    ours = {status: await shelf.jobs(2, ending=status, target=DOMAIN) for status in ("Completed", "Failed", "Processing")}
    await shelf.jobs(5, target=ADDRESS)
    await shelf.project()

    async with listing(shelf.redis) as get:
        everything = flat(await followed(get, target=" EXAMPLE.com. ", limit=4))
        failures = flat(await followed(get, target="example.com", status="Failed", limit=1))
        nobodys = await followed(get, target="example.org")

    assert everything == sorted((place for places in ours.values() for place in places), reverse=True)
    assert failures == ours["Failed"][::-1]
    assert nobodys == [[]]


async def test_no_key_or_list_tells_a_target(shelf: Shelf) -> None:
    """What names targets is the documents alone, so that who erases need look nowhere else."""
    await shelf.job(target=DOMAIN)
    await shelf.project()

    for view in (JOBS_BY_TIME, JOBS_BY_TARGET):
        keys = [key async for key in shelf.redis.scan_iter(f"{KEYS.prefix}*:{view}*")]
        assert keys
        for key in keys:
            told = b" ".join([key, *(await shelf.redis.zrange(key, 0, -1))])
            assert b"example" not in told.lower()


# --- What is wrong with a question ------------------------------------------------------------------------------------

BAD = [
    ([("limit", "0")], "limit_invalid"),
    ([("limit", "201")], "limit_invalid"),
    ([("limit", "9" * 5_000)], "limit_invalid"),
    ([("limit", "\u0661")], "limit_invalid"),
    ([("limit", "")], "limit_invalid"),
    ([("after", "-1")], "after_invalid"),
    ([("after", "x")], "after_invalid"),
    ([("after", str(2**63))], "after_invalid"),
    ([("status", "completed")], "status_invalid"),
    ([("status", "")], "status_invalid"),
    ([("target", "")], "target_required"),
    ([("target", "http://example.com/")], "target_not_plain"),
    *(([("minPosition", text)], "min_position_invalid") for text in ("-1", "x", "", "1.5", str(2**63))),
    ([("traget", "example.com")], "parameter_unknown"),
    ([("status", "Failed"), ("status", "Completed")], "parameter_unknown"),
]


async def test_a_client_may_ask_for_a_list_that_shows_a_position(shelf: Shelf) -> None:
    """Who was told the position of a job by its 202 finds the job on the list."""
    await shelf.job()
    await shelf.project()
    _, place = await shelf.job()
    queries = JobQueries(shelf.redis, Clock(NOW), KEYS)

    async with listing(shelf.redis, queries=queries) as get:
        asked = asyncio.ensure_future(get(minPosition=place, limit=1))
        await eventually(lambda: queries._waiters == 1)
        await shelf.project()
        status, told = await asked

    assert (status, [job["position"] for job in told["jobs"]]) == (200, [place])
    assert told["position"] >= place


async def test_a_list_that_does_not_show_a_position_in_time_is_refused(shelf: Shelf) -> None:
    _, place = await shelf.job()
    await shelf.project()
    head = await shelf.store.head()

    async with listing(shelf.redis) as get:
        assert (await get(minPosition=head, prefer="wait=1"))[0] == 200
        status, told = await get(minPosition=head + 1, prefer="wait=1")

    assert place < head
    assert (status, told["code"]) == (503, "view_behind")
    assert told["error"] == f"The views have not come as far as position {head + 1} yet. Try again shortly."


async def test_a_list_of_a_generation_that_is_behind_that_of_the_documents_is_refused(shelf: Shelf) -> None:
    """A view that was replayed alone is of a generation of its own."""
    await shelf.job()
    await shelf.project()
    head, generation = await shelf.store.head(), await shelf.generation()
    await shelf.redis.copy(KEYS.meta(generation), KEYS.meta("g1"))
    await shelf.redis.hset(KEYS.meta("g1"), "checkpoint", str(head - 1))
    await shelf.redis.hset(KEYS.live, JOBS_BY_TIME, "g1")

    async with listing(shelf.redis) as get:
        before = await get(minPosition=head - 1, prefer="wait=1")
        status, told = await get(minPosition=head, prefer="wait=1")

    assert (before[0], before[1]["position"]) == (200, head - 1)
    assert (status, told["code"]) == (503, "view_behind")


@pytest.mark.parametrize(("query", "code"), BAD, ids=[f"{query[0][0]}={query[0][1][:9]}" for query, _ in BAD])
async def test_a_bad_question_is_told_what_is_wrong_with_it(shelf: Shelf, query: list[tuple[str, str]], code: str) -> None:
    async with listing(shelf.redis) as get:
        status, told = await get("/api/lookup", *query)

    assert (status, told["code"]) == (400, code)


@pytest.mark.parametrize("hours", ["0", "169", "x", "1.5"])
async def test_hours_are_a_bounded_number(shelf: Shelf, hours: str) -> None:
    async with listing(shelf.redis) as get:
        assert [(await get("/api/stats", hours=hours))[1]["code"]] == ["hours_invalid"]
        assert [(await get("/api/stats", hour=hours))[1]["code"]] == ["parameter_unknown"]


@pytest.mark.parametrize("path", ["/api/lookup", "/api/stats"])
async def test_views_that_are_not_built_or_cannot_be_reached_are_said_to_be_so(shelf: Shelf, path: str) -> None:
    async with listing(shelf.redis) as get:
        status, told = await get(path)
    assert (status, told["code"]) == (503, "views_rebuilding")

    with closed_port() as port:
        async with Redis.from_url(f"redis://127.0.0.1:{port}/0") as nobody, listing(nobody) as get:
            status, told = await get(path)
    assert (status, told["code"]) == (503, "views_unavailable")


# --- Numbers ----------------------------------------------------------------------------------------------------------


async def test_the_numbers_of_a_service_are_those_of_its_facts(shelf: Shelf) -> None:
    chance = random.Random(6)
    durations: list[int] = []
    outcomes: Counter[str] = Counter()
    for _ in range(300):
        of = uuid7()
        duration_ms = int(chance.lognormvariate(4, 1))
        endings: list[JobFact] = [answered(of, duration_ms), failed(PING, job_id=of), timed_out(PING, job_id=of)]
        ending = chance.choices(endings, weights=[7, 2, 1])[0]
        outcomes[type(ending).__name__] += 1
        durations += [duration_ms] if isinstance(ending, TaskCompleted) else []
        await shelf.happened(submitted(PING, job_id=of), dispatched(PING, job_id=of), ending)
    await shelf.project()

    async with listing(shelf.redis) as get:
        status, told = await get("/api/stats")

    ping = next(service for service in told["services"] if service["service"] == "Ping")
    assert status == 200
    assert told["hours"] is None
    assert told["position"] == await shelf.store.head()
    assert (ping["succeeded"], ping["failed"], ping["timedOut"]) == (
        outcomes["TaskCompleted"],
        outcomes["TaskFailed"],
        outcomes["TaskTimedOut"],
    )
    assert ping["successShare"] == pytest.approx(outcomes["TaskCompleted"] / 300)
    assert ping["errors"] == {"other": outcomes["TaskFailed"]}
    durations.sort()
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        exact = durations[-(-int(share * 100) * len(durations) // 100) - 1]
        assert ping["durationMs"][name] == pytest.approx(exact, rel=RELATIVE_ERROR, abs=0.5)


def answered(of: UUID, duration_ms: int) -> TaskCompleted:
    return completed(PING, job_id=of).model_copy(update={"duration_ms": duration_ms})


async def test_hours_are_the_last_ones_and_this_one(shelf: Shelf) -> None:
    for hour in range(5):
        shelf.clock.move_to(NOW + timedelta(hours=hour))
        for _ in range(hour + 1):
            await shelf.job("Failed")
    await shelf.project()

    async with listing(shelf.redis, shelf.clock) as get:
        failed_in = []
        for hours in (1, 2, 5, 168):
            _, told = await get("/api/stats", hours=hours)
            failed_in.append(sum(service["failed"] for service in told["services"]))

    assert failed_in == [5, 9, 15, 15]
