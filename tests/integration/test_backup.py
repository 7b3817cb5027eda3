"""Backup and restore against real servers: what comes out is what went in, and whatever is not that is refused."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, LiteralString, cast
from uuid import UUID, uuid4

import orjson
import psycopg
import pytest
from redis.asyncio import Redis
from uuid_utils.compat import uuid7

from app.backup.failure import BackupDamaged, BackupFailed, RestoreRefused
from app.backup.manifest import Manifest, read_manifest, write_manifest
from app.backup.restoring import POSITIONS_SKIPPED, Restore, Restored
from app.backup.snapshot import snapshot_of
from app.backup.surroundings import forget_views_and_messages
from app.backup.taking import Beside, take_backup
from app.doctor.consultation import consult
from app.migrate import MigrationFailed, migrate
from app.settings import Settings
from app.wiring import Wiring
from events.ending import end
from events.facts import JobFact, LogRestored, TaskCompleted
from events.record import Cause, hash_of, read
from events.store import AppendUnit, NewFacts, StoreUnavailable, StreamHead
from projections.views import JOB_STATUS, Keys
from results.documents import reference_to
from tests.builders import PING, RDAP, completed, counts, dispatched, eventually, failed, job_completed, submitted
from tests.servers.postgres import fresh_database
from write_side.retention import open_retention_table

PATIENCE_S = 20.0
KEYS = Keys()
NO_SEGMENTS = Path("no-segments-here")
LETTER = (
    "INSERT INTO dead_letters (message, queue, reason, headers, body, deliveries, died_at)"
    " VALUES (gen_random_uuid(), 'lookup.outcomes', 'unparsable', '{\"a\": \"\\t\"}', '\\x00ff0a5c', 3, now())"
)
CHANGE_A_DURATION: LiteralString = """
UPDATE stored_events
SET state = convert_to(replace(convert_from(state, 'UTF8'), '"duration_ms":12', '"duration_ms":13'), 'UTF8')
WHERE originator_id = %s AND originator_version = 4
"""
SLEEPING: LiteralString = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'lookup restore'"
ERASURE_UNDER_WAY: LiteralString = """
WITH begun AS (
    INSERT INTO erasures (erasure_id, target, salt, target_sha256, by, reason, started_at)
    VALUES (gen_random_uuid(), 'gone.example', '5a17', '00', 'alice', 'asked for', now()) RETURNING erasure_id
)
INSERT INTO erasure_jobs (erasure_id, job_id, positions) SELECT erasure_id, gen_random_uuid(), '{1,2}' FROM begun
"""
BACKUPS_THAT_WAIT: LiteralString = (
    "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'lookup backup' AND wait_event_type = 'Lock'"
)
RESTORES_THAT_WAIT: LiteralString = (
    "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'lookup restore' AND wait_event_type = 'Lock'"
)
FACTS_IN_ORDER = "SELECT notification_id, originator_id, originator_version, topic, state FROM stored_events ORDER BY 1"


def now() -> datetime:
    return datetime.now(UTC)


def story(job_id: UUID) -> list[JobFact]:
    """A job from beginning to end, with one answer of its own."""
    at = now()
    return [
        submitted(PING, RDAP, job_id=job_id, when=at),
        dispatched(PING, RDAP, job_id=job_id, when=at),
        completed(PING, job_id=job_id, document=answer_of(job_id), when=at),
        failed(RDAP, job_id=job_id, when=at),
        job_completed(counts(succeeded=1, failed=1), job_id=job_id, when=at),
    ]


def answer_of(job_id: UUID) -> bytes:
    return orjson.dumps({"answer": str(job_id)})


class House:
    """A database with a log, and parts that may work on it."""

    def __init__(self, database_url: str, redis_url: str | None = None, segments: Path = NO_SEGMENTS) -> None:
        self.database_url = database_url
        self.wiring = Wiring(Settings(database_url=database_url, redis_url=redis_url, segments_dir=segments))
        self._at_work: list[asyncio.Task[None]] = []

    async def happened(self, *job_ids: UUID, facts: Callable[[UUID], Sequence[JobFact]] = story) -> None:
        documents = await self.wiring.documents()
        for job_id in job_ids:
            told = facts(job_id)
            for fact in told:
                if isinstance(fact, TaskCompleted):
                    await documents.put(job_id, answer_of(job_id))
            unit = AppendUnit([NewFacts(job_id, StreamHead(), told)], Cause("test", job_id))
            await self.wiring.store.append(unit)

    def rows(self) -> list[tuple[Any, ...]]:
        return self.ask(FACTS_IN_ORDER)

    def ask(self, query: LiteralString) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database_url) as database:
            return database.execute(query).fetchall()

    def do(self, statement: LiteralString) -> None:
        with psycopg.connect(self.database_url) as database:
            database.execute(statement)

    def start(self) -> None:
        self._at_work = [asyncio.create_task(part()) for part in (self.wiring.relay, self.wiring.projector)]

    async def projected(self) -> None:
        """Wait until the views show the whole log."""
        head = await self.wiring.store.head()
        async with asyncio.timeout(PATIENCE_S):
            while True:
                live = (await self.wiring.views.standing()).of(JOB_STATUS)
                if live is not None and live.log_id == str(await self.wiring.store.log_id()) and live.checkpoint == head:
                    return
                await asyncio.sleep(0.02)

    async def goes_on(self, job_id: UUID, facts: Sequence[JobFact]) -> None:
        last = (await self.wiring.store.read([job_id]))[job_id][-1]
        documents = await self.wiring.documents()
        await documents.put(job_id, answer_of(job_id))
        head = StreamHead(last.stream_version, hash_of(last.state), last.position)
        await self.wiring.store.append(AppendUnit([NewFacts(job_id, head, facts)], Cause("test", job_id)))

    async def seen(self, job_id: UUID) -> bytes | None:
        """What a poller would get, None for nothing."""
        live = (await self.wiring.views.standing()).of(JOB_STATUS)
        return None if live is None else cast("bytes | None", await self.wiring.redis.get(KEYS.job(live.name, job_id)))

    async def keep_polling(self, job_id: UUID, sightings: list[bytes | None]) -> None:
        while True:
            sightings.append(await self.seen(job_id))
            await asyncio.sleep(0.001)

    async def close(self) -> None:
        await end(self._at_work, PATIENCE_S)
        await self.wiring.aclose()


@pytest.fixture(scope="module")
def backed_up_url(postgres: str) -> Iterator[str]:
    """The database that most backups here are of."""
    with fresh_database(postgres) as url:
        migrate(url, uuid4(), {})
        yield url


@pytest.fixture
def database_url_too(postgres: str) -> Iterator[str]:
    with fresh_database(postgres) as url:
        yield url


@pytest.fixture(scope="module")
def never_touched_url(postgres: str) -> Iterator[str]:
    with fresh_database(postgres) as url:
        yield url


@pytest.fixture(scope="module")
def never_restored_url(postgres: str) -> Iterator[str]:
    """A database into which each restore fails, and the next one is tried."""
    with fresh_database(postgres) as url:
        yield url


@pytest.fixture(scope="module")
async def source(backed_up_url: str) -> AsyncIterator[House]:
    """Three jobs, and a letter that nobody could read."""
    house = House(backed_up_url)
    await house.happened(*(uuid7() for _ in range(3)))
    house.do(LETTER)
    yield house
    await house.close()


@pytest.fixture(scope="module")
async def pristine(source: House, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backup") / "pristine"
    await take_backup(folder, source.database_url, NO_SEGMENTS, [], now())
    return folder


@pytest.fixture
def backup(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may do with as it likes."""
    return Path(shutil.copytree(pristine, tmp_path / "backup"))


async def backed_up_beside_us(folder: Path, url: str) -> Manifest:
    """In a thread, as it blocks: in the command nothing else goes on."""
    return await asyncio.to_thread(lambda: asyncio.run(take_backup(folder, url, NO_SEGMENTS, [], now())))


async def _nothing() -> None:
    pass


async def restored(folder: Path, url: str, *, verify: bool = True, forget: Any = _nothing) -> Restored:
    return await Restore(folder, url, NO_SEGMENTS, [], {}, "alice", now, uuid7, forget, verify=verify).run()


def is_untouched(url: str) -> bool:
    with psycopg.connect(url) as database:
        return database.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)


# --- What comes out is what went in -----------------------------------------------------------------------------------


async def test_a_restored_log_has_the_same_facts_byte_for_byte_and_says_where_it_comes_from(
    source: House, backup: Path, database_url: str
) -> None:
    before = source.rows()

    done = await restored(backup, database_url)

    house = House(database_url)
    try:
        *facts, last = house.rows()
        assert facts == before
        (told,) = (await house.wiring.store.read([done.log_id]))[done.log_id]
        fact = read(told).fact
        assert isinstance(fact, LogRestored)
        assert (fact.from_log_id, fact.position, fact.by) == (await source.wiring.store.log_id(), before[-1][0], "alice")
        assert fact.log_head == done.manifest.survey.log_head
        assert last[0] == told.position == before[-1][0] + POSITIONS_SKIPPED + 1
        assert await house.wiring.store.log_id() == done.log_id != fact.from_log_id
        for table in (
            "SELECT * FROM result_documents ORDER BY 1",
            "SELECT * FROM dead_letters",
            "SELECT * FROM relay_checkpoints",
        ):
            assert house.ask(table) == source.ask(table)
        await house.happened(uuid7())
        house.do(LETTER)  # Whose number is not one that was restored.
    finally:
        await house.close()


async def test_a_backup_is_of_one_moment_though_jobs_keep_coming(
    migrated_database_url: str, postgres: str, tmp_path: Path
) -> None:
    house = House(migrated_database_url)
    going_on = True

    async def keep_coming() -> int:
        jobs = 0
        while going_on:
            await house.happened(uuid7())
            jobs += 1
        return jobs

    coming = asyncio.create_task(keep_coming())
    try:
        await eventually(lambda: len(house.rows()) > 100, patience_s=PATIENCE_S)
        head_before = await house.wiring.store.head()
        manifest = await backed_up_beside_us(tmp_path / "backup", migrated_database_url)
        head_after = await house.wiring.store.head()
        with fresh_database(postgres) as url:
            done = await restored(tmp_path / "backup", url)
    finally:
        going_on = False
        await coming
        await house.close()

    assert head_before <= manifest.survey.position < head_after
    assert manifest.survey == done.surveyed
    assert manifest.survey.facts % 5 == 0


async def test_a_backup_holds_up_no_writer(source: House, tmp_path: Path) -> None:
    """It may take as long as it takes: nothing that a writer, VACUUM or the retention needs is locked meanwhile."""
    with psycopg.connect(source.database_url) as blocker:
        blocker.execute("LOCK TABLE result_documents IN ACCESS EXCLUSIVE MODE")
        backing_up = asyncio.create_task(
            asyncio.to_thread(
                lambda: asyncio.run(take_backup(tmp_path / "backup", source.database_url, NO_SEGMENTS, [], now()))
            )
        )
        try:
            await eventually((tmp_path / "backup" / "relay_checkpoints.copy.zst").exists, patience_s=PATIENCE_S)
            locks = source.ask(
                "SELECT DISTINCT mode FROM pg_locks JOIN pg_stat_activity USING (pid)"
                " WHERE application_name = 'lookup backup' AND locktype = 'relation' AND granted"
            )
        finally:
            blocker.rollback()
            await backing_up

    assert locks == [("AccessShareLock",)]


async def test_who_copies_can_change_nothing(migrated_database_url: str) -> None:
    with (
        pytest.raises(psycopg.errors.ReadOnlySqlTransaction),
        snapshot_of(migrated_database_url) as conn,
    ):
        conn.execute("DELETE FROM log_identity")


async def test_rows_that_refer_to_others_come_after_them(
    migrated_database_url: str, database_url_too: str, tmp_path: Path
) -> None:
    """An erasure was under way: its jobs refer to it, and their table is the first by its name."""
    house = House(migrated_database_url)
    house.do(ERASURE_UNDER_WAY)
    await take_backup(tmp_path / "backup", migrated_database_url, NO_SEGMENTS, [], now())

    await restored(tmp_path / "backup", database_url_too)

    again = House(database_url_too)
    for table in ("SELECT * FROM erasures", "SELECT * FROM erasure_jobs"):
        assert again.ask(table) == house.ask(table) != []
    await again.close()
    await house.close()


async def test_sealed_jobs_and_the_files_beside_the_log_come_along(
    migrated_database_url: str, database_url_too: str, tmp_path: Path
) -> None:
    old = uuid7()
    house = House(migrated_database_url, segments=tmp_path / "segments")
    await house.happened(old)
    house.do("UPDATE relay_checkpoints SET position = 5")
    async with open_retention_table(migrated_database_url) as table:
        await house.wiring.retention_of(table, timedelta(0)).run()
    assert len(house.rows()) == 1
    heads = Beside(tmp_path / "heads.jsonl", "heads/1.jsonl")
    heads.place.write_text("a head")
    made = await take_backup(
        tmp_path / "backup", migrated_database_url, tmp_path / "segments", [heads, Beside(tmp_path / "none", "none")], now()
    )
    shutil.rmtree(tmp_path / "segments")
    heads.place.unlink()

    elsewhere = tmp_path / "elsewhere"
    await Restore(
        tmp_path / "backup", database_url_too, elsewhere, [heads], {}, "alice", now, uuid7, _nothing, verify=True
    ).run()

    again = House(database_url_too, segments=elsewhere)
    sealed = (await again.wiring.whole_log.read([old]))[old]
    documents = await (await again.wiring.all_documents()).get([reference_to(old, answer_of(old))])
    await again.close()
    await house.close()
    assert (made.survey.facts, made.survey.jobs, made.survey.missing_results) == (6, 1, 0)
    assert [stored.position for stored in sealed] == [1, 2, 3, 4, 5]
    assert list(documents.values()) == [answer_of(old)]
    assert heads.place.read_text() == "a head"


# --- What is no backup is refused, and nothing touched ----------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a byte of the facts": lambda backup: flip_a_byte(backup / "stored_events.copy.zst"),
    "a byte of the answers": lambda backup: flip_a_byte(backup / "result_documents.copy.zst"),
    "the end of the facts": lambda backup: cut_off(backup / "stored_events.copy.zst"),
    "a file": lambda backup: (backup / "dead_letters.copy.zst").unlink(),
    "a byte of the manifest": lambda backup: flip_a_byte(backup / "manifest.json"),
    "the manifest": lambda backup: (backup / "manifest.json").unlink(),
    "the folder": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
async def test_a_damaged_backup_is_refused_before_anything_is_touched(
    damage: Callable[[Path], None], backup: Path, never_touched_url: str
) -> None:
    damage(backup)

    with pytest.raises(BackupDamaged):
        await restored(backup, never_touched_url, verify=False)

    assert is_untouched(never_touched_url)


async def test_every_byte_of_a_manifest_counts(backup: Path) -> None:
    whole = (backup / "manifest.json").read_bytes()
    for at in range(0, len(whole), 7):
        (backup / "manifest.json").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            read = read_manifest(backup)
        except BackupDamaged:
            continue
        assert orjson.loads(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]) == orjson.loads(whole), (at, read)


async def test_a_database_with_facts_is_refused_and_left_as_it_is(source: House, backup: Path) -> None:
    before = source.rows()

    with pytest.raises(RestoreRefused, match="not empty"):
        await restored(backup, source.database_url)

    assert source.rows() == before
    assert source.ask("SELECT count(*) FROM log_identity") == [(1,)]


async def test_a_database_that_somebody_is_connected_to_is_refused(backup: Path, migrated_database_url: str) -> None:
    with psycopg.connect(migrated_database_url), pytest.raises(RestoreRefused, match="connected"):
        await restored(backup, migrated_database_url)

    assert (await restored(backup, migrated_database_url)).surveyed is not None


async def test_of_two_restores_at_once_the_second_waits_and_is_refused(backup: Path, postgres: str, database_url: str) -> None:
    server, house = House(postgres), House(database_url)
    seconds: list[asyncio.Task[Restored]] = []

    async def a_second_one_comes() -> None:
        seconds.append(asyncio.create_task(asyncio.to_thread(lambda: asyncio.run(restored(backup, database_url)))))
        await eventually(lambda: server.ask(RESTORES_THAT_WAIT) == [(1,)], patience_s=PATIENCE_S)

    done = await restored(backup, database_url, forget=a_second_one_comes)
    with pytest.raises(RestoreRefused, match="not empty"):
        await seconds[0]

    assert await house.wiring.store.log_id() == done.log_id
    assert len(house.rows()) == done.manifest.survey.facts + 1
    await house.close()


async def test_a_folder_that_is_not_empty_is_no_place_for_a_backup(source: House, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")

    with pytest.raises(BackupFailed, match="not empty"):
        await take_backup(tmp_path, source.database_url, NO_SEGMENTS, [], now())


def told_otherwise(backup: Path, **changes: Any) -> None:
    """A manifest that is whole and says something else of the same files."""
    manifest = read_manifest(backup)
    write_manifest(backup, manifest.model_copy(update={"survey": manifest.survey.model_copy(update=changes)}))


@pytest.mark.parametrize("field", ["log_head", "views", "facts", "results", "position"])
async def test_what_comes_out_otherwise_than_it_went_in_is_not_restored(
    field: str, backup: Path, never_restored_url: str
) -> None:
    wrong = "0" * 64 if field in {"log_head", "views"} else 7
    told_otherwise(backup, **{field: wrong})

    with pytest.raises(RestoreRefused):
        await restored(backup, never_restored_url)

    house = House(never_restored_url)
    assert house.rows() == []
    with pytest.raises(StoreUnavailable):
        await house.wiring.store.log_id()
    await house.close()


async def test_a_log_that_was_tampered_with_is_backed_up_as_it_is_and_does_not_verify(
    migrated_database_url: str, postgres: str, tmp_path: Path
) -> None:
    house = House(migrated_database_url)
    victim, other = uuid7(), uuid7()
    await house.happened(victim, other)
    with psycopg.connect(migrated_database_url) as database:
        database.execute(CHANGE_A_DURATION, (victim,))
    manifest = await take_backup(tmp_path / "backup", migrated_database_url, NO_SEGMENTS, [], now())

    with fresh_database(postgres) as url:
        with pytest.raises(RestoreRefused, match=str(victim)):
            await restored(tmp_path / "backup", url)
        await restored(tmp_path / "backup", url, verify=False)
        again = House(url)
        assert again.rows()[:-1] == house.rows()
        await again.close()

    assert manifest.survey.broken_streams == 1
    await house.close()


async def test_an_answer_that_is_not_what_its_fact_says_shows(
    migrated_database_url: str, postgres: str, tmp_path: Path
) -> None:
    house = House(migrated_database_url)
    await house.happened(uuid7(), uuid7())
    manifest = await take_backup(tmp_path / "backup", migrated_database_url, NO_SEGMENTS, [], now())
    house.do("UPDATE result_documents SET body = (SELECT max(body) FROM result_documents)")
    damaged = await take_backup(tmp_path / "damaged", migrated_database_url, NO_SEGMENTS, [], now())
    shutil.copy(tmp_path / "damaged" / "result_documents.copy.zst", tmp_path / "backup")
    entries = {entry.path: entry for entry in damaged.files}
    files = tuple(entries[f.path] if f.path == "result_documents.copy.zst" else f for f in manifest.files)
    write_manifest(tmp_path / "backup", manifest.model_copy(update={"files": files}))

    with fresh_database(postgres) as url, pytest.raises(RestoreRefused, match="missing results: 1 instead of 0"):
        await restored(tmp_path / "backup", url)

    await house.close()


# --- Killed on the way ------------------------------------------------------------------------------------------------


@contextmanager
def lookup(*words: str | Path, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", *map(str, words)],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def test_a_backup_that_was_killed_is_no_backup(source: House, never_touched_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    with psycopg.connect(source.database_url) as blocker:
        blocker.execute("LOCK TABLE stored_events IN ACCESS EXCLUSIVE MODE")
        with lookup("backup", folder, LOOKUP_DATABASE_OWNER_URL=source.database_url) as process:
            await eventually((folder / "result_documents.copy.zst").exists, patience_s=PATIENCE_S)
            process.send_signal(signal.SIGKILL)
            process.wait()

    with pytest.raises(BackupDamaged, match="never finished"):
        await restored(folder, never_touched_url)
    assert is_untouched(never_touched_url)


async def test_a_backup_that_failed_on_the_way_is_no_backup(
    migrated_database_url: str, never_touched_url: str, tmp_path: Path
) -> None:
    """All tables are copied, but a sealed job is not where the log says: nobody may take what is there for all."""
    house = House(migrated_database_url, segments=tmp_path / "segments")
    await house.happened(uuid7())
    house.do("UPDATE relay_checkpoints SET position = 5")
    async with open_retention_table(migrated_database_url) as table:
        await house.wiring.retention_of(table, timedelta(0)).run()
    await house.close()

    with pytest.raises(BackupFailed, match="segment file"):
        await take_backup(tmp_path / "backup", migrated_database_url, NO_SEGMENTS, [], now())

    assert (tmp_path / "backup" / "stored_events.copy.zst").exists()
    with pytest.raises(BackupDamaged, match="never finished"):
        await restored(tmp_path / "backup", never_touched_url)
    assert is_untouched(never_touched_url)


async def test_of_two_backups_into_one_folder_at_once_one_is_whole_and_the_other_fails(
    source: House, database_url: str, tmp_path: Path
) -> None:
    """Both find the folder empty, and wait for the database."""
    folder = tmp_path / "backup"
    with psycopg.connect(source.database_url) as blocker:
        blocker.execute("LOCK TABLE log_identity IN ACCESS EXCLUSIVE MODE")
        both = asyncio.gather(*[backed_up_beside_us(folder, source.database_url) for _ in range(2)], return_exceptions=True)
        await eventually(lambda: source.ask(BACKUPS_THAT_WAIT) == [(2,)], patience_s=PATIENCE_S)
        blocker.rollback()
        made = await both

    assert sorted(type(one).__name__ for one in made) == ["BackupFailed", "Manifest"]
    assert (await restored(folder, database_url)).manifest in made


async def test_a_restore_that_was_killed_leaves_nothing_that_serves_and_is_done_again(
    backup: Path, postgres: str, database_url: str
) -> None:
    migrate(database_url, uuid4(), {})
    house = House(database_url)
    # The rows of the facts wait for this lock: the restore is held up in the middle.
    house.do(
        "CREATE FUNCTION sleep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(3600); RETURN NEW; END $$;"
        " CREATE TRIGGER sleep BEFORE INSERT ON stored_events FOR EACH ROW EXECUTE FUNCTION sleep()"
    )
    server = House(postgres)
    with lookup("restore", backup, "--into", database_url, "--database-only") as process:
        await eventually(lambda: server.ask(f"{SLEEPING} AND wait_event = 'PgSleep'") == [(1,)], patience_s=PATIENCE_S)
        process.send_signal(signal.SIGKILL)
        process.wait()
    # It would find out when it has slept.
    server.ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'lookup restore'")
    await eventually(lambda: server.ask(SLEEPING) == [(0,)], patience_s=PATIENCE_S)

    assert house.rows() == []
    with pytest.raises(MigrationFailed, match="lookup restore"):
        migrate(database_url, uuid4(), {})
    with pytest.raises(StoreUnavailable):
        await house.happened(uuid7(), facts=lambda job_id: [submitted(PING, job_id=job_id)])
    await house.close()

    house.do("DROP TRIGGER sleep ON stored_events; DROP FUNCTION sleep")
    assert (await restored(backup, database_url)).surveyed is not None
    assert len(house.rows()) == 16
    migrate(database_url, uuid4(), {})


# --- What is left of the log that was lost ----------------------------------------------------------------------------


async def test_pollers_never_see_what_the_restored_log_does_not_have(
    migrated_database_url: str, postgres: str, redis_url: str, tmp_path: Path
) -> None:
    """An older backup beside a Redis that is ahead: its views are of facts that were lost."""
    kept, still_open, lost = uuid7(), uuid7(), uuid7()
    house = House(migrated_database_url, redis_url)
    house.start()
    await house.happened(kept)
    await house.happened(still_open, facts=lambda job_id: story(job_id)[:2])
    await house.projected()
    before = {job_id: await house.seen(job_id) for job_id in (kept, still_open)}
    await take_backup(tmp_path / "backup", migrated_database_url, NO_SEGMENTS, [], now())
    await house.goes_on(still_open, story(still_open)[2:])
    await house.happened(lost)
    await house.projected()
    assert await house.seen(lost)
    await house.close()

    with fresh_database(postgres) as url:
        await restored(tmp_path / "backup", url, forget=partial(forget_views_and_messages, redis_url, None))

        again = House(url, redis_url)
        sightings: list[bytes | None] = []
        polling = asyncio.create_task(again.keep_polling(lost, sightings))
        again.start()
        await again.projected()
        assert {job_id: await again.seen(job_id) for job_id in before} == before
        await end([polling], PATIENCE_S)
        await again.close()

    assert before[kept]
    assert before[still_open]
    assert len(sightings) > 3
    assert set(sightings) == {None}


async def test_views_that_were_left_in_redis_are_not_believed(
    migrated_database_url: str, postgres: str, redis_url: str, tmp_path: Path
) -> None:
    """`--database-only`, and Redis was not new: the projector finds out by itself."""
    kept, lost = uuid7(), uuid7()
    house = House(migrated_database_url, redis_url)
    house.start()
    await house.happened(kept)
    await take_backup(tmp_path / "backup", migrated_database_url, NO_SEGMENTS, [], now())
    await house.happened(lost)
    await house.projected()
    await house.close()
    async with Redis.from_url(redis_url) as redis:
        await redis.delete(KEYS.lease)  # As time does.

    with fresh_database(postgres) as url:
        await restored(tmp_path / "backup", url)
        again = House(url, redis_url)
        again.start()
        await again.projected()

        assert await again.seen(kept)
        assert await again.seen(lost) is None
        assert (await consult(again.wiring, second_look_after_s=0.1)).findings.keys() <= {"orphan key"}
        await again.close()


async def test_relay_checkpoints_beyond_the_log_are_refused(
    migrated_database_url: str, never_restored_url: str, tmp_path: Path
) -> None:
    house = House(migrated_database_url)
    await house.happened(uuid7())
    house.do("UPDATE relay_checkpoints SET position = 6 WHERE name = 'facts'")
    await take_backup(tmp_path / "backup", migrated_database_url, NO_SEGMENTS, [], now())
    await house.close()

    with pytest.raises(RestoreRefused, match="facts at 6"):
        await restored(tmp_path / "backup", never_restored_url)
