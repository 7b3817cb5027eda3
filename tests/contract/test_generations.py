"""What the store of the views promises to those who build generations: the same suite for Redis and the in-memory twin."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
from redis.asyncio import Redis
from uuid_utils.compat import uuid7

from projections.folding import Folded
from projections.generations import GenerationStore, RedisGenerations, Step
from projections.memory import MemoryViews
from projections.replay import BUILT
from projections.view_store import Change, Fed, Move, RedisViews, Standing, Verdict, ViewStore
from projections.views import DEADLINES, JOB_STATUS
from projections.writes import Put

LOG = "log-1"
VIEWS = {JOB_STATUS: 2, DEADLINES: 1}
LATER_MS = 9_000_000_000_000


@dataclass
class Shelf:
    """Both ends of a view store: a projector's, which leads and has begun `g1`, and a builder's."""

    views: ViewStore
    generations: GenerationStore
    redis: Redis | None
    fence: str = ""
    building: str = ""

    async def begun(self) -> "Shelf":
        fence = await self.views.lead()
        assert fence is not None
        assert await self.views.begin(fence, "g1", LOG, VIEWS)
        building = await self.generations.lead_build()
        assert building is not None
        self.fence, self.building = fence, building
        return self

    async def built(self, name: str, position: int, *, log: str = LOG) -> None:
        assert await self.generations.begin_build(self.building, name, log, VIEWS) is Step.OK
        assert await self.build(name, 0, position, log=log) is Verdict.OK

    async def build(self, name: str, stood_at: int, position: int, *, log: str = LOG) -> Verdict:
        move = self.move(self.building, BUILT, {name: stood_at}, stood_at, position, log=log)
        return await self.generations.commit_build(move)

    async def commit(self, stood_at: int, position: int, **fed: int) -> Verdict:
        """The projector moves what it is told of from one position to another."""
        roster = (await self.views.standing()).roster
        return await self.views.commit(self.move(self.fence, roster, fed, stood_at, position))

    def move(self, fence: str, roster: str, fed: dict[str, int], stood_at: int, position: int, *, log: str = LOG) -> Move:
        return Move(
            fence=fence,
            roster=roster,
            log_id=log,
            fed=[Fed(name, checkpoint, frozenset(VIEWS)) for name, checkpoint in fed.items()],
            stood_at=stood_at,
            position=position,
            hash="ab",
            complete=True,
            caught_up_ms=position,
            checked_ms=position,
            folded=Folded({JOB_STATUS: [Put("job", b"%d" % position)]}),
        )

    async def standing(self) -> Standing:
        return await self.views.standing()

    async def checkpoints(self) -> dict[str, int | None]:
        standing = await self.standing()
        return {one.name: one.checkpoint for one in (*standing.fed, *standing.built)}

    async def attach(self, name: str) -> Step:
        return await self.generations.attach(self.building, name, LATER_MS)

    async def show(self, name: str) -> Step:
        return await self.generations.show(self.building, dict.fromkeys(VIEWS, name), LATER_MS)

    async def silent(self) -> None:
        """What time does to the lease of a builder that fell silent."""
        if self.redis is not None:
            await self.redis.delete("views:{0}:builder")
        else:
            assert isinstance(self.generations, MemoryViews)
            self.generations._builds_until_ms = 0


@pytest.fixture(params=["memory", "redis"])
async def shelf(request: pytest.FixtureRequest) -> AsyncIterator[Shelf]:
    if request.param == "memory":
        views = MemoryViews(lambda: datetime.now(UTC), uuid7)
        yield await Shelf(views, views, None).begun()
        return
    async with Redis.from_url(request.getfixturevalue("redis_url")) as redis:
        yield await Shelf(RedisViews(redis), RedisGenerations(redis), redis).begun()


async def test_one_builds_until_its_lease_ends_and_is_fenced_off_then(shelf: Shelf) -> None:
    await shelf.built("g2", 5)
    assert await shelf.generations.lead_build() is None

    await shelf.silent()
    assert await shelf.generations.lead_build() is not None

    assert await shelf.build("g2", 5, 6) is Verdict.FENCED
    assert not await shelf.generations.renew(shelf.building)
    assert await shelf.generations.begin_build(shelf.building, "g3", LOG, VIEWS) is Step.FENCED
    assert await shelf.attach("g2") is Step.FENCED
    assert await shelf.show("g2") is Step.FENCED
    assert await shelf.generations.drop(shelf.building, "g2") is Step.FENCED
    assert await shelf.checkpoints() == {"g1": 0, "g2": 5}


async def test_who_is_done_lets_the_next_one_in_at_once(shelf: Shelf) -> None:
    await shelf.generations.end_build("somebody else's")
    assert await shelf.generations.lead_build() is None

    await shelf.generations.end_build(shelf.building)

    assert await shelf.generations.lead_build() is not None


async def test_what_is_built_is_neither_shown_nor_fed(shelf: Shelf) -> None:
    await shelf.built("g2", 5)

    standing = await shelf.standing()

    assert set(standing.live.values()) == {"g1"}
    assert [one.name for one in standing.fed] == ["g1"]
    assert [(one.name, one.checkpoint, one.views) for one in standing.built] == [("g2", 5, {JOB_STATUS: "2", DEADLINES: "1"})]


async def test_a_builder_moves_from_where_the_generation_stands_or_not_at_all(shelf: Shelf) -> None:
    await shelf.built("g2", 5)

    assert await shelf.build("g2", 4, 6) is Verdict.CHECKPOINT
    assert await shelf.build("g2", 5, 6, log="another") is Verdict.CHECKPOINT
    assert await shelf.build("g3", 0, 6) is Verdict.GENERATION
    assert (await shelf.checkpoints())["g2"] == 5


async def test_what_is_behind_what_is_shown_is_not_attached(shelf: Shelf) -> None:
    await shelf.commit(0, 6, g1=0)
    await shelf.built("g2", 5)
    assert await shelf.attach("g2") is Step.BEHIND

    await shelf.build("g2", 5, 6)

    assert await shelf.attach("g2") is Step.OK
    assert {one.name for one in (await shelf.standing()).fed} == {"g1", "g2"}


async def test_the_builder_cannot_write_to_what_is_attached(shelf: Shelf) -> None:
    await shelf.built("g2", 5)
    assert await shelf.attach("g2") is Step.OK

    assert await shelf.build("g2", 5, 6) is Verdict.GENERATION
    assert await shelf.attach("g2") is Step.GONE


async def test_a_projector_that_does_not_know_what_was_attached_moves_nothing(shelf: Shelf) -> None:
    await shelf.built("g2", 5)
    before = (await shelf.standing()).roster
    await shelf.attach("g2")

    stale = shelf.move(shelf.fence, before, {"g1": 0}, 0, 5)

    assert await shelf.views.commit(stale) is Verdict.GENERATION
    assert await shelf.checkpoints() == {"g1": 0, "g2": 5}


async def test_what_is_ahead_is_passed_by_until_the_others_have_come_there(shelf: Shelf) -> None:
    await shelf.built("g2", 5)
    await shelf.attach("g2")

    assert await shelf.commit(0, 5, g1=0, g2=5) is Verdict.OK
    assert await shelf.checkpoints() == {"g1": 5, "g2": 5}
    assert await shelf.commit(5, 7, g1=5, g2=5) is Verdict.OK
    assert await shelf.checkpoints() == {"g1": 7, "g2": 7}


async def test_nothing_is_shown_that_is_behind_what_is_shown(shelf: Shelf) -> None:
    await shelf.built("g2", 5)
    await shelf.attach("g2")
    assert await shelf.show("g2") is Step.OK  # It is ahead.
    assert await shelf.generations.show(shelf.building, {JOB_STATUS: "g1"}, LATER_MS) is Step.BEHIND

    await shelf.commit(0, 5, g1=0, g2=5)

    assert await shelf.generations.show(shelf.building, {JOB_STATUS: "g1"}, LATER_MS) is Step.OK
    assert (await shelf.standing()).live == {JOB_STATUS: "g1", DEADLINES: "g2"}


async def test_what_was_shown_before_is_fed_and_kept(shelf: Shelf) -> None:
    await shelf.built("g2", 5)
    await shelf.attach("g2")
    assert set((await shelf.standing()).kept) == {("g2", JOB_STATUS), ("g2", DEADLINES)}

    await shelf.show("g2")

    standing = await shelf.standing()
    assert standing.kept == {("g1", JOB_STATUS): LATER_MS, ("g1", DEADLINES): LATER_MS}
    assert standing.before == dict.fromkeys(VIEWS, "g1")
    assert {one.name for one in standing.fed} == {"g1", "g2"}


async def test_what_is_not_fed_or_does_not_hold_a_view_is_not_shown(shelf: Shelf) -> None:
    await shelf.built("g2", 5)

    assert await shelf.show("g2") is Step.GONE
    assert await shelf.generations.show(shelf.building, {"another": "g1"}, LATER_MS) is Step.GONE


async def test_the_new_views_know_all_that_the_shown_ones_knew(shelf: Shelf) -> None:
    """Who asks is told no 404, and no older `caught_up_ms`, by what was shown a moment later."""
    await shelf.commit(0, 5, g1=0)
    assert await shelf.generations.begin_build(shelf.building, "g2", LOG, VIEWS) is Step.OK
    move = shelf.move(shelf.building, BUILT, {"g2": 0}, 0, 5)
    incomplete = Move(**{name: getattr(move, name) for name in move.__slots__} | {"complete": False, "caught_up_ms": 1})
    assert await shelf.generations.commit_build(incomplete) is Verdict.OK

    await shelf.attach("g2")

    (g2,) = [one for one in (await shelf.standing()).fed if one.name == "g2"]
    assert g2.complete


async def test_a_view_that_is_retired_leaves_its_generation_and_the_last_one_takes_it_along(shelf: Shelf) -> None:
    await shelf.built("g2", 5)
    await shelf.attach("g2")
    await shelf.show("g2")
    roster = (await shelf.standing()).roster

    assert await shelf.views.arrange(shelf.fence, roster, [Change(Change.RETIRE, "g1", JOB_STATUS)]) is Verdict.OK
    standing = await shelf.standing()
    assert [one.views for one in standing.fed if one.name == "g1"] == [{DEADLINES: "1"}]
    assert (set(standing.kept), set(standing.before)) == ({("g1", DEADLINES)}, {DEADLINES})

    changes = [Change(Change.RETIRE, "g1", DEADLINES), Change(Change.RETIRE, "g2", DEADLINES)]
    assert await shelf.views.arrange(shelf.fence, standing.roster, changes) is Verdict.OK

    standing = await shelf.standing()
    assert [(one.name, set(one.views)) for one in standing.fed] == [("g2", set(VIEWS))], "what is shown is not retired"


async def test_an_arrangement_that_is_not_the_latest_one_changes_nothing(shelf: Shelf) -> None:
    roster = (await shelf.standing()).roster
    await shelf.built("g2", 5)
    await shelf.attach("g2")

    lose = [Change(Change.LOSE, "g1")]

    assert await shelf.views.arrange(shelf.fence, roster, lose) is Verdict.GENERATION
    assert await shelf.views.arrange("another", (await shelf.standing()).roster, lose) is Verdict.FENCED
    assert set((await shelf.standing()).live.values()) == {"g1"}


async def test_a_generation_that_is_lost_is_shown_no_more(shelf: Shelf) -> None:
    await shelf.views.arrange(shelf.fence, (await shelf.standing()).roster, [Change(Change.LOSE, "g1")])

    assert await shelf.standing() == Standing((await shelf.standing()).roster, fed=[], built=[])


async def test_a_version_that_is_told_anew_is_told(shelf: Shelf) -> None:
    roster = (await shelf.standing()).roster
    await shelf.views.arrange(shelf.fence, roster, [Change(Change.MARK, "g1", JOB_STATUS, "2.3")])

    assert [one.views[JOB_STATUS] for one in (await shelf.standing()).fed] == ["2.3"]


async def test_what_was_given_up_is_gone_and_what_is_shown_cannot_be(shelf: Shelf) -> None:
    await shelf.built("g2", 5)
    await shelf.built("g3", 5)
    await shelf.attach("g3")

    for name in ("g2", "g3"):
        assert await shelf.generations.drop(shelf.building, name) is Step.OK

    assert await shelf.generations.drop(shelf.building, "g1") is Step.GONE
    assert await shelf.checkpoints() == {"g1": 0}
    assert (await shelf.standing()).kept == {}


async def test_the_keys_of_what_was_given_up_are_removed_bit_by_bit(shelf: Shelf) -> None:
    if shelf.redis is None:
        pytest.skip("the twin removes at once")
    await shelf.built("g2", 5)
    await shelf.generations.drop(shelf.building, "g2")
    assert await shelf.redis.exists("views:{0}:g2:job_status:job", "views:{0}:g2:meta") == 2

    async with asyncio.timeout(10):
        while await shelf.redis.exists("views:{0}:dropped"):
            await shelf.views.sweep()

    assert [key async for key in shelf.redis.scan_iter("views:{0}:g2*")] == []
    assert await shelf.redis.exists("views:{0}:g1:meta") == 1
