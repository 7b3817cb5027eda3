"""The log under the role that can only select: everything is read, nothing can be written, nobody waits for ever."""

import asyncio
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from uuid_utils.compat import uuid7

from app.migrate import READER_ROLE
from app.settings import Settings
from app.wiring import Wiring
from events.postgres import PostgresHistory, PostgresStore
from events.record import SALT_BYTES
from events.store import Scribe, StoreUnavailable
from tests.builders import PING, completed, counts, dispatched, given, job_completed, submitted
from tests.peers.lookups import closed_port

FACTS = (submitted(PING), dispatched(PING), completed(PING), job_completed(counts(succeeded=1)))
SCRIBE = Scribe(lambda: datetime.now(UTC), uuid7, partial(os.urandom, SALT_BYTES))


@pytest.fixture
async def store(migrated_database_url: str) -> AsyncIterator[PostgresStore]:
    opened = PostgresStore(migrated_database_url, SCRIBE)
    yield opened
    await opened.close()


@pytest.fixture
async def history(migrated_database_url: str) -> AsyncIterator[PostgresHistory]:
    opened = PostgresHistory(make_conninfo(migrated_database_url, user=READER_ROLE))
    yield opened
    await opened.close()


async def test_the_reader_sees_the_log_as_the_store_does(store: PostgresStore, history: PostgresHistory) -> None:
    job_ids = sorted(uuid7() for _ in range(3))
    for job_id in job_ids:
        await given(store, *FACTS, job_id=job_id)

    assert await history.read(job_ids) == await store.read(job_ids)
    assert await history.read_all(2, 5) == await store.read_all(2, 5)
    assert await history.head() == await store.head()
    assert await history.stream_ids(None, 10) == job_ids
    assert await history.log_id() == await store.log_id()


@pytest.mark.parametrize("role", [READER_ROLE, None], ids=["reader", "owner"])
async def test_nothing_can_be_written_through_it_whatever_its_role_may_do(migrated_database_url: str, role: str | None) -> None:
    url = make_conninfo(migrated_database_url, user=role) if role else migrated_database_url
    history = PostgresHistory(url)
    await history.head()

    with history._recorder().datastore.get_connection() as conn, pytest.raises(psycopg.Error) as refused:
        conn.execute("INSERT INTO stored_events VALUES (gen_random_uuid(), 1, 'x', 'x')")
    await history.close()

    assert isinstance(refused.value, psycopg.errors.ReadOnlySqlTransaction)


async def test_each_statement_has_a_bound(history: PostgresHistory) -> None:
    await history.head()

    with history._recorder().datastore.get_connection() as conn:
        row = conn.execute("SHOW statement_timeout").fetchone()

    assert row == {"statement_timeout": "5s"}


async def test_a_log_that_cannot_be_reached_is_unavailable_and_not_empty() -> None:
    with closed_port() as port:
        history = PostgresHistory(f"postgresql://lookup_reader@127.0.0.1:{port}/lookup")
        async with asyncio.timeout(10):
            with pytest.raises(StoreUnavailable):
                await history.head()
        await history.close()


@pytest.mark.parametrize(
    ("given_urls", "read"),
    [
        ({"database_url": "postgresql:///app"}, "postgresql:///app"),
        ({"database_url": "postgresql:///app", "database_read_url": "postgresql:///read"}, "postgresql:///read"),
        ({"database_read_url": "postgresql:///read"}, "postgresql:///read"),
    ],
    ids=["app", "both", "read"],
)
async def test_history_is_read_where_the_settings_say(given_urls: dict[str, Any], read: str) -> None:
    wiring = Wiring(Settings(**given_urls))

    opened = wiring._open_log

    assert opened._url == read
    await wiring.aclose()
