"""What this process appended last: its neighbours need neither the database nor the broker to hear of that.

A writer remembers what it has committed (`append`), a relay in the same process says for which of it the commands have left
(`release`), and a projector in the same process folds that (`released_behind`) before the broker brings it, and without
reading what is in memory already.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from events.facts import Fact
from events.record import Recorded, StoredFact, recorded

TAIL_MAX = 2_000


class LogTail:
    """The last facts that this process appended, without a gap.

    Positions are handed out in commit order, so nothing can lie between a position and the next one.
    """

    def __init__(self) -> None:
        self.released = 0
        self._facts: list[StoredFact] = []
        self._written: list[Fact] = []
        self._listeners: list[asyncio.Event] = []

    @property
    def is_heard(self) -> bool:
        """Whether somebody in this process waits for what is released."""
        return bool(self._listeners)

    def append(self, facts: Sequence[StoredFact], written: Sequence[Fact]) -> None:
        """Remember what one transaction committed, in order, and of what it was made."""
        gapless = facts[-1].position - facts[0].position == len(facts) - 1
        follows = bool(self._facts) and self._facts[-1].position + 1 == facts[0].position
        if not follows:
            self._facts.clear()
            self._written.clear()
        if gapless:
            self._facts += facts
            self._written += written
        del self._facts[:-TAIL_MAX]
        del self._written[:-TAIL_MAX]

    def behind(self, after: int, limit: int) -> list[StoredFact]:
        """The facts right behind a position, at most `limit`; nothing when the database must be asked."""
        first = self._index_behind(after)
        return self._facts[first : first + limit] if first is not None else []

    def released_behind(self, after: int, limit: int) -> list[Recorded]:
        """As `behind`, of what was released, and as the log's readers have it."""
        first = self._index_behind(after)
        if first is None:
            return []
        last = first + min(limit, max(0, self.released - after))
        return list(map(recorded, self._facts[first:last], self._written[first:last]))

    def _index_behind(self, after: int) -> int | None:
        first = after + 1 - self._facts[0].position if self._facts else -1
        return first if first >= 0 else None

    def ends_at(self, position: int) -> bool:
        return bool(self._facts) and self._facts[-1].position == position

    def holds(self, facts: Sequence[StoredFact]) -> bool:
        """Whether all of a stretch of the log is remembered here."""
        return (
            bool(self._facts)
            and self._facts[0].position <= facts[0].position
            and facts[-1].position <= self._facts[-1].position
        )

    def release(self, position: int) -> None:
        """Who waits for what was appended may have it, up to here."""
        if position > self.released:
            self.released = position
            for listener in self._listeners:
                listener.set()

    @contextmanager
    def waking(self, listener: asyncio.Event) -> Iterator[None]:
        """Set this event at each release."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)
