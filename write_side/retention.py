"""Retention: jobs that ended long ago leave the table for a segment file.

Promises:

- **Nothing is lost or doubled.** The segment is durable and read back, then the seal is recorded (`JobsSealed`), then rows are
  deleted. Killed in between, the next run goes on from there; readers (`events/segments.py`) see each fact once, always.
- **Whole streams.** A job goes with all its facts and documents, when it has ended, the relay has told all of it, and its chain
  holds. What is damaged stays where it is, for `lookup doctor` to tell.
- **Bounded.** A step seals at most `FACTS_MAX` facts, and holds them in memory.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import LiteralString
from uuid import UUID

import zstandard
from psycopg import AsyncConnection

from events.batching import groups_within
from events.catalog import topics_of
from events.chain import GENESIS, chained_hash
from events.facts import JobCancelled, JobCompleted, JobFailed, JobsSealed, JobSubmitted
from events.record import Cause, StoredFact, envelope_of, hash_of
from events.segment_files import (
    DRAFT_SUFFIX,
    SUFFIX,
    Document,
    Segment,
    SegmentHeader,
    SegmentUnreadable,
    digest_of,
    segment_files,
    write_segment,
)
from events.segments import SEALS, ArchivedLog, Seal
from events.store import AppendUnit, EventStore, NewFacts, StreamHead
from results.documents import DOCUMENT_BYTES_MAX

ACTOR = "retention"
OLD = "these jobs had ended long ago"
PAGE = 1_000
STREAMS_PAGE = 100
FACTS_MAX = 20_000
BODY_BYTES_MAX = 16 * 1_048_576
"""Of compressed documents, which wait in memory for a segment."""
CONNECT_TIMEOUT_S = 2
STATEMENT_TIMEOUT_MS = 600_000
STEP_MAX_S = 600.0
RETENTION_LOCK = 0x72657461696E
"""The advisory lock of who seals or erases: both rewrite segments."""

OPENING = frozenset(topics_of(JobSubmitted))
CLOSING = frozenset(topics_of(JobCompleted, JobFailed, JobCancelled))

_LOCK: LiteralString = "SELECT pg_try_advisory_lock(%s)"
_RELAYED: LiteralString = "SELECT coalesce(min(position), 0) FROM relay_checkpoints"
_SIZES: LiteralString = "SELECT key, octet_length(body) FROM result_documents WHERE key = ANY(%s)"
_OF_JOBS: LiteralString = "SELECT key, octet_length(body) FROM result_documents WHERE split_part(key, '/', 1) = ANY(%s)"
_BODIES: LiteralString = "SELECT key, body FROM result_documents WHERE key = ANY(%s)"
_DELETE_DOCUMENTS: LiteralString = "DELETE FROM result_documents WHERE key = ANY(%s)"
_DELETE_STREAMS: LiteralString = "DELETE FROM stored_events WHERE originator_id = ANY(%s) AND notification_id <= %s"
_KEY = re.compile(rb'"([0-9a-f-]{36}/[0-9a-f]{64})"')


class SomebodyElseSeals(Exception):  # noqa: N818 - a state, in our words
    """Another process seals or erases right now."""


class SegmentNotKept(Exception):  # noqa: N818 - an outcome, in our words
    """What was written does not read back as it was. Nothing was deleted."""


class RetentionTable:
    """The log's table and the documents, as the retention role sees them. All methods may raise `psycopg.Error`."""

    def __init__(self, conn: AsyncConnection) -> None:
        self.conn = conn

    async def lock(self) -> None:
        """Be the only one; holds until the connection ends. Raises `SomebodyElseSeals`."""
        if await (await self.conn.execute(_LOCK, (RETENTION_LOCK,))).fetchone() != (True,):
            raise SomebodyElseSeals("Another process seals or erases right now. Try again when it is done.")

    async def relayed(self) -> int:
        """The position up to which everything was told and sent out."""
        row = await (await self.conn.execute(_RELAYED)).fetchone()
        return int(row[0]) if row else 0

    async def sizes(self, keys: Iterable[str]) -> dict[str, int]:
        """How many bytes each of these documents takes, compressed; without those that are not there."""
        return dict(await (await self.conn.execute(_SIZES, (list(keys),))).fetchall())

    async def sizes_of_jobs(self, job_ids: Iterable[UUID]) -> dict[str, int]:
        """All documents of these jobs, those that no fact tells of as well. Looks through all keys."""
        return dict(await (await self.conn.execute(_OF_JOBS, ([str(job_id) for job_id in job_ids],))).fetchall())

    async def bodies(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Documents as they lie there, compressed."""
        async with self.conn.cursor(binary=True) as curs:
            rows = await (await curs.execute(_BODIES, (list(keys),))).fetchall()
        return {key: bytes(body) for key, body in rows}

    async def delete(self, stream_ids: Sequence[UUID], last_position: int, keys: Sequence[str]) -> int:
        """Delete these streams up to a position, and these documents, in one transaction. Gives how many facts went."""
        async with self.conn.transaction():
            await self.conn.execute(_DELETE_DOCUMENTS, (list(keys),))
            return (await self.conn.execute(_DELETE_STREAMS, (list(stream_ids), last_position))).rowcount


@asynccontextmanager
async def open_retention_table(database_url: str) -> AsyncIterator[RetentionTable]:
    """On a connection of its own. Raises `psycopg.Error`."""
    connecting = AsyncConnection.connect(
        database_url,
        autocommit=True,
        connect_timeout=CONNECT_TIMEOUT_S,
        options=f"-c statement_timeout={STATEMENT_TIMEOUT_MS} -c lock_timeout={STATEMENT_TIMEOUT_MS}",
    )
    async with await connecting as conn:
        yield RetentionTable(conn)


@dataclass
class Batch:
    """What goes into one segment. `bodies` are compressed documents by their key."""

    rows: list[StoredFact] = field(default_factory=list)
    bodies: dict[str, bytes] = field(default_factory=dict)

    @property
    def stream_ids(self) -> list[UUID]:
        return list(dict.fromkeys(row.stream_id for row in self.rows))

    @property
    def is_full(self) -> bool:
        return len(self.rows) >= FACTS_MAX or sum(map(len, self.bodies.values())) >= BODY_BYTES_MAX


@dataclass
class Tally:
    """What a run did, or with `dry_run` would do."""

    segments: list[str] = field(default_factory=list)
    jobs: int = 0
    facts: int = 0
    documents: int = 0
    deleted: int = 0
    unknown_files: list[str] = field(default_factory=list)


@dataclass
class Retention:
    """Seals what ended longer than `keep` ago. One run at a time, anywhere: `table` is locked first.

    May raise `SomebodyElseSeals`, `SegmentNotKept`, `StoreUnavailable`, `OutcomeUnknown`, `psycopg.Error` or `OSError`.
    """

    store: EventStore
    archive: ArchivedLog
    table: RetentionTable
    folder: Path
    keep: timedelta
    now: Callable[[], datetime]
    new_id: Callable[[], UUID]
    tally: Tally = field(default_factory=Tally)
    _walked: int = 0

    async def run(self, *, steps_max: int | None = None, dry_run: bool = False) -> Tally:
        """Seal until nothing is left to seal, or for so many steps."""
        if not dry_run:
            await self.table.lock()
            await self._finish_last()
            await self._tidy()
        steps = 0
        while (steps_max is None or steps < steps_max) and (batch := await self._next_batch()).rows:
            async with asyncio.timeout(STEP_MAX_S):
                await (self._count(batch) if dry_run else self._seal(batch))
            steps += 1
        return self.tally

    # --- choosing -----------------------------------------------------------------------------------------------------

    async def _next_batch(self) -> Batch:
        """The next streams that ended long ago, in the order of their ends."""
        closed_before, relayed = self.now() - self.keep, await self.table.relayed()
        batch = Batch()
        async for closed in self._closed(closed_before, relayed):
            await self._add(batch, [stream_id for stream_id, _ in closed], closed_before, relayed)
            self._walked = closed[-1][1]
            if batch.is_full:
                break
        if batch.rows:
            untold = (await self.table.sizes_of_jobs(batch.stream_ids)).keys() - batch.bodies.keys()
            batch.bodies |= await self._sound_bodies(await self.table.sizes(untold))
        batch.rows.sort(key=lambda row: row.position)
        return batch

    async def _closed(self, closed_before: datetime, relayed: int) -> AsyncIterator[list[tuple[UUID, int]]]:
        """Streams with a closing fact recorded before that time, and its position: at most `STREAMS_PAGE` at once."""
        closed: list[tuple[UUID, int]] = []
        at, goes_on = self._walked, True
        while goes_on and (page := await self.store.read_all(at, PAGE)):
            for row in page:
                if row.position > relayed or _recorded_at(row) > closed_before:
                    goes_on = False
                    break
                if row.topic in CLOSING:
                    closed.append((row.stream_id, row.position))
                if len(closed) == STREAMS_PAGE:
                    yield closed
                    closed = []
            at = page[-1].position
        if closed:
            yield closed

    async def _add(self, batch: Batch, stream_ids: Sequence[UUID], closed_before: datetime, relayed: int) -> None:
        found = await self.store.read(stream_ids)
        old = [rows for rows in found.values() if rows[-1].position <= relayed and _recorded_at(rows[-1]) <= closed_before]
        rows = [row for rows in old if _is_sound(rows) for row in rows]
        batch.rows += rows
        batch.bodies |= await self._sound_bodies(await self.table.sizes(document_keys_of(rows)))

    async def _sound_bodies(self, sizes: Mapping[str, int]) -> dict[str, bytes]:
        """Documents that are what their key says. A damaged one stays in the table."""
        bodies: dict[str, bytes] = {}
        for keys in groups_within(sizes, sizes.__getitem__, BODY_BYTES_MAX):
            bodies |= await self.table.bodies(keys)
        return {key: body for key, body in bodies.items() if _opened(key, body) is not None}

    # --- sealing ------------------------------------------------------------------------------------------------------

    async def _seal(self, batch: Batch) -> None:
        """Durable, then recorded, then deleted."""
        log_id = await self.store.log_id()
        header = await asyncio.to_thread(self._write, log_id, batch)
        await self._record(header)
        await self._delete(header, batch.stream_ids, list(batch.bodies))
        await self._count(batch)
        self.tally.segments.append(header.name)

    def _write(self, log_id: UUID, batch: Batch) -> SegmentHeader:
        header = write_segment(self.folder, log_id, batch.rows, _Documents(batch.bodies))
        _check(Segment(self.folder / header.name), header.sha256)
        return header

    async def _record(self, header: SegmentHeader) -> None:
        now = self.now()
        seals = await self.archive.seals()
        fact = JobsSealed(
            segment=header.name,
            sha256=header.sha256,
            first_position=header.first_position,
            last_position=header.last_position,
            jobs=header.jobs,
            facts=header.facts,
            documents=header.documents,
            size_bytes=(self.folder / header.name).stat().st_size,
            closed_before=now - self.keep,
            log_retention_days=self.keep / timedelta(days=1),
            sealed_at=now,
        )
        unit = AppendUnit(
            [NewFacts(SEALS, _head_of(seals), [fact])], Cause(actor=ACTOR, correlation_id=self.new_id(), reason=OLD)
        )
        await self.store.append(unit)

    async def _delete(self, header: SegmentHeader, stream_ids: Sequence[UUID], keys: Sequence[str]) -> None:
        of_jobs: dict[str, list[str]] = {}
        for key in keys:
            of_jobs.setdefault(key.partition("/")[0], []).append(key)
        for first in range(0, len(stream_ids), STREAMS_PAGE):
            some = stream_ids[first : first + STREAMS_PAGE]
            of_some = [key for stream_id in some for key in of_jobs.get(str(stream_id), ())]
            self.tally.deleted += await self.table.delete(some, header.last_position, of_some)

    async def _count(self, batch: Batch) -> None:
        self.tally.jobs += len(batch.stream_ids)
        self.tally.facts += len(batch.rows)
        self.tally.documents += len(batch.bodies)

    # --- going on after a kill ----------------------------------------------------------------------------------------

    async def _finish_last(self) -> None:
        """Only what was sealed last can still lie in the table, too: nothing is sealed before that is deleted."""
        seals = await self.archive.seals()
        if not seals:
            return
        fact = seals[-1].fact
        segment = Segment(self.folder / fact.segment)
        await asyncio.to_thread(_check, segment, fact.sha256)
        await self._delete(segment.header, segment.stream_ids(), segment.document_keys())

    async def _tidy(self) -> None:
        """Drafts, and segments of ours that were never recorded, are of a run that was killed: their facts are in the table."""
        for draft in self.folder.glob(f"*{SUFFIX}{DRAFT_SUFFIX}"):
            draft.unlink()
        known = {seal.fact.segment for seal in await self.archive.seals()}
        for path in segment_files(self.folder):
            if path.name in known:
                continue
            if await self._is_left_over(path):
                path.unlink()
            else:
                self.tally.unknown_files.append(path.name)

    async def _is_left_over(self, path: Path) -> bool:
        try:
            segment = Segment(path)
            stream_ids = segment.stream_ids()
        except SegmentUnreadable:
            return False
        if segment.header.log_id != await self.store.log_id():
            return False
        for first in range(0, len(stream_ids), STREAMS_PAGE):
            some = stream_ids[first : first + STREAMS_PAGE]
            if (await self.store.read(some)).keys() != set(some):
                return False
        return True


class _Documents(Sequence[Document]):
    """Documents that are decompressed one after the other, as the segment is written."""

    def __init__(self, bodies: Mapping[str, bytes]) -> None:
        self._bodies = bodies
        self._keys = sorted(bodies)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, number: int) -> Document:  # type: ignore[override]  # nobody asks for a slice
        key = self._keys[number]
        document = _opened(key, self._bodies[key])
        assert document is not None
        return Document(key, document)

    def __iter__(self) -> Iterator[Document]:
        return (self[number] for number in range(len(self)))


def document_keys_of(rows: Iterable[StoredFact]) -> list[str]:
    """The keys of all documents that these facts tell of, of whatever kind."""
    return [found.decode() for row in rows for found in _KEY.findall(row.state.split(b"\n")[1])]


def _opened(key: str, body: bytes) -> bytes | None:
    """The document; None if it is not what its key says."""
    try:
        document = zstandard.ZstdDecompressor().decompress(body, max_output_size=DOCUMENT_BYTES_MAX)
    except zstandard.ZstdError:
        return None
    return document if sha256(document).hexdigest() == key.rpartition("/")[2] else None


def _recorded_at(row: StoredFact) -> datetime:
    return datetime.fromisoformat(envelope_of(row.state)["recorded_at"])


def _is_sound(rows: Sequence[StoredFact]) -> bool:
    """A job's whole stream, ended, each fact chained to the one before it.

    What comes to a sealed stream later (an answer that was read again) stays in the table: it is no whole stream.
    """
    previous = GENESIS
    for version, row in enumerate(rows, start=1):
        envelope, chained, *_ = row.state.split(b"\n")
        previous = chained_hash(previous, row.stream_id, version, row.topic, envelope, chained)
        if row.stream_version != version or hash_of(row.state) != previous:
            return False
    return rows[0].topic in OPENING and any(row.topic in CLOSING for row in rows)


def _check(segment: Segment, digest: str) -> None:
    """Read the file back before anything that is in it is deleted elsewhere."""
    rows = list(segment.rows())
    if digest_of(rows) != digest or len(rows) != segment.header.facts:
        raise SegmentNotKept(f"The segment {segment.path.name} does not read back as it was written.")
    if sum(1 for document in segment.all_documents() if _is_itself(document)) != segment.header.documents:
        raise SegmentNotKept(f"A document in the segment {segment.path.name} does not read back as it was written.")


def _is_itself(document: Document) -> bool:
    return sha256(document.body).hexdigest() == document.key.rpartition("/")[2]


def _head_of(seals: Sequence[Seal]) -> StreamHead:
    if not seals:
        return StreamHead()
    last = seals[-1].stored
    return StreamHead(last.stream_version, hash_of(last.state), last.position)
