"""What a writer remembers of its own appends: the same facts as the database has, and never past somebody else's."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from uuid import UUID

import psycopg
import pytest
from uuid_utils.compat import uuid7

from events import postgres as module
from events.chain import GENESIS
from events.ending import end
from events.facts import Fact, JobFailed, OutcomeCounts
from events.log_tail import TAIL_MAX, LogTail
from events.memory import MemoryBus
from events.postgres import APPEND_LOCK, PostgresStore
from events.record import SALT_BYTES, Cause, Place, StoredFact, Written, read, write
from events.store import AppendUnit, NewFacts, Scribe, StreamHead, VersionConflict
from tests.builders import PING, completed, dispatched, eventually, memory_store, remember, submitted
from write_side import relay as relay_module
from write_side.memory import MemoryLedgers
from write_side.relay import Relay

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
CAUSE = Cause(actor="test", correlation_id=UUID(int=2))
Open = Callable[[], PostgresStore]
WHO_WAITS = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory' AND datname = current_database()"


@pytest.fixture
async def open_store(migrated_database_url: str) -> AsyncIterator[Open]:
    async with AsyncExitStack() as stack:

        def open_one() -> PostgresStore:
            store = PostgresStore(migrated_database_url, Scribe(lambda: NOW, uuid7, partial(os.urandom, SALT_BYTES)))
            stack.push_async_callback(store.close)
            return store

        yield open_one


async def append(store: PostgresStore, stream_id: UUID | None = None) -> int:
    """One fact on a stream of its own; gives its position."""
    job_id = stream_id or uuid7()
    (head,) = await store.append(AppendUnit((NewFacts(job_id, StreamHead(), [failed_job(job_id)]),), CAUSE))
    return head.position


def failed_job(job_id: UUID) -> JobFailed:
    counts = OutcomeCounts(succeeded=0, failed=1, timed_out=0, skipped=0)
    return JobFailed(job_id=job_id, counts=counts, reason="none", failed_at=NOW)


async def test_what_was_just_appended_is_read_without_the_database_and_is_what_the_database_has(
    open_store: Open, migrated_database_url: str
) -> None:
    writer, other = open_store(), open_store()
    before = await append(writer)
    appended = [await append(writer) for _ in range(3)]
    from_database = await other.read_all(before, 10)

    with psycopg.connect(migrated_database_url) as conn:
        conn.execute("DELETE FROM stored_events")
    remembered = await writer.read_all(before, 10)

    assert [stored.position for stored in remembered] == appended
    assert remembered == from_database


async def test_what_another_process_appended_in_between_is_not_passed_over(open_store: Open) -> None:
    ours, theirs = open_store(), open_store()
    first = await append(ours)
    between = await append(theirs)
    last = await append(ours)

    assert [stored.position for stored in await ours.read_all(first - 1, 10)] == [first, between, last]
    assert [stored.position for stored in await ours.read_all(first, 10)] == [between, last]
    assert [stored.position for stored in await ours.read_all(last - 1, 10)] == [last]


async def test_what_another_process_appended_last_is_read(open_store: Open) -> None:
    ours, theirs = open_store(), open_store()
    first = await append(ours)
    last = await append(theirs)

    assert [stored.position for stored in await ours.read_all(first, 10)] == [last]


async def test_what_was_refused_is_not_remembered(open_store: Open) -> None:
    store, job_id = open_store(), uuid7()
    first = await append(store, job_id)
    with pytest.raises(VersionConflict):
        await append(store, job_id)
    last = await append(store)

    assert [stored.position for stored in await store.read_all(first - 1, 10)] == [first, last]


@asynccontextmanager
async def held_up(store: PostgresStore, database_url: str) -> AsyncIterator["asyncio.Task[int]"]:
    """An append that waits for the lock, and has it afterwards."""
    with psycopg.connect(database_url) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", [APPEND_LOCK])
        appending = asyncio.create_task(append(store))
        await eventually(lambda: other.execute(WHO_WAITS).fetchone() == (1,))
        yield appending


async def test_who_has_read_all_that_we_appended_waits_for_what_we_are_appending(
    open_store: Open, migrated_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit is told to those who listen before the writer has its answer."""
    monkeypatch.setattr(module, "ANSWER_WITHIN_S", 30.0)
    store = open_store()
    first = await append(store)
    async with held_up(store, migrated_database_url) as appending:
        reading = asyncio.create_task(store.read_all(first, 10))
        for _ in range(5):
            assert await store.head() == first
        assert not reading.done()

    assert [stored.position for stored in await reading] == [await appending]


async def test_a_relay_whose_facts_wait_for_others_waits_for_what_we_are_appending(
    open_store: Open, migrated_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told of the commit before the writer has its answer, and nobody wakes it again."""
    monkeypatch.setattr(module, "ANSWER_WITHIN_S", 30.0)
    for pause in ("TOGETHER_S", "SAVE_AFTER_S", "HEARTBEAT_S", "EPOCH_INTERVAL_S"):
        monkeypatch.setattr(relay_module, pause, 600.0)
    store, ledgers, bus = open_store(), MemoryLedgers(memory_store()), MemoryBus()
    await bus.write_epoch(str(await store.log_id()))
    first = await append(store)
    relay = Relay(ledgers.open, store, bus, lambda: NOW, tail=store.tail)
    with store.tail.waking(asyncio.Event()):
        running = asyncio.create_task(relay.run())
        try:
            await eventually(lambda: store.tail.released == first)
            async with held_up(store, migrated_database_url) as appending:
                assert ledgers._leader is not None
                ledgers._leader.appended.set()
                await eventually(lambda: ledgers._leader is not None and not ledgers._leader.appended.is_set())
                assert await store.head() == first
            last = await appending
            await eventually(lambda: store.tail.released == last)
        finally:
            await end([running], 10.0)


async def test_an_append_that_takes_long_keeps_no_reader(open_store: Open, migrated_database_url: str) -> None:
    store = open_store()
    first = await append(store)
    async with held_up(store, migrated_database_url) as appending:
        assert await store.read_all(first, 10) == []
        assert not appending.done()

    await appending


def facts(*positions: int) -> list[StoredFact]:
    return [_row_of(failed_job(uuid7())).at(position) for position in positions]


def _row_of(fact: Fact) -> Written:
    place = Place(uuid7(), 1, GENESIS)
    return write(fact, place, CAUSE, event_id=uuid7(), recorded_at=NOW, salt=partial(os.urandom, SALT_BYTES))


def test_what_was_released_is_as_a_reader_of_the_log_has_it() -> None:
    rows = [_row_of(fact) for fact in (submitted(PING), dispatched(PING), completed(PING), failed_job(uuid7()))]
    stored = [row.at(position) for position, row in enumerate(rows, start=1)]
    tail = LogTail()
    tail.append(stored[:2], [row.fact for row in rows[:2]])
    tail.append(stored[2:], [row.fact for row in rows[2:]])

    assert tail.released_behind(0, 10) == []
    tail.release(3)

    assert tail.released_behind(0, 10) == [read(one) for one in stored[:3]]
    assert tail.released_behind(1, 1) == [read(stored[1])]
    assert tail.released_behind(3, 10) == tail.released_behind(5, 10) == []


def test_of_what_is_remembered_each_fact_is_that_of_its_row() -> None:
    tail = LogTail()
    stored = facts(*range(1, TAIL_MAX + 3))
    remember(tail, stored[:-1])
    remember(tail, stored[-1:])
    tail.release(TAIL_MAX + 2)

    assert tail.released_behind(TAIL_MAX, 5) == [read(one) for one in stored[-2:]]
    assert tail.released_behind(2, 1) == [read(stored[2])]

    later = facts(TAIL_MAX + 9)
    remember(tail, later)
    tail.release(TAIL_MAX + 9)
    assert tail.released_behind(TAIL_MAX + 8, 5) == [read(later[0])]


def test_only_the_last_facts_are_remembered() -> None:
    tail = LogTail()
    for position in range(1, 3 * TAIL_MAX):
        remember(tail, facts(position))

    assert tail.behind(0, 1) == []
    assert len(tail.behind(2 * TAIL_MAX, 5 * TAIL_MAX)) == TAIL_MAX - 1


def test_a_transaction_with_a_hole_is_left_to_the_database() -> None:
    tail = LogTail()
    remember(tail, facts(1, 2))
    remember(tail, facts(3, 5))

    assert tail.behind(2, 10) == []


def test_a_stretch_is_held_when_all_of_it_is_remembered() -> None:
    tail = LogTail()
    assert not tail.holds(facts(1))
    remember(tail, facts(3, 4, 5))

    assert [tail.holds(stretch) for stretch in (facts(3, 4, 5), facts(4), facts(2, 3), facts(5, 6))] == [
        True,
        True,
        False,
        False,
    ]


def test_who_listens_is_woken_by_a_release_and_not_by_one_of_what_was_released_already() -> None:
    tail, woken = LogTail(), asyncio.Event()
    with tail.waking(woken):
        assert tail.is_heard
        remember(tail, facts(1, 2))
        assert not woken.is_set()
        tail.release(2)
        assert woken.is_set()
        woken.clear()
        tail.release(1)
        assert not woken.is_set()
    tail.release(3)

    assert not woken.is_set()
    assert not tail.is_heard
    assert tail.released == 3
