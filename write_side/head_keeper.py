"""The keeper of heads: follows the log, and every so many facts or minutes signs what it amounts to.

Promises:

- **What was signed stays.** It goes on from the last head, never from the log anew. A log that is no longer what a head says is
  not signed: the keeper ends in `LogDiffers` until somebody has looked.
- **One at a time.** Who signs holds a lock on the table's connection; a second one waits.
- **Files that cannot be written hold up nothing**, but the keeper ends in `NotWrittenOutside` each time, so that it shows.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

from events.chain import GENESIS
from events.heads import (
    CHECKSUM_BYTES,
    Head,
    LogState,
    PublicKeys,
    Signer,
    Span,
    UnreadableHead,
    checksum,
    is_signed,
    read_head,
)
from events.record import StoredFact, hash_of
from events.store import HistoryReader
from write_side.heads import HeadFile, HeadTable

TICK_S = 1.0
PAGE = 1_000
HOLES_MAX = 1_000
LINES_AT_ONCE = 50

log = logging.getLogger(__name__)


class LogDiffers(Exception):  # noqa: N818 - a finding, in our words
    """The log, or the table of its heads, is not what was signed."""


class NotWrittenOutside(Exception):  # noqa: N818 - a state, in our words
    """A head was signed, and not every file has it."""


@dataclass
class HeadCounters:
    """Heads that were signed, and facts that they cover."""

    signed: int = 0
    facts: int = 0


@dataclass
class Stretch:
    """The facts since the last head."""

    state: LogState
    holes: list[Span] = field(default_factory=list)
    checksums: bytearray = field(default_factory=bytearray)
    facts: int = 0

    def take(self, page: Sequence[StoredFact]) -> None:
        hashes = [(stored.position, hash_of(stored.state)) for stored in page]
        expected = self.state.position + 1
        for position, fact_hash in hashes:
            if position > expected:
                self.holes.append((expected, position - 1))
            expected = position + 1
            self.checksums += checksum(position, fact_hash)
        self.state = self.state.with_facts(hashes)
        self.facts += len(page)


@dataclass
class HeadKeeper:
    """Signs heads, until cancelled. Raises `LogDiffers`, `NotWrittenOutside`, `StoreUnavailable` or `psycopg.Error`."""

    history: HistoryReader
    table: HeadTable
    files: Sequence[HeadFile]
    signer: Signer
    keys: PublicKeys
    facts_max: int
    every: timedelta
    now: Callable[[], datetime]
    counters: HeadCounters = field(default_factory=HeadCounters)
    _last: Head | None = None
    _stretch: Stretch = field(default_factory=lambda: Stretch(LogState()))

    async def run(self) -> None:
        while not await self.table.become_keeper():  # noqa: ASYNC110 - the lock is the database's: nothing here could set an event
            await asyncio.sleep(TICK_S)
        await self.take_up()
        while True:
            await self.tick()
            await asyncio.sleep(TICK_S)

    async def take_up(self) -> None:
        """Go on from the last head: the table's, or one that only a file has, if the log is what that says."""
        self._last = await self._last_in_table()
        self._stretch = Stretch(self._last.state if self._last else LogState())
        furthest = max((last for file in self.files if (last := _last_in(file))), key=lambda head: head.number, default=None)
        log_id = await self.history.log_id()
        if furthest is not None and furthest.log_id == log_id and furthest.number > self._number:
            await self._take_over(furthest)
        told = furthest if furthest is not None and furthest.number > self._number else self._last
        if told is not None and told.log_id != log_id:
            await self._restored(told, log_id)
        unwritten = await self._bring_files_up_to_date()
        if unwritten:
            log.warning("Heads cannot be written to %s.", ", ".join(unwritten))

    async def tick(self) -> None:
        """Take in what was appended; sign as often as is due."""
        while page := await self._read_on():
            self._stretch.take(page)
            if self._stretch.facts >= self.facts_max or len(self._stretch.holes) >= HOLES_MAX:
                await self.sign()
        if self._stretch.facts and (self._last is None or self.now() - self._last.at >= self.every):
            await self.sign()

    async def sign(self) -> Head:
        """Sign what was taken in. Raises `NotWrittenOutside` when the table has the head and a file does not."""
        stretch, last = self._stretch, self._last
        head = self.signer.signed(
            Head(
                number=self._number + 1,
                log_id=await self.history.log_id(),
                state=stretch.state,
                holes=stretch.holes,
                checksums=bytes(stretch.checksums),
                at=self.now(),
                previous=last.digest if last else GENESIS.hex(),
                key_id="",
            )
        )
        await self._write(head)
        self.counters.signed += 1
        self.counters.facts += stretch.facts
        if unwritten := await self._bring_files_up_to_date():
            raise NotWrittenOutside(f"Heads cannot be written to {', '.join(unwritten)}.")
        return head

    async def _read_on(self) -> Sequence[StoredFact]:
        """What comes after the last fact that was taken in, which has to be there still."""
        stand = self._stretch.state.position
        if stand == 0:
            return await self.history.read_all(0, self._room)
        page = await self.history.read_all(stand - 1, self._room + 1)
        known = (self._stretch.checksums or (self._last.checksums if self._last else b""))[-CHECKSUM_BYTES:]
        there = bool(page) and page[0].position == stand
        if not there or (known and checksum(stand, hash_of(page[0].state)) != known):
            raise LogDiffers(
                f"The fact at position {stand}, which was there, is not in the log. `lookup audit verify` says more."
            )
        return page[1:]

    @property
    def _number(self) -> int:
        return self._last.number if self._last else 0

    @property
    def _room(self) -> int:
        return min(PAGE, max(1, self.facts_max - self._stretch.facts))

    async def _write(self, head: Head) -> None:
        await self.table.append(head)
        self._last = head
        self._stretch = Stretch(head.state)

    async def _last_in_table(self) -> Head | None:
        try:
            last = await self.table.last()
        except UnreadableHead as error:
            raise LogDiffers("The last head in the table cannot be read. `lookup audit verify` says more.") from error
        if last is not None and not is_signed(last, self.keys):
            raise LogDiffers(
                f"Head {last.number} in the table is not signed by a key of ours. `lookup audit verify` says more."
            )
        return last

    async def _restored(self, told: Head, log_id: UUID) -> None:
        """The first head of a log that was restored from a backup: it says of which log, and which head the backup had."""
        base = self._number
        restored = Head(
            number=told.number + 1,
            log_id=log_id,
            state=self._stretch.state,
            holes=(),
            checksums=b"",
            at=self.now(),
            previous=told.digest,
            key_id="",
            restored_from=(told.log_id, base),
        )
        log.warning("This log was restored from one with another id (%s): its heads go on from number %d.", told.log_id, base)
        await self._write(self.signer.signed(restored))

    async def _take_over(self, furthest: Head) -> None:
        """A file has heads that the table has lost. They are put back if the log still is what they say."""
        file = next(file for file in self.files if (last := _last_in(file)) and last.number == furthest.number)
        for line in file.lines():
            head = _readable(line)
            if head is None or head.number <= self._number:
                continue
            if not is_signed(head, self.keys) or await self._read_up_to(head.state.position) != head.state:
                raise LogDiffers(
                    f"Head {head.number} in {file.path} covers position {head.state.position}, and the log is not what it says."
                    " `lookup audit verify` says more."
                )
            await self._write(head)
        log.warning("The table had lost heads; those up to number %d were put back from %s.", self._number, file.path)

    async def _read_up_to(self, position: int) -> LogState:
        while page := await self.history.read_all(self._stretch.state.position, PAGE):
            wanted = [stored for stored in page if stored.position <= position]
            if wanted:
                self._stretch.take(wanted)
            if len(wanted) < len(page):
                break
        return self._stretch.state

    async def _bring_files_up_to_date(self) -> list[str]:
        """Gives the paths of those that could not be."""
        unwritten: list[str] = []
        for file in self.files:
            try:
                last = await asyncio.to_thread(file.last)
                await self._add_to(file, last.number if last else 0)
            except OSError:
                unwritten.append(str(file.path))
        return unwritten

    async def _add_to(self, file: HeadFile, after: int) -> None:
        heads: list[Head] = []
        async for line in self.table.lines(after):
            heads.append(read_head(line))
            if len(heads) >= LINES_AT_ONCE:
                await asyncio.to_thread(file.append, heads)
                heads = []
        if heads:
            await asyncio.to_thread(file.append, heads)


def _last_in(file: HeadFile) -> Head | None:
    try:
        return file.last()
    except OSError:
        return None


def _readable(line: str) -> Head | None:
    try:
        return read_head(line)
    except UnreadableHead:
        return None
