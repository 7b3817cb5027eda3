"""Deadlines: see to it that every job ends in time, whatever died.

The to-do list is a projection (`DueJobs`, filled by `app/wiring.py`): which jobs have something due. What to do about one is
decided by its saga from its own facts, so a list that is wrong or late costs a look, never an answer. Where the list is behind
or absent, the open jobs are read from the log.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from domain.commands import ExpireTasks, Rules
from domain.saga import LookupSaga, due_at, evolve, expire_tasks
from events.catalog import TOPICS
from events.facts import JobFact, JobSubmitted
from events.record import envelope_of
from events.store import EventStore, OutcomeUnknown, StoreUnavailable
from write_side.relay import CLOSING_TOPICS
from write_side.sagas import Sagas, TooManyConflicts

TICK_S = 0.5
DUE_MAX = 200
LOG_PAGE = 200
LOG_SCAN_INTERVAL_S = 5.0
APPEND_MAX = timedelta(seconds=10)
"""A fact is recorded later than it was decided, by less than this."""
ACTOR = "deadlines"

DueJobs = Callable[[datetime, int], Awaitable[Sequence[UUID] | None]]
"""Ids of jobs with something due at that time, at most so many; None when the list is behind or absent."""
RelayedPosition = Callable[[], Awaitable[int]]
"""How far the relay has published commands."""

log = logging.getLogger(__name__)


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
    expired: int = 0
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
        relayed_until = await self._relayed_until(now)
        await asyncio.gather(*(self._expire(job_id, now, relayed_until) for job_id in due))

    async def _expire(self, job_id: UUID, now: datetime, relayed_until: datetime) -> None:
        command = ExpireTasks(job_id, now, relayed_until)
        facts = await self.sagas.decide(job_id, lambda saga: self._decide(saga, command), actor=ACTOR, causation_id=None)
        self.expired += bool(facts)

    def _decide(self, saga: LookupSaga, command: ExpireTasks) -> tuple[list[JobFact], LookupSaga]:
        ids = {service: self.new_id() for service in saga.open_tasks}
        facts = expire_tasks(saga, command, next_command_ids=ids, rules=self.rules)
        for fact in facts:
            saga = evolve(saga, fact)
        return facts, saga

    async def _relayed_until(self, now: datetime) -> datetime:
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
        self._scanned_at = clock
        due: list[UUID] = []
        after: UUID | None = None
        while job_ids := await self.store.open_streams(TOPICS[JobSubmitted], CLOSING_TOPICS, after, LOG_PAGE):
            loaded = await self.sagas.load(job_ids)
            for job_id, state in loaded.items():
                at = due_at(state.saga, self.rules)
                if at is not None and at <= now:
                    due.append(job_id)
            after = job_ids[-1]
            if len(due) >= DUE_MAX:
                break
        return due
