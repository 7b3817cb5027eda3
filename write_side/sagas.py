"""The repository of sagas: load, decide, append; on a conflict load and decide again.

A bounded cache of states saves the read. It needs no care: the expected version guards every append, and a state that was out
of date is loaded again.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from domain.saga import LookupSaga, replay
from events.facts import JobFact
from events.record import Cause, StoredFact, envelope_of, fact_of, hash_of
from events.store import AppendUnit, EventStore, NewFacts, StreamHead, VersionConflict

TRIES = 10

Decision = Callable[[LookupSaga], tuple[Sequence[JobFact], LookupSaga]]
"""From a state to the facts that were decided and the state after them."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A saga's state, the head that it ends at, and the correlation id that its facts share."""

    saga: LookupSaga
    head: StreamHead
    correlation_id: UUID


class TooManyConflicts(Exception):  # noqa: N818 - an outcome, in the field's words
    """Others kept appending to the job's stream. Nothing was appended; try again."""


class Sagas:
    """Sagas by job id, at most `cache_max` of them remembered."""

    def __init__(self, store: EventStore, *, cache_max: int = 20_000) -> None:
        self._store = store
        self._cache: OrderedDict[UUID, Loaded] = OrderedDict()
        self._cache_max = cache_max

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
        (head,) = await self._store.append(AppendUnit([NewFacts(job_id, StreamHead(), facts)], cause))
        self._remember(job_id, Loaded(replay(facts), head, cause.correlation_id))
        return head

    async def decide(self, job_id: UUID, decision: Decision, *, actor: str, causation_id: UUID | None) -> Sequence[JobFact]:
        """Append what `decision` makes of the current state; gives the facts, none when the decision was that there is no news.

        Raises what `EventStore.append` raises, but no conflict: that is decided again, up to `TRIES` times.
        """
        for _ in range(TRIES):
            loaded = (await self.load([job_id])).get(job_id)
            if loaded is None:
                return []
            facts, saga = decision(loaded.saga)
            if not facts:
                return []
            cause = Cause(actor=actor, correlation_id=loaded.correlation_id, causation_id=causation_id)
            unit = AppendUnit([NewFacts(job_id, loaded.head, facts)], cause)
            try:
                (head,) = await self._store.append(unit)
            except VersionConflict:
                self._cache.pop(job_id, None)
                continue
            except Exception:
                # Whether it went down or not, what we remember may be out of date now.
                self._cache.pop(job_id, None)
                raise
            self._remember(job_id, Loaded(saga, head, loaded.correlation_id))
            return facts
        raise TooManyConflicts(f"Job {job_id}: others kept appending.")

    def _remember(self, job_id: UUID, loaded: Loaded) -> None:
        self._cache[job_id] = loaded
        self._cache.move_to_end(job_id)
        while len(self._cache) > self._cache_max:
            self._cache.popitem(last=False)


def _loaded(stream: Sequence[StoredFact]) -> Loaded:
    saga = replay(fact_of(stored.topic, stored.state) for stored in stream)
    last = stream[-1]
    head = StreamHead(last.stream_version, hash_of(last.state), last.position)
    return Loaded(saga, head, UUID(envelope_of(stream[0].state)["correlation_id"]))
