"""An append whose answer is lost on its way: what became of it is found out, and said only when it is known."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from uuid_utils.compat import uuid7

from events import postgres as module
from events.facts import JobFailed, OutcomeCounts
from events.postgres import APPEND_LOCK, PostgresStore
from events.record import SALT_BYTES, Cause
from events.store import AppendUnit, NewFacts, OutcomeUnknown, Scribe, StoreUnavailable, StreamHead
from tests.builders import eventually

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
PATIENCE_S = 10.0
END_ALL_OTHERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()
"""
WHO_WAITS = """
SELECT application_name FROM pg_stat_activity WHERE wait_event = 'advisory' AND datname = current_database()
"""
END_WHO_WAITS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'advisory' AND datname = current_database()
"""


@dataclass
class Wire:
    """Between a store and its PostgreSQL. While `mute`, a connection on which something is asked gets no answer any more."""

    server: dict[str, Any]
    mute: bool = False
    broken: bool = False
    late_s: float = 0.0
    """So much later than it was asked for is a connection made."""
    silenced: set[asyncio.StreamWriter] = field(default_factory=set)
    ends: set[asyncio.StreamWriter] = field(default_factory=set)

    async def serve(self, from_store: asyncio.StreamReader, to_store: asyncio.StreamWriter) -> None:
        if self.broken:
            to_store.close()
            return
        await asyncio.sleep(self.late_s)
        from_server, to_server = await self._connect()
        self.ends |= {to_store, to_server}
        async with asyncio.TaskGroup() as group:
            group.create_task(self._ask(from_store, to_server, to_store))
            group.create_task(self._answer(from_server, to_store))

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = self.server["host"], self.server.get("port") or 5432
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, port)

    async def _ask(self, source: asyncio.StreamReader, to: asyncio.StreamWriter, asker: asyncio.StreamWriter) -> None:
        while data := await _read(source):
            if self.mute:
                self.silenced.add(asker)
            to.write(data)
        to.close()

    async def _answer(self, source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        while data := await _read(source):
            if to not in self.silenced:
                to.write(data)
        to.close()

    def cut(self) -> None:
        """Who got no answer loses the connection; who asks from now on is answered."""
        self.mute = False
        for end in self.silenced:
            end.close()

    def break_for_good(self) -> None:
        self.broken = True
        for end in self.ends:
            end.close()


async def _read(source: asyncio.StreamReader) -> bytes:
    try:
        return await source.read(65_536)
    except ConnectionError:
        return b""


@dataclass
class Scene:
    wire: Wire
    store: PostgresStore
    database_url: str

    def position_of(self, stream_id: UUID) -> int | None:
        with psycopg.connect(self.database_url) as conn:
            asked = "SELECT notification_id FROM stored_events WHERE originator_id = %s"
            row = conn.execute(asked, [stream_id]).fetchone()
        return row[0] if row else None

    def is_committed(self, stream_id: UUID) -> bool:
        return self.position_of(stream_id) is not None


@pytest.fixture
async def scene(migrated_database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    monkeypatch.setattr(module, "CONNECT_TIMEOUT_S", 2.0)  # A machine that runs other tests beside takes its time to connect.
    async with wired(migrated_database_url) as scene:
        await append(scene.store, uuid7())
        yield scene


@asynccontextmanager
async def wired(database_url: str, *, late_s: float = 0.0) -> AsyncIterator[Scene]:
    wire = Wire(dict(conninfo_to_dict(database_url)), late_s=late_s)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(await asyncio.start_server(wire.serve, "127.0.0.1", 0))
        port = server.sockets[0].getsockname()[1]
        through_wire = make_conninfo(database_url, host="127.0.0.1", port=port, options="-c application_name=wired")
        store = PostgresStore(through_wire, Scribe(lambda: NOW, uuid7, partial(os.urandom, SALT_BYTES)))
        stack.push_async_callback(store.close)
        stack.callback(wire.break_for_good)
        yield Scene(wire, store, database_url)


async def append(store: PostgresStore, *stream_ids: UUID) -> list[int]:
    counts = OutcomeCounts(succeeded=0, failed=1, timed_out=0, skipped=0)
    streams = [
        NewFacts(each, StreamHead(), [JobFailed(job_id=each, counts=counts, reason="none", failed_at=NOW)])
        for each in stream_ids
    ]
    heads = await store.append(AppendUnit(streams, Cause(actor="test", correlation_id=uuid7())))
    return [head.position for head in heads]


async def test_what_was_committed_before_the_answer_was_lost_is_found(scene: Scene) -> None:
    first, second, later = uuid7(), uuid7(), uuid7()
    scene.wire.mute = True
    appending = asyncio.create_task(append(scene.store, first, second))
    await eventually(partial(scene.is_committed, second))
    scene.wire.cut()

    assert await soon(appending) == [scene.position_of(first), scene.position_of(second)]
    assert await soon(append(scene.store, later)) == [scene.position_of(later)]


async def test_what_was_not_committed_when_the_connection_was_lost_is_refused_and_stays_out(scene: Scene) -> None:
    lost, later = uuid7(), uuid7()
    with psycopg.connect(scene.database_url, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(%s)", [APPEND_LOCK])
        appending = asyncio.create_task(append(scene.store, lost))
        await eventually(lambda: other.execute(END_WHO_WAITS).fetchone() == (True,))

    with pytest.raises(StoreUnavailable):
        await soon(appending)
    assert await soon(append(scene.store, later)) == [scene.position_of(later)]
    assert not scene.is_committed(lost)


async def test_with_all_connections_lost_while_nothing_was_asked_it_is_known_that_nothing_was_committed(scene: Scene) -> None:
    """A server that was started anew, say. The first to notice is an append."""
    lost, later = uuid7(), uuid7()
    await asyncio.gather(*(scene.store.read_all(0, 10) for _ in range(10)))
    with psycopg.connect(scene.database_url, autocommit=True) as other:
        assert other.execute(END_ALL_OTHERS).fetchall()

    with pytest.raises(StoreUnavailable):
        await soon(append(scene.store, lost))
    assert await soon(append(scene.store, later)) == [scene.position_of(later)]
    assert not scene.is_committed(lost)


async def test_when_nobody_can_tell_what_became_of_it_that_is_said(scene: Scene) -> None:
    job_id = uuid7()
    scene.wire.mute = True
    appending = asyncio.create_task(append(scene.store, job_id))
    await eventually(partial(scene.is_committed, job_id))
    scene.wire.break_for_good()

    with pytest.raises(OutcomeUnknown):
        await soon(appending)


async def test_without_a_connection_an_append_is_refused_in_time(scene: Scene) -> None:
    """The first may have been on its way when the connection went; of the second nothing was sent."""
    scene.wire.break_for_good()
    for answer in (OutcomeUnknown, StoreUnavailable):
        with pytest.raises(answer):
            await soon(append(scene.store, uuid7()))


async def test_who_does_not_get_the_lock_in_time_is_refused_whatever_else_the_url_sets(scene: Scene) -> None:
    refused = uuid7()
    with psycopg.connect(scene.database_url, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(%s)", [APPEND_LOCK])
        appending = asyncio.create_task(append(scene.store, refused))
        await eventually(lambda: other.execute(WHO_WAITS).fetchone() == ("wired",))
        with pytest.raises(StoreUnavailable):
            await soon(appending)

    assert not scene.is_committed(refused)


async def test_a_database_to_which_it_takes_longer_to_connect_than_anybody_waits_is_reached_in_the_end(
    migrated_database_url: str,
) -> None:
    """Who gave up left a connection on its way; whoever comes later has it."""
    async with wired(migrated_database_url, late_s=2 * module.CONNECT_TIMEOUT_S) as scene, asyncio.timeout(PATIENCE_S):
        with pytest.raises(StoreUnavailable):
            await scene.store.head()
        while True:
            try:
                positions = await append(scene.store, uuid7())
                assert [await scene.store.head()] == positions
            except StoreUnavailable:
                continue
            return


async def soon(answer: Any) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        return await answer
