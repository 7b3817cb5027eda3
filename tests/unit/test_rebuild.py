"""A rebuild reads, folds and writes at once: others have their turn meanwhile, and what fails leaves no gap."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from redis.exceptions import RedisError
from uuid_utils.compat import uuid7

from events.ending import end
from events.facts import JobFact
from events.memory import MemoryStore
from events.record import Recorded, StoredFact, read
from events.store import AppendUnit, NewFacts, StoreUnavailable, StreamHead
from projections import replay as module
from projections.job_views import JobViews, Terms, View
from projections.memory import MemoryGeneration, MemoryViews
from projections.replay import BIT, Rebuild, leading
from projections.table import PROJECTIONS
from projections.view_store import Move, Verdict
from projections.writes import Count, Write
from results.documents import MemoryDocuments
from tests.builders import (
    CAUSE,
    DOCUMENT,
    PING,
    RDAP,
    RULES,
    Clock,
    completed,
    counts,
    dispatched,
    failed,
    job_completed,
    memory_store,
    submitted,
)

PAGE = 3
TERMS = Terms(RULES, timedelta(days=9_999))


def count_facts(_recorded: Recorded, _job: JobViews) -> Iterable[Write]:
    return [Count("", "facts", 1)]


VIEWS = (*PROJECTIONS, View("counts", 1, of_fact=count_facts))


class Failing(MemoryViews):
    """The write of the n-th page fails; each write takes its time. `written` has where those came to that were made."""

    def __init__(self, clock: Clock, page: int) -> None:
        super().__init__(clock, uuid7)
        self._left = page
        self.written: list[int] = []

    async def commit_build(self, move: Move) -> Verdict:
        for _ in range(20):
            await asyncio.sleep(0)
        self._left -= 1
        if self._left == 0:
            raise OSError("the store of the views is away")
        verdict = await super().commit_build(move)
        self.written.append(move.position)
        return verdict


@dataclass
class Site:
    """A log, the answers that it tells of, and builders."""

    clock: Clock = field(default_factory=Clock)
    store: MemoryStore = field(default_factory=memory_store)
    documents: MemoryDocuments = field(default_factory=MemoryDocuments)

    async def happened(self, jobs: int) -> None:
        """So many jobs of five facts each. Those of three jobs take turns: pages begin in the middle of jobs."""
        for _ in range(jobs // 3):
            stories = [await self._story(uuid7()) for _ in range(3)]
            heads = dict.fromkeys(range(3), StreamHead())
            for step in range(5):
                for number, (job_id, facts) in enumerate(stories):
                    (heads[number],) = await self.store.append(
                        AppendUnit([NewFacts(job_id, heads[number], [facts[step]])], CAUSE)
                    )

    async def _story(self, job_id: UUID) -> tuple[UUID, list[JobFact]]:
        await self.documents.put(job_id, DOCUMENT)
        return job_id, [
            submitted(PING, RDAP, job_id=job_id),
            dispatched(PING, RDAP, job_id=job_id),
            completed(PING, job_id=job_id),
            failed(RDAP, job_id=job_id),
            job_completed(counts(succeeded=1, failed=1), job_id=job_id),
        ]

    @asynccontextmanager
    async def rebuilding(self, views: MemoryViews, page: int = PAGE) -> AsyncIterator[Rebuild]:
        async with leading(views) as fence:
            rebuild = Rebuild(fence, views, self.store, self.documents.get, VIEWS, TERMS, self.clock, page=page)
            await rebuild.open()
            yield rebuild

    async def built(self, goal: int) -> MemoryGeneration:
        """What comes out when nothing fails."""
        views = MemoryViews(self.clock, uuid7)
        async with self.rebuilding(views) as rebuild:
            await rebuild.build_up_to(goal)
            return views.generations[rebuild.name]


def contents(generation: MemoryGeneration) -> Mapping[str, Any]:
    assert generation.values
    assert generation.counts
    held = {name: getattr(generation, name) for name in ("values", "sets", "counts", "expiries", "checkpoint", "hash", "log_s")}
    return held | {"sets": {name: ranks for name, ranks in generation.sets.items() if ranks}}


async def test_others_have_their_turn_after_every_few_facts_of_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who leads the building renews the lease meanwhile; with a page at a time it would lose it."""
    site, done, since_a_turn = Site(), Counter[str](), [0]
    await site.happened(jobs=900)
    size = await site.store.head()

    def read_and_count(stored: StoredFact) -> Recorded:
        done["read"] += 1
        return read(stored)

    def fold_and_count(_recorded: Recorded, _job: JobViews) -> Iterable[Write]:
        done["folded"] += 1
        return ()

    async def take_turns() -> None:
        seen = 0
        while True:
            since_a_turn.append(done.total() - seen)
            seen = done.total()
            await asyncio.sleep(0)

    monkeypatch.setattr(module, "read", read_and_count)
    views = MemoryViews(site.clock, uuid7)
    turns = asyncio.create_task(take_turns())
    async with leading(views) as fence:
        counted = [View("counted", 1, of_fact=fold_and_count)]
        rebuild = Rebuild(fence, views, site.store, site.documents.get, counted, TERMS, site.clock, page=size)
        await rebuild.open()
        await rebuild.build_up_to(size)
    turns.cancel()

    assert done == {"read": size, "folded": size}
    assert max(since_a_turn) <= BIT < size


class Deaf(MemoryViews):
    """A renewal takes its time, and the first cancellation gets lost in it, as in redis-py's commands before Python 3.12."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock, uuid7)
        self.renewing = asyncio.Event()
        self._overheard = False

    async def renew(self, fence: str) -> bool:
        self.renewing.set()
        try:
            await asyncio.sleep(0.2)
        except asyncio.CancelledError:
            if self._overheard:
                raise
            self._overheard = True
        return await super().renew(fence)


async def test_who_has_led_is_done_though_a_renewal_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that went on for ever would keep every later replay from beginning, too."""
    monkeypatch.setattr(module, "RENEW_S", 0.01)
    views = Deaf(Clock())

    async def lead() -> None:
        async with leading(views):
            await views.renewing.wait()

    led = asyncio.create_task(lead())
    ended, _ = await asyncio.wait({led}, timeout=10)
    await end([led], 10)

    assert ended == {led}
    assert await views.lead_build() is not None


class Blinking(MemoryViews):
    """The store cannot be reached when the lead is renewed for the first time."""

    def __init__(self, clock: Clock, error: Exception) -> None:
        super().__init__(clock, uuid7)
        self._error = error
        self.renewals = 0
        self.renewed = asyncio.Event()

    async def renew(self, fence: str) -> bool:
        self.renewals += 1
        if self.renewals == 1:
            raise self._error
        self.renewed.set()
        return await super().renew(fence)


@pytest.mark.parametrize("error", [OSError("no route"), ConnectionError("closed"), RedisError("closed")], ids=repr)
async def test_a_lead_is_renewed_again_after_a_renewal_that_did_not_get_through(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """And who has built everything is not told at the end that a renewal had failed."""
    monkeypatch.setattr(module, "RENEW_S", 0.01)
    views = Blinking(Clock(), error)

    async with asyncio.timeout(30):
        async with leading(views):
            await views.renewed.wait()

    assert await views.lead_build() is not None


@pytest.mark.parametrize("page", [1, 3, 6])
async def test_nothing_is_written_behind_a_page_that_could_not_be(page: int) -> None:
    """What was folded meanwhile is folded again: the second try comes to what a clean one comes to."""
    site = Site()
    await site.happened(jobs=12)
    views = Failing(site.clock, page)

    head = await site.store.head()

    async with site.rebuilding(views) as rebuild:
        with pytest.raises(OSError, match="away"):
            await rebuild.build_up_to(head)
        reached = PAGE * (page - 1)
        assert max(views.written, default=0) == rebuild.position == views.generations[rebuild.name].checkpoint == reached

        for goal in (reached + PAGE, head):
            await rebuild.build_up_to(goal)
            assert contents(views.generations[rebuild.name]) == contents(await site.built(goal))


async def test_what_is_being_written_when_the_log_goes_away_is_written_before_the_rebuild_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who calls then knows where it stands, and may go on."""
    site = Site()
    await site.happened(jobs=12)
    views = Failing(site.clock, page=0)
    head, read_all = await site.store.head(), site.store.read_all

    async def read_two_pages(after: int, limit: int) -> Sequence[StoredFact]:
        if after == 2 * PAGE:
            raise StoreUnavailable("the log is away")
        return await read_all(after, limit)

    async with site.rebuilding(views) as rebuild:
        monkeypatch.setattr(site.store, "read_all", read_two_pages)
        with pytest.raises(StoreUnavailable):
            await rebuild.build_up_to(head)
        assert rebuild.position == views.generations[rebuild.name].checkpoint == 2 * PAGE
        monkeypatch.undo()

        await rebuild.build_up_to(head)

        assert contents(views.generations[rebuild.name]) == contents(await site.built(head))
