"""Deadlines: see to it that every job ends in time, whatever died.

The to-do list is a projection (`DueJobs`, filled by `app/wiring.py`): which jobs have something due. What to do about one is
decided by its saga from its own facts, so a list that is wrong or late costs a look, never an answer. Where the list is behind
or absent, the open jobs are read from the log.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

from domain.commands import ExpireTasks, Rules
from domain.saga import LookupSaga, due_at, evolve, expire_tasks
from events.facts import JobFact, TasksDispatched, TaskTimedOut
from events.record import envelope_of
from events.store import EventStore, OutcomeUnknown, StoreUnavailable
from write_side.relay import CLOSING_TOPICS, OPENING_TOPICS
from write_side.sagas import Sagas, TooManyConflicts, Trigger

TICK_S = 0.5
DUE_MAX = 1_000
LOG_PAGE = 200
LOG_SCAN_INTERVAL_S = 3.0
"""A job that expires right after a look at the log waits for the next: with two ticks, less than the 5 s that are promised."""
APPEND_MAX = timedelta(seconds=10)
"""A fact is recorded later than it was decided, by less than this."""
ACTOR = "deadlines"
DUE = "its time had come"

DueJobs = Callable[[datetime, int], Awaitable[Sequence[UUID] | None]]
"""Ids of jobs with something due at that time, at most so many; None when the list is behind or absent."""
RelayedPosition = Callable[[], Awaitable[int]]
"""How far the relay has published commands. Raises `StoreUnavailable`."""

log = logging.getLogger(__name__)


@dataclass
class DeadlineCounters:
    """Tasks that the clock had something to say about."""

    dispatched_again: int = 0
    timed_out: int = 0


@dataclass
class Deadlines:
    """Looks what is due every `TICK_S`, until cancelled."""

    sagas: Sagas
    store: EventStore
    due_jobs: DueJobs
    relayed_position: RelayedPosition
    rules: Rules
    now: Callable[[], datetime]
    new_id: Callable[[], UUID]
    counters: DeadlineCounters = field(default_factory=DeadlineCounters)
    _scanned_at: float = float("-inf")

    async def run(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self.tick()
            except (StoreUnavailable, OutcomeUnknown, TooManyConflicts):
                log.warning("The store takes nothing now; what is due stays due.")

    async def tick(self) -> None:
        """Bring every job on that has something due now."""
        now = self.now()
        due = await self.due_jobs(now, DUE_MAX)
        if due is None:
            due = await self._due_by_the_log(now)
        if not due:
            return
        relayed_until = await self.relayed_until(now)
        await asyncio.gather(*(self.expire(job_id, relayed_until) for job_id in due))

    async def expire(
        self, job_id: UUID, relayed_until: datetime, *, actor: str = ACTOR, reason: str = DUE
    ) -> Sequence[JobFact]:
        """Bring one job on, if anything of it is due; gives the facts that were appended. Raises what `Sagas.decide` raises."""
        decided = 0
        trigger = Trigger(actor, self.new_id(), reason)

        def decision(saga: LookupSaga) -> tuple[list[JobFact], LookupSaga]:
            nonlocal decided
            # The time of this very decision: an outcome that it already sees must not be later than the end of the job.
            facts, saga = self._decide(saga, ExpireTasks(job_id, self.now(), relayed_until))
            decided = len(facts)
            return facts, saga

        facts = await self.sagas.decide(job_id, decision, lambda: [trigger] * decided)
        for fact in facts:
            if isinstance(fact, TasksDispatched):
                self.counters.dispatched_again += len(fact.tasks)
            self.counters.timed_out += isinstance(fact, TaskTimedOut)
        return facts

    def _decide(self, saga: LookupSaga, command: ExpireTasks) -> tuple[list[JobFact], LookupSaga]:
        ids = {service: self.new_id() for service in saga.open_tasks}
        facts = expire_tasks(saga, command, next_command_ids=ids, rules=self.rules)
        for fact in facts:
            saga = evolve(saga, fact)
        return facts, saga

    async def relayed_until(self, now: datetime) -> datetime:
        """What was decided up to this time has left for the workers: well before the first fact that has not was recorded."""
        position = await self.relayed_position()
        waiting = await self.store.read_all(position, 1)
        if not waiting:
            return now
        return datetime.fromisoformat(envelope_of(waiting[0].state)["recorded_at"]) - APPEND_MAX

    async def _due_by_the_log(self, now: datetime) -> list[UUID]:
        clock = asyncio.get_running_loop().time()
        if clock - self._scanned_at < LOG_SCAN_INTERVAL_S:
            return []
        due: list[UUID] = []
        after: UUID | None = None
        while job_ids := await self.store.open_streams(OPENING_TOPICS, CLOSING_TOPICS, after, LOG_PAGE):
            loaded = await self.sagas.load(job_ids)
            for job_id, state in loaded.items():
                at = due_at(state.saga, self.rules)
                if at is not None and at <= now:
                    due.append(job_id)
            after = job_ids[-1]
            if len(due) >= DUE_MAX:
                return due  # There is more: the next tick looks again.
        self._scanned_at = clock
        return due
