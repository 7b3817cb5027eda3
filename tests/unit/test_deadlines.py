"""Deadlines: whatever died, every job ends in time, and nothing is dispatched again that never left."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from events.facts import JobFact, JobFailed, TasksDispatched, TaskTimedOut
from events.memory import MemoryStore
from events.record import read
from events.store import AppendUnit, NewFacts, StoreUnavailable
from tests.builders import (
    CAUSE,
    GEOIP,
    JOB,
    PING,
    RDAP,
    RULES,
    Clock,
    at,
    completed,
    counts,
    deferred,
    dispatched,
    given,
    job_completed,
    memory_store,
    submitted,
    timed_out,
)
from write_side import deadlines
from write_side.deadlines import DeadlineCounters, Deadlines
from write_side.sagas import Sagas

OTHER = UUID("019b7c8a-0000-7000-8000-000000000002")


class Ticking:
    """The deadlines of a log, with a to-do list (None: read the log) and a relay that has come so far."""

    def __init__(self, clock: Clock, due: Sequence[UUID] | None, relayed: int, store: MemoryStore | None = None) -> None:
        self.clock = clock
        self.store: MemoryStore = store or memory_store(clock)
        self.relayed = relayed
        self._due = due
        self.deadlines = Deadlines(Sagas(self.store), self.store, self._due_jobs, self._relayed_position, RULES, clock, uuid7)

    async def _due_jobs(self, _: datetime, limit: int) -> Sequence[UUID] | None:
        return None if self._due is None else self._due[:limit]

    async def _relayed_position(self) -> int:
        return self.relayed

    async def facts(self, job_id: UUID = JOB) -> list[Any]:
        return [read(stored).fact for stored in (await self.store.read([job_id]))[job_id]]


async def test_a_silent_task_is_dispatched_again_and_then_given_up() -> None:
    ticking = Ticking(Clock(), [JOB], relayed=100)
    await given(ticking.store, submitted(PING), dispatched(PING))

    ticking.clock.move_to(at(30))
    await ticking.deadlines.tick()
    again = (await ticking.facts())[-1]
    assert isinstance(again, TasksDispatched)
    assert again.tasks[0].attempt == 2

    ticking.clock.move_to(at(60))
    await ticking.deadlines.tick()
    assert [type(fact) for fact in (await ticking.facts())[-2:]] == [TaskTimedOut, JobFailed]
    assert ticking.deadlines.counters == DeadlineCounters(dispatched_again=1, timed_out=1)


async def test_a_list_that_is_wrong_costs_a_look_and_no_answer() -> None:
    ticking = Ticking(Clock(), [JOB, OTHER], relayed=100)
    facts: list[JobFact] = [submitted(PING), dispatched(PING), completed(PING), job_completed(counts(succeeded=1))]
    await given(ticking.store, *facts)

    ticking.clock.move_to(at(3600))
    await ticking.deadlines.tick()

    assert await ticking.facts() == facts
    assert ticking.deadlines.counters == DeadlineCounters()


async def test_without_a_list_the_log_tells_what_is_due() -> None:
    ticking = Ticking(Clock(), None, relayed=100)
    await given(ticking.store, submitted(PING), dispatched(PING), deferred(PING, until=at(5)))
    await given(ticking.store, submitted(PING, job_id=OTHER), dispatched(PING, job_id=OTHER), job_id=OTHER)

    ticking.clock.move_to(at(5))
    await ticking.deadlines.tick()

    assert isinstance((await ticking.facts())[-1], TasksDispatched)
    assert len(await ticking.facts()) == 4
    assert len(await ticking.facts(OTHER)) == 2


class Failing(MemoryStore):
    """A log whose open streams cannot be read until it is told otherwise."""

    down = True

    async def open_streams(
        self, opening: Sequence[str], closing: Sequence[str], after: UUID | None, limit: int
    ) -> Sequence[UUID]:
        if self.down:
            raise StoreUnavailable
        return await super().open_streams(opening, closing, after, limit)


async def test_a_log_that_could_not_be_read_is_read_at_the_next_tick() -> None:
    """After an outage of the store every expired job ends within 5 s: a look that failed is no look."""
    clock = Clock()
    store = Failing(memory_store(clock)._scribe, uuid7())
    ticking = Ticking(clock, None, relayed=100, store=store)
    await given(store, submitted(PING), dispatched(PING))
    clock.move_to(at(90))
    with pytest.raises(StoreUnavailable):
        await ticking.deadlines.tick()

    store.down = False
    await ticking.deadlines.tick()

    assert isinstance((await ticking.facts())[-1], JobFailed)


def test_without_a_list_a_job_still_ends_within_five_seconds_of_its_expiry() -> None:
    assert deadlines.LOG_SCAN_INTERVAL_S + 2 * deadlines.TICK_S <= 4


async def test_an_expired_job_ends_although_the_relay_stands_still() -> None:
    ticking = Ticking(Clock(), [JOB], relayed=0)
    await given(ticking.store, submitted(PING, RDAP), dispatched(PING, RDAP), completed(RDAP))

    ticking.clock.move_to(at(90))
    await ticking.deadlines.tick()

    assert (await ticking.facts())[3:] == [
        timed_out(PING, when=at(90)),
        job_completed(counts(succeeded=1, timed_out=1), when=at(90)),
    ]


async def test_a_job_does_not_end_before_the_last_of_its_outcomes() -> None:
    """One that comes between the look at the list and the decision; seen with parts and servers killed under load."""
    ticking = Ticking(Clock(), [JOB], relayed=0)
    head = await given(ticking.store, submitted(PING, RDAP), dispatched(PING, RDAP))

    async def an_outcome_comes_meanwhile() -> int:
        ticking.clock.move_to(at(91))
        await ticking.store.append(AppendUnit([NewFacts(JOB, head, [completed(RDAP, when=at(91))])], CAUSE))
        return 0

    ticking.deadlines.relayed_position = an_outcome_comes_meanwhile
    ticking.clock.move_to(at(90))
    await ticking.deadlines.tick()

    assert (await ticking.facts())[-1] == job_completed(counts(succeeded=1, timed_out=1), when=at(91))


async def test_what_the_relay_has_not_passed_on_uses_up_no_attempt() -> None:
    """The broker is down: the first dispatch that waits for it is not the worker's silence either.

    A fact is recorded a moment after it was decided, so the time of the first waiting fact does not tell by itself.
    """
    ticking = Ticking(Clock(at(0.05)), [JOB, OTHER], relayed=0)
    await given(ticking.store, submitted(PING), dispatched(PING))
    ticking.clock.move_to(at(4))
    await given(ticking.store, submitted(GEOIP, job_id=OTHER), dispatched(GEOIP, job_id=OTHER, when=at(3.9)), job_id=OTHER)

    for relayed in (0, 1):
        ticking.relayed = relayed
        ticking.clock.move_to(at(60))
        await ticking.deadlines.tick()
        assert len(await ticking.facts()) == 2
        assert len(await ticking.facts(OTHER)) == 2

    ticking.relayed = 4
    await ticking.deadlines.tick()
    assert len(await ticking.facts()) == 3
    assert len(await ticking.facts(OTHER)) == 3


async def test_a_relay_that_is_a_little_behind_holds_up_what_left_long_ago_no_longer() -> None:
    ticking = Ticking(Clock(), [JOB], relayed=2)
    await given(ticking.store, submitted(PING), dispatched(PING))
    ticking.clock.move_to(at(40))
    await given(ticking.store, submitted(GEOIP, job_id=OTHER, when=at(40)), job_id=OTHER)

    await ticking.deadlines.tick()

    assert len(await ticking.facts()) == 3
