"""Verification: is the log, fact by fact, what was recorded and signed? Names the first position that is not.

One walk along the log in position order, a page at a time. Each fact has to follow in its stream, and to be at the position
that the signed heads say. A stream is remembered by its last fact, for so many streams; of others that fact is read again.
"""

from bisect import insort
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson

from app.audit.rows import fault_of, told_hash
from app.audit.trail import Trail
from events.chain import GENESIS
from events.facts import ResultReference
from events.heads import CHECKSUM_BYTES, Head, LogState, checksum
from events.record import StoredFact, envelope_of
from events.store import HistoryReader

PAGE = 1_000
STREAMS_MAX = 50_000
DEFECTS_MAX = 100
_REFERENCES = ("result", "raw")

Documents = Callable[[Sequence[ResultReference]], Awaitable[Mapping[str, bytes]]]
"""The documents that are there and are what their SHA-256 says, by their key."""
Progress = Callable[[int, int], None]
"""(position, of)."""


@dataclass(frozen=True, slots=True, order=True)
class Defect:
    """Where the log is not what it was. It is `position`, or where nobody can tell exactly, one up to `last`."""

    position: int
    last: int
    what: str


@dataclass(frozen=True, slots=True)
class Told:
    """A checkpoint of the relay: what it made of the log up to a position."""

    position: int
    log_head: bytes


@dataclass
class Verdict:
    """What a verification found. `defects` are the first ones, in the order of the log; `broken` counts all."""

    facts: int = 0
    documents: int = 0
    erased: int = 0
    log_head: int = 0
    covered: int = 0
    heads: int = 0
    head_number: int | None = None
    head_at: datetime | None = None
    beyond: int = 0
    broken: int = 0
    defects: list[Defect] = field(default_factory=list)
    head_problems: list[str] = field(default_factory=list)

    @property
    def first_bad(self) -> Defect | None:
        return self.defects[0] if self.defects else None

    @property
    def is_sound(self) -> bool:
        return not self.broken and not self.head_problems

    def add(self, position: int, what: str, last: int | None = None) -> None:
        self.broken += 1
        insort(self.defects, Defect(position, last or position, what))
        del self.defects[DEFECTS_MAX:]


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """The last fact of a stream that was walked past."""

    version: int = 0
    hash: bytes = GENESIS
    position: int = 0


@dataclass
class Verification:
    """One walk. `trail` has been judged; without one only the chains are looked at. Raises what the readers raise."""

    log: HistoryReader
    trail: Trail | None
    documents: Documents | None = None
    relay: Told | None = None
    progress: Progress = lambda _, __: None
    verdict: Verdict = field(default_factory=Verdict)
    _state: LogState = field(default_factory=LogState)
    _relayed: bytes | None = None
    _ends: "OrderedDict[UUID, StreamEnd]" = field(default_factory=OrderedDict)
    _at: int = 0

    @property
    def _told(self) -> Told:
        return self.relay or Told(0, GENESIS)

    async def run(self) -> Verdict:
        self.verdict.log_head = await self.log.head()
        if self.trail is not None:
            await self._refuse_another_log(self.trail)
            async for head in self.trail.along():
                if head.restored_from is None:
                    await self._walk_to(head)
                self._cover(head)
        await self._walk_on()
        return self.verdict

    # --- under a head -------------------------------------------------------------------------------------------------

    async def _walk_to(self, head: Head) -> None:
        """The facts that a head vouches for and the one before it does not."""
        before = self._state
        stretch = _Stretch(before.position, head) if _is_exact(head, before) else None
        broken = self.verdict.broken
        while self._at < head.state.position and (page := await self._page(head.state.position)):
            hashes = [told_hash(stored) for stored in page]
            await self._look_at(page, hashes, None if stretch is not None else before.position)
            if stretch is not None:
                stretch.take(page, hashes, self.verdict)
            self._fold(page, hashes)
        self._at = head.state.position
        if stretch is not None:
            stretch.end(self.verdict)
        if self._state != head.state and (stretch is None or not stretch.named) and broken == self.verdict.broken:
            what = (
                f"The facts from here to position {head.state.position} are not those that head {head.number} was signed over."
            )
            self.verdict.add(before.position + 1, what, head.state.position)
        if self._relayed is not None and self._state == head.state and self._relayed != self._told.log_head:
            self.verdict.head_problems.append(f"What the relay has kept for position {self._told.position} is not of this log.")
        self._relayed = None
        self._state = head.state

    def _cover(self, head: Head) -> None:
        verdict = self.verdict
        verdict.heads += 1
        verdict.covered, verdict.head_number, verdict.head_at = head.state.position, head.number, head.at

    async def _refuse_another_log(self, trail: Trail) -> None:
        log_id = await self.log.log_id()
        if trail.last is not None and trail.last.log_id != log_id:
            self.verdict.head_problems.append(
                f"{trail.name}: its last head is of log {trail.last.log_id}, this is log {log_id}."
            )

    # --- beyond the last head -----------------------------------------------------------------------------------------

    async def _walk_on(self) -> None:
        """What no head vouches for yet: the chains, and what the relay made of it."""
        began, broken = self._state.position, self.verdict.broken
        while page := await self._page(None):
            hashes = [told_hash(stored) for stored in page]
            await self._look_at(page, hashes, began)
            self._fold(page, hashes)
            self.verdict.beyond += len(page)
        told = self._told.position
        if told > self._state.position:
            self.verdict.add(self._state.position + 1, "The relay has told facts from here on that are not in the log.", told)
        elif self._relayed is not None and self._relayed != self._told.log_head and broken == self.verdict.broken:
            what = f"The facts from here to position {told} are not those that the relay told."
            self.verdict.add(began + 1, what, told)

    # --- each fact ----------------------------------------------------------------------------------------------------

    async def _page(self, through: int | None) -> Sequence[StoredFact]:
        page = await self.log.read_all(self._at, PAGE if through is None else min(PAGE, through - self._at))
        if through is not None:
            page = [stored for stored in page if stored.position <= through]
        if page:
            self.progress(page[-1].position, self.verdict.log_head)
        return page

    def _fold(self, page: Sequence[StoredFact], hashes: Sequence[bytes]) -> None:
        facts = [(stored.position, fact_hash) for stored, fact_hash in zip(page, hashes, strict=True)]
        until = [fact for fact in facts if fact[0] <= self._told.position]
        if self._state.position < self._told.position <= page[-1].position:
            self._state = self._state.with_facts(until)
            self._relayed = self._state.log_head if self._state.position == self._told.position else b""
            facts = facts[len(until) :]
        self._state = self._state.with_facts(facts)

    async def _look_at(self, page: Sequence[StoredFact], hashes: Sequence[bytes], unsure_since: int | None) -> None:
        """`unsure_since` is the position behind which no head says what was at each one; None where one does."""
        await self._remember_streams(page)
        for stored, fact_hash in zip(page, hashes, strict=True):
            self._look_at_one(stored, fact_hash, unsure_since)
        self._at = page[-1].position
        self.verdict.facts += len(page)
        if self.documents is not None:
            await self._look_at_documents(page, self.documents)

    def _look_at_one(self, stored: StoredFact, fact_hash: bytes, unsure_since: int | None) -> None:
        end = self._ends.get(stored.stream_id, StreamEnd())
        if stored.stream_version != end.version + 1:
            # What is missing may have been at any position since the fact before it, and may have been moved.
            first = stored.position if unsure_since is None else max(end.position, unsure_since) + 1
            what = f"Version {stored.stream_version} of stream {stored.stream_id} comes after version {end.version}."
            self.verdict.add(first, what, stored.position)
        elif (fault := fault_of(stored, end.hash)) is not None:
            self.verdict.add(stored.position, fault)
        self._ends[stored.stream_id] = StreamEnd(stored.stream_version, fact_hash, stored.position)
        self._ends.move_to_end(stored.stream_id)
        if len(self._ends) > STREAMS_MAX:
            self._ends.popitem(last=False)

    async def _remember_streams(self, page: Sequence[StoredFact]) -> None:
        """Of streams that go on here and were forgotten, read the fact before."""
        first: dict[UUID, StoredFact] = {}
        for stored in page:
            first.setdefault(stored.stream_id, stored)
        forgotten = [
            stream_id for stream_id, stored in first.items() if stored.stream_version > 1 and stream_id not in self._ends
        ]
        for stream_id, stream in (await self.log.read(forgotten) if forgotten else {}).items():
            earlier = [stored for stored in stream if stored.position < first[stream_id].position]
            if earlier:
                last = max(earlier, key=lambda stored: stored.position)
                self._ends[stream_id] = StreamEnd(last.stream_version, told_hash(last), last.position)

    # --- result documents ---------------------------------------------------------------------------------------------

    async def _look_at_documents(self, page: Sequence[StoredFact], documents: Documents) -> None:
        told = [(stored, reference) for stored in page for reference in references_of(stored)]
        if not told:
            return
        found = await documents([reference for _, reference in told])
        missing = [(stored, reference) for stored, reference in told if reference.location.key not in found]
        self.verdict.documents += len(told) - len(missing)
        if not missing:
            return
        streams = await self.log.read(list({stored.stream_id for stored, _ in missing}))
        for stored, reference in missing:
            if was_erased(streams.get(stored.stream_id, ())):
                self.verdict.erased += 1
            else:
                what = f"Its result document {reference.sha256} is missing, or is not what was recorded."
                self.verdict.add(stored.position, what)


class _Stretch:
    """The facts under one head, held against what it says of each position."""

    def __init__(self, after: int, head: Head) -> None:
        self.named = False
        self._checksums = head.checksums
        self._expected = _positions(after, head)
        self._next = next(self._expected, None)
        self._taken = 0

    def take(self, page: Sequence[StoredFact], hashes: Sequence[bytes], verdict: Verdict) -> None:
        for stored, fact_hash in zip(page, hashes, strict=True):
            self._pass_over(stored.position, verdict)
            if self._next != stored.position:
                self._tell(verdict, stored.position, "There was no fact at this position when it was signed.")
                continue
            if checksum(stored.position, fact_hash) != self._checksum():
                self._tell(verdict, stored.position, "It is not the fact that was signed at this position.")
            self._advance()

    def end(self, verdict: Verdict) -> None:
        self._pass_over(None, verdict)

    def _pass_over(self, position: int | None, verdict: Verdict) -> None:
        while self._next is not None and (position is None or self._next < position):
            self._tell(verdict, self._next, "The fact that was signed at this position is missing.")
            self._advance()

    def _tell(self, verdict: Verdict, position: int, what: str) -> None:
        self.named = True
        verdict.add(position, what)

    def _checksum(self) -> bytes:
        return self._checksums[self._taken * CHECKSUM_BYTES : (self._taken + 1) * CHECKSUM_BYTES]

    def _advance(self) -> None:
        self._taken += 1
        self._next = next(self._expected, None)


def _is_exact(head: Head, before: LogState) -> bool:
    """Whether the head says of each position what was there: not if a head before it cannot be believed."""
    facts = head.state.tree.size - before.tree.size
    holes = sum(last - first + 1 for first, last in head.holes)
    return facts + holes == head.state.position - before.position and len(head.checksums) == CHECKSUM_BYTES * facts


def _positions(after: int, head: Head) -> Iterator[int]:
    """The positions of the facts behind one, up to the head's."""
    holes = iter([*head.holes, (head.state.position + 1, head.state.position + 1)])
    first = after + 1
    for start, last in holes:
        yield from range(first, start)
        first = last + 1


def references_of(stored: StoredFact) -> list[ResultReference]:
    """The result documents that a fact tells of, whatever its version."""
    chained = stored.state.split(b"\n", 2)[1:2]
    if not chained or b'"sha256"' not in chained[0]:
        return []
    try:
        told: Any = orjson.loads(chained[0])
        found = [told[name] for name in _REFERENCES if isinstance(told.get(name), dict)]
        return [ResultReference.model_validate(reference) for reference in found]
    except (ValueError, AttributeError):
        return []


def was_erased(stream: Sequence[StoredFact]) -> bool:
    """Whether the erasable values of a stream's first fact are gone."""
    if not stream:
        return False
    state = stream[0].state
    try:
        return bool(envelope_of(state).get("erasable")) and state.count(b"\n") == 2  # noqa: PLR2004 - three lines
    except ValueError:
        return False
