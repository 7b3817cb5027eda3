"""Every command's facts say who, why and on whose request: one table, with a line for each command that appends to a job."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import pytest
from aiohttp import ClientSession
from uuid_utils.compat import uuid7

from app.http.middlewares import request_id_of
from app.http.problem import problem
from app.http.serving import serving
from domain.address_policy import AddressPolicy
from domain.commands import Deferred, Failed, Skipped, Succeeded, TaskOutcome, TimedOut, lines_of
from events.bus import OUTCOMES
from events.facts import Service, TasksDispatched
from events.memory import MemoryBus, MemoryStore
from events.record import Cause, envelope_of, read
from tests.builders import (
    DOMAIN,
    OUT_OF_TIME,
    PERMANENT,
    PING,
    RDAP,
    REFUSED,
    RULES,
    TRANSIENT,
    Clock,
    at,
    memory_store,
    outcome,
    quota,
    success,
)
from write_side.api import WriteApi
from write_side.deadlines import Deadlines
from write_side.gather import Gatherer
from write_side.sagas import Sagas
from write_side.submit import Submitter

REQUEST_ID = "req-17"
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
DOCTOR = ("doctor:alice", "it was stuck")


@dataclass
class Job:
    """A job that was asked for over HTTP, and the parts that go on with it."""

    store: MemoryStore
    clock: Clock
    sagas: Sagas
    job_id: UUID = field(default_factory=uuid7)

    async def asked_for(self) -> None:
        submitter = Submitter(self.sagas, AddressPolicy(), RULES, self.clock, uuid7, "default")
        routes = WriteApi(submitter, problem, uuid7, request_id_of).routes()
        headers = {"X-Request-Id": REQUEST_ID, "traceparent": TRACE}
        async with serving(routes, "127.0.0.1", 0) as url, ClientSession() as http:
            body = {"target": "9.9.9.9", "services": ["Ping", "RDAP"]}
            answer = await http.post(f"{url}/api/lookup", json=body, headers=headers)
            self.job_id = UUID((await answer.json())["jobId"])

    async def envelopes(self) -> list[dict[str, Any]]:
        return [envelope_of(stored.state) for stored in (await self.store.read([self.job_id]))[self.job_id]]

    async def command_id(self, service: Service) -> UUID:
        facts = [read(stored).fact for stored in (await self.store.read([self.job_id]))[self.job_id]]
        tasks = [task for fact in facts if isinstance(fact, TasksDispatched) for task in fact.tasks if task.service is service]
        return tasks[-1].command_id

    async def reported(self, *outcomes: TaskOutcome) -> None:
        bus = MemoryBus()
        gatherer = Gatherer(self.sagas, bus, RULES, self.clock, uuid7)
        inbox = gatherer.subscribe()
        await bus.publish(OUTCOMES, lines_of(outcomes))
        await gatherer.gather(inbox, await inbox.take(1))

    async def of(
        self, service: Service, ending: Succeeded | Failed | TimedOut | Skipped | Deferred, worker: str
    ) -> TaskOutcome:
        made = outcome(service, ending, job_id=self.job_id)
        return made.model_copy(update={"command_id": await self.command_id(service), "worker": worker})

    async def expired(self, **by_whom: str) -> None:
        async def nothing_due(_: datetime, __: int) -> Sequence[UUID]:
            return []

        async def relayed() -> int:
            return 1_000

        self.clock.move_to(at(120))
        watch = Deadlines(self.sagas, self.store, nothing_due, relayed, RULES, self.clock, uuid7)
        await watch.expire(self.job_id, at(120), **by_whom)


@pytest.fixture
async def job() -> Job:
    clock = Clock()
    store = memory_store(clock)
    job = Job(store, clock, Sagas(store))
    await job.asked_for()
    return job


def shared(envelopes: Sequence[Mapping[str, Any]]) -> set[tuple[Any, ...]]:
    return {tuple(envelope.get(name) for name in ("correlation_id", "request_id", "traceparent")) for envelope in envelopes}


async def test_what_was_asked_for_over_http_names_the_request(job: Job) -> None:
    envelopes = await job.envelopes()

    assert len(envelopes) == 2
    for envelope in envelopes:
        assert (envelope["actor"], envelope["reason"]) == ("anonymous", "asked over HTTP")
        assert (envelope["request_id"], envelope["traceparent"]) == (REQUEST_ID, TRACE)
        assert envelope["causation_id"] == envelope["correlation_id"]
        assert "key_id" not in envelope, "nobody is authenticated yet"


COMMANDS_AFTER_IT: Mapping[str, tuple[Callable[[Job], Awaitable[None]], tuple[str, str]]] = {
    "an answer": (lambda job: _reports(job, success(job_id=job.job_id)), ("Ping@host:1", "a worker reported")),
    "a failure": (lambda job: _reports(job, PERMANENT), ("Ping@host:1", "a worker reported")),
    "a failure that is tried again": (lambda job: _reports(job, TRANSIENT), ("Ping@host:1", "a worker reported")),
    "an attempt's time-out": (lambda job: _reports(job, OUT_OF_TIME), ("Ping@host:1", "a worker reported")),
    "a refusal": (lambda job: _reports(job, REFUSED), ("Ping@host:1", "a worker reported")),
    "a deferral": (lambda job: _reports(job, quota(at(20))), ("Ping@host:1", "a worker reported")),
    "the clock": (lambda job: job.expired(), ("deadlines", "its time had come")),
    "doctor --fix": (lambda job: job.expired(actor=DOCTOR[0], reason=DOCTOR[1]), DOCTOR),
}


async def _reports(job: Job, ending: Succeeded | Failed | TimedOut | Skipped | Deferred) -> None:
    await job.reported(await job.of(PING, ending, "Ping@host:1"))


@pytest.mark.parametrize("command", COMMANDS_AFTER_IT)
async def test_what_follows_names_who_did_it_why_and_the_same_request(job: Job, command: str) -> None:
    carry_out, who_and_why = COMMANDS_AFTER_IT[command]
    asked_for = await job.command_id(PING)

    await carry_out(job)

    first, _, *later = await job.envelopes()
    assert later
    assert {(envelope["actor"], envelope["reason"]) for envelope in later} == {who_and_why}
    assert shared(later) == {(first["correlation_id"], REQUEST_ID, TRACE)}
    caused_by = {envelope["causation_id"] for envelope in later}
    assert len(caused_by) == 1
    assert (caused_by == {str(asked_for)}) == (who_and_why[1] == "a worker reported")
    assert caused_by != {first["correlation_id"]}


async def test_outcomes_that_are_decided_on_together_keep_their_own_worker_and_command(job: Job) -> None:
    outcomes = [await job.of(PING, PERMANENT, "Ping@a:1"), await job.of(RDAP, success(job_id=job.job_id), "RDAP@b:2")]

    await job.reported(*outcomes)

    told = [(envelope["actor"], envelope["causation_id"]) for envelope in (await job.envelopes())[2:]]
    ping, rdap = (("Ping@a:1", str(outcomes[0].command_id)), ("RDAP@b:2", str(outcomes[1].command_id)))
    assert told == [ping, rdap, rdap], "the end of the job is the last outcome's doing"


async def test_a_saga_that_was_forgotten_and_read_again_still_knows_its_request(job: Job) -> None:
    job.sagas = Sagas(job.store)

    await _reports(job, PERMANENT)

    assert shared(await job.envelopes()) == {((await job.envelopes())[0]["correlation_id"], REQUEST_ID, TRACE)}


async def test_the_key_of_a_request_is_named_on_all_later_facts_once_there_is_one() -> None:
    clock = Clock()
    store = memory_store(clock)
    job = Job(store, clock, Sagas(store))
    submitter = Submitter(job.sagas, AddressPolicy(), RULES, clock, uuid7, "default")
    cause = Cause("alice", uuid7(), key_id="key-1", reason="asked over HTTP")

    await submitter.submit(job.job_id, DOMAIN, [PING], cause, requested_by=None)
    await _reports(job, PERMANENT)

    assert {envelope["key_id"] for envelope in await job.envelopes()} == {"key-1"}
