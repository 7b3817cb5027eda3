"""What somebody decides about dead letters: publish them again, or never.

Promises:

- **Published, then recorded.** A letter is confirmed by the broker before the log says that it was retried. Who dies in between
  leaves a letter that still waits, and the next retry publishes it a second time: at least once, as everything on the bus.
- **In order.** The letters of one job are published one after the other, in the order in which they died.
- **Decided once.** The log tells who decided what and why, each letter in a stream of its own; then its row does. A row that
  was not reached any more is brought up to date from the log by the next decision, and nothing is published for it.
- **Bounded.** Letters are read in pages and only as many as there were when the decision was made, however many come meanwhile.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from events.bus import ALL_QUEUES, DEAD_LETTERS, Bus, BusUnavailable, Queue
from events.dead_letters import own_headers
from events.facts import DeadLetterDiscarded, DeadLetterRetried
from events.record import Cause, StoredFact, fact_of
from events.store import AppendUnit, EventStore, NewFacts, StreamHead
from write_side.dead_letters import PAGE, DeadLetters, Decision, Letter, LetterState
from write_side.relay import CLOSING_TOPICS

_QUEUES: Mapping[str, Queue] = {queue.name: queue for queue in ALL_QUEUES if queue != DEAD_LETTERS}

NO_REASON = "no reason was given"

Streams = Mapping[UUID, Sequence[StoredFact]]


class LeftAlone(StrEnum):
    """Why a letter was left as it is."""

    JOB_ENDED = "its job has ended, so that nobody waits for it any more"
    NO_QUEUE = "it is not known from which queue it came"
    DECIDED = "it was decided about already"


@dataclass(frozen=True, slots=True)
class Judgement:
    """Who decides, and why."""

    by: str
    why: str | None


@dataclass(slots=True)
class Tally:
    """What became of letters: how many the decision was carried out for, and how many were left alone, by reason."""

    done: int = 0
    left: Counter[LeftAlone] = field(default_factory=Counter)


@dataclass(slots=True)
class Pace:
    """At most `rate` a second; None = as fast as it goes."""

    rate: float | None
    _next: float = 0.0

    @property
    def chunk(self) -> int:
        """So many letters are published before they are recorded: those of a second, if that is slower than a page."""
        return PAGE if self.rate is None else max(1, min(PAGE, int(self.rate)))

    async def wait(self) -> None:
        if self.rate is None:
            return
        now = asyncio.get_running_loop().time()
        due, self._next = max(self._next, now), max(self._next, now) + 1 / self.rate
        await asyncio.sleep(due - now)


@dataclass
class Redelivery:
    """Carries decisions out. One at a time: who uses it has become the decider of the table.

    Raises `psycopg.Error`, `BusUnavailable` or what `EventStore.append` raises; `tally` then says how far it came.
    """

    letters: DeadLetters
    store: EventStore
    bus: Bus
    now: Callable[[], datetime]
    new_id: Callable[[], UUID]
    tally: Tally = field(default_factory=Tally)

    async def retry(
        self,
        chosen: Iterable[Letter] | None,
        judgement: Judgement,
        *,
        rate: float | None = None,
        dry_run: bool = False,
    ) -> None:
        """Publish letters again, all that wait if none are chosen. A dry run only counts.

        A command or an outcome whose job has ended is left alone: a worker would drop it and the saga would ignore it.
        """
        pace = Pace(rate)
        async for page in self._pages(chosen, pace.chunk):
            await self._retry_some(page, judgement, pace, dry_run=dry_run)

    async def discard(self, chosen: Iterable[Letter] | None, judgement: Judgement, *, dry_run: bool = False) -> None:
        """Decide that letters will never be handled, all that wait if none are chosen. They stay in the table."""
        async for page in self._pages(chosen, PAGE):
            due = self._undecided(page, streams := await self.store.read([letter.stream_id for letter in page]))
            if not dry_run:
                await self._bring_up_to_date(page, streams)
                await self._record(due, LetterState.DISCARDED, judgement)
            self.tally.done += len(due)

    async def _pages(self, chosen: Iterable[Letter] | None, size: int) -> AsyncIterator[Sequence[Letter]]:
        if chosen is not None:
            yield list(chosen)
            return
        async for page in self.letters.pages(up_to=await self.letters.last_id()):
            for first in range(0, len(page), size):
                yield page[first : first + size]

    async def _retry_some(self, page: Sequence[Letter], judgement: Judgement, pace: Pace, *, dry_run: bool) -> None:
        jobs = {letter.job_id for letter in page if letter.job_id is not None}
        streams = await self.store.read([*(letter.stream_id for letter in page), *jobs])
        undecided = self._undecided(page, streams)
        due = [letter for letter in undecided if self._may_go(letter, streams)]
        if dry_run:
            self.tally.done += len(due)
            return
        await self._bring_up_to_date(page, streams)
        published, failure = await self._publish(due, pace)
        await self._record(published, LetterState.RETRIED, judgement)
        self.tally.done += len(published)
        if failure is not None:
            raise failure

    def _undecided(self, page: Sequence[Letter], streams: Streams) -> list[Letter]:
        undecided = [letter for letter in page if letter.state == LetterState.WAITING and letter.stream_id not in streams]
        if len(undecided) < len(page):
            self.tally.left[LeftAlone.DECIDED] += len(page) - len(undecided)
        return undecided

    async def _bring_up_to_date(self, page: Sequence[Letter], streams: Streams) -> None:
        """The log knows what was decided about these letters; whoever decided did not come to their rows."""
        for letter in page:
            if letter.state == LetterState.WAITING and letter.stream_id in streams:
                await self.letters.decide([letter.id], _decision_of(streams[letter.stream_id][-1]))

    def _may_go(self, letter: Letter, streams: Streams) -> bool:
        reason: LeftAlone | None = None
        if letter.queue not in _QUEUES:
            reason = LeftAlone.NO_QUEUE
        elif letter.job_id is not None and _has_ended(streams.get(letter.job_id, ())):
            reason = LeftAlone.JOB_ENDED
        if reason is not None:
            self.tally.left[reason] += 1
        return reason is None

    async def _publish(self, letters: Sequence[Letter], pace: Pace) -> tuple[list[Letter], BusUnavailable | None]:
        """Publish side by side, but those of one job one after the other; gives which were confirmed, and what went wrong."""
        by_job: dict[UUID | int, list[Letter]] = {}
        for letter in letters:
            by_job.setdefault(letter.job_id or letter.id, []).append(letter)
        published: list[Letter] = []
        failures: list[BusUnavailable] = []

        async def publish_in_order(of_one_job: Sequence[Letter]) -> None:
            for letter in of_one_job:
                await pace.wait()
                try:
                    await self.bus.publish(_QUEUES[letter.queue], letter.body, own_headers(letter.headers))
                except BusUnavailable as failure:
                    failures.append(failure)
                    return
                published.append(letter)

        await asyncio.gather(*(publish_in_order(of_one_job) for of_one_job in by_job.values()))
        return published, failures[0] if failures else None

    async def _record(self, letters: Sequence[Letter], state: LetterState, judgement: Judgement) -> None:
        """First the log, then the rows."""
        if not letters:
            return
        now = self.now()
        streams = [NewFacts(letter.stream_id, StreamHead(), [_fact_of(letter, state, judgement, now)]) for letter in letters]
        cause = Cause(actor=judgement.by, correlation_id=self.new_id(), reason=judgement.why or NO_REASON)
        await self.store.append(AppendUnit(streams, cause))
        await self.letters.decide([letter.id for letter in letters], Decision(state, now, judgement.by, judgement.why))


def _has_ended(stream: Sequence[StoredFact]) -> bool:
    return any(stored.topic in CLOSING_TOPICS for stored in stream)


def _fact_of(
    letter: Letter, state: LetterState, judgement: Judgement, now: datetime
) -> DeadLetterRetried | DeadLetterDiscarded:
    if state is LetterState.RETRIED:
        return DeadLetterRetried(
            letter_id=letter.id,
            queue=letter.queue,
            job_id=letter.job_id,
            by=judgement.by,
            reason=judgement.why,
            retried_at=now,
        )
    return DeadLetterDiscarded(
        letter_id=letter.id,
        queue=letter.queue,
        job_id=letter.job_id,
        by=judgement.by,
        reason=judgement.why or "",
        discarded_at=now,
    )


def _decision_of(stored: StoredFact) -> Decision:
    fact = fact_of(stored.topic, stored.state)
    if isinstance(fact, DeadLetterRetried):
        return Decision(LetterState.RETRIED, fact.retried_at, fact.by, fact.reason)
    assert isinstance(fact, DeadLetterDiscarded)
    return Decision(LetterState.DISCARDED, fact.discarded_at, fact.by, fact.reason)
