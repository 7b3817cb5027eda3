"""Views rebuilt beside what is shown, on a real Redis: the same bytes, never backwards, and who is interrupted goes on."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from redis.asyncio import Redis
from uuid_utils.compat import uuid7

from app.replaying import OUTRUN, _told
from events.ending import end
from events.facts import JobFact
from projections import replay as module
from projections.comparison import ADDED, CHANGED, GONE, SAME, Comparer, Differences, NotAtRest
from projections.generations import RedisGenerations, Step
from projections.job_views import JobViews, Terms, View
from projections.projector import Projector
from projections.replay import CannotReplay, Progress, Rebuild, leading, roll_back
from projections.table import PROJECTIONS
from projections.view_store import RedisViews, Standing
from projections.views import DEADLINES, JOB_STATUS, Keys
from projections.writes import Count, Put, Write
from tests.builders import PING, RULES, submitted
from tests.integration.test_projector import PATIENCE_S, RETENTION, Views, _utc_now, interleaved, rolled_back, story

KEYS = Keys()
TERMS = Terms(RULES, RETENTION)
KEEP = timedelta(minutes=10)


class Site(Views):
    """A log, a Redis, projectors and rebuilds between them."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self.generations = RedisGenerations(redis)
        self.comparer = Comparer(redis, KEYS)

    def rebuild(self, fence: str, views: Sequence[View] = PROJECTIONS, page: int = 7) -> Rebuild:
        return Rebuild(fence, self.generations, self.store, self.documents.get, views, TERMS, _utc_now, page=page)

    @asynccontextmanager
    async def rebuilding(self, views: Sequence[View] = PROJECTIONS, page: int = 7) -> AsyncIterator[Rebuild]:
        async with leading(self.generations) as fence:
            yield self.rebuild(fence, views, page)

    async def replayed(self, views: Sequence[View] = PROJECTIONS, keep: timedelta = KEEP) -> Rebuild:
        async with self.rebuilding(views) as rebuild:
            await rebuild.open()
            await rebuild.build()
            await rebuild.show(keep)
            return rebuild

    def projector_of(self, table: Sequence[View]) -> Projector:
        """A projector of another version of the program."""
        return replace(self.projector(), table=table, generations=self.generations)

    async def standing(self) -> Standing:
        return await RedisViews(self.redis).standing()

    async def digest(self, views: Sequence[View] = PROJECTIONS) -> str:
        """Of what is shown."""
        live = (await self.standing()).live
        return (await self.comparer.digest({view.name: live[view.name] for view in views})).hex

    async def keys(self) -> set[bytes]:
        return {key async for key in self.redis.scan_iter("*")}


@pytest.fixture
async def site(redis_url: str) -> AsyncIterator[Site]:
    async with Redis.from_url(redis_url) as redis:
        yield Site(redis)


def is_none(found: dict[str, Differences]) -> bool:
    return all(differences.is_none for differences in found.values())


# --- The same bytes ---------------------------------------------------------------------------------------------------


async def test_a_replay_gives_the_same_bytes_twice_and_after_everything_was_lost(site: Site) -> None:
    _, facts = interleaved(9)
    await site.happened(*facts)
    await site.caught_up()
    before = await site.digest()

    await site.replayed()
    first = await site.digest()
    await site.redis.flushdb()
    await site.replayed()

    assert before == first == await site.digest()
    await site.all_are_the_fold_of_their_facts()


@pytest.mark.parametrize("at", [1, 13, 29, 53])
async def test_the_same_bytes_come_out_from_a_checkpoint_in_the_middle(site: Site, at: int) -> None:
    _, facts = interleaved(9)
    await site.happened(*facts)
    await site.caught_up()
    before = await site.digest()
    async with site.rebuilding() as half:
        await half.open()
        await half.build_up_to(at)
        assert half.position == at

    rebuild = await site.replayed()

    assert rebuild.resumed
    assert rebuild.folded == len(facts) - at
    assert await site.digest() == before


async def test_what_the_log_does_not_say_is_found_and_put_right(site: Site) -> None:
    job_ids, facts = interleaved(4)
    await site.happened(*facts)
    await site.caught_up()
    live = await site.generation()
    unknown = uuid7()
    await site.redis.set(KEYS.job(live, job_ids[0]), b"24\n{}")
    await site.redis.delete(KEYS.job(live, job_ids[1]))
    await site.redis.set(KEYS.job(live, unknown), b"1\n{}")

    async with site.rebuilding() as rebuild:
        await rebuild.open()
        await rebuild.build()
        found = await site.comparer.compare((await site.standing()).live, rebuild.name)
        await rebuild.show(KEEP)

    assert found[JOB_STATUS].counts == {SAME: 2, CHANGED: 1, ADDED: 1, GONE: 1}
    samples = {CHANGED: [str(job_ids[0])], ADDED: [str(job_ids[1])], GONE: [str(unknown)]}
    assert found[JOB_STATUS].samples == samples
    assert found[DEADLINES].is_none
    await site.all_are_the_fold_of_their_facts()


async def test_large_sorted_sets_are_compared_and_digested_range_by_range(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("projections.comparison.RANGE", 3)
    await site.happened(*(submitted(PING, job_id=uuid7(), when=_utc_now()) for _ in range(10)))
    await site.caught_up()
    before = await site.digest()
    async with site.rebuilding() as rebuild:
        await rebuild.open()
        await rebuild.build()
        live = (await site.standing()).live
        assert is_none(await site.comparer.compare(live, rebuild.name))

        list_of = KEYS.deadlines(live[DEADLINES])
        await site.redis.zadd(list_of, {str(uuid7()): 9_999_999_999_999})

        found = await site.comparer.compare(live, rebuild.name)
    assert found[DEADLINES].counts == {SAME: 0, CHANGED: 1, ADDED: 0, GONE: 0}
    assert await site.digest() != before


# --- Beside what is shown ---------------------------------------------------------------------------------------------


async def test_while_it_is_built_and_shown_the_projector_goes_on_and_nothing_goes_back(site: Site) -> None:
    """Facts come between all steps. At each of them what is shown is the fold of the facts up to its checkpoint."""
    job_ids, facts = interleaved(12)
    more = iter([facts[first : first + 4] for first in range(20, len(facts), 4)])
    await site.happened(*facts[:20])
    leader = await site.caught_up()
    seen: dict[UUID, int] = {}

    async def look() -> None:
        for job_id in job_ids:
            shown = await site.shown(job_id)
            if shown is not None:
                position = int(shown.partition(b"\n")[0])
                assert position >= seen.get(job_id, 0)
                seen[job_id] = position

    async def go_on() -> None:
        await look()
        before = await site.store.head()
        await site.happened(*next(more))
        await leader.project([await site.stretch(before, await site.store.head())])
        await look()
        await site.all_are_the_fold_of_their_facts()

    async with site.rebuilding() as rebuild:
        await rebuild.open()
        await rebuild.build_up_to(9)
        await go_on()
        await rebuild.build()
        await go_on()
        assert is_none(await site.comparer.compare((await site.standing()).live, rebuild.name))
        await rebuild.show(KEEP)
        await go_on()
        await roll_back(rebuild.fence, site.generations, PROJECTIONS, KEEP, _utc_now())
        await go_on()
    assert seen


async def test_a_replay_is_no_warning_to_the_projector_and_views_that_were_lost_are(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """Both times it finds the views otherwise than it left them: once by intent, once by a loss."""
    caplog.set_level(logging.INFO, "projections.projector")
    await site.happened(*story(uuid7()))
    leader = await site.caught_up()
    caplog.clear()

    await site.replayed()
    await leader.catch_up()
    by_intent = _levels(caplog)
    await rolled_back(site, to=2)
    await leader.catch_up()  # Finds it out,
    await leader.catch_up()  # and folds what was lost.

    assert by_intent == ["INFO"]
    assert _levels(caplog) == ["INFO", "WARNING"]
    await site.all_are_the_fold_of_their_facts()


def _levels(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.levelname for record in caplog.records if "not where we left them" in record.getMessage()]


async def test_views_that_are_ahead_wait_until_the_projector_has_come_there(site: Site) -> None:
    """It is slow, or dead: then the new views are built past it, and shown, and it finds its way from where it stood."""
    _, facts = interleaved(8)
    await site.happened(*facts[:11])
    leader = await site.caught_up()
    await site.happened(*facts[11:])
    async with site.rebuilding() as rebuild:
        await rebuild.open()
        await rebuild.build_up_to(29)
        rebuild._folder.forget()
        await rebuild.build()
        assert rebuild.position == 29
        await rebuild.show(KEEP)
    assert await site.checkpoint() == 29

    await leader.catch_up()

    assert {one.checkpoint for one in (await site.standing()).fed} == {len(facts)}
    await site.all_are_the_fold_of_their_facts()
    async with leading(site.generations) as fence:
        await roll_back(fence, site.generations, PROJECTIONS, KEEP, _utc_now())
    await site.all_are_the_fold_of_their_facts()


async def test_nothing_is_rolled_back_to_what_is_behind(site: Site) -> None:
    _, facts = interleaved(8)
    await site.happened(*facts[:11])
    await site.caught_up()
    await site.happened(*facts[11:])
    async with site.rebuilding() as rebuild:
        await rebuild.open()
        await rebuild.build_up_to(29)
        await rebuild.build()
        await rebuild.show(KEEP)

        with pytest.raises(CannotReplay, match="behind"):
            await roll_back(rebuild.fence, site.generations, PROJECTIONS, KEEP, _utc_now())

    assert await site.checkpoint() == 29


class Growing(RedisGenerations):
    """What is shown moves on by so many facts each time that a builder believes to be there."""

    def __init__(self, site: Site, leader: Projector, more: list[int]) -> None:
        super().__init__(site.redis)
        self.site, self.leader, self.more = site, leader, more

    async def attach(self, fence: str, generation: str, until_ms: int) -> Step:
        if self.more:
            await self.site.happened(*_submissions(self.more.pop(0)))
            await self.leader.catch_up()
        return await super().attach(fence, generation, until_ms)


@pytest.mark.parametrize(
    ("more", "outrun"),
    [([25, 30], [False, True, True]), ([15, 10], [False, False, False]), ([6, 7], [False, False, False])],
)
async def test_a_rate_below_what_comes_in_is_told(site: Site, more: list[int], outrun: list[bool]) -> None:
    """Within a page it catches up whatever comes."""
    await site.happened(*_submissions(20 if more[0] > 7 else 5))
    leader = await site.caught_up()
    told: dict[int, Progress] = {}
    async with site.rebuilding() as rebuild:
        rebuild.generations = Growing(site, leader, list(more))
        rebuild.tell = lambda progress: told.update({progress.goal: progress})
        await rebuild.open()
        await rebuild.build()

    assert [progress.outrun for progress in told.values()] == outrun
    assert [progress.left_s is None for progress in told.values()] == outrun
    assert [_told(progress).endswith(OUTRUN) for progress in told.values()] == outrun


async def test_a_rate_is_held_until_the_last_page(site: Site) -> None:
    await site.happened(*_submissions(21))
    await site.caught_up()
    async with site.rebuilding() as rebuild:
        await rebuild.open()
        rebuild.rate = 14
        began = time.monotonic()
        await rebuild.build()

    assert time.monotonic() - began >= 2 * 7 / 14


async def test_the_last_page_before_what_is_shown_is_not_held_up(site: Site) -> None:
    await site.happened(*_submissions(7))
    await site.caught_up()
    async with site.rebuilding() as rebuild, asyncio.timeout(PATIENCE_S):
        await rebuild.open()
        rebuild.rate = 0.001
        await rebuild.build()

    assert rebuild.folded == 7


def _submissions(jobs: int) -> list[JobFact]:
    return [submitted(PING, job_id=uuid7(), when=_utc_now()) for _ in range(jobs)]


async def test_one_view_alone_is_replayed_and_the_others_stay_where_they_are(site: Site) -> None:
    _, facts = interleaved(5)
    await site.happened(*facts)
    leader = await site.caught_up()
    before = dict((await site.standing()).live)
    job_status = [view for view in PROJECTIONS if view.name == JOB_STATUS]

    rebuild = await site.replayed(job_status, keep=timedelta(0))
    await site.happened(*story(uuid7()))
    await leader.catch_up()
    await leader.catch_up()

    standing = await site.standing()
    assert standing.live == before | {JOB_STATUS: rebuild.name}
    assert {one.name: set(one.views) for one in standing.fed} == {
        rebuild.name: {JOB_STATUS},
        before[DEADLINES]: {view.name for view in PROJECTIONS} - {JOB_STATUS},
    }
    assert not [key for key in await site.keys() if key.startswith(f"views:{{0}}:{before[JOB_STATUS]}:job_status".encode())]
    await site.all_are_the_fold_of_their_facts()


async def test_a_kept_generation_goes_when_its_time_is_over_and_leaves_no_key(site: Site) -> None:
    _, facts = interleaved(5)
    await site.happened(*facts)
    leader = await site.caught_up()
    old = await site.generation()

    await site.replayed(keep=timedelta(0))
    await leader.catch_up()  # Finds the time over,
    await leader.catch_up()  # and removes.

    assert not [key for key in await site.keys() if old.encode() in key]
    with pytest.raises(CannotReplay, match="Nothing is kept"):
        async with leading(site.generations) as fence:
            await roll_back(fence, site.generations, PROJECTIONS, KEEP, _utc_now())
    await site.all_are_the_fold_of_their_facts()


async def test_a_replay_that_died_when_it_was_attached_is_gone_on_with_or_forgotten(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, facts = interleaved(5)
    await site.happened(*facts)
    leader = await site.caught_up()
    async with site.rebuilding() as dead:
        await dead.open()
        await dead.build()
    rebuild = await site.replayed()
    assert (rebuild.name, rebuild.resumed, rebuild.folded) == (dead.name, True, 0)

    monkeypatch.setattr(module, "ATTACHED_FOR", timedelta(0))
    async with site.rebuilding() as forgotten:
        await forgotten.open()
        await forgotten.build()
    for _ in range(3):
        await leader.catch_up()

    assert not [key for key in await site.keys() if forgotten.name.encode() in key]
    await site.all_are_the_fold_of_their_facts()


async def test_two_replays_at_once_are_one_and_a_refusal(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUILD_LEASE_MS", 200)
    async with site.rebuilding():
        with pytest.raises(CannotReplay, match="Another replay is under way"):
            async with site.rebuilding():
                pass


async def test_a_replay_whose_page_took_longer_than_its_lease_goes_on_if_nobody_has_begun_meanwhile(site: Site) -> None:
    _, facts = interleaved(5)
    await site.happened(*facts)
    await site.caught_up()
    async with site.rebuilding() as slow:
        await slow.open()
        await slow.build_up_to(9)
        await site.redis.delete(KEYS.builder)

        await slow.build_up_to(20)

        assert slow.position == 20
        assert await site.generations.lead_build() is None
        await slow.build()
        await slow.show(KEEP)
    await site.all_are_the_fold_of_their_facts()


async def test_a_replay_that_fell_silent_for_too_long_changes_nothing_any_more(site: Site) -> None:
    _, facts = interleaved(5)
    await site.happened(*facts)
    await site.caught_up()
    async with site.rebuilding() as frozen:
        await frozen.open()
        await frozen.build_up_to(9)
        await site.redis.delete(KEYS.builder)
        async with site.rebuilding() as next_one:
            await next_one.open()
            assert next_one.name == frozen.name
            await next_one.build_up_to(15)

            for step in (frozen.build_up_to(20), frozen.build(), frozen.show(KEEP), frozen.drop()):
                with pytest.raises(CannotReplay, match="Another replay"):
                    await step

            await next_one.build()
            await next_one.show(KEEP)
    await site.all_are_the_fold_of_their_facts()


@pytest.mark.parametrize("when", ["half-built", "attached"])
async def test_a_redis_that_is_wiped_under_a_replay_ends_it_and_heals_all_the_same(site: Site, when: str) -> None:
    _, facts = interleaved(5)
    await site.happened(*facts)
    leader = await site.caught_up()
    async with site.rebuilding() as rebuild:
        await rebuild.open()
        await (rebuild.build() if when == "attached" else rebuild.build_up_to(9))
        await site.redis.flushdb()
        with pytest.raises(CannotReplay):
            await (rebuild.show(KEEP) if when == "attached" else rebuild.build())
    await leader.catch_up()
    await leader.catch_up()
    await site.all_are_the_fold_of_their_facts()


async def test_a_digest_of_views_that_move_meanwhile_is_none(site: Site) -> None:
    await site.happened(*story(uuid7()))
    leader = await site.caught_up()

    class Moving(Comparer):
        async def _checkpoints(self, shown: Any) -> list[int]:
            found = await super()._checkpoints(shown)
            await site.happened(*story(uuid7()))
            await leader.catch_up()
            return found

    with pytest.raises(NotAtRest):
        await Moving(site.redis, KEYS).digest((await site.standing()).live)


# --- A view whose code has changed ------------------------------------------------------------------------------------


def shouting(job: JobViews) -> list[Write]:
    """Another version of `job_status`, and easily told from the first."""
    return [Put(str(job.status.job_id), b"%d\nNEW" % job.position)]


def counting(name: str, by: int) -> Any:
    return lambda _recorded, _job: [Count("", name, by)]


OLD_TABLE = (*PROJECTIONS, View("counts", 1, of_fact=counting("facts", 1)))
NEW_TABLE = (
    *(replace(view, version=view.version + 1, of_job=shouting) if view.name == JOB_STATUS else view for view in PROJECTIONS),
    View("counts", 2, of_fact=counting("facts", 10)),
    View("more", 1, of_fact=counting("more", 1)),
)


async def test_a_view_whose_code_has_changed_is_built_beside_the_old_one_which_answers_meanwhile(site: Site) -> None:
    job_ids, facts = interleaved(6)
    await site.happened(*facts[:30])
    await _led(site, OLD_TABLE)
    old = await site.generation()
    await site.lead_ends()
    held = asyncio.Event()
    held_back = Held(site.redis, held)
    projector = replace(site.projector_of(NEW_TABLE), generations=held_back)

    task = asyncio.create_task(projector.run())
    try:
        await held_back.asked.wait()
        await site.happened(*facts[30:])
        await _until(lambda: _shows_all(site))
        assert await site.generation() == old
        told = (await site.standing()).of(JOB_STATUS)
        assert told is not None
        assert told.views[JOB_STATUS] == "2.3"
        held.set()
        await _until(lambda: _is_built(site, NEW_TABLE))
    finally:
        await end([task], PATIENCE_S)

    for job_id in job_ids:
        assert (await site.shown(job_id) or b"").endswith(b"\nNEW")
    live = (await site.standing()).live
    counts: Any = await site.redis.hgetall(KEYS.key(live["counts"], "counts"))
    assert counts == {b"facts": b"360"}
    assert {one.name for one in (await site.standing()).fed} == set(live.values())


async def test_who_goes_back_to_the_old_version_does_not_believe_what_the_new_one_went_on_with(site: Site) -> None:
    """The new version began, and was taken back before it had built anything."""
    job_ids, facts = interleaved(6)
    await site.happened(*facts[:20])
    await _led(site, OLD_TABLE)
    await site.lead_ends()
    await site.happened(*facts[20:])
    await _led(site, NEW_TABLE)
    await site.lead_ends()

    task = asyncio.create_task(site.projector_of(OLD_TABLE).run())
    try:
        await _until(lambda: _is_built(site, OLD_TABLE))
    finally:
        await end([task], PATIENCE_S)

    await site.all_are_the_fold_of_their_facts()
    live = (await site.standing()).live
    assert await site.redis.hgetall(KEYS.key(live["counts"], "counts")) == {b"facts": b"36"}
    assert len(job_ids) == 6


class Held(RedisGenerations):
    """Building waits for somebody."""

    def __init__(self, redis: Redis, held: asyncio.Event) -> None:
        super().__init__(redis)
        self._held = held
        self.asked = asyncio.Event()

    async def lead_build(self) -> str | None:
        self.asked.set()
        await self._held.wait()
        return await super().lead_build()


async def _led(site: Site, table: Sequence[View]) -> None:
    """A projector of this table leads once, and falls silent."""
    projector = site.projector_of(table)
    await projector._become_leader()
    projector._log_id = str(await site.store.log_id())
    await projector._take_over()
    await projector.catch_up()


async def _shows_all(site: Site) -> bool:
    """Every job is shown as of its last fact, whichever version wrote it."""
    for job_id in site._heads:
        shown = await site.shown(job_id)
        if shown is None or int(shown.partition(b"\n")[0]) != site._heads[job_id].position:
            return False
    return True


async def _is_built(site: Site, table: Sequence[View]) -> bool:
    standing = await site.standing()
    for view in table:
        shown = standing.of(view.name)
        if shown is None or shown.views[view.name] != str(view.version) or shown.checkpoint != await site.store.head():
            return False
    return not standing.kept


async def _until(holds: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await holds():  # noqa: ASYNC110 - a store sets no event
            await asyncio.sleep(0.02)
