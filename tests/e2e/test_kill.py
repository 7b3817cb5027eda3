"""What was accepted ends, whichever part or server dies meanwhile, and every answer is still the fold of its facts.

"Accepted" is a 202 that arrived. A request whose answer was lost may have become a job or not.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import aiohttp
import pytest

from app.embedded.servers import Embedded
from tests.e2e import independent_check
from tests.e2e.compose_harness import ComposeParts
from tests.e2e.journey import CLOSED, Client, Document, check_document, client_of
from tests.e2e.processes import LookupProcess, database_of, until
from tests.e2e.served import NEIGHBOURS, Served
from tests.servers.rabbitmq import RabbitMQNode
from tests.servers.valkey import RedisDatabases

JOBS = 200
PACE_S = 0.12
STRIDE = JOBS // 7
PARTS = ("write", "relay", "saga", "worker-ping", "projector", "read")
WHILE_DOWN = 8
"""So many requests are made while a part is down."""

LIFETIME_S = 60
SLACK_S = 10
FLOW_S = 60.0
RECOVERY_S = 8.0
"""However long the database was away: a pool that waits ever longer between its tries would show."""
SILENT_POLLS = 60
TIMES: Mapping[str, str] = {
    "LOOKUP_INTERACTIVE_LIFETIME_S": str(LIFETIME_S),
    "LOOKUP_TIMEOUT_S": '{"GeoIP": 4, "Ping": 4, "RDAP": 4, "ReverseDNS": 4}',
}
NO_SECOND_ATTEMPTS: Mapping[str, str] = {"LOOKUP_REDISPATCH_AFTER_S": str(LIFETIME_S - 20)}
"""A task that a part lost on its way is asked again only after this, and then it shows."""
SOON_ASKED_AGAIN: Mapping[str, str] = {"LOOKUP_REDISPATCH_AFTER_S": "6"}
UNANSWERED = (aiohttp.ClientError, TimeoutError, ConnectionError)

pytestmark = pytest.mark.timeout(240)


@dataclass
class Traffic:
    """A client that submits steadily, looks at each job at once, and polls all of them to their end."""

    client: Client
    accepted: list[str] = field(default_factory=list)
    tried: int = 0

    async def submit(self, jobs: int, pace_s: float) -> None:
        """Until so many were accepted. Each is looked at in the instant after its 202, while others are submitted."""
        async with asyncio.TaskGroup() as looks:
            while len(self.accepted) < jobs:
                job_id = await self._submit_one(f"127.0.{NEIGHBOURS[self.tried % len(NEIGHBOURS)]}.1")
                if job_id is not None:
                    self.accepted.append(job_id)
                    looks.create_task(self._look(job_id))
                self.tried += 1
                await asyncio.sleep(pace_s)

    async def _submit_one(self, target: str) -> str | None:
        try:
            answer = await self.client.post({"target": target})
        except UNANSWERED:
            return None
        assert answer.status in {202, 503}, answer
        return str(answer.document["jobId"]) if answer.status == 202 else None

    async def has_come_to(self, *, accepted: int = 0, tried: int = 0) -> None:
        await until(lambda: len(self.accepted) >= accepted and self.tried >= tried, FLOW_S, "the traffic to go on")

    async def follow_all(self) -> None:
        """Until each accepted job is closed, within the lifetime of a job."""
        waiting = set(self.accepted)
        async with asyncio.timeout(LIFETIME_S + SLACK_S):
            while waiting:
                for job_id in list(waiting):
                    document = await self._look(job_id)
                    if document is not None and document["status"] in CLOSED:
                        self.client.finished[job_id] = document
                        waiting.discard(job_id)
                await asyncio.sleep(0.2)

    async def _look(self, job_id: str) -> Document | None:
        """A poll. It may meet a part that is down, but it is never told that an accepted job does not exist."""
        try:
            answer = await self.client.get(f"/api/lookup/{job_id}")
        except UNANSWERED:
            return None
        assert answer.status in {200, 503}, f"job {job_id} was accepted: {answer}"
        if answer.status == 503:
            return None
        check_document(answer.document)
        document: Document = answer.document
        return document


@dataclass(frozen=True)
class Deployment:
    """The parts of compose.yaml on servers of their own, which may be stopped."""

    parts: ComposeParts
    database_url: str
    database: Embedded
    broker: RabbitMQNode


@pytest.fixture(scope="module")
async def deployment(
    tmp_path_factory: pytest.TempPathFactory, peers: Served, valkey: RedisDatabases
) -> AsyncIterator[Deployment]:
    folder = tmp_path_factory.mktemp("kill")
    database, broker = Embedded(folder / "postgres", valkey=False), RabbitMQNode(folder / "rabbitmq")
    try:
        database_url = database.start().database_owner_url
        broker.start()
        with valkey.fresh() as redis_url:
            parts = ComposeParts(
                database_owner_url=database_url,
                redis_url=redis_url,
                broker_url=broker.broker.url,
                work_dir=folder / "parts",
                env={**peers.environment(), **TIMES, **NO_SECOND_ATTEMPTS},
            )
            await parts.start()
            try:
                yield Deployment(parts, database_url, database, broker)
            finally:
                await parts.stop()
    finally:
        broker.stop()
        database.stop()


async def test_every_accepted_job_ends_though_each_part_is_killed_in_turn(deployment: Deployment, peers: Served) -> None:
    parts = deployment.parts
    async with client_of(parts.write_url, parts.read_url) as client:
        traffic = Traffic(client)
        async with asyncio.TaskGroup() as together:
            together.create_task(traffic.submit(JOBS, PACE_S))
            together.create_task(kill_each_in_turn(parts, traffic))
        await traffic.follow_all()

    assert len(client.finished) == JOBS
    assert_ended_in_time(client.finished)
    assert_nothing_was_lost_on_its_way(client.finished)
    await until(lambda: all_closed(deployment.database_url), LIFETIME_S, "jobs whose answer was lost to end")
    independent_check.check(deployment.database_url, client.finished, peers)


async def test_polling_needs_neither_database_nor_broker(deployment: Deployment, peers: Served) -> None:
    parts = deployment.parts
    async with client_of(parts.write_url, parts.read_url) as client:
        job_id = await client.submit("127.0.0.1")
        document = await client.follow(job_id)
        path = f"/api/lookup/{job_id}"
        etag = (await client.get(path)).headers["ETag"]

        async with stopped_servers(deployment):
            refused = await client.post({"target": "127.0.0.1"})
            for _ in range(SILENT_POLLS):
                fresh, known = await client.get(path), await client.get(path, etag)
                assert (fresh.status, fresh.document) == (200, document)
                assert (known.status, known.headers["ETag"]) == (304, etag)
                await asyncio.sleep(0.1)
            alive = [await client.ask("GET", f"{url}/health/live") for url in (client.write_url, client.read_url)]

        # The first request may find a connection that broke under it, and then nobody can tell.
        assert (refused.status, refused.document["code"] in {"store_unavailable", "outcome_unknown"}) == (503, True)
        assert [answer.status for answer in alive] == [200, 200]
        traffic = Traffic(client)
        async with asyncio.timeout(RECOVERY_S):
            await traffic.submit(1, 0.2)
        await traffic.follow_all()
    independent_check.check(deployment.database_url, client.finished, peers)


async def test_every_accepted_job_ends_though_everything_is_killed_at_once(tmp_path: Path, peers: Served) -> None:
    env = {**peers.environment(), **TIMES, **SOON_ASKED_AGAIN}
    up = LookupProcess("up", "--port", "0", "--data-dir", "data", folder=tmp_path, env=env)
    try:
        traffic = await submit_and_kill(up)
        restarted_at = datetime.now().astimezone()
        url = await up.start()
        async with client_of(url, url) as client:
            traffic.client = client
            await traffic.follow_all()

        assert_ended_in_time(client.finished)
        assert any(_at(document["completedAt"]) > restarted_at for document in client.finished.values()), "none was in flight"
        database_url = database_of(tmp_path / "data")
        await until(lambda: all_closed(database_url), LIFETIME_S, "jobs whose answer was lost to end")
        independent_check.check(database_url, client.finished, peers)
    finally:
        await up.stop()


async def kill_each_in_turn(parts: ComposeParts, traffic: Traffic) -> None:
    for number, part in enumerate(PARTS, start=1):
        await traffic.has_come_to(accepted=number * STRIDE)
        parts.kill(part)
        await traffic.has_come_to(tried=traffic.tried + WHILE_DOWN)
        parts.start_part(part)


async def submit_and_kill(up: LookupProcess) -> Traffic:
    """Kill -9 while jobs are in flight and more are coming in."""
    url = await up.start()
    async with client_of(url, url) as client:
        traffic = Traffic(client)
        submitting = asyncio.create_task(traffic.submit(JOBS, 0.0))
        await until(lambda: len(traffic.accepted) >= JOBS // 4, 30, "jobs to be accepted")
        up.send(signal.SIGKILL)
        submitting.cancel()
        await asyncio.wait({submitting})
    assert await up.ended() == -signal.SIGKILL
    return traffic


@asynccontextmanager
async def stopped_servers(deployment: Deployment) -> AsyncIterator[None]:
    """PostgreSQL and RabbitMQ are gone within the block, and back after it, with their data."""
    deployment.broker.kill()
    deployment.database.stop()
    try:
        yield
    finally:
        deployment.broker.start()
        deployment.database.start()


def assert_ended_in_time(finished: Mapping[str, Document]) -> None:
    for job_id, document in finished.items():
        took = _at(document["completedAt"]) - _at(document["createdAt"])
        assert took.total_seconds() <= LIFETIME_S + SLACK_S, f"job {job_id} took {took}"


def assert_nothing_was_lost_on_its_way(finished: Mapping[str, Document]) -> None:
    """What a dead part had in hand came again by itself: no deadline had to ask a task a second time."""
    for job_id, document in finished.items():
        endings = {(result["status"], result["attempt"]) for result in document["results"]}
        assert endings == {("Succeeded", 1)}, f"job {job_id}: {document}"


def all_closed(database_url: str) -> bool:
    log = independent_check.read_log(database_url)
    return all(stream[-1].name in independent_check.CLOSING for stream in log.streams.values())


def _at(text: str) -> datetime:
    return datetime.fromisoformat(text)
