"""What the store of the views promises: the same suite for Redis and the in-memory twin."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol
from uuid import UUID

import pytest
from redis.asyncio import Redis
from uuid_utils.compat import uuid7

from projections.folding import Folded
from projections.memory import MemoryViews
from projections.view_store import DUE_LIST_GOOD_FOR_MS, Fed, Generation, Move, RedisViews, Verdict, ViewStore
from projections.views import DEADLINES, JOB_STATUS
from projections.writes import Count, Expire, KeepLast, Put, Rank, Remove, Unrank, UnrankBelow, Write

LOG = "log-1"
RANKS, COUNTS = "ranks", "counts"
VERSIONS = {JOB_STATUS: 2, DEADLINES: 1, RANKS: 1, COUNTS: 1}
TOLD = {name: str(version) for name, version in VERSIONS.items()}
HASH = "ab" * 32
PATIENCE_S = 10.0


class Views(ViewStore, Protocol):
    """A view store, and its to-do list."""

    async def due(self, now: datetime, limit: int) -> Sequence[UUID] | None: ...


@dataclass
class Shelf:
    """A view store, and what those who read and break it see."""

    views: Views
    roster: str = ""

    async def shown(self, job_id: UUID) -> bytes | None:
        if isinstance(self.views, MemoryViews):
            return self.views.document(job_id)
        assert isinstance(self.views, RedisViews)
        live = (await self.views.standing()).of(JOB_STATUS)
        shown: Any = await self.views.redis.get(self.views.keys.job(live.name, job_id)) if live else None
        return None if shown is None else bytes(shown)

    async def live(self) -> Generation | None:
        """The generation of the jobs' views."""
        live = (await self.views.standing()).of(JOB_STATUS)
        return None if live is None else replace(live, checked_ms=0)

    async def ranked(self, key: str) -> list[tuple[str, int]]:
        """A sorted set of the view `ranks`, lowest first."""
        if isinstance(self.views, MemoryViews):
            held = self.views.generations["g1"].sets.get((RANKS, key), {})
            return sorted(held.items(), key=lambda item: (item[1], item[0]))
        assert isinstance(self.views, RedisViews)
        found: Any = await self.views.redis.zrange(self.views.keys.key("g1", RANKS, key), 0, -1, withscores=True)
        return [(member.decode(), int(score)) for member, score in found]

    async def counted(self, key: str) -> dict[str, int]:
        """A hash of the view `counts`."""
        if isinstance(self.views, MemoryViews):
            return dict(self.views.generations["g1"].counts.get((COUNTS, key), {}))
        assert isinstance(self.views, RedisViews)
        found: Any = await self.views.redis.hgetall(self.views.keys.key("g1", COUNTS, key))
        return {name.decode(): int(count) for name, count in found.items()}

    async def lead_ends(self) -> None:
        """What time does to the lead of a projector that fell silent."""
        if isinstance(self.views, MemoryViews):
            self.views.end_lead()
        elif isinstance(self.views, RedisViews):
            await self.views.redis.delete(self.views.keys.lease)

    async def wipe(self) -> None:
        if isinstance(self.views, MemoryViews):
            self.views.wipe()
        elif isinstance(self.views, RedisViews):
            await self.views.redis.flushdb()

    async def begun(self, generation: str = "g1") -> str:
        """The fence of a leader of a new generation."""
        fence = await self.views.lead()
        assert fence is not None
        assert await self.views.begin(fence, generation, LOG, VERSIONS)
        self.roster = (await self.views.standing()).roster
        return fence

    def move(
        self, fence: str, stood_at: int, position: int, *writes: tuple[str, Write], complete: bool = True, until_s: int = 0
    ) -> Move:
        """A move of the generation `g1`: what is written is told with the view that it is of."""
        now_ms = _ms(_now())
        of_views = {view: [write for name, write in writes if name == view] for view in VERSIONS}
        return Move(
            fence=fence,
            roster=self.roster,
            log_id=LOG,
            fed=[Fed("g1", stood_at, frozenset(VERSIONS))],
            stood_at=stood_at,
            position=position,
            hash=HASH,
            complete=complete,
            caught_up_ms=now_ms,
            checked_ms=now_ms,
            folded=Folded(of_views, until_s=until_s),
        )


@pytest.fixture(params=["memory", "redis"])
async def shelf(request: pytest.FixtureRequest) -> AsyncIterator[Shelf]:
    if request.param == "memory":
        yield Shelf(MemoryViews(_now, uuid7))
        return
    async with Redis.from_url(request.getfixturevalue("redis_url")) as redis:
        yield Shelf(RedisViews(redis))


def _now() -> datetime:
    return datetime.now(UTC)


def _ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)


def put(job_id: UUID, value: bytes = b"5\n{}", *, expires_at_s: int = 0) -> tuple[str, Write]:
    return JOB_STATUS, Put(str(job_id), value, expires_at_s)


def due(job_id: UUID, at_ms: int) -> tuple[str, Write]:
    return DEADLINES, Rank("", str(job_id), at_ms)


async def test_an_empty_store_has_no_live_views_and_no_list(shelf: Shelf) -> None:
    assert await shelf.live() is None
    assert await shelf.views.due(_now(), 10) is None


async def test_a_new_generation_is_live_and_stands_at_the_beginning(shelf: Shelf) -> None:
    await shelf.begun()

    assert await shelf.live() == Generation("g1", LOG, 0, "", complete=False, views=TOLD)


async def test_a_commit_moves_views_and_checkpoint_together(shelf: Shelf) -> None:
    job_id = uuid7()
    fence = await shelf.begun()

    assert await shelf.views.commit(shelf.move(fence, 0, 5, put(job_id))) is Verdict.OK

    assert await shelf.live() == Generation("g1", LOG, 5, HASH, complete=True, views=TOLD)
    assert await shelf.shown(job_id) == b"5\n{}"


async def test_a_commit_from_elsewhere_than_the_checkpoint_moves_nothing(shelf: Shelf) -> None:
    job_id = uuid7()
    fence = await shelf.begun()
    await shelf.views.commit(shelf.move(fence, 0, 5))

    for stood_at in (4, 6):
        assert await shelf.views.commit(shelf.move(fence, stood_at, 9, put(job_id))) is Verdict.CHECKPOINT

    assert await shelf.live() == Generation("g1", LOG, 5, HASH, complete=True, views=TOLD)
    assert await shelf.shown(job_id) is None


async def test_a_commit_of_another_log_or_generation_moves_nothing(shelf: Shelf) -> None:
    fence = await shelf.begun()

    assert await shelf.views.commit(replace(shelf.move(fence, 0, 5), log_id="log-2")) is Verdict.CHECKPOINT
    assert await shelf.views.commit(replace(shelf.move(fence, 0, 5), roster="another")) is Verdict.GENERATION

    assert await shelf.live() == Generation("g1", LOG, 0, "", complete=False, views=TOLD)


async def test_one_leads_until_its_lease_ends(shelf: Shelf) -> None:
    first = await shelf.begun()
    assert await shelf.views.lead() is None

    await shelf.lead_ends()
    second = await shelf.views.lead()

    assert second is not None
    assert await shelf.views.commit(shelf.move(first, 0, 5)) is Verdict.FENCED
    assert not await shelf.views.begin(first, "g2", LOG, VERSIONS)
    assert await shelf.views.commit(shelf.move(second, 0, 5)) is Verdict.OK


async def test_a_fence_never_comes_again_not_even_after_a_wipe(shelf: Shelf) -> None:
    before = await shelf.begun()
    await shelf.wipe()
    assert await shelf.views.commit(shelf.move(before, 0, 5)) is Verdict.FENCED

    after = await shelf.begun()

    assert after != before
    assert await shelf.views.commit(shelf.move(before, 0, 5)) is Verdict.FENCED


async def test_the_lease_ends_by_itself(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("projections.view_store", "projections.memory"):
        monkeypatch.setattr(f"{module}.LEASE_MS", 1)
    fence = await shelf.views.lead()
    assert fence is not None

    async with asyncio.timeout(PATIENCE_S):
        while await shelf.views.lead() is None:  # noqa: ASYNC110 - the lease is the store's
            await asyncio.sleep(0.001)

    assert not await shelf.views.begin(fence, "g1", LOG, VERSIONS)


async def test_the_list_has_what_is_due_by_time_and_no_more_than_asked_for(shelf: Shelf) -> None:
    now = _now()
    soon, sooner, later = (uuid7() for _ in range(3))
    fence = await shelf.begun()
    await shelf.views.commit(
        shelf.move(
            fence,
            0,
            5,
            due(soon, _ms(now) - 1),
            due(sooner, _ms(now) - 2),
            due(later, _ms(now) + 1_000),
        )
    )

    assert await shelf.views.due(now, 10) == [sooner, soon]
    assert await shelf.views.due(now, 1) == [sooner]
    assert await shelf.views.due(now + timedelta(seconds=1), 10) == [sooner, soon, later]


async def test_a_job_with_nothing_due_any_more_leaves_the_list(shelf: Shelf) -> None:
    job_id = uuid7()
    fence = await shelf.begun()
    await shelf.views.commit(shelf.move(fence, 0, 5, due(job_id, 1)))
    assert await shelf.views.due(_now(), 10) == [job_id]

    await shelf.views.commit(shelf.move(fence, 5, 6, (DEADLINES, Unrank("", str(job_id)))))

    assert await shelf.views.due(_now(), 10) == []


async def test_a_list_that_is_incomplete_or_not_looked_after_is_no_list(shelf: Shelf) -> None:
    fence = await shelf.begun()
    await shelf.views.commit(shelf.move(fence, 0, 5, complete=False))
    assert await shelf.views.due(_now(), 10) is None

    await shelf.views.commit(shelf.move(fence, 5, 6))
    assert await shelf.views.due(_now(), 10) == []
    assert await shelf.views.due(_now() + timedelta(milliseconds=DUE_LIST_GOOD_FOR_MS + 1), 10) is None


async def test_a_list_that_is_looked_after_and_behind_is_no_list(shelf: Shelf) -> None:
    """A projector that waits for something keeps its lead, and knows nothing of the jobs of meanwhile."""
    fence = await shelf.begun()
    behind = replace(shelf.move(fence, 0, 5), caught_up_ms=_ms(_now()) - DUE_LIST_GOOD_FOR_MS - 1)

    assert await shelf.views.commit(behind) is Verdict.OK

    assert await shelf.views.due(_now(), 10) is None


async def test_a_view_goes_at_its_time(shelf: Shelf) -> None:
    stays, gone = uuid7(), uuid7()
    now_s = _ms(_now()) // 1000
    fence = await shelf.begun()

    await shelf.views.commit(shelf.move(fence, 0, 5, put(stays, expires_at_s=now_s + 100), put(gone, expires_at_s=now_s - 1)))

    assert await shelf.shown(stays) == b"5\n{}"
    assert await shelf.shown(gone) is None


async def test_a_sorted_set_is_ranked_and_trimmed(shelf: Shelf) -> None:
    fence = await shelf.begun()
    ranks: list[Write] = [Rank("a", f"m{score}", score) for score in range(6)]
    await shelf.views.commit(shelf.move(fence, 0, 5, *((RANKS, write) for write in [*ranks, UnrankBelow("a", 1)])))
    assert await shelf.ranked("a") == [(f"m{score}", score) for score in range(2, 6)]

    again: list[Write] = [Unrank("a", "m5"), Rank("a", "m2", 9), KeepLast("a", 2)]
    await shelf.views.commit(shelf.move(fence, 5, 6, *((RANKS, write) for write in again)))

    assert await shelf.ranked("a") == [("m4", 4), ("m2", 9)]
    assert await shelf.ranked("b") == []


async def test_counters_count_and_a_removed_key_is_gone(shelf: Shelf) -> None:
    fence = await shelf.begun()
    first: list[Write] = [Count("a", "x", 2), Count("a", "x", -3), Count("b", "y", 1)]
    await shelf.views.commit(shelf.move(fence, 0, 5, *((COUNTS, write) for write in first)))
    assert (await shelf.counted("a"), await shelf.counted("b")) == ({"x": -1}, {"y": 1})

    await shelf.views.commit(shelf.move(fence, 5, 6, (COUNTS, Remove("a"))))

    assert (await shelf.counted("a"), await shelf.counted("b")) == ({}, {"y": 1})


async def test_a_key_goes_when_the_logs_time_has_come_whatever_the_clock_says(shelf: Shelf) -> None:
    """And never earlier than it was said before."""
    fence = await shelf.begun()
    facts: list[tuple[str, Write]] = [(COUNTS, Count("a", "x", 1)), (COUNTS, Expire("a", 100)), (COUNTS, Expire("a", 90))]
    await shelf.views.commit(shelf.move(fence, 0, 5, *facts, until_s=99))
    assert await shelf.counted("a") == {"x": 1}

    await shelf.views.commit(shelf.move(fence, 5, 6, until_s=100))

    assert await shelf.counted("a") == {}


async def test_a_view_that_a_generation_does_not_hold_is_not_written_to_it(shelf: Shelf) -> None:
    fence = await shelf.begun()
    move = shelf.move(fence, 0, 5, (COUNTS, Count("a", "x", 1)), (RANKS, Rank("a", "m", 1)))

    await shelf.views.commit(replace(move, fed=[Fed("g1", 0, frozenset({RANKS}))]))

    assert (await shelf.counted("a"), await shelf.ranked("a")) == ({}, [("m", 1)])
