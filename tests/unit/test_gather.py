"""Gather: each outcome counts once, and is acknowledged only after what it led to is in the log."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import UUID

import pytest

from domain.commands import TaskOutcome, lines_of
from domain.saga import NO_ANSWER
from events import dead_letters
from events.bus import DEAD_LETTERS, OUTCOMES, Delivery
from events.facts import Fact, Service, TasksDispatched
from events.memory import MemoryBus, MemoryInbox, MemoryStore
from events.record import envelope_of, read
from events.store import AppendUnit, OutcomeUnknown, StoreUnavailable, StreamHead, VersionConflict
from tests.builders import (
    CAUSE,
    GEOIP,
    JOB,
    NOW,
    PERMANENT,
    PING,
    RDAP,
    RULES,
    TRANSIENT,
    Clock,
    completed,
    counts,
    dispatched,
    eventually,
    failed,
    given,
    job_completed,
    job_failed,
    memory_store,
    numbered_ids,
    outcome,
    quota,
    submitted,
)
from write_side import gather
from write_side.gather import Gatherer
from write_side.sagas import Sagas

PATIENCE_S = 5.0
NOBODYS_JOB = UUID("019b7c8a-0000-7000-8000-0000000000ff")


class Refusing:
    """The store, but its first appends fail in a given way. `committed` says that they went down all the same."""

    def __init__(self, store: MemoryStore, *refusals: Exception, committed: bool = False) -> None:
        self._store = store
        self._refusals = list(refusals)
        self._committed = committed
        self.refused = asyncio.Event()
        self.may_go_on = asyncio.Event()
        self.appends = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def append(self, unit: AppendUnit) -> Sequence[StreamHead]:
        self.appends += 1
        if self._refusals:
            if self._committed:
                await self._store.append(unit)
            self.refused.set()
            raise self._refusals.pop(0)
        if self.refused.is_set():
            await self.may_go_on.wait()
        return await self._store.append(unit)


class Gathering:
    """A gatherer over a store, with an inbox that it reads."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.bus = MemoryBus()
        self.gatherer = Gatherer(Sagas(store), self.bus, RULES, Clock(), numbered_ids(1 << 100))
        inbox = self.gatherer.subscribe()
        assert isinstance(inbox, MemoryInbox)
        self.inbox = inbox
        self.dead_letters = self.bus.subscribe(DEAD_LETTERS, in_hand_max=10)

    async def take_in(self, *messages: Sequence[TaskOutcome] | bytes) -> list[Delivery]:
        deliveries = await self.delivered(*messages)
        async with asyncio.timeout(PATIENCE_S):
            await self.gatherer.gather(self.inbox, deliveries)
        return deliveries

    async def delivered(self, *messages: Sequence[TaskOutcome] | bytes) -> list[Delivery]:
        for message in messages:
            await self.bus.publish(OUTCOMES, message if isinstance(message, bytes) else lines_of(message))
        return await self.inbox.take(len(messages))

    async def unacknowledged(self) -> int:
        """How many deliveries would come again if this reader died now."""
        await self.inbox.give_back()
        with suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                return len(await self.inbox.take(1_000))
        return 0

    def counted(self) -> tuple[int, int, int]:
        counters = self.gatherer.counters
        return counters.recorded, counters.ignored, counters.unreadable

    async def facts(self, job_id: UUID = JOB) -> list[Fact]:
        return [read(stored).fact for stored in (await self.store.read([job_id])).get(job_id, ())]


OPEN: list[Any] = [submitted(PING, RDAP), dispatched(PING, RDAP)]


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause between tries is for the store's sake, not the test's."""
    monkeypatch.setattr(gather, "RETRY_PAUSE_S", 0.01)


async def started(*facts: Any, refusals: Sequence[Exception] = (), committed: bool = False) -> Gathering:
    store = memory_store()
    await given(store, *facts)
    return Gathering(Refusing(store, *refusals, committed=committed) if refusals else store)


async def test_an_outcome_becomes_a_fact_and_is_acknowledged() -> None:
    gathering = await started(*OPEN)

    await gathering.take_in([outcome(PING)])

    assert await gathering.facts() == [*OPEN, completed(PING)]
    assert gathering.counted() == (1, 0, 0)
    assert await gathering.unacknowledged() == 0


async def test_the_fact_tells_which_command_led_to_it_and_whose_request_it_was() -> None:
    gathering = await started(*OPEN)

    await gathering.take_in([outcome(PING)])

    envelope = envelope_of((await gathering.store.read([JOB]))[JOB][-1].state)
    assert envelope["causation_id"] == str(outcome(PING).command_id)
    assert envelope["correlation_id"] == str(CAUSE.correlation_id)
    assert envelope["actor"] == outcome(PING).worker


async def test_all_outcomes_of_a_job_that_are_in_hand_are_one_append() -> None:
    gathering = await started(*OPEN, refusals=[VersionConflict()])
    gathering.store.may_go_on.set()

    await gathering.take_in([outcome(PING)], [outcome(RDAP, PERMANENT)])

    assert await gathering.facts() == [*OPEN, completed(PING), failed(RDAP), job_completed(counts(succeeded=1, failed=1))]
    assert gathering.store.appends == 2  # The conflict, and the one that went down.


async def test_a_repeated_outcome_is_acknowledged_and_counted_but_leaves_no_trace() -> None:
    gathering = await started(*OPEN)
    await gathering.take_in([outcome(PING)])

    await gathering.take_in([outcome(PING)])

    assert await gathering.facts() == [*OPEN, completed(PING)]
    assert gathering.counted() == (1, 1, 0)
    assert await gathering.unacknowledged() == 0


async def test_a_repetition_within_one_decision_is_counted_as_such() -> None:
    gathering = await started(*OPEN)

    await gathering.take_in([outcome(PING), outcome(PING)], [outcome(PING), outcome(RDAP, TRANSIENT)])

    assert (await gathering.facts())[:3] == [*OPEN, completed(PING)]
    assert len(await gathering.facts()) == 4
    assert gathering.counted() == (2, 2, 0)


async def test_an_outcome_of_nobodys_job_is_ignored_counted_and_acknowledged() -> None:
    gathering = await started(*OPEN)

    await gathering.take_in([outcome(PING, job_id=NOBODYS_JOB), outcome(PING)])

    assert await gathering.facts(NOBODYS_JOB) == []
    assert await gathering.facts() == [*OPEN, completed(PING)]
    assert gathering.counted() == (1, 1, 0)
    assert await gathering.unacknowledged() == 0


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("refusal", [StoreUnavailable(), OutcomeUnknown()], ids=lambda error: type(error).__name__)
async def test_nothing_is_acknowledged_before_it_is_committed(refusal: Exception) -> None:
    gathering = await started(*OPEN, refusals=[refusal])
    deliveries = await gathering.delivered([outcome(PING)])

    gathered = asyncio.create_task(gathering.gatherer.gather(gathering.inbox, deliveries))
    async with asyncio.timeout(PATIENCE_S):
        await gathering.store.refused.wait()
    assert await gathering.unacknowledged() == 1
    assert not gathered.done()

    gathering.store.may_go_on.set()
    async with asyncio.timeout(PATIENCE_S):
        await gathered
    assert await gathering.facts() == [*OPEN, completed(PING)]


@pytest.mark.usefixtures("quick_retries")
async def test_an_append_of_unknown_outcome_that_went_down_counts_once() -> None:
    gathering = await started(*OPEN, refusals=[OutcomeUnknown()], committed=True)
    gathering.store.may_go_on.set()

    await gathering.take_in([outcome(PING)])

    assert await gathering.facts() == [*OPEN, completed(PING)]
    assert gathering.counted() == (0, 1, 0)


async def test_a_conflict_is_decided_again_on_what_the_other_wrote() -> None:
    """Two gatherers, each with the other's news in its blind spot: the second to append closes the job."""
    store = memory_store()
    await given(store, *OPEN)
    one, two = Gathering(store), Gathering(store)
    for each in (one, two):
        await each.gatherer.sagas.load([JOB])

    await one.take_in([outcome(PING, PERMANENT)])
    await two.take_in([outcome(RDAP, PERMANENT), outcome(PING)])

    assert await one.facts() == [*OPEN, failed(PING), failed(RDAP), job_failed(counts(failed=2), reason=NO_ANSWER)]
    assert two.counted() == (1, 1, 0)


async def test_what_somebody_else_dispatched_meanwhile_is_not_taken_for_superseded() -> None:
    """A decision that appends nothing is guarded by no expected version: it may not be made of a remembered state."""
    store = memory_store()
    await given(store, *OPEN)
    one, two = Gathering(store), Gathering(store)
    await two.gatherer.sagas.load([JOB])
    await one.take_in([outcome(PING, TRANSIENT)])
    again = (await one.facts())[-1]
    assert isinstance(again, TasksDispatched)

    await two.take_in([outcome(PING, PERMANENT, attempt=2).model_copy(update={"command_id": again.tasks[0].command_id})])

    assert (await two.facts())[-1] == failed(PING, attempt=2)
    assert two.counted() == (1, 0, 0)


async def test_sixty_four_simultaneous_outcomes_of_one_job_are_each_counted_once() -> None:
    """16 reports of each of 4 tasks, in 64 messages, read by 4 gatherers at the same time."""
    store = memory_store()
    await given(store, submitted(*Service), dispatched(*Service))
    readers = [Gathering(store) for _ in range(4)]
    messages = [[outcome(service)] for service in Service for _ in range(16)]

    await asyncio.gather(*(reader.take_in(*messages[number::4]) for number, reader in enumerate(readers)))

    facts = await readers[0].facts()
    assert sorted(fact.model_dump_json() for fact in facts[2:6]) == sorted(
        completed(service).model_dump_json() for service in Service
    )
    assert facts[6:] == [job_completed(counts(succeeded=4))]
    counted = [reader.counted() for reader in readers]
    assert sum(recorded for recorded, _, _ in counted) == 4
    assert sum(ignored for _, ignored, _ in counted) == 60


async def test_an_unreadable_line_goes_to_the_dead_letters_alone() -> None:
    gathering = await started(*OPEN)
    spoiled = lines_of([outcome(PING)]) + b'\n{"job_id":"nobody"}\n' + lines_of([outcome(RDAP)])

    await gathering.take_in(spoiled)

    (letter,) = await gathering.dead_letters.take(10)
    assert letter.body == b'{"job_id":"nobody"}'
    assert (letter.headers[dead_letters.QUEUE], letter.headers[dead_letters.REASON]) == (OUTCOMES.name, "wrong_schema")
    assert await gathering.facts() == [*OPEN, completed(PING), completed(RDAP), job_completed(counts(succeeded=2))]
    assert gathering.counted() == (2, 0, 1)
    assert await gathering.unacknowledged() == 0


async def test_an_outcome_that_breaks_the_decision_goes_to_the_dead_letters_alone() -> None:
    """A time without a zone can be read, and cannot be compared. It must not end the reader, nor take its neighbours along."""
    gathering = await started(*OPEN)
    breaking = outcome(PING, quota(NOW.replace(tzinfo=None)))

    await gathering.take_in([breaking, outcome(RDAP)], [outcome(PING)], [breaking])

    letters = await gathering.dead_letters.take(10)
    assert [letter.body for letter in letters] == [lines_of([breaking])] * len(letters)
    assert {letter.headers[dead_letters.REASON] for letter in letters} == {"refused"}
    assert len({letter.headers[dead_letters.MESSAGE] for letter in letters}) == 1
    assert await gathering.facts() == [*OPEN, completed(RDAP), completed(PING), job_completed(counts(succeeded=2))]
    assert await gathering.unacknowledged() == 0


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"null", b"[1]", b'{"kind":"succeeded"}', b"[" * 10_000])
async def test_no_body_stops_the_reader(body: bytes) -> None:
    gathering = await started(*OPEN)

    await gathering.take_in(body, [outcome(PING)])

    assert await gathering.facts() == [*OPEN, completed(PING)]
    assert gathering.counted() == (1, 0, 1)


async def test_an_outcome_of_a_job_that_the_cache_is_about_to_forget_is_not_lost() -> None:
    """Reading other jobs may push a remembered one out: it is still a job of ours."""
    store = memory_store()
    others = [UUID(int=number) for number in range(1, 4)]
    await given(store, *OPEN)
    for job_id in others:
        await given(store, submitted(GEOIP, job_id=job_id), dispatched(GEOIP, job_id=job_id), job_id=job_id)
    gathering = Gathering(store)
    gathering.gatherer.sagas = Sagas(store, cache_max=2)
    await gathering.gatherer.sagas.load([JOB])

    await gathering.take_in([outcome(PING)], *([outcome(GEOIP, job_id=job_id)] for job_id in others))

    assert await gathering.facts() == [*OPEN, completed(PING)]
    assert gathering.counted() == (4, 0, 0)


@asynccontextmanager
async def running(gathering: Gathering) -> AsyncIterator[None]:
    task = asyncio.create_task(gathering.gatherer.run(gathering.inbox))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_a_running_gatherer_takes_in_what_comes_and_what_came_before_it() -> None:
    gathering = await started(*OPEN)
    await gathering.bus.publish(OUTCOMES, lines_of([outcome(PING)]))

    async with running(gathering):
        await gathering.bus.publish(OUTCOMES, lines_of([outcome(RDAP)]))
        await eventually(lambda: gathering.gatherer.counters.recorded == 2)

    assert (await gathering.facts())[-1] == job_completed(counts(succeeded=2), when=NOW)
