"""Outcomes of one job, all at once, from several processes' worth of gatherers: each is decided about once, and none is lost.

Every gatherer has a store and a cache of its own, as in a process of its own; they meet in PostgreSQL only, where the expected
version is checked.
"""

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from uuid import UUID

from uuid_utils.compat import uuid7

from app.wiring import utc_now
from domain.commands import TaskOutcome, lines_of
from domain.saga import replay
from events.bus import OUTCOMES, Inbox
from events.chain import GENESIS, chained_hash
from events.facts import (
    Fact,
    JobCompleted,
    JobFailed,
    Service,
    TaskCompleted,
    TaskFailed,
    TasksDispatched,
    TaskSkipped,
    TaskTimedOut,
)
from events.memory import MemoryBus
from events.postgres import PostgresStore
from events.record import SALT_BYTES, StoredFact, fact_of, hash_of
from events.store import Scribe
from tests.builders import (
    OUT_OF_TIME,
    PERMANENT,
    REFUSED,
    RULES,
    TRANSIENT,
    Clock,
    at,
    dispatched,
    given,
    outcome,
    quota,
    submitted,
    success,
)
from write_side.gather import Gatherer
from write_side.sagas import Sagas

SCRIBE = Scribe(utc_now, uuid7, partial(os.urandom, SALT_BYTES))
ROUNDS = 200
OUTCOMES_AT_ONCE = 64
OUTCOMES_PER_MESSAGE_MAX = 7
GATHERERS = 4
PATIENCE_S = 100.0
TERMINAL = (TaskCompleted, TaskFailed, TaskTimedOut, TaskSkipped)


@dataclass(frozen=True)
class Gathering:
    """A gatherer with everything of its own."""

    gatherer: Gatherer
    bus: MemoryBus
    inbox: Inbox

    async def gather(self, message: Sequence[TaskOutcome]) -> None:
        await self.bus.publish(OUTCOMES, lines_of(message))
        await self.gatherer.gather(self.inbox, await self.inbox.take(1))


@asynccontextmanager
async def gatherings(database_url: str) -> AsyncIterator[list[Gathering]]:
    async with AsyncExitStack() as stack:
        found = []
        for _ in range(GATHERERS):
            store = PostgresStore(database_url, SCRIBE)
            stack.push_async_callback(store.close)
            bus = MemoryBus()
            gatherer = Gatherer(Sagas(store), bus, RULES, Clock(at(1)), uuid7)
            found.append(Gathering(gatherer, bus, gatherer.subscribe()))
        yield found


def mixed_outcomes(chance: random.Random, job_id: UUID, services: Sequence[Service]) -> list[TaskOutcome]:
    """Every ending of both attempts, many times over. A success for each service is among them, so the job ends."""
    endings = [None, None, PERMANENT, TRANSIENT, OUT_OF_TIME, REFUSED, quota(at(5))]
    some = [
        outcome(chance.choice(services), chance.choice(endings), attempt=chance.randint(1, 2), job_id=job_id)
        for _ in range(OUTCOMES_AT_ONCE - len(services))
    ]
    mixed = [*some, *(outcome(service, success(job_id=job_id), job_id=job_id) for service in services)]
    chance.shuffle(mixed)
    return mixed


def messages_of(chance: random.Random, outcomes: Sequence[TaskOutcome]) -> list[Sequence[TaskOutcome]]:
    """As workers send them: one alone, or some that ended together. Each message is a decision of its own."""
    messages: list[Sequence[TaskOutcome]] = []
    left = outcomes
    while left:
        some = chance.randint(1, OUTCOMES_PER_MESSAGE_MAX)
        messages.append(left[:some])
        left = left[some:]
    return messages


async def test_64_outcomes_at_once_each_count_once_and_leave_dense_versions(migrated_database_url: str) -> None:
    chance = random.Random(4)
    async with asyncio.timeout(PATIENCE_S), gatherings(migrated_database_url) as several:
        store = several[0].gatherer.sagas._store
        for _ in range(ROUNDS):
            job_id = uuid7()
            services = chance.sample(list(Service), chance.randint(1, 4))
            await given(store, submitted(*services, job_id=job_id), dispatched(*services, job_id=job_id), job_id=job_id)
            before = counted(several)

            outcomes = mixed_outcomes(chance, job_id, services)
            await asyncio.gather(
                *(several[index % GATHERERS].gather(told) for index, told in enumerate(messages_of(chance, outcomes)))
            )

            stream = (await store.read([job_id]))[job_id]
            facts = [fact_of(stored.topic, stored.state) for stored in stream]
            assert_dense_and_chained(stream)
            assert_each_task_ended_once(facts, services)
            news = counted(several) - before
            assert news["recorded"] + news["ignored"] == OUTCOMES_AT_ONCE
            assert news["recorded"] == len([fact for fact in facts[2:] if not isinstance(fact, JobCompleted | JobFailed)])
        assert sum(gathering.gatherer.sagas.counters.conflict for gathering in several) > ROUNDS, "they hardly met"


def counted(several: Sequence[Gathering]) -> Counter[str]:
    total: Counter[str] = Counter()
    for gathering in several:
        counters = gathering.gatherer.counters
        total.update(recorded=counters.recorded, ignored=counters.ignored)
    return total


def assert_dense_and_chained(stream: Sequence[StoredFact]) -> None:
    assert [stored.stream_version for stored in stream] == list(range(1, len(stream) + 1))
    previous = GENESIS
    for stored in stream:
        envelope, chained, *_ = stored.state.split(b"\n")
        previous = chained_hash(previous, stored.stream_id, stored.stream_version, stored.topic, envelope, chained)
        assert hash_of(stored.state) == previous


def assert_each_task_ended_once(facts: Sequence[Fact], services: Sequence[Service]) -> None:
    ended = [fact.service for fact in facts if isinstance(fact, TERMINAL)]
    assert sorted(ended) == sorted(services)
    assert [type(fact) for fact in facts if isinstance(fact, JobCompleted | JobFailed)] == [type(facts[-1])]
    assert replay(facts).closed
    tasks = [task for fact in facts if isinstance(fact, TasksDispatched) for task in fact.tasks]
    for service in services:
        attempts = [task.attempt for task in tasks if task.service is service]
        assert attempts == list(range(1, len(attempts) + 1))
