"""A projector follows the bus until it is cancelled, though a cancellation was lost, or until building new views fails."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import pytest
from uuid_utils.compat import uuid7

from events.bus import FACTS
from events.ending import end
from events.log_tail import LogTail
from events.memory import MemoryBus, MemoryInbox, MemoryStore
from events.record import StoredFact
from events.wire import cloud_events, stretch_headers
from projections import projector as module
from projections.memory import MemoryViews
from projections.projector import Projector
from projections.table import PROJECTIONS
from projections.view_store import Move, Verdict
from results.documents import MemoryDocuments
from tests.builders import PING, RULES, Clock, dispatched, eventually, given, memory_store, remember, submitted

PATIENCE_S = 10.0
RETENTION = timedelta(hours=24)
NEWER = [replace(view, version=view.version + 1) for view in PROJECTIONS]


class Deaf(MemoryViews):
    """Loses the cancellation that comes while it commits, once: so does redis-py before Python 3.12."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock, uuid7)
        self.is_deaf = asyncio.Event()
        self.committing = asyncio.Event()
        self.lost = 0

    async def commit(self, move: Move) -> Verdict:
        if self.is_deaf.is_set() and not self.lost:
            self.committing.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.lost += 1
        return await super().commit(move)

    async def lead_build(self) -> str | None:
        raise OSError("the store of the new views is gone")


@dataclass
class Site:
    """A projector and what it works with, all in memory."""

    clock: Clock = field(default_factory=Clock)
    store: MemoryStore = field(default_factory=memory_store)
    bus: MemoryBus = field(default_factory=MemoryBus)
    tail: LogTail = field(default_factory=LogTail)

    def __post_init__(self) -> None:
        self.views = Deaf(self.clock)

    def projector(self) -> Projector:
        documents = MemoryDocuments()
        return Projector(self.views, self.store, documents, self.bus, RULES, RETENTION, self.clock, tail=self.tail)

    def checkpoint(self) -> int:
        live = self.views.live()
        return live.checkpoint or 0 if live else 0

    async def begin_job(self) -> list[StoredFact]:
        """A job begins; gives its two facts."""
        head = await self.store.head()
        job_id = uuid7()
        await given(self.store, submitted(PING, job_id=job_id), dispatched(PING, job_id=job_id), job_id=job_id)
        return [*await self.store.read_all(head, 2)]

    @asynccontextmanager
    async def following(self) -> AsyncIterator["asyncio.Task[None]"]:
        """A projector that has caught up and waits for the bus."""
        task = asyncio.create_task(self.projector().run())
        try:
            await self.is_followed()
            yield task
        finally:
            self.views.is_deaf.clear()
            await end([task], PATIENCE_S)

    async def is_followed(self) -> None:
        await eventually(lambda: takers() == 1)
        assert takers() == 1


def takers() -> int:
    """Tasks that wait for what an inbox brings."""
    return sum(getattr(task.get_coro(), "__qualname__", "") == MemoryInbox.take.__qualname__ for task in asyncio.all_tasks())


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(module, "TICK_S", 0.01)
    return Site()


async def told(site: Site) -> None:
    """A job begins, and the bus brings its facts."""
    facts = await site.begin_job()
    await site.bus.publish(FACTS, cloud_events(facts, "/lookup/test"), stretch_headers(0, 2))


async def ends(task: "asyncio.Task[None]") -> None:
    """With nothing left that would take what the next projector has to be brought."""
    await asyncio.wait([task], timeout=PATIENCE_S)
    assert task.done()
    await asyncio.sleep(0)
    assert takers() == 0


async def test_who_follows_ends_when_it_is_cancelled_and_takes_nothing_more(site: Site) -> None:
    async with site.following() as task:
        task.cancel()

        await ends(task)
        assert task.cancelled()


@pytest.mark.parametrize("at_work_on", ["what the bus brings", "the log"])
async def test_who_lost_a_cancellation_ends_with_the_next_one(
    site: Site, monkeypatch: pytest.MonkeyPatch, at_work_on: str
) -> None:
    if at_work_on == "what the bus brings":
        monkeypatch.setattr(module, "TICK_S", PATIENCE_S)
    async with site.following() as task:
        site.views.is_deaf.set()
        if at_work_on == "what the bus brings":
            await told(site)
        async with asyncio.timeout(PATIENCE_S):
            await site.views.committing.wait()
        task.cancel()
        await eventually(lambda: site.views.lost == 1)
        assert not task.done()

        task.cancel()

        await ends(task)
        assert task.cancelled()


async def test_a_projector_whose_building_fails_ends_with_that_error(site: Site) -> None:
    """Else the views of the new version would never come, and nobody would be told."""
    async with site.following():
        pass
    site.views.end_lead()
    newer = replace(site.projector(), table=NEWER, generations=site.views)

    task = asyncio.create_task(newer.run())
    try:
        await ends(task)
    finally:
        await end([task], PATIENCE_S)

    with pytest.raises(OSError, match="the store of the new views is gone"):
        await task


async def test_what_this_process_appended_is_folded_when_it_is_released(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the broker, and before the log is read again."""
    monkeypatch.setattr(module, "TICK_S", 600.0)
    async with site.following():
        remember(site.tail, await site.begin_job())
        remember(site.tail, await site.begin_job())

        site.tail.release(2)
        await eventually(lambda: site.checkpoint() == 2)
        site.tail.release(4)
        await eventually(lambda: site.checkpoint() == 4)


async def test_who_is_told_by_neighbours_all_the_time_reads_the_log_all_the_same(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may have appended what the silent broker does not bring."""

    async def happens_always(_: asyncio.Event, _within_s: float) -> bool:
        await asyncio.sleep(0)
        return True

    monkeypatch.setattr(module, "happens_within", happens_always)
    async with site.following():
        await site.begin_job()
        await eventually(lambda: site.checkpoint() == 2)
