"""Position order is commit order: a reader that follows positions misses nothing, whoever writes and whatever is rolled back.

Writers are the product's stores and, beside them, bare transactions that dawdle between insert and commit or roll back, so that
positions are given out in another order than they would be committed in, and holes stay behind. All take the same lock.
"""

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from threading import Event, Thread
from typing import LiteralString
from uuid import UUID

import psycopg
import pytest
from psycopg import sql
from uuid_utils.compat import uuid7

from app.wiring import utc_now
from events.postgres import APPEND_LOCK, EVENTS_TABLE, PostgresStore
from events.record import SALT_BYTES
from events.store import AppendUnit, NewFacts, Scribe, StoreUnavailable, StreamHead
from tests.builders import CAUSE, PING, submitted

SCRIBE = Scribe(utc_now, uuid7, partial(os.urandom, SALT_BYTES))
STORES = 8
BARE_WRITERS = 8
READERS = 4
APPENDS = 10_000
BARE_SHARE = 0.25
ROLLED_BACK = 0.2
"""The share of a bare writer's transactions that end in a rollback."""
DAWDLES_S = 0.002
LOOKS_AGAIN_S = 0.02
PATIENCE_S = 90.0
VACUUM_WAIT_MAX_MS = 200.0

LOCK = sql.SQL("SELECT pg_advisory_xact_lock({})").format(APPEND_LOCK)
NO_LOCK = sql.SQL("SELECT {}").format(APPEND_LOCK)
INSERT: LiteralString = (
    "INSERT INTO stored_events (originator_id, originator_version, topic, state)"
    " VALUES (%s, %s, %s, %s) RETURNING notification_id"
)

Place = tuple[int, UUID]
"""A position and the stream whose first fact stands there."""


def begun() -> AppendUnit:
    """A job's first fact."""
    job_id = uuid7()
    return AppendUnit([NewFacts(job_id, StreamHead(), [submitted(PING, job_id=job_id)])], CAUSE)


@dataclass
class BareWriter:
    """Appends in transactions of its own, on a connection of its own, in a thread of its own."""

    database_url: str
    lock: sql.Composed
    seed: int
    committed: list[Place] = field(default_factory=list)

    def write(self, appends: int) -> None:
        """Until so many were committed."""
        chance = random.Random(self.seed)
        with psycopg.connect(self.database_url) as conn:
            while len(self.committed) < appends:
                self._transaction(conn, chance)

    def _transaction(self, conn: psycopg.Connection, chance: random.Random) -> None:
        ((row,),) = SCRIBE.write(begun())
        conn.execute(self.lock)
        found = conn.execute(INSERT, (row.stream_id, row.stream_version, row.topic, row.state)).fetchone()
        assert found is not None
        if chance.random() < 0.3:
            time.sleep(chance.uniform(0, DAWDLES_S))
        if chance.random() < ROLLED_BACK:
            conn.rollback()
            return
        conn.commit()
        self.committed.append((found[0], row.stream_id))


@dataclass
class StoreWriter:
    """Appends through the product's store: several at a time, so that some share a transaction."""

    store: PostgresStore
    seed: int
    committed: list[Place] = field(default_factory=list)

    async def write(self, appends: int) -> None:
        chance = random.Random(self.seed)
        while len(self.committed) < appends:
            some = min(chance.randint(1, 12), appends - len(self.committed))
            await asyncio.gather(*(self._append() for _ in range(some)))
            await asyncio.sleep(chance.uniform(0, DAWDLES_S))

    async def _append(self) -> None:
        """On a crowded machine the store may give up its turn: then nothing was appended, and it is asked again."""
        unit = begun()
        while True:
            try:
                (head,) = await self.store.append(unit)
            except StoreUnavailable:
                await asyncio.sleep(LOOKS_AGAIN_S)
            else:
                self.committed.append((head.position, unit.streams[0].stream_id))
                return


@dataclass
class Reader:
    """Follows the log by position, as relay and projector do."""

    store: PostgresStore
    seed: int
    seen: list[Place] = field(default_factory=list)

    async def follow(self, ended: asyncio.Event) -> None:
        """To the end of the log, once nobody writes any more."""
        chance = random.Random(self.seed)
        while True:
            nobody_writes = ended.is_set()
            after = self.seen[-1][0] if self.seen else 0
            try:
                page = await self.store.read_all(after, chance.randint(1, 500))
            except StoreUnavailable:  # On a crowded machine: then it looks again, as they do.
                await asyncio.sleep(LOOKS_AGAIN_S)
                continue
            self.seen += [(stored.position, stored.stream_id) for stored in page]
            if not page and nobody_writes:
                return
            await asyncio.sleep(0 if page else chance.uniform(0, LOOKS_AGAIN_S))


@asynccontextmanager
async def stores(database_url: str, count: int) -> AsyncIterator[list[PostgresStore]]:
    async with AsyncExitStack() as stack:
        opened = [PostgresStore(database_url, SCRIBE) for _ in range(count)]
        for store in opened:
            stack.push_async_callback(store.close)
        yield opened


async def written_and_read(
    database_url: str, *, appends: int, lock: sql.Composed, bare_share: float = BARE_SHARE
) -> tuple[list[Place], list[list[Place]]]:
    """What was committed by all writers at once, by position, and what each reader saw that followed them meanwhile."""
    of_bare = int(appends * bare_share) // BARE_WRITERS
    of_store = (appends - of_bare * BARE_WRITERS) // STORES
    async with stores(database_url, STORES + READERS) as opened:
        writers = [StoreWriter(store, seed) for seed, store in enumerate(opened[READERS:])]
        bare = [BareWriter(database_url, lock, seed) for seed in range(BARE_WRITERS)]
        readers = [Reader(store, seed) for seed, store in enumerate(opened[:READERS])]
        ended = asyncio.Event()
        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as following:
            for reader in readers:
                following.create_task(reader.follow(ended))
            await asyncio.gather(
                *(writer.write(of_store) for writer in writers), *(asyncio.to_thread(writer.write, of_bare) for writer in bare)
            )
            ended.set()
    everybody = [writer.committed for writer in writers] + [writer.committed for writer in bare]
    committed = sorted(place for of_writer in everybody for place in of_writer)
    return committed, [reader.seen for reader in readers]


def rows_of(database_url: str) -> list[Place]:
    with psycopg.connect(database_url) as conn:
        found = conn.execute("SELECT notification_id, originator_id FROM stored_events ORDER BY notification_id").fetchall()
    return [(position, stream_id) for position, stream_id in found]


async def test_every_reader_sees_what_was_committed_in_the_same_order_while_vacuum_runs(migrated_database_url: str) -> None:
    with vacuuming(migrated_database_url) as vacuum:
        committed, seen = await written_and_read(migrated_database_url, appends=APPENDS, lock=LOCK)

    assert len(committed) == APPENDS
    assert rows_of(migrated_database_url) == committed
    for of_reader in seen:
        assert of_reader == committed
    assert committed[-1][0] > APPENDS, "nothing was rolled back, so there were no holes to wait for"
    assert vacuum.runs >= len(KINDS)
    assert vacuum.longest_wait_ms < VACUUM_WAIT_MAX_MS


async def test_with_a_writer_that_takes_no_lock_a_reader_misses_facts(migrated_database_url: str) -> None:
    """The same run, but the bare writers leave the lock out: if this did not show, the test above would prove nothing."""
    for _ in range(10):
        _, seen = await written_and_read(migrated_database_url, appends=800, lock=NO_LOCK)
        committed = set(rows_of(migrated_database_url))
        if any(set(of_reader) < committed for of_reader in seen):
            return
    pytest.fail("Nobody missed anything.")


async def test_a_fact_committed_late_is_never_behind_a_reader(migrated_database_url: str) -> None:
    """The smallest story: somebody has a position and is slow to commit it; whoever appends next waits for it."""
    async with stores(migrated_database_url, 1) as (store,):
        await store.append(begun())
        with psycopg.connect(migrated_database_url) as slow:
            ((row,),) = SCRIBE.write(begun())
            slow.execute(LOCK)
            slow.execute(INSERT, (row.stream_id, row.stream_version, row.topic, row.state))
            next_one = asyncio.ensure_future(store.append(begun()))
            await until(lambda: waiting_appends(migrated_database_url) == 1 or next_one.done())
            seen = await store.read_all(0, 10)
            slow.commit()
        (head,) = await next_one
        seen = [*seen, *await store.read_all(seen[-1].position, 10)]

    assert [stored.position for stored in seen] == [position for position, _ in rows_of(migrated_database_url)]
    assert seen[-1].position == head.position
    assert seen[-2].stream_id == row.stream_id


async def test_an_append_that_waits_for_the_lock_has_no_position_yet(migrated_database_url: str) -> None:
    """Else who held the lock would commit behind it with a greater position, and readers would skip the smaller one."""
    async with stores(migrated_database_url, 1) as (store,):
        await store.append(begun())
        with psycopg.connect(migrated_database_url) as slow:
            ((row,),) = SCRIBE.write(begun())
            slow.execute(LOCK)
            next_one = asyncio.ensure_future(store.append(begun()))
            await until(lambda: waiting_appends(migrated_database_url) == 1 or next_one.done())
            slow.execute(INSERT, (row.stream_id, row.stream_version, row.topic, row.state))
            slow.commit()
        (head,) = await next_one

    assert [stream_id for _, stream_id in rows_of(migrated_database_url)][-2] == row.stream_id
    assert rows_of(migrated_database_url)[-1][0] == head.position


def waiting_appends(database_url: str) -> int:
    with psycopg.connect(database_url) as conn:
        found = conn.execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        ).fetchone()
    assert found is not None
    return int(found[0])


async def until(happens: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not await asyncio.to_thread(happens):  # noqa: ASYNC110 - the database tells nobody
            await asyncio.sleep(0.02)


# --- VACUUM -----------------------------------------------------------------------------------------------------------

KINDS = ("VACUUM (ANALYZE)", "VACUUM", "VACUUM (FREEZE)", "ANALYZE")
# Slowed down as autovacuum is, but more, so that each holds its lock for a while even on a small table.
GENTLE = "-c vacuum_cost_delay=10 -c vacuum_cost_limit=20"
# Over 100 ms for each page that it looks at.
SLOWEST = "-c vacuum_cost_delay=100 -c vacuum_cost_limit=1"
WAITS = """
SELECT coalesce(max(extract(epoch FROM clock_timestamp() - waiting.waitstart)) * 1000, 0)
FROM pg_locks waiting
WHERE NOT waiting.granted AND waiting.pid <> %(vacuum)s AND %(vacuum)s = ANY (pg_blocking_pids(waiting.pid))
"""
"""How long the session that has waited longest for the vacuum's lock has waited so far, in ms: by the server's own books."""


@dataclass
class Vacuum:
    """Runs in a loop until stopped, and is watched: who waits for it, and for how long."""

    database_url: str
    stop: Event = field(default_factory=Event)
    runs: int = 0
    longest_wait_ms: float = 0.0
    _pid: int = 0

    def run(self) -> None:
        with psycopg.connect(self.database_url, autocommit=True, options=GENTLE) as conn:
            self._pid = conn.info.backend_pid
            for kind in cycle(KINDS):
                if self.stop.wait(0.02):
                    return
                conn.execute(sql.SQL("{} {}").format(sql.SQL(kind), sql.Identifier(EVENTS_TABLE)))
                self.runs += 1

    def watch(self) -> None:
        with psycopg.connect(self.database_url, autocommit=True) as conn:
            while not self.stop.wait(0.01):
                found = conn.execute(WAITS, {"vacuum": self._pid}).fetchone()
                assert found is not None
                self.longest_wait_ms = max(self.longest_wait_ms, float(found[0]))


@contextmanager
def vacuuming(database_url: str) -> Iterator[Vacuum]:
    vacuum = Vacuum(database_url)
    threads: Sequence[Thread] = [Thread(target=vacuum.run), Thread(target=vacuum.watch)]
    for thread in threads:
        thread.start()
    try:
        yield vacuum
    finally:
        vacuum.stop.set()
        for thread in threads:
            thread.join()


@contextmanager
def slow_vacuum(database_url: str) -> Iterator[psycopg.Connection]:
    """A VACUUM that is under way, and takes as long as the block does: it is ended with it. Gives another connection."""
    with psycopg.connect(database_url, autocommit=True) as conn:
        vacuum = psycopg.connect(database_url, autocommit=True, options=SLOWEST)

        def run() -> None:
            with vacuum:
                vacuum.execute(sql.SQL("VACUUM (FREEZE, DISABLE_PAGE_SKIPPING) {}").format(sql.Identifier(EVENTS_TABLE)))

        thread = Thread(target=_until_cancelled, args=[run])
        thread.start()
        try:
            while not vacuum_runs(conn):
                assert thread.is_alive()
                time.sleep(0.01)
            yield conn
        finally:
            vacuum.cancel_safe()
            thread.join()


def _until_cancelled(run: Callable[[], None]) -> None:
    try:
        run()
    except psycopg.errors.QueryCanceled:
        return


def vacuum_runs(conn: psycopg.Connection) -> bool:
    return conn.execute("SELECT FROM pg_stat_progress_vacuum WHERE datname = current_database()").fetchone() is not None


async def test_an_append_does_not_wait_for_a_vacuum_under_way(migrated_database_url: str) -> None:
    """However long it takes. The library's own lock on the table would wait for its end: it must not come back."""
    async with stores(migrated_database_url, 1) as (store,):
        await asyncio.gather(*(store.append(begun()) for _ in range(2_000)))
        with slow_vacuum(migrated_database_url) as conn:
            await asyncio.gather(*(store.append(begun()) for _ in range(100)))

            assert vacuum_runs(conn), "it ended by itself, so nothing was shown"
            with pytest.raises(psycopg.errors.LockNotAvailable):
                conn.execute("SET lock_timeout = '200ms'; BEGIN; LOCK TABLE stored_events IN EXCLUSIVE MODE")
            conn.execute("ROLLBACK")
