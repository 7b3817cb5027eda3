"""Every accepted job ends in time, whatever becomes of a worker or of its queue; and nothing is asked again without a bound.

All parts in processes of their own, on PostgreSQL and each transport: one runs everything but the workers that a test lets
die, sleep or be absent.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import aio_pika
import dns.reversename
import pytest
from redis.asyncio import Redis
from uuid_utils.compat import uuid7

from app.migrate import migrate
from events.bus import COMMANDS, OUTCOMES
from events.facts import Priority, Service
from events.redis_bus import PREFIX
from tests.e2e.independent_check import CLOSING, Row, check_story, read_log
from tests.e2e.journey import Client, Document, client_of
from tests.e2e.processes import LookupProcess, until
from tests.e2e.served import Served
from tests.servers.postgres import fresh_database
from tests.servers.rabbitmq import RabbitMQ
from tests.servers.valkey import RedisDatabases

LIFETIME_S = 20
SLACK_S = 5
REDISPATCH_AFTER_S = 2
RDAP_ATTEMPTS = 6
ATTEMPT_S = 0.5
SETTINGS = {
    "LOOKUP_INTERACTIVE_LIFETIME_S": str(LIFETIME_S),
    "LOOKUP_REDISPATCH_AFTER_S": str(REDISPATCH_AFTER_S),
    "LOOKUP_TIMEOUT_S": f'{{"RDAP": {ATTEMPT_S}, "GeoIP": 1.5, "ReverseDNS": 5}}',
    "LOOKUP_ATTEMPTS_MAX": f'{{"RDAP": {RDAP_ATTEMPTS}}}',
}
PATIENCE_S = 30.0
SILENT_JOBS = 200
NO_NAME_SERVER_ANSWERS = "127.0.0.8"
NOBODY_ELSE_ASKS_ABOUT = "127.0.12.77"

pytestmark = pytest.mark.timeout(180)


class Broker(Protocol):
    """What somebody with an operator's rights can do to a queue."""

    async def delete(self, queue: str) -> None: ...
    async def purge(self, queue: str) -> None: ...
    async def length(self, queue: str) -> int:
        """How many messages wait; 0 when there is no such queue."""


class RedisBroker:
    def __init__(self, url: str) -> None:
        self._url = url

    async def delete(self, queue: str) -> None:
        async with Redis.from_url(self._url) as redis:
            await redis.delete(PREFIX + queue)

    async def purge(self, queue: str) -> None:
        async with Redis.from_url(self._url) as redis:
            await redis.xtrim(PREFIX + queue, maxlen=0, approximate=False)

    async def length(self, queue: str) -> int:
        async with Redis.from_url(self._url) as redis:
            return int(await redis.xlen(PREFIX + queue))


class Rabbit:
    def __init__(self, url: str) -> None:
        self._url = url

    @asynccontextmanager
    async def _channel(self) -> AsyncIterator[aio_pika.abc.AbstractChannel]:
        async with await aio_pika.connect(self._url) as connection, connection.channel() as channel:
            yield channel

    async def delete(self, queue: str) -> None:
        async with self._channel() as channel:
            await channel.queue_delete(queue)

    async def purge(self, queue: str) -> None:
        async with self._channel() as channel:
            await (await channel.get_queue(queue)).purge()

    async def length(self, queue: str) -> int:
        async with self._channel() as channel:
            declared = await channel.declare_queue(queue, passive=True)
            return declared.declaration_result.message_count or 0


@dataclass
class Place:
    """One deployment: the parts that always run, and what a worker needs to join them."""

    core: LookupProcess
    client: Client
    broker: Broker
    database_url: str
    environment: dict[str, str]

    @asynccontextmanager
    async def worker(self, *services: Service, name: str = "worker") -> AsyncIterator[LookupProcess]:
        process = LookupProcess("worker", *services, folder=self.core.folder, env=self.environment, name=name)
        process.launch()
        try:
            yield process
        finally:
            if not process.has_ended:
                process.send(signal.SIGCONT)
            await process.stop()

    def story(self, job_id: str) -> Sequence[Row]:
        """The job's facts, whose chain and order are checked on the way."""
        stream = read_log(self.database_url).streams[job_id]
        if stream[-1].name in CLOSING:
            check_story(stream)
        return stream

    async def answers(self, target: str, service: Service) -> None:
        """Asks until an answer comes: a worker that is starting, on a busy machine, may come too late for the first job."""
        async with asyncio.timeout(PATIENCE_S):
            while (await self.ended(await self.client.submit(target, [service])))["status"] != "Completed":
                pass

    async def ended(self, job_id: str) -> Document:
        """The job's final document; it came in time."""
        async with asyncio.timeout(PATIENCE_S + LIFETIME_S):
            document = await self.client.follow(job_id)
        took_s = (_at(document["completedAt"]) - _at(document["createdAt"])).total_seconds()
        assert took_s <= LIFETIME_S + SLACK_S, document
        return document


def dispatches(story: Sequence[Row], service: Service) -> int:
    return sum(task["service"] == service for row in story if row.name == "TasksDispatched" for task in row.fields["tasks"])


def queue_of(service: Service) -> str:
    return COMMANDS[service, Priority.INTERACTIVE].name


@contextmanager
def redis_transport(valkey: RedisDatabases) -> Iterator[tuple[Broker, dict[str, str]]]:
    with valkey.fresh() as url:
        yield RedisBroker(url), {"LOOKUP_REDIS_URL": url}


@contextmanager
def rabbitmq_transport(valkey: RedisDatabases, rabbitmq: RabbitMQ) -> Iterator[tuple[Broker, dict[str, str]]]:
    with valkey.fresh() as redis_url, rabbitmq.fresh_vhost() as url:
        yield Rabbit(url), {"LOOKUP_REDIS_URL": redis_url, "LOOKUP_BROKER_URL": url}


@pytest.fixture(scope="module", params=["redis", "rabbitmq"])
async def place(
    request: pytest.FixtureRequest,
    postgres: str,
    valkey: RedisDatabases,
    peers: Served,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Place]:
    transport = (
        redis_transport(valkey) if request.param == "redis" else rabbitmq_transport(valkey, request.getfixturevalue("rabbitmq"))
    )
    with fresh_database(postgres) as database_url, transport as (broker, urls):
        migrate(database_url, uuid7(), {})
        environment = {**peers.environment(), **SETTINGS, **urls, "LOOKUP_DATABASE_URL": database_url}
        folder = tmp_path_factory.mktemp(request.param)
        words = ("write", "relay", "saga", "projector", "read", "worker", "GeoIP")
        core = LookupProcess(*words, "--port", "0", folder=folder, env=environment, name="core")
        url = await core.start()
        try:
            async with client_of(url, url) as client:
                await client.ready(url)
                yield Place(core, client, broker, database_url, environment)
        finally:
            await core.stop()


# --- Nobody there -----------------------------------------------------------------------------------------------------


async def test_a_service_without_any_worker_times_out_and_its_job_ends(place: Place) -> None:
    job_id = await place.client.submit("127.0.7.1", ["GeoIP", "ReverseDNS"])

    document = await place.ended(job_id)

    located, unnamed = document["results"]
    assert (document["status"], located["status"]) == ("Completed", "Succeeded")
    assert (unnamed["status"], unnamed["errorCode"], unnamed["attempt"]) == ("TimedOut", "timed_out", 2)
    assert dispatches(place.story(job_id), Service.REVERSE_DNS) == 2


async def test_silent_jobs_are_dispatched_again_a_bounded_number_of_times(place: Place) -> None:
    """However many wait for a worker that is down: each costs the broker so many commands, and no more, for ever."""
    job_ids = await asyncio.gather(
        *(place.client.submit(f"127.0.{1 + number % 250}.1", ["ReverseDNS"]) for number in range(SILENT_JOBS))
    )

    async with asyncio.timeout(PATIENCE_S):
        while not all_closed(place, job_ids):  # noqa: ASYNC110 - another process brings it about
            await asyncio.sleep(0.5)

    streams = read_log(place.database_url).streams
    assert {dispatches(streams[job_id], Service.REVERSE_DNS) for job_id in job_ids} == {2}
    assert {streams[job_id][-2].name for job_id in job_ids} == {"TaskTimedOut"}


def all_closed(place: Place, job_ids: Sequence[str]) -> bool:
    streams = read_log(place.database_url).streams
    return all(streams[job_id][-1].name in CLOSING for job_id in job_ids)


# --- Messages that are lost -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["delete", "purge"])
async def test_what_a_queue_lost_is_dispatched_again_and_brings_the_answer(place: Place, how: str) -> None:
    queue = queue_of(Service.RDAP)
    job_id = await place.client.submit("127.0.8.1", ["RDAP"])
    await has_arrived(place.broker, queue)

    await getattr(place.broker, how)(queue)

    async with place.worker(Service.RDAP):
        document = await place.ended(job_id)
    (registration,) = document["results"]
    assert (registration["status"], registration["data"]["network"]["cidr"]) == ("Succeeded", "127.0.8.0/24")
    assert registration["attempt"] <= RDAP_ATTEMPTS
    assert dispatches(place.story(job_id), Service.RDAP) <= RDAP_ATTEMPTS


async def test_a_queue_that_is_deleted_under_its_worker_and_its_reader_is_made_again(place: Place) -> None:
    assert (await place.client.look_up("127.0.9.1", ["GeoIP"]))["status"] == "Completed"

    await place.broker.delete(queue_of(Service.GEOIP))
    await place.broker.delete(OUTCOMES.name)

    assert (await place.ended(await place.client.submit("127.0.10.1", ["GeoIP"])))["status"] == "Completed"


async def has_arrived(broker: Broker, queue: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await broker.length(queue):  # noqa: ASYNC110 - another process brings it about
            await asyncio.sleep(0.05)


# --- A worker that sleeps ---------------------------------------------------------------------------------------------


async def test_a_worker_that_slept_past_the_deadline_changes_nothing_when_it_wakes(place: Place, peers: Served) -> None:
    """It holds a lookup under way and an item not yet begun. Both tasks have ended; it reports the one and drops the other."""
    async with place.worker(Service.REVERSE_DNS) as worker:
        await place.answers("127.0.11.1", Service.REVERSE_DNS)
        question, asked = (pointer(NO_NAME_SERVER_ANSWERS), "PTR"), peers.dns.asked
        earlier = asked.count(question)
        under_way = await place.client.submit(NO_NAME_SERVER_ANSWERS, ["ReverseDNS"])
        await until(lambda: asked.count(question) > earlier, PATIENCE_S, "the question to be asked")
        worker.send(signal.SIGSTOP)
        never_begun = await place.client.submit(NOBODY_ELSE_ASKS_ABOUT, ["ReverseDNS"])
        for job_id in (under_way, never_begun):
            (name,) = (await place.ended(job_id))["results"]
            assert name["status"] == "TimedOut"
        before = [place.story(job_id) for job_id in (under_way, never_begun)]

        worker.send(signal.SIGCONT)

        # What it reports now comes after all that it has to say about the two.
        await place.answers("127.0.13.1", Service.REVERSE_DNS)
        assert [place.story(job_id) for job_id in (under_way, never_begun)] == before
    assert (pointer(NOBODY_ELSE_ASKS_ABOUT), "PTR") not in asked


def pointer(address: str) -> str:
    return dns.reversename.from_address(address).to_text()


# --- Settings and requests --------------------------------------------------------------------------------------------


async def test_timeout_and_attempts_are_settings_of_a_service_and_a_request_may_ask_for_less(place: Place) -> None:
    async with place.worker(Service.RDAP):
        await place.answers("127.0.14.1", Service.RDAP)
        as_set = await place.client.post({"target": "slow.org", "services": ["RDAP"]})
        in_a_hurry = await place.client.post({"target": "slow.org", "services": ["RDAP"], "timeoutSeconds": 0.1})
        for answer, timeout_s in ((as_set, ATTEMPT_S), (in_a_hurry, 0.1)):
            document = await place.ended(answer.document["jobId"])

            story = place.story(document["jobId"])
            tasks = [task for row in story if row.name == "TasksDispatched" for task in row.fields["tasks"]]
            assert [(task["attempt"], task["timeout_s"]) for task in tasks] == [
                (attempt, timeout_s) for attempt in range(1, RDAP_ATTEMPTS + 1)
            ]
            (registration,) = document["results"]
            assert (registration["status"], registration["attempt"]) == ("TimedOut", RDAP_ATTEMPTS)


def _at(text: str) -> datetime:
    return datetime.fromisoformat(text)
