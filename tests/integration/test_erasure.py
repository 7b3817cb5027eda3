"""Erasure on a real database, and a backup that is older than it. Every place at once is `tests/e2e/test_erasure.py`."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from redis.asyncio import Redis
from uuid_utils.compat import uuid7

from app.backup import running as backup_commands
from app.backup.taking import take_backup
from app.doctor.consultation import consult
from app.erasing import MessageSweep
from app.erasure import Order, apply_list, erase, erasure_of, hold_against_list
from app.migrate import APP_ROLE, RETENTION_ROLE, migrate
from app.running import CannotRun
from app.settings import Settings
from app.wiring import Wiring, utc_now
from domain.commands import lines_of
from events.bus import COMMANDS
from events.facts import JobCancelled, Priority, Service, Target, TargetType
from events.record import read
from events.redis_bus import PREFIX
from events.store import AppendUnit, NewFacts, StreamHead
from tests.builders import CAUSE, LIFETIME, PING, completed, counts, dispatched, job_completed, look_up_command, submitted
from tests.servers.postgres import fresh_database
from write_side.erasure import AFTER_THE_LAST_ATTEMPT, CALLED_OFF, Erasure, Receipt, not_done_here
from write_side.erasure_list import ErasureList, ListedErasure
from write_side.erasure_table import Subject, is_erasable

TARGET = Target(raw="Gone.Example", canonical="gone.example", type=TargetType.DOMAIN)
OTHER = Target(raw="stays.example", canonical="stays.example", type=TargetType.DOMAIN)
TABLES = ("stored_events", "result_documents", "dead_letters", "erasures")


@pytest.fixture(scope="module")
def one_database_url(postgres: str) -> Iterator[str]:
    """Emptied for each test: to make one takes a second."""
    with fresh_database(postgres) as url:
        migrate(url, uuid7(), {})
        yield url


@pytest.fixture
async def wiring(one_database_url: str, redis_url: str, tmp_path: Path) -> AsyncIterator[Wiring]:
    with psycopg.connect(one_database_url) as conn:
        conn.execute("TRUNCATE stored_events, result_documents, dead_letters, erasures, erasure_jobs RESTART IDENTITY")
        conn.execute("UPDATE relay_checkpoints SET position = 0")
    settings = Settings(
        data_dir=tmp_path,
        database_url=make_conninfo(one_database_url, user=APP_ROLE),
        database_retention_url=make_conninfo(one_database_url, user=RETENTION_ROLE),
        database_owner_url=one_database_url,
        redis_url=redis_url,
    )
    wiring = Wiring(settings)
    yield wiring
    await wiring.aclose()


async def job(wiring: Wiring, target: Target, document: bytes = b'{"found":true}') -> UUID:
    job_id = uuid7()
    await (await wiring.documents()).put(job_id, document)
    facts = [
        submitted(PING, job_id=job_id, target=target),
        dispatched(PING, job_id=job_id).model_copy(update={"target": target, "target_type": target.type}),
        completed(PING, job_id=job_id, document=document),
        job_completed(counts(succeeded=1), job_id=job_id),
    ]
    await wiring.store.append(AppendUnit([NewFacts(job_id, StreamHead(), facts)], CAUSE))
    return job_id


@asynccontextmanager
async def erasing(wiring: Wiring) -> AsyncIterator[Erasure]:
    async with erasure_of(wiring) as erasure:
        await erasure.retention.lock()
        yield erasure


async def erase_target(wiring: Wiring) -> list[Receipt]:
    async with erasing(wiring) as erasure:
        await erasure.begin(TARGET.canonical, salt="5a17", by="alice", reason="asked for")
        return await erasure.run()


async def still_told(wiring: Wiring, job_id: UUID) -> bool:
    rows = (await wiring.history.read([job_id]))[job_id]
    return any(map(is_erasable, rows))


def dump(owner_url: str) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of all tables, as a backup has them."""
    with psycopg.connect(owner_url) as conn:
        return {name: conn.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(name))).fetchall() for name in TABLES}


def restore(owner_url: str, dumped: dict[str, list[tuple[Any, ...]]]) -> None:
    with psycopg.connect(owner_url) as conn:
        conn.execute("TRUNCATE stored_events, result_documents, dead_letters, erasures, erasure_jobs")
        for name, rows in dumped.items():
            for row in rows:
                places = sql.SQL(", ").join([sql.Placeholder()] * len(row))
                conn.execute(sql.SQL("INSERT INTO {} VALUES ({})").format(sql.Identifier(name), places), row)


async def test_only_the_target_goes_and_every_chain_holds(wiring: Wiring) -> None:
    gone, stays = await job(wiring, TARGET), await job(wiring, OTHER)

    (receipt,) = await erase_target(wiring)

    assert (receipt.counts["jobs"], receipt.counts["facts"], receipt.counts["documents"]) == (1, 2, 1)
    assert (await still_told(wiring, gone), await still_told(wiring, stays)) == (False, True)
    first = read((await wiring.history.read([stays]))[stays][0]).fact
    assert first == submitted(PING, job_id=stays, target=OTHER)
    report = await consult(wiring, second_look_after_s=0.0)
    assert {"broken chain", "version hole", "unreadable fact", "result missing"}.isdisjoint(report.findings)


async def test_a_job_that_is_open_is_called_off_and_outlived_before_its_target_is_erased(wiring: Wiring) -> None:
    """A worker may have it in hand, and would bring an answer that tells of the target."""
    job_id = uuid7()
    begun_at = utc_now()
    begun = [submitted(PING, job_id=job_id, target=TARGET, when=begun_at), dispatched(PING, job_id=job_id)]
    await wiring.store.append(AppendUnit([NewFacts(job_id, StreamHead(), begun)], CAUSE))
    waited: list[tuple[float, str, bool]] = []

    async def note(seconds: float) -> None:
        last = (await wiring.history.read([job_id]))[job_id][-1]
        waited.append((seconds, type(read(last).fact).__name__, await still_told(wiring, job_id)))

    async with erasing(wiring) as erasure:
        erasure.now, erasure.wait = lambda: begun_at, note
        await erasure.begin(TARGET.canonical, salt="5a17", by="alice", reason="asked for")
        await erasure.run()

    assert waited == [((LIFETIME + AFTER_THE_LAST_ATTEMPT).total_seconds(), "JobCancelled", True)]
    called_off = read((await wiring.history.read([job_id]))[job_id][-1]).fact
    assert isinstance(called_off, JobCancelled)
    assert (called_off.by, called_off.reason) == ("alice", CALLED_OFF)
    assert not await still_told(wiring, job_id)


async def test_a_new_job_about_an_erased_target_is_an_ordinary_job(wiring: Wiring) -> None:
    await job(wiring, TARGET)
    await erase_target(wiring)

    again = await job(wiring, TARGET)

    assert await still_told(wiring, again)
    assert await not_done_here(ErasureList(wiring.settings.erasures), wiring.history) == []


async def test_an_older_backup_is_erased_again_before_it_serves(wiring: Wiring) -> None:
    """Nobody serves it before; then it is as if the erasure had happened in it, and serves."""
    owner_url = wiring.settings.database_owner_url or ""
    gone, stays = await job(wiring, TARGET), await job(wiring, OTHER)
    older = dump(owner_url)
    (receipt,) = await erase_target(wiring)
    restore(owner_url, older)
    assert await still_told(wiring, gone)
    listed = ErasureList(wiring.settings.erasures)
    assert await not_done_here(listed, wiring.history) == [receipt.erasure_id]

    (again,) = await apply_list(wiring, "bob")

    assert again.counts["facts"] == 2
    assert again.counts["documents"] == 1
    assert (await still_told(wiring, gone), await still_told(wiring, stays)) == (False, True)
    assert await not_done_here(listed, wiring.history) == []
    ends = [read(row).fact for row in (await wiring.history.read([receipt.erasure_id]))[receipt.erasure_id]]
    assert ends[-1].model_dump()["from_list"] is True


def test_no_part_serves_a_log_that_is_older_than_an_erasure(wiring: Wiring, one_database_url: str) -> None:
    """A part refuses; `lookup up`, which is the only one there, erases again by itself."""
    settings = wiring.settings

    async def prepare() -> None:
        own = Wiring(settings)
        await job(own, TARGET)
        older = dump(one_database_url)
        await erase_target(own)
        restore(one_database_url, older)
        await own.aclose()

    asyncio.run(prepare())
    with pytest.raises(CannotRun, match="older than 1 erasure"):
        hold_against_list(settings, mend=False)
    hold_against_list(settings, mend=True)
    hold_against_list(settings, mend=False)


@pytest.mark.parametrize("database_only", [False, True])
def test_a_restore_holds_an_older_backup_against_the_list_of_what_was_erased(
    wiring: Wiring, postgres: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], database_only: bool
) -> None:
    """It erases again; where it may touch nothing but the database it says that this is left to do."""
    settings = wiring.settings

    async def prepare() -> UUID:
        own = Wiring(settings)
        job_id = await job(own, TARGET)
        await take_backup(tmp_path / "backup", settings.database_owner_url or "", settings.segments, [], utc_now())
        await erase_target(own)
        await own.aclose()
        return job_id

    async def tells(url: str, job_id: UUID) -> bool:
        restored = Wiring(settings.model_copy(update={"database_url": url}))
        told = await still_told(restored, job_id)
        await restored.aclose()
        return told

    job_id = asyncio.run(prepare())
    with fresh_database(postgres) as url:
        code = backup_commands.restore(
            settings, tmp_path / "backup", into=url, verify=False, database_only=database_only, actor="bob", as_json=True
        )
        told = asyncio.run(tells(url, job_id))

    said = "older than 1 erasures" if database_only else "Erased again what 1 erasures had erased"
    assert said in capsys.readouterr().err
    assert (code, told) == ((1, True) if database_only else (0, False))


def test_half_a_line_of_a_crash_hides_no_other_erasure(tmp_path: Path) -> None:
    listed = ErasureList(tmp_path / "erasures.jsonl")
    line = ListedErasure(uuid7(), "00", "alice", "asked for", utc_now(), [uuid7()], is_last=True)
    listed.append([line])
    with (tmp_path / "erasures.jsonl").open("ab") as file:
        file.write(b'{"erasure_id":"0')
    listed.append([line])

    assert list(listed.lines()) == [line, line]


async def test_other_items_of_a_message_are_published_again_without_the_target(wiring: Wiring) -> None:
    queue = COMMANDS[Service.PING, Priority.INTERACTIVE]
    ours, theirs = look_up_command(target=TARGET), look_up_command(target=OTHER)
    bus = wiring.bus()
    await bus.start()
    await bus.publish(queue, lines_of([ours, theirs]))
    await bus.publish(queue, lines_of([theirs]))

    async with Redis.from_url(wiring.settings.redis_url or "") as redis:
        removed = await MessageSweep(redis, bus)(Subject(TARGET.canonical, [TARGET.raw]), _no_jobs, 0)
        entries: Any = await redis.xrange(PREFIX + queue.name)
        left = [fields[b"__data__"] for _, fields in entries]
    await bus.stop()

    assert removed == 1
    assert [lines_of([theirs]) in message for message in left] == [True, True]
    assert not any(b"gone" in message.lower() for message in left)


async def _no_jobs() -> AsyncIterator[list[UUID]]:
    return
    yield []


@pytest.mark.parametrize(
    ("text", "is_it"),
    [
        ('{"target":"gone.example"}', True),
        ('{"raw":" GONE.example. "}', True),
        ("http://gone.example/", True),
        ("gone.example", True),
        ("www.gone.example", False),
        ("begone.example", False),
        ("gone.example.net", False),
        ("gone.examples", False),
        ("not-gone.example", False),
    ],
)
def test_a_target_is_known_by_its_whole_name(text: str, is_it: bool) -> None:
    assert Subject("gone.example", [" Gone.Example "]).is_mentioned_in(text.encode()) is is_it


def test_an_erasure_is_refused_before_anything_is_touched(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert erase(tmp_path, Order(target="gone.example", reason="asked for")) == 3
    assert "LOOKUP_DATABASE_URL" in capsys.readouterr().err
