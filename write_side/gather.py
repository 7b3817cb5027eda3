"""Gather: outcomes become facts. Each counts once, however often it comes.

Promise: a delivery is acknowledged after the facts that it led to are committed, never before. What cannot be committed stays
unacknowledged and comes again. All outcomes of one job that are in hand are one decision; the decisions of all jobs in hand
wait together in the store's group commit.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from domain.commands import Rules, TaskOutcome
from domain.saga import LookupSaga, evolve, record_outcome
from events.bus import OUTCOMES, Bus, Delivery, Inbox
from events.facts import JobFact
from events.lines import read_items
from events.store import OutcomeUnknown, StoreUnavailable
from write_side.sagas import Sagas, TooManyConflicts

IN_HAND_MAX = 64
RETRY_PAUSE_S = 0.5
ACTOR = "gather"


@dataclass
class GatherCounters:
    """What was taken in, by what became of it."""

    recorded: int = 0
    ignored: int = 0
    unreadable: int = 0


@dataclass
class Gatherer:
    """Reads outcomes and records them, until cancelled."""

    sagas: Sagas
    bus: Bus
    rules: Rules
    now: Callable[[], datetime]
    new_id: Callable[[], UUID]
    counters: GatherCounters = field(default_factory=GatherCounters)

    def subscribe(self) -> Inbox:
        return self.bus.subscribe(OUTCOMES, in_hand_max=IN_HAND_MAX)

    async def run(self, inbox: Inbox) -> None:
        while True:
            deliveries = await inbox.take(IN_HAND_MAX)
            await self.gather(inbox, deliveries)

    async def gather(self, inbox: Inbox, deliveries: Sequence[Delivery]) -> None:
        """Record everything in these deliveries, then acknowledge them. Retries until the store takes it."""
        outcomes: list[TaskOutcome] = []
        for delivery in deliveries:
            items, unreadable = await read_items(TaskOutcome, delivery, OUTCOMES, self.bus)
            outcomes += items
            self.counters.unreadable += unreadable
        while outcomes:
            outcomes = await self._record_all(outcomes)
            if outcomes:
                await asyncio.sleep(RETRY_PAUSE_S)
        await inbox.ack(deliveries)

    async def _record_all(self, outcomes: Sequence[TaskOutcome]) -> list[TaskOutcome]:
        """Record by job, all jobs at once; gives back what the store did not take."""
        by_job: dict[UUID, list[TaskOutcome]] = {}
        for outcome in outcomes:
            by_job.setdefault(outcome.job_id, []).append(outcome)
        try:
            known = await self.sagas.load(list(by_job))
        except StoreUnavailable:
            return list(outcomes)
        for job_id in by_job.keys() - known.keys():
            # A command leaves after its job is committed, so this is nobody's job.
            self.counters.ignored += len(by_job.pop(job_id))
        left = await asyncio.gather(*(self._record(job_id, of_job) for job_id, of_job in by_job.items()))
        return [outcome for of_job in left for outcome in of_job]

    async def _record(self, job_id: UUID, outcomes: list[TaskOutcome]) -> list[TaskOutcome]:
        news = 0

        def decision(saga: LookupSaga) -> tuple[list[JobFact], LookupSaga]:
            nonlocal news
            facts, saga, news = self._decide(saga, outcomes)
            return facts, saga

        try:
            await self.sagas.decide(job_id, decision, actor=ACTOR, causation_id=outcomes[0].command_id)
        except (StoreUnavailable, OutcomeUnknown, TooManyConflicts):
            return outcomes
        self.counters.recorded += news
        self.counters.ignored += len(outcomes) - news
        return []

    def _decide(self, saga: LookupSaga, outcomes: Sequence[TaskOutcome]) -> tuple[list[JobFact], LookupSaga, int]:
        """One decision about all outcomes of a job that are in hand: facts, the state after them, and how many were news."""
        facts: list[JobFact] = []
        news = 0
        now = self.now()
        for outcome in outcomes:
            decided = record_outcome(saga, outcome, next_command_id=self.new_id(), now=now, rules=self.rules)
            for fact in decided:
                saga = evolve(saga, fact)
            facts.extend(decided)
            news += bool(decided)
        return facts, saga, news
