"""The repository of sagas: load, decide, append; on a conflict load and decide again.

A bounded cache of states saves the read. The expected version guards every append: a state that was out of date is loaded
again. A decision that there is no news appends nothing that could be guarded, so it is made of a state just read.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from domain.saga import LookupSaga, replay
from events.batching import Batcher, Overloaded
from events.facts import JobFact
from events.record import Cause, StoredFact, cause_of, fact_of, hash_of
from events.store import AppendUnit, EventStore, NewFacts, StoreUnavailable, StreamHead, VersionConflict

TRIES = 10
READS_MAX = 200
BEGIN_MAX_S = 1.2
"""A client is answered within 2 s, whatever became of the store."""

Decision = Callable[[LookupSaga], tuple[Sequence[JobFact], LookupSaga]]
"""From a state to the facts that were decided and the state after them."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A saga's state, the head that it ends at, and what took the job on: its request is named on all later facts too."""

    saga: LookupSaga
    head: StreamHead
    origin: Cause


@dataclass(frozen=True, slots=True)
class Trigger:
    """What a decision is the answer to: the command, who or what gave it, and why."""

    actor: str
    command_id: UUID
    reason: str


Triggers = Callable[[], Sequence[Trigger]]
"""One for each fact of the last decision."""


@dataclass
class SagaCounters:
    """Decisions about jobs, by what became of them."""

    begun: int = 0
    decided: int = 0
    conflict: int = 0


class TooManyConflicts(Exception):  # noqa: N818 - an outcome, in the field's words
    """Others kept appending to the job's stream. Nothing was appended; try again."""


class Sagas:
    """Sagas by job id, at most `cache_max` of them remembered."""

    def __init__(self, store: EventStore, *, cache_max: int = 20_000, counters: SagaCounters | None = None) -> None:
        self.counters = counters or SagaCounters()
        self._store = store
        self._cache: OrderedDict[UUID, Loaded] = OrderedDict()
        self._cache_max = cache_max
        self._reads: Batcher[UUID, Loaded | None] = Batcher(self._read, batch_max=READS_MAX)

    async def load(self, job_ids: Sequence[UUID]) -> Mapping[UUID, Loaded]:
        """The states of many jobs, those not remembered in one query. A job that is not in the log is not in the answer."""
        # Kept aside, because what is read now may push what was remembered out of the cache.
        found = {job_id: self._cache[job_id] for job_id in job_ids if job_id in self._cache}
        for job_id in found:
            self._cache.move_to_end(job_id)
        missing = [job_id for job_id in job_ids if job_id not in found]
        if missing:
            for job_id, stream in (await self._store.read(missing)).items():
                found[job_id] = _loaded(stream)
                self._remember(job_id, found[job_id])
        return found

    async def begin(self, job_id: UUID, facts: Sequence[JobFact], cause: Cause) -> StreamHead:
        """Append a new job's first facts. Raises what `EventStore.append` raises."""
        (head,) = await self._store.append(AppendUnit([NewFacts(job_id, StreamHead(), facts)], cause, within_s=BEGIN_MAX_S))
        self._remember(job_id, Loaded(replay(facts), head, cause))
        self.counters.begun += 1
        return head

    async def decide(self, job_id: UUID, decision: Decision, triggers: Triggers) -> Sequence[JobFact]:
        """Append what `decision` makes of the current state; gives the facts, none when the decision was that there is no news.

        `triggers` is asked after each decision what led to its facts.

        Raises what `EventStore.append` raises, but no conflict: that is decided again, up to `TRIES` times.
        """
        remembered = self._cache.get(job_id)
        for _ in range(TRIES):
            loaded = remembered or await self._read_now(job_id)
            if loaded is None:
                return []
            facts, saga = decision(loaded.saga)
            if not facts and remembered is None:
                return []
            if facts:
                causes = [_cause(loaded.origin, trigger) for trigger in triggers()]
                head = await self._append(AppendUnit([NewFacts(job_id, loaded.head, facts, causes)], causes[0]), job_id)
                if head is not None:
                    self._remember(job_id, Loaded(saga, head, loaded.origin))
                    self.counters.decided += 1
                    return facts
            # What we remembered is out of date, or may be: nothing guards a decision that appends nothing.
            remembered = None
        raise TooManyConflicts(f"Job {job_id}: others kept appending.")

    async def _append(self, unit: AppendUnit, job_id: UUID) -> StreamHead | None:
        """The new head of the job's stream; None after a conflict."""
        try:
            (head,) = await self._store.append(unit)
        except VersionConflict:
            self.counters.conflict += 1
            self._cache.pop(job_id, None)
            return None
        except Exception:
            # Whether it went down or not, what we remember may be out of date now.
            self._cache.pop(job_id, None)
            raise
        return head

    async def _read_now(self, job_id: UUID) -> Loaded | None:
        try:
            return await self._reads.add(job_id)
        except Overloaded:
            raise StoreUnavailable("More reads wait already than may wait.") from None

    async def _read(self, job_ids: Sequence[UUID]) -> Sequence[Loaded | None]:
        """The states of jobs as the log has them now, in one query."""
        streams = await self._store.read(list(dict.fromkeys(job_ids)))
        read = {job_id: _loaded(stream) for job_id, stream in streams.items()}
        for job_id, loaded in read.items():
            self._remember(job_id, loaded)
        return [read.get(job_id) for job_id in job_ids]

    def _remember(self, job_id: UUID, loaded: Loaded) -> None:
        self._cache[job_id] = loaded
        self._cache.move_to_end(job_id)
        while len(self._cache) > self._cache_max:
            self._cache.popitem(last=False)


def _loaded(stream: Sequence[StoredFact]) -> Loaded:
    saga = replay(fact_of(stored.topic, stored.state) for stored in stream)
    last = stream[-1]
    head = StreamHead(last.stream_version, hash_of(last.state), last.position)
    return Loaded(saga, head, cause_of(stream[0].state))


def _cause(origin: Cause, trigger: Trigger) -> Cause:
    return replace(origin, actor=trigger.actor, causation_id=trigger.command_id, reason=trigger.reason)
