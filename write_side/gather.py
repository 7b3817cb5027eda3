"""Gather: outcomes become facts. Each counts once, however often it comes.

Promise: a delivery is acknowledged after the facts that it led to are committed, never before. What cannot be committed stays
unacknowledged and comes again; what can be read but breaks the decision goes to the dead letters alone. All outcomes of one
job that are in hand are one decision; the decisions of all jobs in hand wait together in the store's group commit.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from uuid import UUID

from domain.commands import Rules, TaskOutcome, lines_of
from domain.saga import LookupSaga, evolve, record_outcome
from events.bus import OUTCOMES, Bus, Delivery, Inbox
from events.catalog import UnknownFact
from events.dead_letters import Reason, put_aside
from events.facts import JobFact
from events.lines import read_items
from events.store import OutcomeUnknown, StoreUnavailable
from write_side.sagas import Sagas, TooManyConflicts, Trigger

IN_HAND_MAX = 64
RETRY_PAUSE_S = 0.5
REPORTED = "a worker reported"

log = logging.getLogger(__name__)


@dataclass
class GatherCounters:
    """What was taken in, by what became of it."""

    recorded: int = 0
    ignored: int = 0
    unreadable: int = 0
    refused: int = 0


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
            items, unreadable = await read_items(TaskOutcome, delivery, OUTCOMES, self.bus, now=self.now())
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
        led_to: list[tuple[TaskOutcome, list[JobFact]]] = []

        def decision(saga: LookupSaga) -> tuple[list[JobFact], LookupSaga]:
            nonlocal led_to
            led_to, saga = self._decide(saga, outcomes)
            return [fact for _, facts in led_to for fact in facts], saga

        def triggers() -> list[Trigger]:
            return [Trigger(outcome.worker, outcome.command_id, REPORTED) for outcome, facts in led_to for _ in facts]

        try:
            await self.sagas.decide(job_id, decision, triggers)
        except (StoreUnavailable, OutcomeUnknown, TooManyConflicts):
            return outcomes
        except UnknownFact:
            raise  # The log is newer than this program: the outcomes are in order, and wait for an upgrade.
        except Exception:
            log.exception("Outcomes of job %s break the decision about it.", job_id)
            return await self._record_each(job_id, outcomes)
        self.counters.recorded += len(led_to)
        self.counters.ignored += len(outcomes) - len(led_to)
        return []

    async def _record_each(self, job_id: UUID, outcomes: list[TaskOutcome]) -> list[TaskOutcome]:
        """One of them is at fault: each is decided on its own, and that one put aside."""
        if len(outcomes) == 1:
            self.counters.refused += 1
            body = lines_of(outcomes)
            # The same outcome is the same letter, in whatever message it comes.
            refused = Delivery(body, {}, 1, None, message_id=sha256(body).hexdigest())
            await put_aside(self.bus, OUTCOMES, refused, body, Reason.REFUSED, at=self.now())
            return []
        return [left for outcome in outcomes for left in await self._record(job_id, [outcome])]

    def _decide(
        self, saga: LookupSaga, outcomes: Sequence[TaskOutcome]
    ) -> tuple[list[tuple[TaskOutcome, list[JobFact]]], LookupSaga]:
        """One decision about all outcomes of a job that are in hand: the news with their facts, and the state then."""
        led_to: list[tuple[TaskOutcome, list[JobFact]]] = []
        now = self.now()
        for outcome in outcomes:
            decided = record_outcome(saga, outcome, next_command_id=self.new_id(), now=now, rules=self.rules)
            for fact in decided:
                saga = evolve(saga, fact)
            if decided:
                led_to.append((outcome, decided))
        return led_to, saga
