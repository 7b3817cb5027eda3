"""The whole log, wherever it lies: the table, and the segment files that old jobs were sealed into.

Whoever reads history reads it through here. A seal (`JobsSealed`) is recorded before the rows are deleted, and the table is
always read before the seals: so whatever a reader no longer finds in the table, it finds in a segment, and what it finds in
both it gives once.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar
from uuid import UUID

from events.facts import JobsSealed
from events.record import StoredFact, fact_of
from events.segment_files import Segment
from events.store import HistoryReader

SEALS = UUID("7c0f2f64-52f5-5d6b-8e4e-6c6f6f6b7570")
"""The stream that tells of all seals. It is never sealed itself."""
INDEXES_MAX = 32

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Seal:
    """One seal: the fact, its place in the stream of seals, and the hash of that fact."""

    fact: JobsSealed
    stored: StoredFact


class LiveLog(HistoryReader, Protocol):
    """The table."""

    async def read_behind(self, stream_id: UUID, version: int) -> Sequence[StoredFact]:
        """The facts of one stream behind a version, in order."""


class Segments:
    """The segments that the log tells of, as far as it was asked. Files are opened when something in them is wanted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seals: list[Seal] = []
        self._open: dict[str, Segment] = {}
        self._indexed: OrderedDict[str, Segment] = OrderedDict()

    def learn(self, stored: Sequence[StoredFact]) -> None:
        """More facts of the stream of seals, in order. Those that are known already are passed over."""
        for row in stored:
            fact = fact_of(row.topic, row.state)
            if row.stream_version == len(self.seals) + 1 and isinstance(fact, JobsSealed):
                self.seals.append(Seal(fact, row))

    def rows_behind(self, after: int, through: int | None, limit: int) -> list[StoredFact]:
        """The sealed facts behind `after`, up to `through` (None: to the end), in order, at most `limit`."""
        rows: list[StoredFact] = []
        for fact in sorted((seal.fact for seal in self.seals), key=lambda fact: fact.first_position):
            if fact.last_position <= after or (through is not None and fact.first_position > through):
                continue
            if len(rows) == limit and fact.first_position > rows[-1].position:
                break
            more = [row for row in self.segment(fact.segment).rows(after, limit) if through is None or row.position <= through]
            rows = sorted([*rows, *more], key=_position)[:limit]
        return rows

    def streams(self, stream_ids: Sequence[UUID]) -> dict[UUID, list[StoredFact]]:
        found: dict[UUID, list[StoredFact]] = {}
        for segment, wanted in self._holding(stream_ids):
            found |= segment.streams(wanted)
        return found

    def stream_ids(self, after: UUID | None, limit: int) -> list[UUID]:
        """The lowest ids behind `after`, at most `limit`."""
        ids: list[UUID] = []
        segments = sorted((self.segment(seal.fact.segment) for seal in self.seals), key=lambda one: one.header.first_stream)
        for segment in segments:
            if after is not None and segment.header.last_stream <= after:
                continue
            if len(ids) == limit and segment.header.first_stream > ids[-1]:
                break
            more = [stream_id for stream_id in segment.stream_ids() if after is None or stream_id > after]
            self._used(segment)
            ids = sorted({*ids, *more[:limit]})[:limit]
        return ids

    def documents(self, keys: Mapping[UUID, Sequence[str]]) -> dict[str, bytes]:
        """Result documents, of the jobs that they belong to."""
        found: dict[str, bytes] = {}
        for segment, wanted in self._holding(list(keys)):
            found |= segment.documents(key for job_id in wanted for key in keys[job_id])
        return found

    def segment(self, name: str) -> Segment:
        if name not in self._open:
            self._open[name] = Segment(self.folder / name)
        return self._open[name]

    def _holding(self, stream_ids: Sequence[UUID]) -> list[tuple[Segment, list[UUID]]]:
        """The segments that may hold some of these streams. Ids are made in the order of time, so it is few of them."""
        holding: list[tuple[Segment, list[UUID]]] = []
        for seal in self.seals:
            segment = self.segment(seal.fact.segment)
            header = segment.header
            wanted = [stream_id for stream_id in stream_ids if header.first_stream <= stream_id <= header.last_stream]
            if wanted:
                self._used(segment)
                holding.append((segment, wanted))
        return holding

    def _used(self, segment: Segment) -> None:
        """Only so many indexes are kept in memory."""
        self._indexed[segment.path.name] = segment
        self._indexed.move_to_end(segment.path.name)
        while len(self._indexed) > INDEXES_MAX:
            self._indexed.popitem(last=False)[1].forget_index()


class ArchivedLog:
    """The `HistoryReader` over the table and the segments in `folder`.

    Raises `SegmentUnreadable`, which is a `StoreUnavailable`, when a file is missing or damaged.
    """

    def __init__(self, live: LiveLog, folder: Path) -> None:
        self._live = live
        self._segments = Segments(folder)
        self._disk = asyncio.Lock()

    async def read(self, stream_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[StoredFact]]:
        live = await self._live.read(stream_ids)
        wanted = [stream_id for stream_id in stream_ids if stream_id not in live or live[stream_id][0].stream_version > 1]
        if not wanted:
            return live
        sealed = await self._on_disk(lambda segments: segments.streams(wanted))
        return {**live, **{stream_id: [*rows, *live.get(stream_id, ())] for stream_id, rows in sealed.items()}}

    async def read_all(self, after: int, limit: int) -> Sequence[StoredFact]:
        live = await self._live.read_all(after, limit)
        # What is sealed behind these comes with the next page: between the two there may be more in the table.
        through = live[-1].position if live else None
        sealed = await self._on_disk(lambda segments: segments.rows_behind(after, through, limit))
        if not sealed:
            return live
        return sorted({row.position: row for row in (*sealed, *live)}.values(), key=_position)[:limit]

    async def stream_ids(self, after: UUID | None, limit: int) -> Sequence[UUID]:
        live = await self._live.stream_ids(after, limit)
        sealed = await self._on_disk(lambda segments: segments.stream_ids(after, limit))
        return sorted({*live, *sealed})[:limit]

    async def documents(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        """Result documents from segments, by their key (`<job id>/<sha256>`)."""
        of_jobs: dict[UUID, list[str]] = {}
        for key in keys:
            job_id = _job_of(key)
            if job_id is not None:
                of_jobs.setdefault(job_id, []).append(key)
        return await self._on_disk(lambda segments: segments.documents(of_jobs)) if of_jobs else {}

    async def seals(self) -> Sequence[Seal]:
        """All seals so far, in their order."""
        return await self._on_disk(lambda segments: list(segments.seals))

    async def head(self) -> int:
        """Never sealed: a seal is newer than what it seals."""
        return await self._live.head()

    async def log_id(self) -> UUID:
        return await self._live.log_id()

    async def _on_disk(self, look: Callable[[Segments], Found]) -> Found:
        """Always after the table was read. One look at a time: what is open and indexed is shared."""
        async with self._disk:
            segments = self._segments
            segments.learn(await self._live.read_behind(SEALS, len(segments.seals)))
            if not segments.seals:
                return look(segments)
            return await asyncio.to_thread(look, segments)


def _position(row: StoredFact) -> int:
    return row.position


def _job_of(key: str) -> UUID | None:
    try:
        return UUID(key.partition("/")[0])
    except ValueError:
        return None
