"""The canary: a small fact, appended while nothing else happens, so that the way to the views is proved all the time."""

from collections.abc import Callable
from datetime import datetime
from uuid import UUID, uuid5

from events.facts import CanarySent
from events.record import Cause, hash_of
from events.store import AppendUnit, EventStore, NewFacts, StreamHead, VersionConflict

ACTOR = "keeper.watch"
IDLE = "nothing else had happened"
WITHIN_S = 2.0
_CANARIES = UUID("5f0a7b46-6c39-4b0e-9d0e-3f7f0e8f2c11")


class Canary:
    """Appends canaries. Any number of processes may: of those that do at the same moment, one does."""

    def __init__(self, store: EventStore, now: Callable[[], datetime], new_id: Callable[[], UUID]) -> None:
        self._store = store
        self._now = now
        self._new_id = new_id
        self._stream_id: UUID | None = None
        self._head = StreamHead()

    async def send(self) -> int | None:
        """The canary's position; None when somebody else sent one. Raises `StoreUnavailable` or `OutcomeUnknown`."""
        at = self._now()
        stream_id = stream_of(at)
        if stream_id != self._stream_id:
            self._head = await self._read_head(stream_id)
        # Forgotten until the append has succeeded: after anything else the stream is read anew.
        self._stream_id = None
        unit = AppendUnit(
            [NewFacts(stream_id, self._head, [CanarySent(sent_at=at)])],
            Cause(ACTOR, self._new_id(), reason=IDLE),
            within_s=WITHIN_S,
        )
        try:
            (self._head,) = await self._store.append(unit)
        except VersionConflict:
            return None
        self._stream_id = stream_id
        return self._head.position

    async def _read_head(self, stream_id: UUID) -> StreamHead:
        stream = (await self._store.read([stream_id])).get(stream_id, ())
        return StreamHead(stream[-1].stream_version, hash_of(stream[-1].state), stream[-1].position) if stream else StreamHead()


def stream_of(at: datetime) -> UUID:
    """The stream of an hour's canaries: short enough to be read whole by who begins to append to it."""
    return uuid5(_CANARIES, f"{at:%Y-%m-%dT%H}")
