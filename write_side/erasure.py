"""Erasure: takes everything that tells of a target out of every place where it lies, and nothing else.

Promises:

- **The chain still holds.** Of a fact, the erasable lines go, and nothing that was hashed (`events/record.py`).
- **Begun is finished.** What is being erased, and how far it has come, is in two tables until the last step is done
  (`ErasureTable`). Killed anywhere, it goes on from there; each step may be done twice.
- **Nothing comes back.** Open jobs are called off first, and nothing is erased before the last attempt of theirs must be over.
  What was erased is on a list outside of the database, which a restored backup is held against.
- **New jobs are new.** What is asked about the target after the erasure began is not part of it.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from uuid import UUID

from domain.saga import LookupSaga, cancel, evolve
from events.catalog import topics_of
from events.facts import ErasureStarted, JobFact, Target, TargetErased
from events.record import Cause, StoredFact, hash_of
from events.segment_files import DRAFT_SUFFIX, SUFFIX, Document, Segment, rewrite_segment, segment_files
from events.store import AppendUnit, EventStore, HistoryReader, NewFacts, StreamHead, VersionConflict
from write_side.erasure_list import ErasureList, ListedErasure, lines_of
from write_side.erasure_table import JOBS_PAGE, ErasureTable, Subject, UnderWay, erasable_values, erased, is_erasable, salted
from write_side.retention import RetentionTable
from write_side.sagas import Sagas, Trigger

PAGE = 1_000
SPELLINGS_MAX = 100
TOLD_PAGE = 1_000
AFTER_THE_LAST_ATTEMPT = timedelta(seconds=5)
ENDS = frozenset(topics_of(TargetErased))
CALLED_OFF = "Everything about its target is being erased."


class NotYet(Exception):  # noqa: N818 - a state, in our words
    """Something has to happen first; the message says what. The erasure goes on with `lookup erase --resume`."""


JobPages = Callable[[], AsyncIterator[Sequence[UUID]]]
Sweep = Callable[[Subject, JobPages, int], Awaitable[int]]
"""Clears one kind of place of a target and its jobs; gives how much was cleared. What is still on its way there from facts up
to a position is waited for, or `NotYet` raised.
"""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was erased, and what is out of reach. `told` has the positions of facts that subscribers were sent, by job."""

    erasure_id: UUID
    target_sha256: str
    salt: str
    by: str
    reason: str
    started_at: datetime
    erased_at: datetime
    counts: Mapping[str, int]
    told: Mapping[UUID, Sequence[int]]
    jobs_cut: int
    """So many jobs more were erased than `told` names."""


@dataclass
class Erasure:
    """Carries erasures out. One at a time, anywhere: `table` is locked first.

    May raise `NotYet`, `SomebodyElseSeals`, `StoreUnavailable`, `OutcomeUnknown`, `psycopg.Error`, `OSError`, or what the
    sweeps raise; all of them leave it under way.
    """

    store: EventStore
    archive: HistoryReader
    sagas: Sagas
    retention: RetentionTable
    folder: Path
    listed: ErasureList
    sweep_messages: Sweep
    sweep_views: Sweep
    now: Callable[[], datetime]
    new_id: Callable[[], UUID]
    wait: Callable[[float], Awaitable[None]] = asyncio.sleep
    on_step: Callable[[str], None] = lambda _: None
    table: ErasureTable = field(init=False)

    def __post_init__(self) -> None:
        self.table = ErasureTable(self.retention.conn)

    async def begin(self, canonical: str, *, salt: str, by: str, reason: str) -> None:
        """Note what is to be erased, unless it is noted already. `run` carries it out."""
        if not await self.table.has(canonical):
            await self.table.begin(_new(self.new_id(), canonical, salt, by, reason, self.now()))

    async def find(self, subject: Subject) -> tuple[int, int]:
        """How many jobs and facts tell of a target now. Nothing is changed."""
        at, facts, jobs = 0, 0, set[UUID]()
        while page := await self.archive.read_all(at, PAGE):
            told = [row for row in page if subject.is_told_by(row)]
            facts, at = facts + len(told), page[-1].position
            jobs |= {row.stream_id for row in told}
        return len(jobs), facts

    async def run(self) -> list[Receipt]:
        """Finish all that has begun, the oldest first."""
        receipts: list[Receipt] = []
        while (one := await self.table.under_way()) is not None:
            receipts.append(await self._carry_out(one))
        return receipts

    async def _carry_out(self, one: UnderWay) -> Receipt:
        for name, step in (
            ("start", self._start),
            ("find", self._find),
            ("cancel", self._cancel),
            ("facts", self._facts),
            ("documents", self._documents),
            ("letters", self._letters),
            ("segments", self._segments),
            ("messages", self._messages),
            ("views", self._views),
            ("list", self._list),
        ):
            self.on_step(name)
            await step(one)
            again = await self.table.under_way()
            assert again is not None
            one = again
        self.on_step("end")
        return await self._end(one)

    async def _start(self, one: UnderWay) -> None:
        fact = ErasureStarted(
            erasure_id=one.erasure_id,
            target_sha256=one.target_sha256,
            by=one.by,
            reason=one.reason,
            started_at=one.started_at,
        )
        await self._append(one, StreamHead(), fact)

    async def _append(self, one: UnderWay, head: StreamHead, fact: ErasureStarted | TargetErased) -> None:
        """Once: a stream that has moved on has this fact already."""
        cause = Cause(actor=one.by, correlation_id=one.erasure_id, reason=one.reason)
        try:
            await self.store.append(AppendUnit([NewFacts(one.erasure_id, head, [fact])], cause))
        except VersionConflict:
            return

    async def _find(self, one: UnderWay) -> None:
        """Look through the whole log, segments included, up to where the erasure began."""
        if one.from_list:
            return
        ends = (await self.store.read([one.erasure_id]))[one.erasure_id][0].position
        at, spellings = one.scanned_to, list(one.spellings)
        while at < ends and (page := await self.archive.read_all(at, min(PAGE, ends - at))):
            told = [row for row in page if row.position < ends and one.subject.is_told_by(row)]
            spellings = list(dict.fromkeys([*spellings, *_spellings(told)]))[:SPELLINGS_MAX]
            at = page[-1].position
            await self.table.found(one.erasure_id, told, at, spellings)

    async def _cancel(self, one: UnderWay) -> None:
        """Call open jobs off, and wait until the last of their attempts must be over: none may bring an answer any more."""
        if not one.from_list and one.not_before is None:
            not_before = self.now()
            async for page in self.table.jobs(one.erasure_id):
                for loaded in (await self.sagas.load(list(page))).values():
                    if not loaded.saga.closed:
                        not_before = max(not_before, loaded.saga.submitted.expires_at + AFTER_THE_LAST_ATTEMPT)
            await self.table.wait_until(one.erasure_id, not_before)
        async for page in self.table.jobs(one.erasure_id):
            for job_id, loaded in (await self.sagas.load(list(page))).items():
                if not loaded.saga.closed:
                    await self._call_off(one, job_id)
        again = await self.table.under_way()
        if again is not None and again.not_before is not None:
            await self.wait(max(0.0, (again.not_before - self.now()).total_seconds()))

    async def _call_off(self, one: UnderWay, job_id: UUID) -> None:
        def decision(saga: LookupSaga) -> tuple[list[JobFact], LookupSaga]:
            facts = cancel(saga, by=one.by, reason=CALLED_OFF, now=self.now())
            for fact in facts:
                saga = evolve(saga, fact)
            return facts, saga

        await self.sagas.decide(job_id, decision, lambda: [Trigger(one.by, one.erasure_id, one.reason)])

    async def _facts(self, one: UnderWay) -> None:
        async for page in self.table.jobs(one.erasure_id):
            await self.table.erase_facts(page)

    async def _documents(self, one: UnderWay) -> None:
        await self.table.count(one, "documents", await self.table.delete_documents(one.erasure_id))

    async def _letters(self, one: UnderWay) -> None:
        async for page in self.table.letters(one.erasure_id):
            about = [
                letter_id
                for letter_id, body, headers, is_ours in page
                if is_ours or any(one.subject.is_mentioned_in(text) for text in (body, headers.encode()))
            ]
            if about:
                await self.table.count(one, "letters", await self.table.delete_letters(about))

    async def _segments(self, one: UnderWay) -> None:
        """All files of the folder, also those that the log does not tell of: they are read by whoever finds them."""
        for draft in self.folder.glob(f"*{SUFFIX}{DRAFT_SUFFIX}"):
            draft.unlink()
        for path in segment_files(self.folder):
            segment = Segment(path)
            about = await self._streams_about(one, segment)
            documents = await asyncio.to_thread(_rewrite, segment, about) if about else None
            if documents is not None:
                await self.table.count(one, "documents", documents)
                await self.table.count(one, "segments", 1)

    async def _streams_about(self, one: UnderWay, segment: Segment) -> set[UUID]:
        stream_ids, about = segment.stream_ids(), set[UUID]()
        for first in range(0, len(stream_ids), JOBS_PAGE):
            about |= await self.table.ours(one.erasure_id, stream_ids[first : first + JOBS_PAGE])
        return about | await asyncio.to_thread(lambda: {r.stream_id for r in segment.rows() if one.subject.is_told_by(r)})

    async def _messages(self, one: UnderWay) -> None:
        await self._sweep(one, "messages", self.sweep_messages)

    async def _views(self, one: UnderWay) -> None:
        await self._sweep(one, "views", self.sweep_views)

    async def _sweep(self, one: UnderWay, kind: str, sweep: Sweep) -> None:
        cleared = await sweep(one.subject, lambda: self._job_ids(one), await self._last_position(one))
        await self.table.count(one, kind, cleared)

    async def _last_position(self, one: UnderWay) -> int:
        """Of the last fact of any of these jobs."""
        last = 0
        async for page in self.table.jobs(one.erasure_id):
            for rows in (await self.archive.read(list(page))).values():
                last = max(last, rows[-1].position)
        return last

    async def _job_ids(self, one: UnderWay) -> AsyncIterator[Sequence[UUID]]:
        async for page in self.table.jobs(one.erasure_id):
            yield list(page)

    async def _list(self, one: UnderWay) -> None:
        """Before the last fact: what the log calls erased is on the list."""
        if one.from_list or await asyncio.to_thread(self.listed.has, one.erasure_id):
            return
        told = (one.erasure_id, one.target_sha256, one.by, one.reason, self.now())
        lines: list[ListedErasure] = [line async for line in lines_of(*told, self._job_ids(one))]
        await asyncio.to_thread(self.listed.append, lines)

    async def _end(self, one: UnderWay) -> Receipt:
        receipt = await self._receipt(one)
        fact = TargetErased(
            erasure_id=one.erasure_id,
            target_sha256=one.target_sha256,
            by=one.by,
            reason=one.reason,
            from_list=one.from_list,
            erased_at=receipt.erased_at,
            **receipt.counts,
        )
        rows = (await self.store.read([one.erasure_id]))[one.erasure_id]
        if not any(map(_is_end, rows)):
            head = StreamHead(rows[-1].stream_version, hash_of(rows[-1].state), rows[-1].position)
            await self._append(one, head, fact)
        await self.table.end(one.erasure_id)
        return receipt

    async def _receipt(self, one: UnderWay) -> Receipt:
        told_to = await self.table.told_to()
        told: dict[UUID, Sequence[int]] = {}
        jobs = facts = told_facts = 0
        async for page in self.table.jobs(one.erasure_id):
            for job_id, positions in page.items():
                sent = sorted(position for position in set(positions) if position <= told_to)
                jobs, facts, told_facts = jobs + 1, facts + len(set(positions)), told_facts + len(sent)
                if len(told) < TOLD_PAGE:
                    told[job_id] = sent
        swept = {kind: one.counts.get(kind, 0) for kind in ("documents", "views", "letters", "messages", "segments")}
        counts = {"jobs": jobs, "facts": facts, "told_facts": told_facts, **swept}
        who = (one.erasure_id, one.target_sha256, one.salt, one.by, one.reason, one.started_at, self.now())
        return Receipt(*who, counts, told, jobs - len(told))


def _new(erasure_id: UUID, canonical: str, salt: str, by: str, reason: str, now: datetime) -> UnderWay:
    digest = salted(salt, canonical)
    return UnderWay(erasure_id, canonical, (), salt, digest, by, reason, now, False, 0, None, {})


def _rewrite(segment: Segment, about: set[UUID]) -> int | None:
    """Take what tells of these jobs out of a segment; gives the number of documents that went, None if there was nothing."""
    names = {str(job_id) for job_id in about}

    def is_about(document: Document) -> bool:
        return document.key.partition("/")[0] in names

    gone = sum(map(is_about, segment.all_documents()))
    if not gone and not any(row.stream_id in about and is_erasable(row) for row in segment.rows()):
        return None
    rewrite_segment(
        segment, lambda row: erased(row) if row.stream_id in about else row, lambda document: not is_about(document)
    )
    return gone


def _spellings(rows: Iterable[StoredFact]) -> Iterable[str]:
    """How the target was typed."""
    for row in rows:
        for value in erasable_values(row.state.split(b"\n")):
            if isinstance(value, dict) and "raw" in value:
                yield Target.model_validate(value, strict=False).raw


# --- The list, and a backup that is older than it -----------------------------------------------------------------------


async def not_done_here(listed: ErasureList, archive: HistoryReader) -> list[UUID]:
    """As `unapplied`, but believes the log where it says that an erasure is done: quick enough for every start."""
    done: dict[UUID, bool] = {}
    found: list[UUID] = []
    for line in listed.lines():
        if line.erasure_id not in done:
            rows = (await archive.read([line.erasure_id])).get(line.erasure_id, ())
            done[line.erasure_id] = any(_is_end(row) for row in rows)
        if not done[line.erasure_id] and line.erasure_id not in found and await _is_unapplied(line, archive):
            found.append(line.erasure_id)
    return found


def _is_end(row: StoredFact) -> bool:
    return row.topic in ENDS


async def unapplied(listed: ErasureList, archive: HistoryReader) -> list[UUID]:
    """Erasures of the list that this log does not know to be done, and that left something in it to erase."""
    found: list[UUID] = []
    for line in listed.lines():
        if line.erasure_id not in found and await _is_unapplied(line, archive):
            found.append(line.erasure_id)
    return found


async def _is_unapplied(line: ListedErasure, archive: HistoryReader) -> bool:
    for first in range(0, len(line.job_ids), JOBS_PAGE):
        streams = await archive.read(line.job_ids[first : first + JOBS_PAGE])
        if any(is_erasable(row) for rows in streams.values() for row in rows):
            return True
    return False


async def apply_erasures(erasure: Erasure, by: str) -> list[Receipt]:
    """Erase again whatever the list names and the log still tells: for a database that was restored from an older backup.

    Call it before anything serves that log. Killed, it is called again. Raises what `Erasure.run` raises.
    """
    for erasure_id in await unapplied(erasure.listed, erasure.archive):
        await _begin_again(erasure, erasure_id, by)
    return await erasure.run()


async def _begin_again(erasure: Erasure, erasure_id: UUID, by: str) -> None:
    """Noted whole or not at all: half of it would be carried out, and taken for all of it."""
    lines = [line for line in erasure.listed.lines() if line.erasure_id == erasure_id]
    new = _new(erasure_id, "", "", by, lines[0].reason, erasure.now())
    async with erasure.retention.conn.transaction():
        await erasure.table.end(erasure_id)
        await erasure.table.begin(replace(new, target_sha256=lines[0].target_sha256, from_list=True))
        for line in lines:
            await erasure.table.add_jobs(erasure_id, await _positions(erasure.archive, line.job_ids))


async def _positions(archive: HistoryReader, job_ids: Sequence[UUID]) -> dict[UUID, Sequence[int]]:
    positions: dict[UUID, Sequence[int]] = {}
    for first in range(0, len(job_ids), JOBS_PAGE):
        streams = await archive.read(job_ids[first : first + JOBS_PAGE])
        positions |= {job_id: [row.position for row in rows if is_erasable(row)] for job_id, rows in streams.items()}
    return positions
