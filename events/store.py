"""The event store: the one truth. Everything else (broker, views, caches) can be made again from it.

Promises, held by `tests/contract/test_store.py` for the real store and the in-memory twin alike:

- **All or nothing.** An append unit goes down whole, with all its streams, or not at all.
- **Expected version.** A unit is refused with `VersionConflict` when one of its streams has moved on.
- **Order.** Position order is commit order: who has read up to a position will never find a new fact below it. Holes are legal.
- **Honest about doubt.** `StoreUnavailable` means that nothing was appended; `OutcomeUnknown` that nobody can tell right now.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from events.chain import GENESIS
from events.facts import Fact
from events.record import Cause, Place, StoredFact, Written, shared_envelope, write_caused


@dataclass(frozen=True, slots=True)
class StreamHead:
    """Where a stream stands: its last version (0 before the first fact), that fact's hash, its position."""

    version: int = 0
    hash: bytes = GENESIS
    position: int = 0


@dataclass(frozen=True, slots=True)
class NewFacts:
    """Facts for one stream, decided on the state that ends at `head`.

    `causes` has one for each fact where they have different ones; else the unit's is that of all.
    """

    stream_id: UUID
    head: StreamHead
    facts: Sequence[Fact]
    causes: Sequence[Cause] | None = None


@dataclass(frozen=True, slots=True)
class AppendUnit:
    """What goes down together: the facts of one decision. No stream twice.

    `within_s` is how long its caller can wait: after that it is not appended any more, or in doubt when it is under way.
    """

    streams: Sequence[NewFacts]
    cause: Cause
    within_s: float | None = None


class VersionConflict(Exception):  # noqa: N818 - an outcome, in the field's words
    """A stream has moved on since the decision was made. Load it again and decide again."""


class StoreUnavailable(Exception):  # noqa: N818 - a state, in the field's words
    """The store cannot be reached or has no room. Nothing was appended."""


class OutcomeUnknown(Exception):  # noqa: N818 - a state, in the field's words
    """The connection broke during the commit and the store cannot be asked: the unit may or may not be in the log."""


class HistoryReader(Protocol):
    """The log for those who only look: nothing here can change it. All methods may raise `StoreUnavailable`."""

    async def read(self, stream_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[StoredFact]]:
        """The whole streams, in version order, in one query. A stream without facts is missing from the answer."""

    async def read_all(self, after: int, limit: int) -> Sequence[StoredFact]:
        """The log behind a position, in position order, at most `limit` facts."""

    async def head(self) -> int:
        """The position of the last fact, 0 for an empty log."""

    async def stream_ids(self, after: UUID | None, limit: int) -> Sequence[UUID]:
        """The ids of all streams, in their order, behind `after`: at most `limit` of them, none only at the end."""

    async def log_id(self) -> UUID:
        """Which log this is. A restored backup is another log."""


class EventStore(HistoryReader, Protocol):
    """What the rest of the program sees of the log. All methods may raise `StoreUnavailable`."""

    async def append(self, unit: AppendUnit) -> Sequence[StreamHead]:
        """Append one unit; gives the new head of each of its streams, in order. The last head's position is the unit's.

        Raises `VersionConflict`, `StoreUnavailable` or `OutcomeUnknown`.
        """

    async def open_streams(
        self, opening: Sequence[str], closing: Sequence[str], after: UUID | None, limit: int
    ) -> Sequence[UUID]:
        """Streams that begin with a topic of `opening` and hold none of the topics `closing`, by id, behind `after`.

        Every version of a fact is a topic of its own: `events.catalog.topics_of` knows them all.

        Reads much of the log: for when nothing quicker can be asked.
        """


@dataclass(frozen=True, slots=True)
class Scribe:
    """Lays units out for the log; time, ids and salts come in here, so that a test or a simulation can fix them."""

    now: Callable[[], datetime]
    new_id: Callable[[], UUID]
    salt: Callable[[], bytes]

    def write(self, unit: AppendUnit) -> list[list[Written]]:
        """The unit's rows, a list for each of its streams."""
        now = self.now()
        of_all = shared_envelope(unit.cause, now)
        return [self._write_stream(new, _shared_envelopes(new, now) or [of_all] * len(new.facts)) for new in unit.streams]

    def _write_stream(self, new: NewFacts, shared: Sequence[bytes]) -> list[Written]:
        rows: list[Written] = []
        previous = new.head.hash
        for version, (fact, envelope) in enumerate(zip(new.facts, shared, strict=True), start=new.head.version + 1):
            place = Place(new.stream_id, version, previous)
            row = write_caused(fact, place, envelope, event_id=self.new_id(), salt=self.salt)
            rows.append(row)
            previous = row.hash
        return rows


def _shared_envelopes(new: NewFacts, now: datetime) -> list[bytes]:
    return [shared_envelope(cause, now) for cause in new.causes or ()]


def heads_of(rows: Sequence[Sequence[Written]], positions: Sequence[int]) -> list[StreamHead]:
    """The new head of each stream of a unit, given the positions of all its rows in order."""
    heads: list[StreamHead] = []
    taken = 0
    for stream in rows:
        taken += len(stream)
        heads.append(StreamHead(stream[-1].stream_version, stream[-1].hash, positions[taken - 1]))
    return heads
