"""Each fact counts once: a broker that delivers everything three times, out of order and long afterwards changes nothing.

The real parts over PostgreSQL and each transport, with lookups that answer the same whenever they are asked, and a wire tap.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from app.migrate import migrate
from app.settings import Settings
from app.wiring import Wiring, new_id, utc_now
from domain.commands import Failed, Succeeded, TaskOutcome, lines_of
from domain.target import parse_target
from events.bus import COMMANDS, OUTCOMES, Bus, Inbox, Queue
from events.ending import end
from events.facts import Fact, JobCompleted, JobFailed, Service, Target, TaskCompleted, TaskFailed, TasksDispatched
from events.record import Cause, fact_of
from events.store import OutcomeUnknown, StoreUnavailable, VersionConflict
from tests.builders import DOWN, eventually, success
from tests.servers.postgres import fresh_database
from tests.servers.valkey import RedisDatabases
from workers.lookup import Answer, LookUp, LookupFailed, Result
from workers.runner import WorkerCounters
from write_side.gather import GatherCounters
from write_side.submit import Submitter

JOBS = 24
COPIES = 3
DELAY_MAX_S = 0.4
PATIENCE_S = 60.0

pytestmark = pytest.mark.timeout(180)


class Echo(Result):
    text: str


async def look_up(target: Target, service: Service) -> Answer[Echo]:
    """What becomes of it depends on target and service alone: an answer, a permanent failure, or one that stays transient."""
    match (int(target.canonical.rpartition(".")[2]) + tuple(Service).index(service)) % 4:
        case 0:
            raise LookupFailed("not_found", "There is no such thing.")
        case 1:
            raise LookupFailed("upstream_error", "The source is broken.", transient=True)
        case _:
            return Answer(Echo(text=f"{target.canonical} {service}"))


@dataclass
class Tap:
    """Has every command and outcome delivered `COPIES` times, each in its own time; `again` sends all of it once more."""

    chance: random.Random
    sent: list[tuple[Queue, bytes]] = field(default_factory=list)
    outcomes: int = 0
    commands: int = 0
    under_way: set["asyncio.Task[None]"] = field(default_factory=set)

    async def publish(self, bus: Bus, queue: Queue, body: bytes, headers: Mapping[str, str] | None) -> None:
        self.sent.append((queue, body))
        for _ in range(COPIES):
            task = asyncio.create_task(self._later(bus, queue, body, headers))
            self.under_way.add(task)
            task.add_done_callback(self.under_way.discard)

    async def again(self, bus: Bus) -> None:
        for queue, body in self.chance.sample(self.sent, len(self.sent)):
            await self._send(bus, queue, body, None)

    async def _later(self, bus: Bus, queue: Queue, body: bytes, headers: Mapping[str, str] | None) -> None:
        await asyncio.sleep(self.chance.uniform(0, DELAY_MAX_S))
        await self._send(bus, queue, body, headers)

    async def _send(self, bus: Bus, queue: Queue, body: bytes, headers: Mapping[str, str] | None) -> None:
        lines = body.count(b"\n") + 1
        if queue == OUTCOMES:
            self.outcomes += lines
        else:
            self.commands += lines
        await bus.publish(queue, body, headers)


class TappedBus:
    """A bus whose messages to workers and saga go through the tap."""

    def __init__(self, bus: Bus, tap: Tap) -> None:
        self._bus = bus
        self._tap = tap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    def subscribe(self, queue: Queue, *, in_hand_max: int) -> Inbox:
        return self._bus.subscribe(queue, in_hand_max=in_hand_max)

    async def publish(self, queue: Queue, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        if queue == OUTCOMES or queue in COMMANDS.values():
            await self._tap.publish(self._bus, queue, body, headers)
        else:
            await self._bus.publish(queue, body, headers)

    async def publish_each(self, bodies: Mapping[Queue, bytes]) -> None:
        for queue, body in bodies.items():
            await self.publish(queue, body)


class TappedWiring(Wiring):
    """The product's own composition, but for the tap."""

    tap: Tap | None = None

    def bus(self) -> Bus:
        bus = super().bus()
        tapped: Any = TappedBus(bus, self.tap) if self.tap is not None else bus
        return tapped  # type: ignore[no-any-return]


def settings_of(database_url: str, redis_url: str, broker_url: str | None) -> Settings:
    return Settings(
        database_url=database_url,
        redis_url=redis_url,
        broker_url=broker_url,
        redispatch_after_s=3600,
        interactive_lifetime_s=3600,
    )


@pytest.fixture(params=["redis", "rabbitmq"])
def two_places(request: pytest.FixtureRequest, postgres: str, valkey: RedisDatabases) -> Iterator[list[Settings]]:
    """Two logs, each with a broker of its own."""
    with ExitStack() as stack:
        places = []
        for _ in range(2):
            database_url = stack.enter_context(fresh_database(postgres))
            migrate(database_url, uuid7(), {})
            redis_url, broker_url = stack.enter_context(valkey.fresh()), None
            if request.param == "rabbitmq":
                broker_url = stack.enter_context(request.getfixturevalue("rabbitmq").fresh_vhost())
            places.append(settings_of(database_url, redis_url, broker_url))
        yield places


@asynccontextmanager
async def running(settings: Settings, tap: Tap | None) -> AsyncIterator[TappedWiring]:
    wiring = TappedWiring(settings, lookups=lookups())
    wiring.tap = tap
    parts = [wiring.relay(), wiring.gather(), *(wiring.worker(service) for service in Service)]
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        yield wiring
    finally:
        await end(tasks, 20.0)
        await wiring.aclose()


def lookups() -> dict[Service, LookUp]:
    return {service: partial(look_up, service=service) for service in Service}


async def work_off(wiring: Wiring) -> dict[str, list[Fact]]:
    """Submits all jobs and waits for their end; gives each job's facts, by its target."""
    submitter = Submitter(wiring.sagas, wiring.policy(), wiring.settings.rules, utc_now, new_id, "default")
    cause = Cause(actor="test", correlation_id=new_id())
    job_ids = {f"8.8.8.{number}": new_id() for number in range(JOBS)}
    async with asyncio.timeout(PATIENCE_S):
        for target, job_id in job_ids.items():
            await taken_on(submitter, job_id, target, cause)
        while True:
            found = await logs(wiring, job_ids)
            if all(isinstance(facts[-1], JobCompleted | JobFailed) for facts in found.values()):
                return found
            await asyncio.sleep(0.2)


async def taken_on(submitter: Submitter, job_id: UUID, target: str, cause: Cause) -> None:
    """As a client would that does not give up: a busy machine may answer too late for a single try."""
    while True:
        with suppress(StoreUnavailable, OutcomeUnknown):
            with suppress(VersionConflict):  # The try before, whose answer came too late, was taken.
                await submitter.submit(job_id, parse_target(target), tuple(Service), cause, requested_by=None)
            return


async def logs(wiring: Wiring, job_ids: Mapping[str, UUID]) -> dict[str, list[Fact]]:
    streams = await wiring.store.read(list(job_ids.values()))
    return {target: [fact_of(stored.topic, stored.state) for stored in streams[job_id]] for target, job_id in job_ids.items()}


def told(facts: Sequence[Fact]) -> list[Any]:
    """The story without ids and times. What different services did has no order among them; all else has."""
    by_service: dict[Service, list[Any]] = {service: [] for service in Service}
    rest: list[Any] = []
    for fact in facts:
        match fact:
            case TasksDispatched(tasks=tasks):
                for task in tasks:
                    by_service[task.service].append(("dispatched", task.attempt, task.timeout_s))
            case TaskCompleted(service=service, attempt=attempt, result=result):
                by_service[service].append(("completed", attempt, result.sha256, result.size_bytes))
            case TaskFailed(service=service, attempt=attempt, error=error):
                by_service[service].append(("failed", attempt, error.code, error.message))
            case JobCompleted(counts=counts) | JobFailed(counts=counts):
                rest.append((type(fact).__name__, counts))
            case _:
                rest.append(type(fact).__name__)
    return [by_service, rest, len(facts)]


async def test_everything_three_times_out_of_order_and_long_afterwards_gives_the_same_log(two_places: list[Settings]) -> None:
    undisturbed, disturbed = two_places
    async with running(undisturbed, None) as wiring:
        expected = await work_off(wiring)
    tap = Tap(random.Random(4711))

    async with running(disturbed, tap) as wiring:
        found = await work_off(wiring)
        assert {target: told(facts) for target, facts in found.items()} == {
            target: told(facts) for target, facts in expected.items()
        }

        await late_and_strange(wiring, tap, found)

        job_ids = {target: facts[0].job_id for target, facts in found.items()}  # type: ignore[attr-defined]
        assert await logs(wiring, job_ids) == found
        assert len(await wiring.store.read_all(0, 10_000)) == sum(map(len, found.values()))
        gathered = wiring.counters.of(GatherCounters)
        assert gathered.unreadable == 0
        first_two_and_last = 3
        assert gathered.recorded == sum(len(facts) - first_two_and_last for facts in found.values())
        assert gathered.ignored > (COPIES - 1) * gathered.recorded


async def late_and_strange(wiring: TappedWiring, tap: Tap, jobs: Mapping[str, Sequence[Fact]]) -> None:
    """All messages once more, the jobs being closed, and outcomes that nobody can have asked for; until all are counted."""
    tap.chance.shuffle(tap.sent)
    async with _bus(wiring) as bus:
        await tap.again(bus)
        strange = list(strangers(jobs))
        tap.outcomes += len(strange)
        await bus.publish(OUTCOMES, lines_of(strange))
        gathered = wiring.counters.of(GatherCounters)
        workers = [wiring.counters.of(WorkerCounters, service) for service in Service]
        await eventually(lambda: not tap.under_way and handled(workers) == tap.commands, patience_s=PATIENCE_S)
        await eventually(
            lambda: not tap.under_way and gathered.recorded + gathered.ignored == tap.outcomes, patience_s=PATIENCE_S
        )


def handled(workers: Sequence[WorkerCounters]) -> int:
    return sum(worker.reported + worker.superseded + worker.expired for worker in workers)


def strangers(jobs: Mapping[str, Sequence[Fact]]) -> Iterator[TaskOutcome]:
    """For unknown jobs; and of each closed job, a success where it failed and a failure where it succeeded."""
    for facts in jobs.values():
        for fact in facts:
            if isinstance(fact, TaskCompleted | TaskFailed):
                yield _outcome(fact, fact.job_id)
                yield _outcome(fact, uuid7())


def _outcome(fact: TaskCompleted | TaskFailed, job_id: UUID) -> TaskOutcome:
    succeeded = isinstance(fact, TaskCompleted)
    ending: Succeeded | Failed = Failed(error=DOWN, transient=False) if succeeded else success(job_id=job_id)
    return TaskOutcome(
        job_id=job_id,
        command_id=uuid7(),
        service=fact.service,
        attempt=fact.attempt,
        worker="stranger",
        duration_ms=1,
        ended_at=utc_now(),
        ending=ending,
    )


@asynccontextmanager
async def _bus(wiring: TappedWiring) -> AsyncIterator[Bus]:
    bus = Wiring.bus(wiring)
    await bus.start()
    try:
        yield bus
    finally:
        await bus.stop()
