"""The projector against a real Redis: views are the fold of the log, whatever was lost, repeated, cut or rolled back."""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID

import pytest
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from uuid_utils.compat import uuid7

from events.bus import DEAD_LETTERS, FACTS, Delivery
from events.catalog import UnknownFact
from events.ending import end
from events.facts import DeadLetterRetried, JobFact, ResultReference, TaskCompleted
from events.memory import MemoryBus, MemoryStore
from events.record import StoredFact, read
from events.store import AppendUnit, NewFacts, StreamHead
from events.wire import cloud_events, stretch_headers
from projections import folding
from projections import projector as module
from projections.folding import fold, fold_stream
from projections.job_views import Terms
from projections.projector import Projector, Superseded
from projections.view_store import RedisViews
from projections.views import DEADLINES, DUE, JOB_STATUS, Keys, document_of
from read_side.queries import JobQueries
from results.documents import MemoryDocuments, ResultsUnavailable
from tests.builders import (
    CAUSE,
    PING,
    RDAP,
    REVERSE_DNS,
    RULES,
    completed,
    counts,
    deferred,
    dispatched,
    eventually,
    failed,
    job_completed,
    job_failed,
    memory_store,
    skipped,
    submitted,
)

PATIENCE_S = 20.0
RETENTION = timedelta(hours=24)
TERMS = Terms(RULES, RETENTION)
KEYS = Keys()


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Unreachable(MemoryDocuments):
    """Documents that cannot be read while somebody says so; `asked` counts how often somebody tried."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.reachable = True

    async def get(self, references: Sequence[ResultReference]) -> Mapping[str, bytes]:
        self.asked += 1
        if not self.reachable:
            raise ResultsUnavailable
        return await super().get(references)


class Views:
    """A log, a Redis, and projectors between them."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.store: MemoryStore = memory_store(_utc_now)
        self.documents = Unreachable()
        self.bus = MemoryBus()
        self._heads: dict[UUID, StreamHead] = {}

    async def happened(self, *facts: JobFact) -> None:
        """Append facts, each to its own job's stream, and store what answers they tell of."""
        for fact in facts:
            head = self._heads.get(fact.job_id, StreamHead())
            (self._heads[fact.job_id],) = await self.store.append(AppendUnit([NewFacts(fact.job_id, head, [fact])], CAUSE))
            if isinstance(fact, TaskCompleted):
                await self.documents.put(fact.job_id, ANSWER)

    def projector(self) -> Projector:
        return Projector(RedisViews(self.redis), self.store, self.documents, self.bus, RULES, RETENTION, _utc_now)

    async def leading(self) -> Projector:
        """A projector that has taken the lead and stands where Redis stands, with nothing read yet."""
        leader = self.projector()
        async with asyncio.timeout(PATIENCE_S):
            await leader._become_leader()
        leader._log_id = str(await self.store.log_id())
        await leader._take_over()
        return leader

    async def caught_up(self) -> Projector:
        leader = await self.leading()
        await leader.catch_up()
        return leader

    async def stretch(self, previous: int, position: int) -> Delivery:
        """The batch of the log behind one position and up to another, as the relay would send it."""
        facts = await self.store.read_all(previous, position - previous)
        return Delivery(cloud_events(facts, "/lookup/test"), stretch_headers(previous, position), 1, None)

    async def shown(self, job_id: UUID) -> bytes | None:
        """What a poller would get: the position of the job's last fact, a line feed, the document."""
        generation = await self.generation()
        return cast("bytes | None", await self.redis.get(KEYS.job(generation, job_id))) if generation else None

    async def generation(self) -> str:
        """The live one's name, empty without one."""
        return cast("bytes", await self.redis.hget(KEYS.live, JOB_STATUS) or b"").decode()

    async def expected(self, job_id: UUID) -> bytes | None:
        """The fold of the job's own stream, without any projector."""
        stream = (await self.store.read([job_id])).get(job_id, ())
        if not stream:
            return None
        views = fold_stream(map(read, stream), TERMS)
        documents = await MemoryDocuments.get(self.documents, views.missing)
        return b"%d\n%b" % (views.position, document_of(views.status, documents))

    async def meta(self) -> dict[str, str]:
        fields: Any = await self.redis.hgetall(KEYS.meta(await self.generation()))
        return {name.decode(): value.decode() for name, value in fields.items()}

    async def checkpoint(self) -> int:
        return int((await self.meta())["checkpoint"])

    async def due(self, now: datetime) -> list[UUID] | None:
        ms = int(now.timestamp() * 1000)
        found: Any = await self.redis.eval(DUE, 1, KEYS.live, KEYS.prefix, DEADLINES, ms, 10**12, 100)
        return None if found is None else [UUID(job_id.decode()) for job_id in found]

    async def lead_ends(self) -> None:
        """What time does to the lease of a projector that fell silent."""
        await self.redis.delete(KEYS.lease)

    async def all_are_the_fold_of_their_facts(self) -> None:
        assert self._heads
        for job_id in self._heads:
            assert await self.shown(job_id) == await self.expected(job_id)


ANSWER = b'{"answer":42}'


@pytest.fixture
async def views(redis_url: str) -> AsyncIterator[Views]:
    async with Redis.from_url(redis_url) as redis:
        yield Views(redis)


def story(job_id: UUID, *, when: datetime | None = None) -> list[JobFact]:
    """A job from beginning to end, three of whose tasks end in three ways."""
    at = when or _utc_now()
    return [
        submitted(PING, RDAP, REVERSE_DNS, job_id=job_id, when=at),
        dispatched(PING, RDAP, job_id=job_id, when=at),
        skipped(REVERSE_DNS, job_id=job_id, when=at),
        completed(PING, job_id=job_id, document=ANSWER, when=at),
        failed(RDAP, job_id=job_id, when=at),
        job_completed(counts(succeeded=1, failed=1, skipped=1), job_id=job_id, when=at),
    ]


def interleaved(count: int) -> tuple[list[UUID], list[JobFact]]:
    """The stories of several jobs, as they happen to mix."""
    job_ids = [uuid7() for _ in range(count)]
    stories = [story(job_id) for job_id in job_ids]
    chance = random.Random(20260102)
    facts: list[JobFact] = []
    while any(stories):
        facts.append(chance.choice([left for left in stories if left]).pop(0))
    return job_ids, facts


# --- From the log to the views ----------------------------------------------------------------------------------------


async def test_a_view_is_the_fold_of_its_jobs_facts_with_the_answers_in_it(views: Views) -> None:
    job_ids, facts = interleaved(7)
    await views.happened(*facts)

    await views.caught_up()

    await views.all_are_the_fold_of_their_facts()
    shown = await views.shown(job_ids[0])
    assert shown is not None
    assert ANSWER in shown
    assert await views.checkpoint() == await views.store.head() == 42


async def test_each_fact_moves_its_view_and_the_checkpoint(views: Views) -> None:
    job_id = uuid7()
    leader = await views.caught_up()

    for position, fact in enumerate(story(job_id), start=1):
        await views.happened(fact)
        await leader.project([await views.stretch(position - 1, position)])
        assert await views.checkpoint() == position
        await views.all_are_the_fold_of_their_facts()


@pytest.mark.parametrize("seed", range(5))
async def test_it_does_not_matter_how_the_log_is_cut_mixed_and_repeated_on_its_way(views: Views, seed: int) -> None:
    """A relay that starts again cuts elsewhere, the broker delivers twice and in any order, and some is lost."""
    _, facts = interleaved(9)
    await views.happened(*facts)
    chance = random.Random(seed)
    cuts = [sorted(chance.sample(range(len(facts) + 1), 2)) for _ in range(25)]
    leader = await views.leading()

    for first in range(0, len(cuts), 5):
        deliveries = [await views.stretch(previous, position) for previous, position in cuts[first : first + 5]]
        await leader.project(deliveries)
    await leader.catch_up()

    await views.all_are_the_fold_of_their_facts()
    assert await views.checkpoint() == len(facts)


async def test_what_was_folded_already_is_dropped(views: Views) -> None:
    job_id = uuid7()
    await views.happened(*story(job_id))
    leader = await views.caught_up()
    before = await views.shown(job_id)

    await leader.project([await views.stretch(0, 6), await views.stretch(2, 4)])

    assert (await views.shown(job_id), await views.checkpoint()) == (before, 6)


async def test_of_a_stretch_that_overlaps_only_the_new_part_is_folded(views: Views) -> None:
    job_id = uuid7()
    await views.happened(*story(job_id))
    leader = await views.leading()
    await leader.project([await views.stretch(0, 3)])

    await leader.project([await views.stretch(1, 5)])

    assert await views.checkpoint() == 5
    assert b'"status":"Failed"' in (await views.shown(job_id) or b"")


async def test_a_stretch_of_another_log_is_not_folded(views: Views) -> None:
    """A log that was restored shares its past with the one that was lost, and the broker may still hold what came after."""
    job_id = uuid7()
    await views.happened(*story(job_id))
    lost = await views.stretch(2, 4)
    leader = await views.leading()
    await leader.project([await views.stretch(0, 2)])

    await leader.project([replace(lost, headers=stretch_headers(2, 4, log_id="the-lost-log"))])

    assert await views.checkpoint() == 2
    await leader.project([replace(lost, headers=stretch_headers(2, 4, log_id=str(await views.store.log_id())))])
    assert await views.checkpoint() == 4


async def test_a_gap_is_read_from_the_log(views: Views) -> None:
    await views.happened(*story(uuid7()))
    leader = await views.leading()
    await leader.project([await views.stretch(0, 1)])

    await leader.project([await views.stretch(4, 6)])

    await views.all_are_the_fold_of_their_facts()
    assert await views.checkpoint() == 6


async def test_a_job_that_is_not_remembered_is_folded_from_its_stream(views: Views, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "OPEN_JOBS_MAX", 1)
    _, facts = interleaved(6)
    await views.happened(*facts)
    leader = await views.leading()

    for position in range(len(facts)):
        await leader.project([await views.stretch(position, position + 1)])

    await views.all_are_the_fold_of_their_facts()


async def test_facts_of_other_streams_pass_by(views: Views) -> None:
    """A letter that is retried twice has a stream of two facts, and none of them is a job's."""
    job_id, letter = uuid7(), uuid7()
    await views.happened(*story(job_id))
    retried = DeadLetterRetried(letter_id=1, queue=FACTS.name, by="alice", retried_at=_utc_now())
    (head,) = await views.store.append(AppendUnit([NewFacts(letter, StreamHead(), [retried])], CAUSE))
    await views.store.append(AppendUnit([NewFacts(letter, head, [retried])], CAUSE))
    leader = await views.leading()

    await leader.project([await views.stretch(0, 7)])
    await leader.project([await views.stretch(7, 8)])

    await views.all_are_the_fold_of_their_facts()
    assert await views.checkpoint() == 8


async def test_a_fact_that_is_not_known_stops_the_projector_and_moves_nothing(views: Views) -> None:
    job_id = uuid7()
    await views.happened(*story(job_id)[:2])
    leader = await views.leading()
    await leader.project([await views.stretch(0, 1)])
    known = await views.stretch(1, 2)
    newer = Delivery(known.body.replace(b".v1", b".v2"), known.headers, 1, None)
    second = views.store._log[1]
    views.store._log[1] = second._replace(topic=second.topic.replace(".v1", ".v2"))

    with pytest.raises(UnknownFact, match="Upgrade"):
        await leader.project([newer])

    assert await views.checkpoint() == 1
    assert not views.bus.waiting(DEAD_LETTERS.name)


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, None),
        ({"previous_position": "x", "position": "2"}, None),
        (None, b"\xff"),
        (None, b"[1]"),
        (None, b'{"a":1}'),
        (None, b'[{"type":"lookup.TaskTimedOut.v9","data":{}}]'),
        (None, b'[{"type":"lookup.TasksDispatched.v1","data":{}}]'),
    ],
)
async def test_a_stretch_that_cannot_be_read_is_read_from_the_log_and_put_aside(
    headers: Mapping[str, str] | None, body: bytes | None, views: Views
) -> None:
    """Left on its queue, it would end each projector that is handed it."""
    job_id = uuid7()
    await views.happened(*story(job_id))
    leader = await views.leading()
    good = [await views.stretch(0, 1), await views.stretch(2, 6)]
    spoiled = await views.stretch(1, 2)
    spoiled = replace(
        spoiled,
        headers=spoiled.headers if headers is None else headers,
        body=spoiled.body if body is None else body,
    )

    await leader.project([*good, spoiled])

    await views.all_are_the_fold_of_their_facts()
    assert await views.checkpoint() == 6
    (letter,) = views.bus.waiting(DEAD_LETTERS.name)
    assert letter.body == spoiled.body


async def test_a_running_projector_needs_the_bus_for_speed_only(views: Views) -> None:
    """Silent broker: what happens is shown all the same, within a tick or two. With the broker: the same."""
    job_ids = [uuid7(), uuid7()]
    async with running(views.projector()):
        await views.happened(*story(job_ids[0]))
        await shows(views, job_ids[0])
        await views.happened(*story(job_ids[1]))
        delivery = await views.stretch(6, 12)
        await views.bus.publish(FACTS, delivery.body, dict(delivery.headers))
        await shows(views, job_ids[1])

    await views.all_are_the_fold_of_their_facts()


# --- Answers ----------------------------------------------------------------------------------------------------------


async def test_a_document_that_is_missing_for_certain_is_null_and_a_warning(views: Views) -> None:
    job_id = uuid7()
    await views.happened(*story(job_id))
    views.documents._documents.clear()

    await views.caught_up()

    assert b"The stored result of Ping is missing or damaged." in (await views.shown(job_id) or b"")


async def test_documents_that_cannot_be_reached_are_waited_for(views: Views) -> None:
    """A view without them would be wrong for good: nobody would look again."""
    job_id = uuid7()
    await views.happened(*story(job_id))
    views.documents.reachable = False
    leader = await views.leading()
    catching_up = asyncio.create_task(leader.catch_up())
    await eventually(lambda: views.documents.asked > 0)
    assert await views.shown(job_id) is None

    views.documents.reachable = True
    async with asyncio.timeout(PATIENCE_S):
        await catching_up

    assert ANSWER in (await views.shown(job_id) or b"")


async def test_a_rollback_while_documents_are_waited_for_leaves_no_gap(views: Views) -> None:
    """The projector learns of it while it waits. What it has in hand then begins behind a gap, and must not go down."""
    first, second = uuid7(), uuid7()
    await views.happened(*story(first))
    leader = await views.caught_up()
    await views.happened(*story(second))
    views.documents.reachable = False
    asked_before = views.documents.asked
    projecting = asyncio.create_task(leader.project([await views.stretch(6, 12)]))
    await eventually(lambda: views.documents.asked > asked_before)
    await rolled_back(views, to=0)
    asked_before = views.documents.asked
    await eventually(lambda: views.documents.asked >= asked_before + 2)  # It looks at Redis between two tries.

    views.documents.reachable = True
    async with asyncio.timeout(PATIENCE_S):
        await projecting
        await leader.catch_up()

    await views.all_are_the_fold_of_their_facts()


# --- Redis that forgets, or remembers something else ------------------------------------------------------------------


async def test_a_projector_that_starts_again_goes_on_where_redis_stands(views: Views) -> None:
    job_ids, facts = interleaved(5)
    await views.happened(*facts[:13])
    await views.caught_up()
    generation = await views.generation()
    await views.happened(*facts[13:])
    await views.lead_ends()

    await views.caught_up()

    assert await views.generation() == generation
    await views.all_are_the_fold_of_their_facts()
    assert len(job_ids) == 5


async def test_a_redis_that_was_wiped_is_filled_again_with_the_same_bytes(views: Views) -> None:
    job_ids, facts = interleaved(5)
    await views.happened(*facts)
    leader = await views.caught_up()
    before = [await views.shown(job_id) for job_id in job_ids]
    await views.redis.flushdb()

    await leader.catch_up()  # Finds out,
    await leader.catch_up()  # and begins anew.

    assert [await views.shown(job_id) for job_id in job_ids] == before
    assert None not in before


async def test_a_running_projector_notices_a_wiped_redis_without_traffic(views: Views) -> None:
    job_id = uuid7()
    await views.happened(*story(job_id))
    async with running(views.projector()):
        await shows(views, job_id)
        await views.redis.flushdb()
        await shows(views, job_id)


async def test_a_lead_that_is_lost_while_views_are_begun_anew_is_taken_again(
    views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis is wiped once more just then, or we were slower than the lease: nobody else leads, so nobody is superseded."""
    job_id = uuid7()
    await views.happened(*story(job_id))
    leader = await views.caught_up()
    begin = leader.views.begin

    async def begin_too_late(fence: str, generation: str, log_id: str, versions: Mapping[str, int]) -> bool:
        monkeypatch.undo()
        await views.redis.flushdb()
        return await begin(fence, generation, log_id, versions)

    monkeypatch.setattr(leader.views, "begin", begin_too_late)
    await views.redis.flushdb()
    await leader.catch_up()
    await leader.catch_up()

    await views.all_are_the_fold_of_their_facts()


async def test_a_redis_that_was_rolled_back_is_believed_and_brought_up_to_date(views: Views) -> None:
    _, facts = interleaved(5)
    await views.happened(*facts[:20])
    leader = await views.caught_up()
    await rolled_back(views, to=7)
    await views.happened(*facts[20:])

    await leader.project([await views.stretch(20, 30)])
    await leader.catch_up()

    await views.all_are_the_fold_of_their_facts()
    assert await views.checkpoint() == 30


@pytest.mark.parametrize("lost", ["some", "everything"])
async def test_a_redis_that_forgets_in_the_middle_of_a_large_stretch_leaves_no_gap(
    views: Views, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """A stretch goes down in several steps. When one is refused, those that follow it begin behind a gap."""
    monkeypatch.setattr(module, "COMMIT_MAX", 4)
    await views.happened(*story(uuid7()))
    leader = await views.caught_up()
    await views.happened(*story(uuid7()), *story(uuid7()))
    await (rolled_back(views, to=2) if lost == "some" else views.redis.flushdb())

    await leader.project([await views.stretch(6, 18)])
    await leader.catch_up()

    await views.all_are_the_fold_of_their_facts()
    assert await views.checkpoint() == 18


async def test_a_redis_that_forgets_while_a_missing_stretch_is_read_leaves_no_gap(
    views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was in hand then begins behind a gap once more, and must not go down."""
    await views.happened(*story(uuid7()), *story(uuid7()))
    leader = await views.leading()
    missing_before_it = await views.stretch(6, 12)
    read_all = views.store.read_all

    async def read_and_forget(after: int, limit: int) -> Sequence[StoredFact]:
        page = await read_all(after, limit)
        if not page:
            await views.redis.flushdb()
        return page

    monkeypatch.setattr(views.store, "read_all", read_and_forget)
    await leader.project([missing_before_it])
    monkeypatch.undo()
    await leader.catch_up()

    await views.all_are_the_fold_of_their_facts()
    assert await views.checkpoint() == 12


async def test_views_of_another_log_are_built_anew(views: Views) -> None:
    await views.happened(*story(uuid7()))
    await views.caught_up()
    await views.lead_ends()
    restored = Views(views.redis)
    job_id = uuid7()
    await restored.happened(*story(job_id)[:3])

    await restored.caught_up()

    await restored.all_are_the_fold_of_their_facts()
    assert await restored.checkpoint() == 3


async def test_views_that_are_ahead_of_their_log_are_built_anew(views: Views) -> None:
    """A backup of the log was put back under the same id."""
    job_id = uuid7()
    await views.happened(*story(job_id))
    await views.caught_up()
    await views.lead_ends()
    del views.store._log[4:]
    del views.store._streams[job_id][4:]

    await views.caught_up()

    assert await views.checkpoint() == 4
    await views.all_are_the_fold_of_their_facts()


async def test_views_that_stand_at_another_fact_than_the_log_has_there_are_built_anew(views: Views) -> None:
    await views.happened(*story(uuid7()))
    await views.caught_up()
    await views.lead_ends()
    before = await views.generation()
    await views.redis.hset(KEYS.meta(before), "hash", "00" * 32)

    await views.caught_up()

    assert await views.generation() != before
    await views.all_are_the_fold_of_their_facts()


# --- One projector at a time ------------------------------------------------------------------------------------------


async def test_a_second_projector_waits_while_the_first_leads(views: Views) -> None:
    await views.caught_up()
    second = asyncio.create_task(views.projector()._become_leader())

    done, _ = await asyncio.wait({second}, timeout=1.5)
    assert not done

    await views.lead_ends()
    async with asyncio.timeout(PATIENCE_S):
        await second


async def test_a_projector_that_woke_up_after_its_lease_changes_nothing(views: Views) -> None:
    job_id = uuid7()
    await views.happened(*story(job_id)[:3])
    frozen = await views.caught_up()
    await views.lead_ends()
    await views.happened(*story(job_id)[3:5])
    await views.caught_up()
    before = await views.shown(job_id)
    await views.happened(story(job_id)[5])

    with pytest.raises(Superseded):
        await frozen.project([await views.stretch(3, 6)])
    with pytest.raises(Superseded):
        await frozen.catch_up()

    assert (await views.shown(job_id), await views.checkpoint()) == (before, 5)


# --- The to-do list ---------------------------------------------------------------------------------------------------


async def test_the_to_do_list_has_each_open_job_by_its_next_due_time(views: Views) -> None:
    now = _utc_now()
    silent, waiting, closed = uuid7(), uuid7(), uuid7()
    await views.happened(
        submitted(PING, job_id=silent, when=now),
        dispatched(PING, job_id=silent, when=now),
        submitted(PING, job_id=waiting, when=now),
        dispatched(PING, job_id=waiting, when=now),
        deferred(PING, until=now + timedelta(seconds=5), job_id=waiting, when=now),
        *story(closed, when=now),
    )

    await views.caught_up()

    assert await views.due(now + timedelta(seconds=4)) == []
    assert await views.due(now + timedelta(seconds=6)) == [waiting]
    assert await views.due(now + timedelta(seconds=31)) == [waiting, silent]


async def test_a_to_do_list_that_nobody_looks_after_is_no_list(views: Views) -> None:
    assert await views.due(_utc_now()) is None
    await views.happened(submitted(PING, job_id=uuid7()))
    await views.leading()

    assert await views.due(_utc_now()) is None


# --- How long a view lives --------------------------------------------------------------------------------------------


async def test_a_closed_jobs_view_goes_by_its_closing_facts_time_and_an_open_ones_stays(views: Views) -> None:
    now = _utc_now()
    open_job, closed = uuid7(), uuid7()
    await views.happened(*story(closed, when=now - timedelta(hours=1)), *story(open_job, when=now)[:4])

    await views.caught_up()

    generation = await views.generation()
    gone_at = int((now - timedelta(hours=1) + RETENTION).timestamp())
    assert await views.redis.expiretime(KEYS.job(generation, closed)) == gone_at
    assert await views.redis.expiretime(KEYS.job(generation, open_job)) == -1


async def test_a_rebuild_does_not_bring_back_what_has_gone(views: Views) -> None:
    old, young = uuid7(), uuid7()
    long_ago = _utc_now() - timedelta(days=3)
    await views.happened(*story(old, when=long_ago), *story(young))

    await views.caught_up()

    assert await views.shown(old) is None
    assert await views.shown(young) == await views.expected(young)


# --- How ----------------------------------------------------------------------------------------------------------


async def rolled_back(views: Views, *, to: int) -> None:
    """Redis as it was at an earlier checkpoint: the views that came later are not there, the lease is."""
    generation = await views.generation()
    rows: Sequence[StoredFact] = await views.store.read_all(0, to)
    streams: dict[UUID, Any] = {}
    for stored in rows:
        streams[stored.stream_id] = fold(streams.get(stored.stream_id), read(stored), TERMS)
    async for key in views.redis.scan_iter(KEYS.job(generation, "*")):
        await views.redis.delete(key)
    for job_id, folded in streams.items():
        documents = await MemoryDocuments.get(views.documents, folded.missing)
        value = b"%d\n%b" % (folded.position, document_of(folded.status, documents))
        await views.redis.set(KEYS.job(generation, job_id), value)
    fact_hash = read(rows[-1]).hash if rows else ""
    await views.redis.hset(KEYS.meta(generation), items=["checkpoint", to, "hash", fact_hash])


@asynccontextmanager
async def running(projector: Projector) -> AsyncIterator["asyncio.Task[None]"]:
    task = asyncio.create_task(projector.run())
    try:
        yield task
    finally:
        why = task.exception() if task.done() else None
        await end([task], PATIENCE_S)
        assert task.done()
        assert why is None, f"the projector ended: {why!r}"


async def shows(views: Views, job_id: UUID) -> None:
    """Wait until a poller would see the job as its facts tell."""
    clock = asyncio.get_running_loop().time
    give_up_at = clock() + PATIENCE_S
    while await views.shown(job_id) != await views.expected(job_id):
        assert clock() < give_up_at, "the view did not come about in time"
        await asyncio.sleep(0.02)


# --- Who waits is told ------------------------------------------------------------------------------------------------


async def test_the_jobs_that_ended_are_named_to_who_waits_for_them(views: Views) -> None:
    open_job, *ended_jobs = uuid7(), uuid7(), uuid7()
    leader = await views.leading()
    async with views.redis.pubsub() as pubsub:
        await pubsub.subscribe(KEYS.moved)
        await views.happened(*(submitted(PING, job_id=job_id, when=_utc_now()) for job_id in (open_job, *ended_jobs)))
        await leader.catch_up()
        await views.happened(*(fact for job_id in ended_jobs for fact in end_of(job_id)))
        await leader.catch_up()
        told = [await next_message(pubsub) for _ in range(2)]

    assert told == ["3", f"7 {ended_jobs[0]} {ended_jobs[1]}"]


async def test_of_a_job_that_ended_alone_its_view_is_told_as_it_is_shown(views: Views) -> None:
    job_id = uuid7()
    leader = await views.leading()
    async with views.redis.pubsub() as pubsub:
        await pubsub.subscribe(KEYS.moved)
        await views.happened(submitted(PING, job_id=job_id, when=_utc_now()), *end_of(job_id))
        await leader.catch_up()
        told = await next_message(pubsub)
        answer = await JobQueries(views.redis, _utc_now).job(job_id)

    assert answer is not None
    assert answer.ended
    moved, version, position, body = told.split("\n")
    assert moved == f"3 {job_id} ", "the ids are words, with or without a view behind them"
    assert (f'"{version}-{position}"', body.encode()) == (answer.etag, answer.body)


async def test_told_is_what_is_shown_and_not_what_else_is_fed(views: Views) -> None:
    job_id = uuid7()
    leader = await views.leading()
    await views.redis.hset(KEYS.live, JOB_STATUS, "g0")
    await views.redis.hset(KEYS.meta("g0"), f"view:{JOB_STATUS}", 77)
    await views.redis.set(KEYS.job("g0", job_id), b"1\n{}")
    async with views.redis.pubsub() as pubsub:
        await pubsub.subscribe(KEYS.moved)
        await views.happened(submitted(PING, job_id=job_id, when=_utc_now()), *end_of(job_id))
        await leader.catch_up()
        told = await next_message(pubsub)

    assert told == f"3 {job_id} \n77\n1\n{{}}"


def end_of(job_id: UUID) -> list[JobFact]:
    """Just now: the view of a job that ended long ago has expired before anybody could read it."""
    now = _utc_now()
    return [failed(PING, job_id=job_id, when=now), job_failed(counts(failed=1), job_id=job_id, reason="none", when=now)]


async def next_message(pubsub: PubSub) -> str:
    async with asyncio.timeout(PATIENCE_S):
        while (message := await pubsub.get_message(ignore_subscribe_messages=True, timeout=1.0)) is None:
            pass
    return cast("bytes", message["data"]).decode()
