"""Answers against a real Redis: one look, a bounded wait for what is on its way, and no 404 that a moment could refute."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import orjson
import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from redis.asyncio import Redis
from uuid_utils.compat import uuid7

from app.http.middlewares import with_problems, with_request_id
from app.http.problem import problem
from projections.views import JOB_STATUS, Keys
from read_side import queries as module
from read_side.api import ReadApi
from read_side.queries import Answer, JobQueries, ViewBehind, ViewsRebuilding, ViewsUnavailable
from tests.builders import eventually
from tests.peers.lookups import closed_port

KEYS = Keys()
GENERATION = "g1"
DOCUMENT = b'{"jobId":"1","results":[{"data":{"ttl":300}},{"data":null}]}'
UNDER_WAY = b'{"target":"\\"status\\":\\"Completed","status":"Processing","results":[{"status":"Succeeded"}]}'
ENDED = b'{"target":"a","status":"Failed","results":[{"status":"Pending"}]}'
PATIENCE_S = 10.0
LONG_WAIT_S = 15.0


@dataclass
class Board:
    """A Redis as the projector would leave it, and the queries that read it."""

    redis: Redis
    queries: JobQueries

    async def stands(self, *, caught_up: datetime | None = None, complete: bool = True, at: int = 7) -> None:
        """The views are there, and current until that time."""
        await self.redis.hset(KEYS.live, JOB_STATUS, GENERATION)
        until_ms = int((caught_up or _utc_now()).timestamp() * 1000)
        items: list[str | int] = ["complete", int(complete), "caught_up_ms", until_ms, "checkpoint", at, "view:job_status", 2]
        await self.redis.hset(KEYS.meta(GENERATION), items=items)
        await self.redis.publish(KEYS.moved, str(at))

    async def shows(self, job_id: UUID, body: bytes = DOCUMENT, position: int = 12) -> None:
        await self.redis.set(KEYS.job(GENERATION, job_id), b"%d\n%b" % (position, body))
        await self.redis.publish(KEYS.moved, f"{position} {job_id}")


def _utc_now() -> datetime:
    return datetime.now(UTC)


def made_ago(age: timedelta) -> UUID:
    """A job id of that age."""
    at_ms = int((_utc_now() - age).timestamp() * 1000)
    return UUID(int=(at_ms << 80) | (7 << 76) | (0b10 << 62) | 5)


@pytest.fixture
async def board(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Board]:
    """Queries that would rather wait too long: what is answered sooner was not waited for in vain."""
    monkeypatch.setattr(module, "WAIT_MAX_S", LONG_WAIT_S)
    async with Redis.from_url(redis_url) as redis:
        queries = JobQueries(redis, _utc_now)
        await queries.start()
        yield Board(redis, queries)
        await queries.stop()


async def soon(asked: Awaitable[Answer | None]) -> Answer | None:
    """The answer, which has to come earlier than a wait of `LONG_WAIT_S` would allow."""
    async with asyncio.timeout(PATIENCE_S):
        return await asked


# --- Known and unknown ------------------------------------------------------------------------------------------------


async def test_a_known_job_is_its_document_and_the_position_of_its_last_fact(board: Board) -> None:
    job_id = uuid7()
    await board.stands()
    await board.shows(job_id)

    assert await board.queries.job(job_id) == Answer(DOCUMENT, '"2-12"')


async def test_a_known_job_is_answered_however_far_the_views_are_behind(board: Board) -> None:
    job_id = uuid7()
    await board.stands(caught_up=_utc_now() - timedelta(hours=1), complete=False)
    await board.shows(job_id)

    assert await soon(board.queries.job(job_id)) == Answer(DOCUMENT, '"2-12"')


@pytest.mark.parametrize("job_id", [uuid4(), UUID(int=0), made_ago(timedelta(minutes=1))], ids=["v4", "nil", "old"])
async def test_an_id_that_the_views_would_know_by_now_is_unknown_at_once(board: Board, job_id: UUID) -> None:
    await board.stands()

    assert await soon(board.queries.job(job_id)) is None


@pytest.mark.parametrize("age_s", [0, 20], ids=["new", "held up between its id and its commit"])
async def test_a_young_unknown_id_is_waited_for_and_answered_the_moment_it_comes(board: Board, age_s: int) -> None:
    job_id = made_ago(timedelta(seconds=age_s))
    await board.stands(caught_up=_utc_now() - timedelta(seconds=1))
    asked = asyncio.create_task(board.queries.job(job_id))
    await eventually(lambda: board.queries._waiters == 1)

    await board.shows(job_id)

    assert await soon(asked) == Answer(DOCUMENT, '"2-12"')
    assert board.queries._waiters == 0


async def test_a_young_id_that_nobody_made_is_unknown_once_the_views_have_come_past_the_question(board: Board) -> None:
    await board.stands(caught_up=_utc_now() - timedelta(seconds=1))
    asked = asyncio.create_task(board.queries.job(uuid7()))
    await eventually(lambda: board.queries._waiters == 1)

    await board.stands(caught_up=_utc_now() + timedelta(milliseconds=5))

    assert await soon(asked) is None


async def test_no_404_is_said_while_the_views_stay_behind_the_question(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """A projector that died a second ago is hardly behind, and misses the jobs of that second."""
    monkeypatch.setattr(module, "WAIT_MAX_S", 0.2)
    await board.stands(caught_up=_utc_now() - timedelta(seconds=1))

    with pytest.raises(ViewsRebuilding):
        await soon(board.queries.job(uuid7()))


@pytest.mark.parametrize("job_id", [uuid4(), made_ago(timedelta(days=1))], ids=["v4", "old"])
async def test_incomplete_views_know_of_no_job_that_it_does_not_exist(
    board: Board, monkeypatch: pytest.MonkeyPatch, job_id: UUID
) -> None:
    monkeypatch.setattr(module, "WAIT_MAX_S", 0.2)
    await board.stands(complete=False, caught_up=_utc_now() + timedelta(hours=1))

    with pytest.raises(ViewsRebuilding):
        await soon(board.queries.job(job_id))


async def test_an_empty_redis_knows_of_no_job_that_it_does_not_exist(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_MAX_S", 0.2)

    with pytest.raises(ViewsRebuilding):
        await soon(board.queries.job(uuid4()))


async def test_no_more_may_wait_than_the_bound(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITERS_MAX", 2)
    await board.stands(caught_up=_utc_now() - timedelta(seconds=1))
    job_ids = [uuid7() for _ in range(2)]
    waiting = [asyncio.create_task(board.queries.job(job_id)) for job_id in job_ids]
    await eventually(lambda: board.queries._waiters == 2)

    with pytest.raises(ViewsRebuilding):
        await soon(board.queries.job(uuid7()))

    for job_id in job_ids:
        await board.shows(job_id)
    assert await soon(_all(waiting)) is None


async def _all(waiting: list["asyncio.Task[Answer | None]"]) -> None:
    assert all(await asyncio.gather(*waiting))


async def test_a_waiter_that_gives_up_makes_room(board: Board) -> None:
    await board.stands(caught_up=_utc_now() - timedelta(seconds=1))
    waiting = asyncio.create_task(board.queries.job(uuid7()))
    await eventually(lambda: board.queries._waiters == 1)

    waiting.cancel()
    await asyncio.wait({waiting})

    assert board.queries._waiters == 0


async def test_a_redis_that_cannot_be_reached_is_no_missing_job() -> None:
    with closed_port() as port:
        async with Redis(port=port) as redis:
            with pytest.raises(ViewsUnavailable):
                await JobQueries(redis, _utc_now).job(uuid4())


# --- Waiting for the end ----------------------------------------------------------------------------------------------


async def waiting_for_the_end(board: Board, job_id: UUID) -> "asyncio.Task[Answer | None]":
    """Somebody waits for a job's end, and has looked at it once: looks follow each other, and ours comes behind theirs."""
    asked = asyncio.create_task(board.queries.ended_job(job_id, LONG_WAIT_S))
    await eventually(lambda: board.queries._waiters == 1)
    await board.queries.reached(0, LONG_WAIT_S)
    return asked


async def test_who_waits_for_the_end_is_answered_when_the_job_has_ended(board: Board) -> None:
    job_id = uuid7()
    await board.stands()
    await board.shows(job_id, UNDER_WAY, 12)
    asked = await waiting_for_the_end(board, job_id)

    await board.shows(job_id, UNDER_WAY, 13)
    await board.shows(job_id, ENDED, 14)

    assert await soon(asked) == Answer(ENDED, '"2-14"')
    assert board.queries._waiters == 0


async def test_other_jobs_moves_do_not_wake_who_waits(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_AGAIN_S", LONG_WAIT_S)
    job_id = uuid7()
    await board.stands()
    await board.shows(job_id, UNDER_WAY)
    asked = await waiting_for_the_end(board, job_id)
    looks = await number_of_looks(board)

    for _ in range(20):
        await board.shows(uuid7(), ENDED)
    await board.shows(job_id, ENDED)

    assert await soon(asked) == Answer(ENDED, '"2-12"')
    assert await number_of_looks(board) - looks <= 2, "the one before it waited, and the one after its own job moved"


async def number_of_looks(board: Board) -> int:
    stats = await board.redis.info("commandstats")
    return int(stats["cmdstat_evalsha"]["calls"])


async def test_who_waits_for_the_end_of_a_new_job_need_not_see_it_begin(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look costs a round trip, which comes between the job and its workers when all is in one process."""
    monkeypatch.setattr(module, "BEGUN_S", LONG_WAIT_S)
    job_id = uuid7()
    await board.stands(caught_up=_utc_now() - timedelta(seconds=1))
    await board.queries.job(uuid4())
    looks_before = await number_of_looks(board)
    asked = asyncio.create_task(board.queries.ended_job(job_id, LONG_WAIT_S))
    await eventually(lambda: board.queries._waiters == 1)

    await board.redis.set(KEYS.job(GENERATION, job_id), b"11\n" + UNDER_WAY)
    await board.stands(at=11)
    await board.shows(job_id, ENDED)

    assert await soon(asked) == Answer(ENDED, '"2-12"')
    assert await number_of_looks(board) - looks_before == 2


@pytest.mark.parametrize("is_known", [True, False], ids=["under way", "new"])
async def test_an_end_that_is_told_whole_is_answered_without_another_look(
    board: Board, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    for pause in ("BEGUN_S", "LOOK_AGAIN_S"):
        monkeypatch.setattr(module, pause, LONG_WAIT_S)
    job_id = uuid7()
    await board.stands(caught_up=_utc_now() - timedelta(seconds=1))
    if is_known:
        await board.shows(job_id, UNDER_WAY)
    asked = await waiting_for_the_end(board, job_id)
    looks = await number_of_looks(board)

    await board.redis.publish(KEYS.moved, b"14 %b \n3\n14\n%b" % (str(job_id).encode(), ENDED))

    assert await soon(asked) == Answer(ENDED, '"3-14"')
    assert await number_of_looks(board) == looks


async def test_a_view_in_which_the_job_has_not_ended_is_not_told_for_its_end(board: Board) -> None:
    """Another generation may be shown than the one in which it ended."""
    job_id = uuid7()
    await board.stands()
    await board.shows(job_id, UNDER_WAY)
    asked = await waiting_for_the_end(board, job_id)

    await board.redis.publish(KEYS.moved, b"14 %b \n3\n12\n%b" % (str(job_id).encode(), UNDER_WAY))
    await board.queries.reached(0, LONG_WAIT_S)
    await board.shows(job_id, ENDED, 15)

    assert await soon(asked) == Answer(ENDED, '"2-15"')


async def test_a_new_job_that_nobody_made_is_unknown_to_who_would_wait_for_its_end(board: Board) -> None:
    asked = asyncio.create_task(board.queries.ended_job(uuid7(), LONG_WAIT_S))
    await asyncio.sleep(0)

    await board.stands(caught_up=_utc_now() + timedelta(seconds=1))

    assert await soon(asked) is None


async def test_a_move_that_nobody_told_is_seen_a_moment_later(board: Board) -> None:
    job_id = uuid7()
    await board.stands()
    await board.shows(job_id, UNDER_WAY)
    asked = await waiting_for_the_end(board, job_id)

    await board.redis.set(KEYS.job(GENERATION, job_id), b"13\n" + ENDED)

    assert await soon(asked) == Answer(ENDED, '"2-13"')


async def test_who_has_waited_long_enough_is_told_how_far_the_job_is(board: Board) -> None:
    job_id = uuid7()
    await board.stands()
    await board.shows(job_id, UNDER_WAY)

    assert await soon(board.queries.ended_job(job_id, 0.2)) == Answer(UNDER_WAY, '"2-12"')


async def test_one_waiter_too_many_is_answered_at_once(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITERS_MAX", 0)
    job_id = uuid7()
    await board.stands()
    await board.shows(job_id, UNDER_WAY)

    assert await soon(board.queries.ended_job(job_id, LONG_WAIT_S)) == Answer(UNDER_WAY, '"2-12"')


async def test_who_waits_is_let_go_when_the_service_stops(board: Board) -> None:
    job_id = uuid7()
    await board.stands()
    await board.shows(job_id, UNDER_WAY)
    asked = await waiting_for_the_end(board, job_id)

    board.queries.let_go()

    assert await soon(asked) == Answer(UNDER_WAY, '"2-12"')


async def test_nobody_waits_for_the_end_of_a_job_that_does_not_exist(board: Board) -> None:
    await board.stands()

    assert await soon(board.queries.ended_job(uuid4(), LONG_WAIT_S)) is None


# --- Waiting for a position -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 6, 7])
async def test_what_the_views_have_reached_is_not_waited_for(board: Board, position: int) -> None:
    await board.stands(at=7)

    async with asyncio.timeout(PATIENCE_S):
        await board.queries.reached(position, LONG_WAIT_S)


async def test_who_waits_for_a_position_goes_on_the_moment_it_is_reached(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_AGAIN_S", LONG_WAIT_S)
    await board.stands(at=7)
    waiting = asyncio.create_task(board.queries.reached(9, LONG_WAIT_S))
    await eventually(lambda: board.queries._waiters == 1)

    await board.stands(at=8)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await asyncio.shield(waiting)
    await board.stands(at=9)

    async with asyncio.timeout(PATIENCE_S):
        await waiting
    assert board.queries._waiters == 0


async def test_a_position_that_does_not_come_is_waited_for_within_the_bound(board: Board) -> None:
    await board.stands(at=7)

    with pytest.raises(ViewBehind):
        async with asyncio.timeout(PATIENCE_S):
            await board.queries.reached(8, 0.2)


async def test_one_who_waits_for_a_position_too_many_is_told_at_once(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITERS_MAX", 0)
    await board.stands(at=7)

    with pytest.raises(ViewBehind):
        async with asyncio.timeout(PATIENCE_S):
            await board.queries.reached(8, LONG_WAIT_S)


async def test_who_waits_for_a_position_is_let_go_when_the_service_stops(board: Board) -> None:
    await board.stands(at=7)
    waiting = asyncio.create_task(board.queries.reached(8, LONG_WAIT_S))
    await eventually(lambda: board.queries._waiters == 1)

    board.queries.let_go()

    with pytest.raises(ViewBehind):
        async with asyncio.timeout(PATIENCE_S):
            await waiting


# --- Over HTTP --------------------------------------------------------------------------------------------------------

Get = Callable[..., Awaitable[tuple[int, Mapping[str, str], bytes]]]


@asynccontextmanager
async def serving(queries: JobQueries, *, data_as_string: bool = False) -> AsyncIterator[Get]:
    app = web.Application(middlewares=[with_request_id, with_problems])
    app.add_routes(ReadApi(queries, problem, b"[]", data_as_string).routes())
    async with TestServer(app) as server, ClientSession() as http:

        async def get(job_id: UUID | str, **headers: str) -> tuple[int, Mapping[str, str], bytes]:
            async with http.get(server.make_url(f"/api/lookup/{job_id}"), headers=headers) as answer:
                return answer.status, answer.headers, await answer.read()

        yield get


async def test_a_job_is_answered_byte_for_byte_with_its_tag(board: Board) -> None:
    job_id = uuid7()
    await board.stands()
    await board.shows(job_id)

    async with serving(board.queries) as get:
        status, headers, body = await get(job_id)

    assert (status, body) == (200, DOCUMENT)
    assert headers["ETag"] == '"2-12"'
    assert headers["Content-Type"].startswith("application/json")
    assert headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize("tags", ['"2-12"', 'W/"2-12"', '"2-11", "2-12"', "*"])
async def test_a_client_that_has_it_already_gets_no_body(board: Board, tags: str) -> None:
    job_id = uuid7()
    await board.stands()
    await board.shows(job_id)

    async with serving(board.queries) as get:
        status, headers, body = await get(job_id, **{"If-None-Match": tags})

    assert (status, body, headers["ETag"]) == (304, b"", '"2-12"')


@pytest.mark.parametrize("tags", ['"2-11"', '"1-12"', "2-12", ""])
async def test_a_client_that_has_something_else_gets_the_body(board: Board, tags: str) -> None:
    job_id = uuid7()
    await board.stands()
    await board.shows(job_id)

    async with serving(board.queries) as get:
        assert (await get(job_id, **{"If-None-Match": tags}))[::2] == (200, DOCUMENT)


@pytest.mark.parametrize("prefer", ["wait=10", "respond-async, wait = 10", 'WAIT="10"; x=y', "foo;bar=1,wait=9999"])
async def test_a_client_may_prefer_to_wait(board: Board, prefer: str) -> None:
    job_id = uuid7()
    await board.stands()
    await board.shows(job_id, UNDER_WAY)

    async with serving(board.queries) as get:
        asked = asyncio.ensure_future(get(job_id, Prefer=prefer))
        await eventually(lambda: board.queries._waiters == 1)
        await board.shows(job_id, ENDED)
        async with asyncio.timeout(PATIENCE_S):
            status, headers, body = await asked

    assert (status, body) == (200, ENDED)
    assert headers["Preference-Applied"] == ("wait=30" if "9999" in prefer else "wait=10")


@pytest.mark.parametrize("prefer", ["wait=-1", "wait=ten", "await=10", "wait=0", "wait", "wait=٣", ""])
async def test_a_preference_that_is_none_is_passed_over(board: Board, prefer: str) -> None:
    job_id = uuid7()
    await board.stands()
    await board.shows(job_id, UNDER_WAY)

    async with serving(board.queries) as get:
        async with asyncio.timeout(PATIENCE_S):
            status, headers, body = await get(job_id, Prefer=prefer)

    assert (status, body) == (200, UNDER_WAY)
    assert "Preference-Applied" not in headers


async def test_a_client_may_ask_for_views_that_show_a_position(board: Board) -> None:
    job_id = uuid7()
    await board.stands(at=11)
    await board.shows(job_id, UNDER_WAY, 11)

    async with serving(board.queries) as get:
        asked = asyncio.ensure_future(get(f"{job_id}?minPosition=12"))
        await eventually(lambda: board.queries._waiters == 1)
        await board.shows(job_id, ENDED, 12)
        await board.stands(at=12)
        async with asyncio.timeout(PATIENCE_S):
            status, headers, body = await asked

    assert (status, headers["ETag"], body) == (200, '"2-12"', ENDED)


async def test_a_position_that_is_not_reached_within_the_preferred_wait_is_told_so(board: Board) -> None:
    job_id = uuid7()
    await board.stands(at=11)
    await board.shows(job_id, UNDER_WAY, 11)

    async with serving(board.queries) as get:
        async with asyncio.timeout(PATIENCE_S):
            status, headers, body = await get(f"{job_id}?minPosition=12", Prefer="wait=1")

    assert (status, headers["Retry-After"], orjson.loads(body)["code"]) == (503, "2", "view_behind")
    assert orjson.loads(body)["error"] == "The views have not come as far as position 12 yet. Try again shortly."


@pytest.mark.parametrize("position", ["-1", "1.5", "", "ten", "%D9%A3", "9" * 19, "1" * 5000, "0x10"])
async def test_a_position_that_is_none_is_refused(board: Board, position: str) -> None:
    await board.stands()

    async with serving(board.queries) as get:
        status, _, body = await get(f"{uuid7()}?minPosition={position}")

    assert (status, orjson.loads(body)["code"]) == (400, "min_position_invalid")


async def test_an_unknown_job_is_not_found(board: Board) -> None:
    await board.stands()

    async with serving(board.queries) as get:
        status, headers, body = await get(uuid4())

    assert (status, headers["Content-Type"]) == (404, "application/problem+json")
    assert (orjson.loads(body)["code"], orjson.loads(body)["error"]) == ("job_not_found", "Job not found")


async def test_views_that_are_being_built_say_so(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_MAX_S", 0.2)
    await board.stands(complete=False)

    async with serving(board.queries) as get:
        status, headers, body = await get(uuid4())

    assert (status, headers["Retry-After"], orjson.loads(body)["code"]) == (503, "2", "views_rebuilding")


async def test_clients_of_the_older_service_get_each_results_data_as_text(board: Board) -> None:
    job_id = uuid7()
    await board.stands()
    await board.shows(job_id)

    async with serving(board.queries, data_as_string=True) as get:
        _, headers, body = await get(job_id)

    results = orjson.loads(body)["results"]
    assert [result["data"] for result in results] == ['{"ttl":300}', None]
    assert headers["ETag"] == '"2-12"'
