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
    """Facts for one stream, decided on the state that ends at `head`."""

    stream_id: UUID
    head: StreamHead
    facts: Sequence[Fact]


@dataclass(frozen=True, slots=True)
class AppendUnit:
    """What goes down together: the facts of one decision. No stream twice."""

    streams: Sequence[NewFacts]
    cause: Cause


class VersionConflict(Exception):  # noqa: N818 - an outcome, in the field's words
    """A stream has moved on since the decision was made. Load it again and decide again."""


class StoreUnavailable(Exception):  # noqa: N818 - a state, in the field's words
    """The store cannot be reached or has no room. Nothing was appended."""


class OutcomeUnknown(Exception):  # noqa: N818 - a state, in the field's words
    """The connection broke during the commit and the store cannot be asked: the unit may or may not be in the log."""


class EventStore(Protocol):
    """What the rest of the program sees of the log. All methods may raise `StoreUnavailable`."""

    async def append(self, unit: AppendUnit) -> Sequence[StreamHead]:
        """Append one unit; gives the new head of each of its streams, in order. The last head's position is the unit's.

        Raises `VersionConflict`, `StoreUnavailable` or `OutcomeUnknown`.
        """

    async def read(self, stream_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[StoredFact]]:
        """The whole streams, in version order, in one query. A stream without facts is missing from the answer."""

    async def read_all(self, after: int, limit: int) -> Sequence[StoredFact]:
        """The log behind a position, in position order, at most `limit` facts."""

    async def head(self) -> int:
        """The position of the last fact, 0 for an empty log."""

    async def open_streams(self, opening: str, closing: Sequence[str], after: UUID | None, limit: int) -> Sequence[UUID]:
        """Streams that begin with the topic `opening` and hold none of the topics `closing`, by id, behind `after`.

        Reads much of the log: for when nothing quicker can be asked.
        """

    async def log_id(self) -> UUID:
        """Which log this is. A restored backup is another log."""


@dataclass(frozen=True, slots=True)
class Scribe:
    """Lays units out for the log; time, ids and salts come in here, so that a test or a simulation can fix them."""

    now: Callable[[], datetime]
    new_id: Callable[[], UUID]
    salt: Callable[[], bytes]

    def write(self, unit: AppendUnit) -> list[list[Written]]:
        """The unit's rows, a list for each of its streams."""
        shared = shared_envelope(unit.cause, self.now())
        return [self._write_stream(new, shared) for new in unit.streams]

    def _write_stream(self, new: NewFacts, shared: bytes) -> list[Written]:
        rows: list[Written] = []
        previous = new.head.hash
        for version, fact in enumerate(new.facts, start=new.head.version + 1):
            place = Place(new.stream_id, version, previous)
            row = write_caused(fact, place, shared, event_id=self.new_id(), salt=self.salt)
            rows.append(row)
            previous = row.hash
        return rows


def heads_of(rows: Sequence[Sequence[Written]], positions: Sequence[int]) -> list[StreamHead]:
    """The new head of each stream of a unit, given the positions of all its rows in order."""
    heads: list[StreamHead] = []
    taken = 0
    for stream in rows:
        taken += len(stream)
        heads.append(StreamHead(stream[-1].stream_version, stream[-1].hash, positions[taken - 1]))
    return heads
