"""Standing: is anybody still waiting for this item? A worker that comes late to one asks the log before it asks the world.

Without it a backlog does everything twice: what waited too long has been dispatched again, or has ended, meanwhile.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol
from uuid import UUID

from domain.commands import LookUp
from domain.saga import replay
from events.batching import Batcher, Overloaded
from events.catalog import UnknownFact
from events.record import StoredFact, fact_of
from events.store import EventStore, StoreUnavailable

READ_MAX = 100

log = logging.getLogger(__name__)


class Standing(Protocol):
    """Tells whether an item's outcome could still be news."""

    async def is_wanted(self, item: LookUp) -> bool: ...


class AlwaysWanted:
    """Knows of no log: every item is worked off."""

    async def is_wanted(self, item: LookUp) -> bool:  # noqa: ARG002 - it asks nobody
        return True


class LogStanding:
    """Asks the event log; questions that wait together are one query. Without the log every item is wanted."""

    def __init__(self, store: EventStore) -> None:
        self._store = store
        self._questions: Batcher[LookUp, bool] = Batcher(self._answer, batch_max=READ_MAX)

    async def is_wanted(self, item: LookUp) -> bool:
        try:
            return await self._questions.add(item)
        except (StoreUnavailable, Overloaded):
            log.warning(
                "The log cannot be asked whether job %s still waits for %s; it is looked up.", item.job_id, item.service
            )
            return True

    async def _answer(self, items: Sequence[LookUp]) -> Sequence[bool]:
        streams = await self._store.read(list({item.job_id for item in items}))
        return [_waits_for(item, streams) for item in items]


def _waits_for(item: LookUp, streams: Mapping[UUID, Sequence[StoredFact]]) -> bool:
    stream = streams.get(item.job_id)
    if not stream:
        # A command leaves after its job is committed, so this is nobody's.
        return False
    try:
        saga = replay(fact_of(stored.topic, stored.state) for stored in stream)
    except UnknownFact:
        # The saga was replaced by a newer one before we were. It will know what to make of a late outcome.
        log.warning("The log is newer than this worker: job %s may not wait for %s any more.", item.job_id, item.service)
        return True
    task = saga.open_tasks.get(item.service)
    return not saga.closed and task is not None and task.dispatched_at is not None and task.command_id == item.command_id
