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
from projections.views import Keys
from read_side import queries as module
from read_side.api import ReadApi
from read_side.queries import Answer, JobQueries, ViewsRebuilding, ViewsUnavailable
from tests.builders import eventually
from tests.peers.lookups import closed_port

KEYS = Keys()
GENERATION = "g1"
DOCUMENT = b'{"jobId":"1","results":[{"data":{"ttl":300}},{"data":null}]}'
PATIENCE_S = 10.0
LONG_WAIT_S = 15.0


@dataclass
class Board:
    """A Redis as the projector would leave it, and the queries that read it."""

    redis: Redis
    queries: JobQueries

    async def stands(self, *, caught_up: datetime | None = None, complete: bool = True) -> None:
        """The views are there, and current until that time."""
        await self.redis.set(KEYS.live, GENERATION)
        until_ms = int((caught_up or _utc_now()).timestamp() * 1000)
        items: list[str | int] = ["complete", int(complete), "caught_up_ms", until_ms, "checkpoint", 7]
        await self.redis.hset(KEYS.meta(GENERATION), items=items)

    async def shows(self, job_id: UUID, body: bytes = DOCUMENT, position: int = 12) -> None:
        await self.redis.set(KEYS.job(GENERATION, job_id), b"%d\n%b" % (position, body))
        await self.redis.publish(KEYS.moved, position)


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

    assert await board.queries.job(job_id) == Answer(DOCUMENT, '"1-12"')


async def test_a_known_job_is_answered_however_far_the_views_are_behind(board: Board) -> None:
    job_id = uuid7()
    await board.stands(caught_up=_utc_now() - timedelta(hours=1), complete=False)
    await board.shows(job_id)

    assert await soon(board.queries.job(job_id)) == Answer(DOCUMENT, '"1-12"')


@pytest.mark.parametrize("job_id", [uuid4(), UUID(int=0), made_ago(timedelta(minutes=1))], ids=["v4", "nil", "old"])
async def test_an_id_that_the_views_would_know_by_now_is_unknown_at_once(board: Board, job_id: UUID) -> None:
    await board.stands()

    assert await soon(board.queries.job(job_id)) is None


async def test_a_young_unknown_id_is_waited_for_and_answered_the_moment_it_comes(board: Board) -> None:
    job_id = uuid7()
    await board.stands(caught_up=_utc_now() - timedelta(seconds=1))
    asked = asyncio.create_task(board.queries.job(job_id))
    await eventually(lambda: board.queries._waiters == 1)

    await board.shows(job_id)

    assert await soon(asked) == Answer(DOCUMENT, '"1-12"')
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
    assert headers["ETag"] == '"1-12"'
    assert headers["Content-Type"].startswith("application/json")
    assert headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize("tags", ['"1-12"', 'W/"1-12"', '"1-11", "1-12"', "*"])
async def test_a_client_that_has_it_already_gets_no_body(board: Board, tags: str) -> None:
    job_id = uuid7()
    await board.stands()
    await board.shows(job_id)

    async with serving(board.queries) as get:
        status, headers, body = await get(job_id, **{"If-None-Match": tags})

    assert (status, body, headers["ETag"]) == (304, b"", '"1-12"')


@pytest.mark.parametrize("tags", ['"1-11"', '"2-12"', "1-12", ""])
async def test_a_client_that_has_something_else_gets_the_body(board: Board, tags: str) -> None:
    job_id = uuid7()
    await board.stands()
    await board.shows(job_id)

    async with serving(board.queries) as get:
        assert (await get(job_id, **{"If-None-Match": tags}))[::2] == (200, DOCUMENT)


async def test_an_unknown_job_is_not_found(board: Board) -> None:
    await board.stands()

    async with serving(board.queries) as get:
        status, headers, body = await get(uuid4())

    assert (status, headers["Content-Type"]) == (404, "application/problem+json")
    assert (orjson.loads(body)["code"], orjson.loads(body)["error"]) == ("job_not_found", "Job not found")


async def test_views_that_are_being_built_say_so(board: Board) -> None:
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
    assert headers["ETag"] == '"1-12"'
