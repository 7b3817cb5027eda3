"""What a writer remembers of its own appends: the same facts as the database has, and never past somebody else's."""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from uuid import UUID

import psycopg
import pytest
from uuid_utils.compat import uuid7

from events.facts import JobFailed, OutcomeCounts
from events.postgres import TAIL_MAX, LogTail, PostgresStore
from events.record import SALT_BYTES, Cause, Written
from events.store import AppendUnit, NewFacts, Scribe, StreamHead, VersionConflict

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
Open = Callable[[], PostgresStore]


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
    counts = OutcomeCounts(succeeded=0, failed=1, timed_out=0, skipped=0)
    fact = JobFailed(job_id=job_id, counts=counts, reason="none", failed_at=NOW)
    cause = Cause(actor="test", correlation_id=uuid7())
    (head,) = await store.append(AppendUnit((NewFacts(job_id, StreamHead(), [fact]),), cause))
    return head.position


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


def rows(count: int) -> list[Written]:
    return [Written(uuid7(), 1, "topic", b"state", b"") for _ in range(count)]


def test_only_the_last_facts_are_remembered() -> None:
    tail = LogTail()
    for position in range(1, 3 * TAIL_MAX):
        tail.append([position], rows(1))

    assert tail.behind(0, 1) == []
    assert len(tail.behind(2 * TAIL_MAX, 5 * TAIL_MAX)) == TAIL_MAX - 1


def test_a_transaction_with_a_hole_is_left_to_the_database() -> None:
    tail = LogTail()
    tail.append([1, 2], rows(2))
    tail.append([3, 5], rows(2))

    assert tail.behind(2, 10) == []
