"""Retention on a real database: old jobs leave the table, and nobody who reads history notices."""

import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
import zstandard
from psycopg.conninfo import make_conninfo
from uuid_utils.compat import uuid7

from app.migrate import RETENTION_ROLE, migrate
from events.facts import JobsSealed, ResultCorrected
from events.postgres import PostgresStore
from events.record import SALT_BYTES, StoredFact, fact_of, hash_of
from events.segment_files import Segment, SegmentUnreadable, segment_files
from events.segments import SEALS, ArchivedLog
from events.store import AppendUnit, EventStore, NewFacts, Scribe, StreamHead
from projections import job_status
from read_side.history import JobHistory
from results.archived import ArchivedDocuments
from results.documents import reference_to
from results.postgres import PostgresDocuments
from tests.builders import CAUSE, PING, RDAP, completed, counts, dispatched, job_completed, submitted
from tests.servers.postgres import fresh_database
from write_side import retention
from write_side.retention import Retention, RetentionTable, SegmentNotKept, SomebodyElseSeals, open_retention_table

KEEP = timedelta(days=30)
OLD = datetime(2026, 1, 2, tzinfo=UTC)
TODAY = OLD + timedelta(days=60)


class Killed(Exception):  # noqa: N818 - what happened
    """The process ended here."""


class Archive:
    """A log of which some is old, and all that retention needs."""

    def __init__(self, url: str, folder: Path) -> None:
        self.now = OLD
        self.folder = folder
        self.retention_url = make_conninfo(url, user=RETENTION_ROLE)
        self.store = PostgresStore(url, Scribe(lambda: self.now, uuid7, partial(os.urandom, SALT_BYTES)))
        self.documents = PostgresDocuments(url)
        self.url = url

    def log(self) -> ArchivedLog:
        return ArchivedLog(self.store, self.folder)

    def past(self) -> JobHistory:
        """As the query side makes it, but for the letters."""

        async def nothing_else(_: UUID) -> Sequence[UUID]:
            return []

        documents = ArchivedDocuments(self.documents, self.log())
        view = job_status.VIEW.version
        return JobHistory(self.log(), documents, job_status.fold, view, nothing_else, lambda: TODAY)

    async def close(self) -> None:
        await self.store.close()
        await self.documents.close()

    async def job(self, *, closed: bool = True, document: bytes = b'{"rdap":"old"}') -> UUID:
        job_id = uuid7()
        reference = await self.documents.put(job_id, document)
        assert reference == reference_to(job_id, document)
        facts = [
            submitted(PING, RDAP, job_id=job_id),
            dispatched(PING, RDAP, job_id=job_id),
            completed(PING, job_id=job_id, document=document),
            completed(RDAP, job_id=job_id, document=document),
        ]
        ending = [job_completed(counts(succeeded=2), job_id=job_id)] if closed else []
        await self.store.append(AppendUnit([NewFacts(job_id, StreamHead(), [*facts, *ending])], CAUSE))
        return job_id

    async def relay_all(self) -> None:
        head = await self.store.head()
        with psycopg.connect(self.url) as conn:
            conn.execute("UPDATE relay_checkpoints SET position = %s", (head,))

    @asynccontextmanager
    async def sealing(self) -> AsyncIterator[Retention]:
        async with open_retention_table(self.retention_url) as table:
            yield self.over(table)

    def over(self, table: RetentionTable) -> Retention:
        return Retention(self.store, self.log(), table, self.folder, KEEP, lambda: TODAY, uuid7)

    async def seal(self) -> retention.Tally:
        async with self.sealing() as run:
            return await run.run()

    def in_table(self) -> tuple[int, int]:
        """How many facts and documents of jobs the tables hold."""
        with psycopg.connect(self.url) as conn:
            facts = conn.execute("SELECT count(*) FROM stored_events WHERE originator_id <> %s", (SEALS,)).fetchone()
            documents = conn.execute("SELECT count(*) FROM result_documents").fetchone()
        assert facts
        assert documents
        return facts[0], documents[0]


@pytest.fixture(scope="module")
def one_database_url(postgres: str) -> Iterator[str]:
    """Emptied for each test: to make one takes a second."""
    with fresh_database(postgres) as url:
        migrate(url, uuid7(), {})
        yield url


@pytest.fixture
async def archive(one_database_url: str, tmp_path: Path) -> AsyncIterator[Archive]:
    with psycopg.connect(one_database_url) as conn:
        conn.execute("TRUNCATE stored_events, result_documents RESTART IDENTITY")
        conn.execute("UPDATE relay_checkpoints SET position = 0")
    archive = Archive(one_database_url, tmp_path / "segments")
    await archive.documents.open()
    yield archive
    await archive.close()


async def all_of(log: ArchivedLog | EventStore, page: int = 7) -> list[StoredFact]:
    rows: list[StoredFact] = []
    while more := await log.read_all(rows[-1].position if rows else 0, page):
        rows += more
    return rows


async def streams_of(log: ArchivedLog | EventStore, page: int = 2) -> list[UUID]:
    ids: list[UUID] = []
    while more := await log.stream_ids(ids[-1] if ids else None, page):
        ids += more
    return ids


async def test_what_ended_long_ago_leaves_the_table_and_stays_in_the_log(archive: Archive) -> None:
    old = [await archive.job() for _ in range(3)]
    still_open = await archive.job(closed=False)
    archive.now = TODAY
    new = await archive.job()
    await archive.relay_all()
    before = await all_of(archive.store)

    tally = await archive.seal()

    assert (tally.jobs, tally.facts, tally.documents, tally.deleted) == (3, 15, 3, 15)
    assert archive.in_table() == (9, 2), "the open job and the new one stay"
    log = archive.log()
    assert (await all_of(log))[: len(before)] == before
    assert await streams_of(log) == sorted([*old, still_open, new, SEALS])
    assert await log.read([old[1]]) == {old[1]: [row for row in before if row.stream_id == old[1]]}
    assert await log.head() == await archive.store.head()


async def test_the_past_of_a_sealed_job_is_told_as_before(archive: Archive) -> None:
    job_id = await archive.job()
    await archive.relay_all()
    positions = [stored.position for stored in (await archive.store.read([job_id]))[job_id]]
    before = [await archive.past().as_of(job_id, position) for position in positions]
    told = await archive.past().entries(job_id)

    assert (await archive.seal()).jobs == 1

    assert [await archive.past().as_of(job_id, position) for position in positions] == before
    assert await archive.past().entries(job_id) == told
    assert b'"rdap":"old"' in before[-1].body


async def test_a_seal_is_a_fact_that_tells_what_was_sealed(archive: Archive) -> None:
    await archive.job()
    await archive.relay_all()

    await archive.seal()

    (stored,) = (await archive.store.read([SEALS]))[SEALS]
    fact = fact_of(stored.topic, stored.state)
    assert isinstance(fact, JobsSealed)
    (path,) = segment_files(archive.folder)
    header = Segment(path).header
    assert (fact.segment, fact.sha256) == (path.name, header.sha256)
    assert (fact.jobs, fact.facts, fact.documents, fact.size_bytes) == (1, 5, 1, path.stat().st_size)
    assert (fact.log_retention_days, fact.closed_before) == (30.0, TODAY - KEEP)


async def test_documents_of_sealed_jobs_are_found_in_their_segment(archive: Archive) -> None:
    job_id = await archive.job(document=b'{"who":"example"}')
    await archive.relay_all()
    await archive.seal()
    reference = reference_to(job_id, b'{"who":"example"}')
    documents = PostgresDocuments(archive.url)
    await documents.open()

    alone = await documents.get([reference])
    found = await ArchivedDocuments(documents, archive.log()).get([reference])
    await documents.close()

    assert (alone, found) == ({}, {reference.location.key: b'{"who":"example"}'})


async def test_what_was_not_relayed_or_does_not_follow_stays(archive: Archive) -> None:
    damaged = await archive.job()
    with psycopg.connect(archive.url) as conn:
        conn.execute(
            "UPDATE stored_events SET state = overlay(state placing '2' from position('\"attempt\":1' in state) + 10)"
            " WHERE originator_id = %s AND topic LIKE '%%TaskCompleted%%'",
            (damaged,),
        )
    await archive.relay_all()
    await archive.job()

    assert (await archive.seal()).jobs == 0
    assert archive.in_table() == (10, 2)


@pytest.mark.parametrize("step", ["_check", "_record", "_delete", "delete"])
async def test_a_retention_that_is_killed_goes_on_without_loss_or_double(
    archive: Archive, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each step: before the file is believed, before the seal is recorded, before anything is deleted, half-way in it."""
    for _ in range(3):
        await archive.job()
    await archive.relay_all()
    before = await all_of(archive.store)
    monkeypatch.setattr(retention, "STREAMS_PAGE", 2)
    killed: Callable[..., None] = _killed_at_the_second_call if step == "delete" else _killed
    where = {"_check": retention, "delete": RetentionTable}.get(step, Retention)
    with monkeypatch.context() as dying:
        killed(dying, where, step)
        with pytest.raises(Killed):
            await archive.seal()

    between = await all_of(archive.log())
    await archive.seal()
    after = await all_of(archive.log())

    assert [row for row in between if row.stream_id != SEALS] == before
    assert [row for row in after if row.stream_id != SEALS] == before
    assert archive.in_table() == (0, 0)
    (told,) = await archive.log().seals()
    assert [path.name for path in segment_files(archive.folder)] == [told.fact.segment]


def _killed(patch: pytest.MonkeyPatch, where: object, step: str) -> None:
    def die(*_: object) -> None:
        raise Killed

    patch.setattr(where, step, die)


def _killed_at_the_second_call(patch: pytest.MonkeyPatch, where: type[RetentionTable], step: str) -> None:
    real, calls = getattr(where, step), iter(range(10))

    async def die(*args: object) -> object:
        if next(calls) == 1:
            raise Killed
        return await real(*args)

    patch.setattr(where, step, die)


async def test_a_reader_beside_a_sealing_sees_each_fact_once(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages are read between the steps of the sealing, so each page meets another state of table and segments."""
    for _ in range(8):
        await archive.job()
    await archive.relay_all()
    before = await all_of(archive.store)
    monkeypatch.setattr(retention, "FACTS_MAX", 10)
    monkeypatch.setattr(retention, "STREAMS_PAGE", 1)
    reader, seen = archive.log(), list[StoredFact]()
    real = RetentionTable.delete

    async def delete_and_read(*args: object) -> int:
        seen.extend(await reader.read_all(seen[-1].position if seen else 0, 4))
        return await real(*args)  # type: ignore[arg-type]  # handed on as they came

    monkeypatch.setattr(RetentionTable, "delete", delete_and_read)
    tally = await archive.seal()
    while more := await reader.read_all(seen[-1].position, 4):
        seen += more

    assert len(tally.segments) == 4
    assert [row for row in seen if row.stream_id != SEALS] == before


async def test_what_a_process_remembers_of_its_own_facts_hides_none_of_others(archive: Archive) -> None:
    """A store gives the facts that it just appended without asking, and says nothing of what came after them."""
    await archive.job(closed=False)
    others = Archive(archive.url, archive.folder)
    await others.documents.open()
    await others.job(closed=False)
    await others.job()
    await archive.relay_all()
    before = await all_of(others.store)

    await others.seal()
    seen = await all_of(archive.log())
    await others.close()

    assert [row for row in seen if row.stream_id != SEALS] == before


async def test_an_answer_that_is_read_again_after_the_sealing_is_read_behind_the_sealed_facts(archive: Archive) -> None:
    job_id = await archive.job()
    await archive.relay_all()
    sealed = (await archive.store.read([job_id]))[job_id]
    await archive.seal()
    last = sealed[-1]
    correction = ResultCorrected(
        job_id=job_id,
        service=RDAP,
        attempt=1,
        result=reference_to(job_id, b"{}"),
        replaces="0" * 64,
        parser="rdap/2",
        reason="read again",
        corrected_at=TODAY,
    )

    head = StreamHead(last.stream_version, hash_of(last.state), last.position)
    await archive.store.append(AppendUnit([NewFacts(job_id, head, [correction])], CAUSE))
    rows = (await archive.log().read([job_id]))[job_id]

    assert list(rows[:-1]) == sealed
    assert [row.stream_version for row in rows] == [1, 2, 3, 4, 5, 6]
    assert await streams_of(archive.log()) == sorted([job_id, SEALS])


async def test_a_segment_that_is_damaged_is_told_and_nothing_is_deleted_for_it(archive: Archive) -> None:
    job_id = await archive.job()
    await archive.relay_all()
    await archive.seal()
    (path,) = segment_files(archive.folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    with pytest.raises(SegmentUnreadable, match="damaged"):
        await archive.log().read([job_id])
    with pytest.raises((SegmentUnreadable, SegmentNotKept)):
        await archive.seal()


async def test_only_one_seals_at_a_time(archive: Archive) -> None:
    async with archive.sealing() as first, archive.sealing() as second:
        await first.run()
        with pytest.raises(SomebodyElseSeals):
            await second.run()


async def test_a_dry_run_changes_nothing(archive: Archive) -> None:
    await archive.job()
    await archive.relay_all()

    async with archive.sealing() as run:
        tally = await run.run(dry_run=True)

    assert (tally.jobs, tally.segments) == (1, [])
    assert archive.in_table() == (5, 1)
    assert segment_files(archive.folder) == []


async def test_a_segment_can_be_read_with_any_zstd_tool(archive: Archive) -> None:
    job_id = await archive.job(document=b'{"who":"example"}')
    await archive.relay_all()
    await archive.seal()
    (path,) = segment_files(archive.folder)

    with zstandard.ZstdDecompressor().stream_reader(path.read_bytes(), read_across_frames=True) as reader:
        text = reader.read().decode()

    assert text.count(str(job_id)) > 5
    assert "198.51.100.7" in text
    assert "who" in text
