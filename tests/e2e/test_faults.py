"""A server that is gone, frozen or full: what a client is told, how soon, and that all recovers by itself.

A frozen server is the worst of them: it takes connections and never answers.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aio_pika
import aiohttp
import psycopg
import pytest

from events.bus import ALL_QUEUES
from tests.e2e import independent_check
from tests.e2e.deployment import IN_TWO, Deployment, broken, deployed
from tests.e2e.journey import PROBLEM_KEYS, Answer, Client, Document
from tests.e2e.processes import until
from tests.e2e.served import Served
from tests.e2e.traffic import Traffic, all_closed, assert_nothing_was_lost_on_its_way
from tests.servers.breakable import BreakablePostgres, BreakableRabbitMQ
from tests.servers.small_disk import small_disk

POST_MAX_S = 2.0
GET_MAX_S = 2.5
USUAL_MAX_S = 1.0
OF_THE_PAST = ("?asOf={completedAt}", "/history", "/why?path=/status")
PAST_MAX_S = 6.0
AT_ONCE = 500
BURST_MAX_S = 6.0
"""Of so many at once: most of it is our own time to send them and to be answered."""
RECOVERY_S = 20.0
JOBS = 20
SILENT_POLLS = 30
LOG_FILES = 40
"""More than PostgreSQL keeps for use again."""
END_S = 60.0
ALARMS = {
    "memory": ("set_vm_memory_high_watermark", "0.000001", "0.4"),
    "disk": ("set_disk_free_limit", str(10**15), "50MB"),
}
"""By resource: the setting, a limit that every machine is beyond, and the usual one."""
TIMES = {
    "LOOKUP_INTERACTIVE_LIFETIME_S": "300",
    "LOOKUP_REDISPATCH_AFTER_S": "200",
    "LOOKUP_TIMEOUT_S": '{"GeoIP": 4, "Ping": 4, "RDAP": 4, "ReverseDNS": 4}',
}
"""So long that a test cannot pass because a deadline helped."""

pytestmark = pytest.mark.timeout(240)


@dataclass(frozen=True)
class Asked:
    """An answer, and how long it took, in seconds."""

    answer: Answer
    took_s: float


@pytest.fixture(scope="module")
async def running(servers_folder: Path, peers: Served) -> AsyncIterator[tuple[Deployment, Client]]:
    env = {**peers.environment(), **TIMES}
    async with deployed(servers_folder / "faults", env, IN_TWO, with_rabbitmq=True) as running:
        yield running


@pytest.mark.parametrize("how", ["stopped", "frozen"])
async def test_without_postgresql_every_post_is_refused_in_time_and_polling_goes_on(
    how: str, running: tuple[Deployment, Client], peers: Served
) -> None:
    deployment, client = running
    job = await serves_again(client)
    paths = [f"/api/lookup/{job['jobId']}{path.format(**job)}" for path in OF_THE_PAST]
    before = len(independent_check.read_log(deployment.database_url).jobs)

    async with broken(deployment.postgres, how):
        burst = await asked_at_once(deployment, AT_ONCE)
        few = [asked for _ in range(3) for asked in await asked_at_once(deployment, 5)]
        past = asyncio.gather(*(timed(client.get(path)) for path in paths))
        poll = await timed(client.get(f"/api/lookup/{job['jobId']}"))
        listed = [await timed(client.get(path)) for path in ("/api/lookup?limit=200", "/api/stats")]
        untold = await past
        ready = await client.ask("GET", f"{client.write_url}/health/ready")
        live = await client.ask("GET", f"{client.write_url}/health/live")

    codes = [check_refused(asked.answer) for asked in burst + few]
    assert max(asked.took_s for asked in burst) < BURST_MAX_S
    assert max(asked.took_s for asked in few) < POST_MAX_S
    assert set(codes) <= {"store_unavailable", "outcome_unknown"}
    assert (poll.answer.status, poll.answer.document) == (200, job)
    assert poll.took_s < USUAL_MAX_S
    assert [asked.answer.status for asked in listed] == [200, 200]
    assert job["jobId"] in [row["jobId"] for row in listed[0].answer.document["jobs"]]
    assert max(asked.took_s for asked in listed) < USUAL_MAX_S
    assert {check_refused(asked.answer) for asked in untold} == {"history_unavailable"}
    assert max(asked.took_s for asked in untold) < PAST_MAX_S
    assert (live.status, ready.status) == (200, 503)
    assert "database" in ready.document["checks"]["store"] or "in time" in ready.document["checks"]["store"]
    await serves_again(client)
    assert [(await client.get(path)).status for path in paths] == [200] * len(paths)
    await until(lambda: all_closed(deployment.database_url), END_S, "the jobs whose fate was unknown to end")
    log = independent_check.check(deployment.database_url, client.finished, peers)
    assert len(log.jobs) - before <= codes.count("outcome_unknown") + 1, "a refused job was taken on"


async def test_without_a_broker_jobs_are_accepted_and_run_when_it_is_back(running: tuple[Deployment, Client]) -> None:
    deployment, client = running
    assert deployment.rabbitmq is not None
    job = await serves_again(client)
    traffic = Traffic(client)

    async with broken(deployment.rabbitmq, "stopped"):
        accepted = await asked_at_once(deployment, JOBS)
        await tells_readiness(client.write_url, client, {"store": "ok", "broker": "RabbitMQ cannot be reached"})
        async with broken(deployment.postgres, "stopped"):
            await polls_change_nothing(client, job)

    assert [asked.answer.status for asked in accepted] == [202] * JOBS
    assert max(asked.took_s for asked in accepted) < POST_MAX_S
    traffic.accepted += [asked.answer.document["jobId"] for asked in accepted]
    await traffic.follow_all(END_S)
    assert_nothing_was_lost_on_its_way({job_id: client.finished[job_id] for job_id in traffic.accepted})


@pytest.mark.parametrize("how", ["stopped", "frozen"])
async def test_without_redis_a_poll_is_told_so_in_time_and_jobs_go_on(how: str, running: tuple[Deployment, Client]) -> None:
    deployment, client = running
    job = await serves_again(client)
    traffic = Traffic(client)

    async with broken(deployment.valkey, how):
        polls = await asyncio.gather(*(timed(client.get(f"/api/lookup/{job['jobId']}")) for _ in range(10)))
        accepted = await asked_at_once(deployment, JOBS)
        ready = await client.ask("GET", f"{client.read_url}/health/ready")
        live = await client.ask("GET", f"{client.read_url}/health/live")

    assert {check_refused(poll.answer) for poll in polls} == {"views_unavailable"}
    assert max(poll.took_s for poll in polls) < GET_MAX_S
    assert [asked.answer.status for asked in accepted] == [202] * JOBS
    assert (live.status, ready.status) == (200, 503)
    assert set(ready.document["checks"]) == {"redis", "projection"}
    assert "ok" not in ready.document["checks"].values()
    traffic.accepted += [asked.answer.document["jobId"] for asked in accepted]
    await traffic.follow_all(END_S)
    assert_nothing_was_lost_on_its_way({job_id: client.finished[job_id] for job_id in traffic.accepted})


@pytest.mark.parametrize("resource", ["memory", "disk"])
async def test_an_alarm_of_rabbitmq_does_not_slow_the_api(running: tuple[Deployment, Client], resource: str) -> None:
    deployment, client = running
    assert deployment.rabbitmq is not None
    job = await serves_again(client)
    traffic = Traffic(client)

    setting, too_tight, usual = ALARMS[resource]
    await deployment.rabbitmq.command(setting, too_tight)
    try:
        await publishing_is_blocked(deployment.rabbitmq, resource)
        asked: list[Asked] = []
        for _ in range(JOBS):
            asked += await asked_at_once(deployment, 1)
            asked.append(await timed(client.get(f"/api/lookup/{job['jobId']}")))
            await asyncio.sleep(0.1)
    finally:
        await deployment.rabbitmq.command(setting, usual)

    assert [one.answer.status for one in asked] == [202, 200] * JOBS
    assert max(one.took_s for one in asked) < USUAL_MAX_S
    traffic.accepted += [one.answer.document["jobId"] for one in asked if one.answer.status == 202]
    await traffic.follow_all(END_S)
    assert_nothing_was_lost_on_its_way({job_id: client.finished[job_id] for job_id in traffic.accepted})


async def test_deleted_queues_come_back_by_themselves_and_what_was_in_them_is_told_again(
    running: tuple[Deployment, Client],
) -> None:
    deployment, client = running
    assert deployment.rabbitmq is not None
    traffic = Traffic(client)
    async with asyncio.TaskGroup() as together:
        together.create_task(traffic.submit(JOBS, 0.02))
        together.create_task(delete_queues(deployment.rabbitmq, traffic))

    await traffic.follow_all(END_S)

    assert_nothing_was_lost_on_its_way({job_id: client.finished[job_id] for job_id in traffic.accepted})
    assert await queues_of(deployment.rabbitmq) >= {queue.name for queue in ALL_QUEUES}


@pytest.mark.parametrize("what", ["base", "pg_wal"])
async def test_a_full_disk_refuses_and_room_is_used_at_once(
    what: str, running: tuple[Deployment, Client], peers: Served
) -> None:
    """Without room for its log PostgreSQL ends; then it is started again, as compose.yaml has it, and again."""
    deployment, client = running
    postgres = deployment.postgres
    postgres.stop()
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(postgres, what))
        postgres.launch()
        stack.callback(postgres.stop)
        await postgres.ready()
        await serves_again(client)

        disk.fill()
        if what == "pg_wal":
            use_up_the_log(postgres)
        await refuses(client)
        async with kept_running(postgres):
            asked = [one for _ in range(3) for one in await asked_at_once(deployment, JOBS)]
            disk.empty()
            await serves_again(client)

    postgres.launch()
    await postgres.ready()
    await serves_again(client)
    assert {check_refused(one.answer) for one in asked} <= {"store_unavailable", "outcome_unknown"}
    assert max(one.took_s for one in asked) < POST_MAX_S
    await until(lambda: all_closed(deployment.database_url), END_S, "the jobs whose fate was unknown to end")
    independent_check.check(deployment.database_url, client.finished, peers)


# --- how it is asked --------------------------------------------------------------------------------------------------


async def timed(answer: Any) -> Asked:
    started_at = time.monotonic()
    return Asked(await answer, time.monotonic() - started_at)


async def asked_at_once(deployment: Deployment, count: int) -> list[Asked]:
    """So many submissions side by side, each on a connection of its own."""
    unlimited = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=unlimited, timeout=aiohttp.ClientTimeout(total=30)) as http:
        client = Client(http, deployment.write_url, deployment.read_url)
        return await asyncio.gather(*(timed(client.post({"target": "127.0.0.1"})) for _ in range(count)))


def check_refused(answer: Answer) -> str:
    """A problem that says when to come again; gives its code."""
    assert answer.status == 503, answer
    assert answer.headers["Content-Type"].startswith("application/problem+json")
    assert int(answer.headers["Retry-After"]) >= 1
    assert list(answer.document)[: len(PROBLEM_KEYS)] == PROBLEM_KEYS
    return str(answer.document["code"])


async def tells_readiness(url: str, client: Client, checks: dict[str, str]) -> None:
    """Sooner or later: a server that has just been asked for so much at once may answer a check too late."""
    async with asyncio.timeout(END_S):
        while (await client.ask("GET", f"{url}/health/ready")).document["checks"] != checks:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.1)


async def serves_again(client: Client) -> Document:
    """A new job's last document. The first tries may be refused."""
    traffic = Traffic(client)
    async with asyncio.timeout(RECOVERY_S):
        await traffic.submit(1, 0.2)
    await traffic.follow_all(END_S)
    return client.finished[traffic.accepted[0]]


async def polls_change_nothing(client: Client, job: Document) -> None:
    """The poll path knows the views only."""
    path = f"/api/lookup/{job['jobId']}"
    etag: str | None = None
    for _ in range(SILENT_POLLS):
        fresh = await timed(client.get(path))
        assert (fresh.answer.status, fresh.answer.document) == (200, job)
        assert fresh.took_s < USUAL_MAX_S
        etag = etag or fresh.answer.headers["ETag"]
        known = await client.get(path, etag)
        assert (known.status, known.headers["ETag"]) == (304, etag)
        await asyncio.sleep(0.05)


def use_up_the_log(postgres: BreakablePostgres) -> None:
    """PostgreSQL keeps some files for use again: until there is no next one, and it ends."""
    with suppress(psycopg.Error), psycopg.connect(postgres.url, autocommit=True) as database:
        for _ in range(LOG_FILES):
            database.execute("SELECT pg_logical_emit_message(true, 'filler', 'x')")
            database.execute("SELECT pg_switch_wal()")


async def refuses(client: Client) -> None:
    """Until the first submission is refused: what is left of the last pages is used up first."""
    async with asyncio.timeout(END_S):
        while (await client.post({"target": "127.0.0.1"})).status == 202:
            pass


@asynccontextmanager
async def kept_running(postgres: BreakablePostgres) -> AsyncIterator[None]:
    """Started again whenever it has ended by itself."""

    async def watch() -> None:
        while True:
            if postgres.has_ended:
                postgres.launch()
            await asyncio.sleep(0.5)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


async def publishing_is_blocked(rabbitmq: BreakableRabbitMQ, resource: str) -> None:
    """Until the broker has raised the alarm."""
    async with asyncio.timeout(END_S):
        while resource not in await rabbitmq.command("eval", "rabbit_alarm:get_alarms()."):  # noqa: ASYNC110 - nobody tells us
            await asyncio.sleep(0.2)


async def delete_queues(rabbitmq: BreakableRabbitMQ, traffic: Traffic) -> None:
    """All that the parts read, by hand, in the middle of the traffic."""
    await traffic.has_come_to(accepted=JOBS // 2)
    connection = await aio_pika.connect(rabbitmq.url)
    async with connection, connection.channel() as channel:
        for queue in ALL_QUEUES:
            await channel.queue_delete(queue.name)


async def queues_of(rabbitmq: BreakableRabbitMQ) -> set[str]:
    return set((await rabbitmq.command("list_queues", "name")).split())
