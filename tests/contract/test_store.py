"""What every event store promises: the same suite for PostgreSQL and the in-memory twin."""

import asyncio
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from events.catalog import TOPICS
from events.chain import GENESIS, chained_hash
from events.facts import JobFailed, JobSubmitted, OutcomeCounts, Priority, Sensitivity, Service, Target, TargetType
from events.memory import MemoryStore
from events.postgres import PostgresStore
from events.record import SALT_BYTES, Cause, hash_of, read
from events.store import AppendUnit, EventStore, NewFacts, Scribe, StreamHead, VersionConflict

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SCRIBE = Scribe(lambda: datetime.now(UTC), uuid7, partial(os.urandom, SALT_BYTES))


@pytest.fixture(params=["memory", "postgres"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[MemoryStore | PostgresStore]:
    if request.param == "memory":
        yield MemoryStore(SCRIBE, uuid7())
        return
    postgres = PostgresStore(request.getfixturevalue("migrated_database_url"), SCRIBE)
    yield postgres
    await postgres.close()


def submitted(job_id: UUID) -> JobSubmitted:
    return JobSubmitted(
        job_id=job_id,
        tenant="default",
        target=Target(raw="Example.com", canonical="example.com", type=TargetType.DOMAIN),
        target_type=TargetType.DOMAIN,
        services=(Service.PING,),
        priority=Priority.INTERACTIVE,
        sensitivity=Sensitivity.NORMAL,
        requested_by="192.0.2.7",
        expires_at=NOW,
        submitted_at=NOW,
    )


def failed(job_id: UUID) -> JobFailed:
    counts = OutcomeCounts(succeeded=0, failed=1, timed_out=0, skipped=0)
    return JobFailed(job_id=job_id, counts=counts, reason="none", failed_at=NOW)


def unit(*streams: NewFacts) -> AppendUnit:
    return AppendUnit(streams, Cause(actor="test", correlation_id=uuid7()))


async def begin(store: EventStore, job_id: UUID) -> StreamHead:
    (head,) = await store.append(unit(NewFacts(job_id, StreamHead(), [submitted(job_id)])))
    return head


async def test_appended_facts_are_read_back_as_they_were(store: EventStore) -> None:
    job_id = uuid7()
    facts = [submitted(job_id), failed(job_id)]

    (head,) = await store.append(unit(NewFacts(job_id, StreamHead(), facts)))

    stream = (await store.read([job_id]))[job_id]
    assert [read(stored).fact for stored in stream] == facts
    assert [stored.stream_version for stored in stream] == [1, 2]
    assert head == StreamHead(2, hash_of(stream[-1].state), stream[-1].position)


async def test_each_fact_is_chained_to_the_one_before_it(store: EventStore) -> None:
    job_id = uuid7()
    head = await begin(store, job_id)
    await store.append(unit(NewFacts(job_id, head, [failed(job_id)])))

    previous = GENESIS
    for stored in (await store.read([job_id]))[job_id]:
        envelope, chained, *_ = stored.state.split(b"\n")
        previous = chained_hash(previous, job_id, stored.stream_version, stored.topic, envelope, chained)
        assert hash_of(stored.state) == previous


async def test_a_stream_is_read_from_behind_a_version(store: MemoryStore | PostgresStore) -> None:
    job_id = uuid7()
    head = await begin(store, job_id)
    await store.append(unit(NewFacts(job_id, head, [failed(job_id)])))

    assert [stored.stream_version for stored in await store.read_behind(job_id, 1)] == [2]
    assert await store.read_behind(job_id, 2) == []
    assert await store.read_behind(uuid7(), 0) == []


async def test_streams_are_named_in_their_order_page_by_page(store: EventStore) -> None:
    job_ids = sorted(uuid7() for _ in range(5))
    for job_id in reversed(job_ids):
        head = await begin(store, job_id)
        await store.append(unit(NewFacts(job_id, head, [failed(job_id)])))

    first = await store.stream_ids(None, 3)
    second = await store.stream_ids(first[-1], 3)

    assert (list(first), list(second)) == (job_ids[:3], job_ids[3:])
    assert list(await store.stream_ids(job_ids[-1], 3)) == []


async def test_a_stale_expectation_is_refused_and_leaves_nothing(store: EventStore) -> None:
    job_id = uuid7()
    head = await begin(store, job_id)
    await store.append(unit(NewFacts(job_id, head, [failed(job_id)])))

    with pytest.raises(VersionConflict):
        await store.append(unit(NewFacts(job_id, head, [failed(job_id)])))

    assert len((await store.read([job_id]))[job_id]) == 2


async def test_a_unit_of_two_streams_goes_down_whole_or_not_at_all(store: EventStore) -> None:
    taken, fresh = uuid7(), uuid7()
    await begin(store, taken)

    with pytest.raises(VersionConflict):
        await store.append(
            unit(NewFacts(fresh, StreamHead(), [submitted(fresh)]), NewFacts(taken, StreamHead(), [submitted(taken)]))
        )

    assert fresh not in await store.read([fresh])


async def test_a_conflict_fails_its_own_unit_only(store: EventStore) -> None:
    taken = uuid7()
    await begin(store, taken)
    fresh = [uuid7() for _ in range(20)]
    units = [unit(NewFacts(job_id, StreamHead(), [submitted(job_id)])) for job_id in [*fresh[:10], taken, *fresh[10:]]]

    answers = await asyncio.gather(*(store.append(one) for one in units), return_exceptions=True)

    assert isinstance(answers[10], VersionConflict)
    assert set(await store.read(fresh)) == set(fresh)
    assert len((await store.read([taken]))[taken]) == 1


async def test_simultaneous_appends_to_one_stream_leave_dense_versions(store: EventStore) -> None:
    job_id = uuid7()
    head = await begin(store, job_id)

    answers = await asyncio.gather(
        *(store.append(unit(NewFacts(job_id, head, [failed(job_id)]))) for _ in range(16)), return_exceptions=True
    )

    assert sum(not isinstance(answer, BaseException) for answer in answers) == 1
    assert [stored.stream_version for stored in (await store.read([job_id]))[job_id]] == [1, 2]


async def test_a_follower_sees_every_fact_once_and_in_commit_order(store: EventStore) -> None:
    job_ids = [uuid7() for _ in range(60)]
    seen: list[UUID] = []

    async def follow() -> None:
        after = 0
        while len(seen) < len(job_ids):
            page = await store.read_all(after, 7)
            seen.extend(stored.stream_id for stored in page)
            after = page[-1].position if page else after
            await asyncio.sleep(0)

    async with asyncio.timeout(20):
        following = asyncio.ensure_future(follow())
        heads = await asyncio.gather(*(begin(store, job_id) for job_id in job_ids))
        await following

    by_position = [job_id for _, job_id in sorted(zip([head.position for head in heads], job_ids, strict=True))]
    assert seen == by_position
    assert await store.head() == max(head.position for head in heads)


async def test_an_empty_log_stands_at_zero_and_has_an_identity(store: EventStore) -> None:
    assert await store.head() == 0
    assert await store.read_all(0, 10) == []
    assert await store.log_id() == await store.log_id()


async def test_open_streams_are_those_without_a_closing_fact(store: EventStore) -> None:
    open_ids = sorted(uuid7() for _ in range(3))
    closed = uuid7()
    for job_id in open_ids:
        await begin(store, job_id)
    head = await begin(store, closed)
    await store.append(unit(NewFacts(closed, head, [failed(closed)])))

    found = await store.open_streams([TOPICS[JobSubmitted]], [TOPICS[JobFailed]], None, 10)
    page = await store.open_streams([TOPICS[JobSubmitted]], [TOPICS[JobFailed]], open_ids[0], 1)

    assert list(found) == open_ids
    assert list(page) == [open_ids[1]]
