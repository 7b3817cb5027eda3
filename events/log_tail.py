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
        self._facts: list[tuple[StoredFact, Fact]] = []
        self._listeners: list[asyncio.Event] = []

    @property
    def is_heard(self) -> bool:
        """Whether somebody in this process waits for what is released."""
        return bool(self._listeners)

    def append(self, facts: Sequence[StoredFact], written: Sequence[Fact]) -> None:
        """Remember what one transaction committed, in order, and of what it was made."""
        gapless = facts[-1].position - facts[0].position == len(facts) - 1
        if not self.ends_at(facts[0].position - 1):
            self._facts.clear()
        if gapless:
            self._facts += zip(facts, written, strict=True)
        del self._facts[:-TAIL_MAX]

    def behind(self, after: int, limit: int) -> list[StoredFact]:
        """The facts right behind a position, at most `limit`; nothing when the database must be asked."""
        return [stored for stored, _ in self._behind(after, limit)]

    def released_behind(self, after: int, limit: int) -> list[Recorded]:
        """As `behind`, of what was released, and as the log's readers have it."""
        return [recorded(stored, fact) for stored, fact in self._behind(after, limit) if stored.position <= self.released]

    def _behind(self, after: int, limit: int) -> list[tuple[StoredFact, Fact]]:
        first = after + 1 - self._first if self._facts else -1
        return self._facts[first : first + limit] if first >= 0 else []

    def ends_at(self, position: int) -> bool:
        return bool(self._facts) and self._last == position

    def holds(self, facts: Sequence[StoredFact]) -> bool:
        """Whether all of a stretch of the log is remembered here."""
        return bool(self._facts) and self._first <= facts[0].position and facts[-1].position <= self._last

    @property
    def _first(self) -> int:
        return self._facts[0][0].position

    @property
    def _last(self) -> int:
        return self._facts[-1][0].position

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
