"""The watch over the views: what keeps them from moving raises the alarm in time, once, and it is over after the repair."""

import logging
import os
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from functools import partial

import pytest
from redis.asyncio import Redis
from uuid_utils.compat import uuid7

from app import lag
from app.health import projection_check, view_meta
from app.lag import Note, Patience
from app.readings import projection_reading
from app.watch import Watch, Watched
from events.facts import CanarySent
from events.memory import MemoryStore
from events.record import SALT_BYTES, fact_of
from events.store import Scribe, StoreUnavailable
from projections.views import JOB_STATUS, Keys
from tests.builders import NOW, PING, at, given, submitted
from write_side.canary import Canary, stream_of

KEYS = Keys()
PATIENCE = Patience(stalled_after=timedelta(seconds=10), canary_idle=timedelta(seconds=10))
LOG_ID = "log_id"


class Silenced(MemoryStore):
    """A log that somebody can cut off."""

    silent = False

    async def head(self) -> int:
        if self.silent:
            raise StoreUnavailable
        return await super().head()


class Scene:
    """A log, what Redis has of the views, a clock that only the test moves, and a watch over all that."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.time = NOW
        self.store = Silenced(Scribe(lambda: self.time, uuid7, partial(os.urandom, SALT_BYTES)), uuid7())
        self.watch = self.another_watch()

    def another_watch(self) -> Watch:
        meta = partial(view_meta, self.redis, KEYS)
        return Watch(self.store, self.redis, meta, PATIENCE, lambda: self.time, uuid7, Watched(self.time))

    async def project(self, position: int | None = None) -> None:
        """What a projector leaves that has just come to a position, the end of the log if none is given."""
        reached = await self.store.head() if position is None else position
        fields: Mapping[str, str | int] = {
            LOG_ID: str(await self.store.log_id()),
            "checkpoint": reached,
            "complete": 1,
            "caught_up_ms": lag.ms(self.time),
            "checked_ms": lag.ms(self.time),
        }
        await self.redis.hset(KEYS.live, JOB_STATUS, "g1")
        await self.redis.hset(KEYS.meta("g1"), items=[word for pair in fields.items() for word in pair])

    async def seconds(self, count: int, *, projecting: bool = False) -> str:
        """So many seconds go by, with a look in each; gives the alarm at their end."""
        for _ in range(count):
            self.time += timedelta(seconds=1)
            if projecting:
                await self.project()
            sight = await self.watch.look()
            if self.watch._is_idle(sight):
                await self.watch._send_canary()
        return (await self.note()).alarm

    async def note(self) -> Note:
        note = await lag.last_note(self.redis)
        assert note is not None
        return note

    async def topics(self) -> list[str]:
        return [stored.topic for stored in await self.store.read_all(0, 100)]


@pytest.fixture
async def scene(redis_url: str) -> AsyncIterator[Scene]:
    async with Redis.from_url(redis_url) as redis:
        yield Scene(redis)


async def test_views_that_follow_are_no_alarm_and_an_idle_log_gets_a_canary_each_ten_seconds(scene: Scene) -> None:
    await given(scene.store, submitted(PING))

    assert await scene.seconds(45, projecting=True) == ""

    assert (await scene.topics())[1:] == ["lookup.CanarySent.v1"] * 4
    assert (await scene.note()).lag_events == 0


async def test_a_log_that_is_appended_to_needs_no_canary(scene: Scene) -> None:
    for second in range(25):
        job_id = uuid7()
        await given(scene.store, submitted(PING, job_id=job_id, when=at(second)), job_id=job_id)
        await scene.seconds(1, projecting=True)

    assert set(await scene.topics()) == {"lookup.JobSubmitted.v1"}


async def test_views_that_stand_still_are_an_alarm_within_thirty_seconds_of_silence(scene: Scene) -> None:
    """The projector says that it looks after them, and it may even believe so: only the canary tells."""
    await scene.seconds(15, projecting=True)
    stopped_at = scene.time
    alarm = ""
    while not alarm:
        await scene.project(1)
        alarm = await scene.seconds(1)

    assert scene.time - stopped_at < timedelta(seconds=30)
    assert "It stands still at position 1 of 2" in alarm


async def test_canaries_do_not_pile_up_behind_views_that_stand_still(scene: Scene) -> None:
    await scene.seconds(15, projecting=True)

    await scene.seconds(300)

    assert len(await scene.topics()) == 2


async def test_the_alarm_is_told_once_and_so_is_its_end(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "app.watch")
    await scene.seconds(3, projecting=True)

    assert await scene.seconds(60) != ""
    assert await scene.seconds(1, projecting=True) == ""

    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in told] == ["ERROR", "INFO"]
    assert told[0][1].startswith("Alarm `stalled`: No projector leads")
    assert told[1][1] == "Alarm `stalled` is over after 48 s."


# --- What else can be wrong -------------------------------------------------------------------------------------------


async def test_a_wiped_redis_that_nobody_fills_again_is_an_alarm(scene: Scene) -> None:
    await given(scene.store, submitted(PING))
    await scene.seconds(15, projecting=True)
    await scene.redis.flushdb()

    assert await scene.seconds(9) == ""
    assert await scene.seconds(3) == lag.NO_VIEWS


async def test_views_of_another_log_are_an_alarm(scene: Scene) -> None:
    await given(scene.store, submitted(PING))
    await scene.seconds(15, projecting=True)
    await scene.redis.hset(KEYS.meta("g1"), LOG_ID, str(uuid7()))

    assert await scene.seconds(12) == lag.of_another_log(2)


async def test_a_start_after_a_long_night_is_no_alarm_before_the_projector_has_had_its_time(scene: Scene) -> None:
    await given(scene.store, submitted(PING))
    await scene.project(0)
    scene.time += timedelta(hours=9)
    scene.watch = scene.another_watch()

    assert await scene.seconds(9) == ""
    assert "at position 0 of 1; the next fact has waited 32411 s" in await scene.seconds(2)


async def test_a_log_that_does_not_answer_leaves_what_was_seen_and_sends_no_canary(scene: Scene) -> None:
    await given(scene.store, submitted(PING))
    await scene.seconds(3, projecting=True)
    scene.store.silent = True

    assert "No projector leads" in await scene.seconds(30)
    assert await scene.topics() == ["lookup.JobSubmitted.v1"]
    scene.store.silent = False
    assert await scene.seconds(1, projecting=True) == ""


async def test_a_watch_that_is_started_again_remembers_when_the_views_last_moved(scene: Scene) -> None:
    await given(scene.store, submitted(PING))
    await scene.seconds(3, projecting=True)
    moved_ms = (await scene.note()).moved_ms
    scene.time += timedelta(minutes=1)
    scene.watch = scene.another_watch()

    scene.watch._remember(await scene.note())
    await scene.watch.look()

    assert moved_ms == lag.ms(at(1))
    assert (await scene.note()).moved_ms == moved_ms


# --- The canary -------------------------------------------------------------------------------------------------------


async def test_a_watch_that_another_one_was_quicker_than_sends_nothing(scene: Scene) -> None:
    first, second = (Canary(scene.store, lambda: scene.time, uuid7) for _ in range(2))

    sent = [await first.send(), await second.send(), await first.send(), await first.send()]

    assert sent == [1, 2, None, 3]


async def test_the_canaries_of_an_hour_share_a_stream(scene: Scene) -> None:
    canary = Canary(scene.store, lambda: scene.time, uuid7)
    for _ in range(3):
        await canary.send()
        scene.time += timedelta(minutes=30)

    first, second, third = await scene.store.read_all(0, 10)

    assert (first.stream_id, second.stream_id, third.stream_id) == (stream_of(at(0)), stream_of(at(0)), stream_of(at(3600)))
    assert (first.stream_version, second.stream_version, third.stream_version) == (1, 2, 1)
    assert fact_of(second.topic, second.state) == CanarySent(sent_at=at(1800))


async def test_how_long_a_canary_took_is_told(scene: Scene) -> None:
    await scene.seconds(10, projecting=True)
    await scene.seconds(1)
    scene.time += timedelta(milliseconds=250)
    await scene.project()
    await scene.watch.look()

    assert (await scene.note()).canary_ms == 250


# --- Where the alarm is seen ------------------------------------------------------------------------------------------


async def ready(scene: Scene) -> str | None:
    return await projection_check(scene.redis, lambda: scene.time, KEYS, PATIENCE.stalled_after)()


async def gauges(scene: Scene, store: MemoryStore | None = None) -> dict[str, float]:
    read = projection_reading(scene.redis, lambda: scene.time, KEYS, PATIENCE.stalled_after, store)
    return {family.name.removeprefix("lookup_"): family.samples[""] for family in await read()}


async def test_readiness_and_metrics_tell_the_alarm_without_log_or_projector(scene: Scene) -> None:
    await given(scene.store, submitted(PING))
    await scene.seconds(3, projecting=True)
    assert await ready(scene) is None
    assert (await gauges(scene))["projection_stalled"] == 0

    # The projector says that it looks after the views, but they do not move.
    job_id = uuid7()
    await given(scene.store, submitted(PING, job_id=job_id), job_id=job_id)
    for _ in range(20):
        await scene.project(1)
        await scene.seconds(1)

    said = await ready(scene)
    assert said is not None
    assert said.startswith("stalled: It stands still at position 1 of 2; the next fact has waited")
    assert await gauges(scene) == {
        "projection_position": 1,
        "projection_lag_events": 1,
        "projection_lag_seconds": 1,
        "projection_last_moved_seconds": 22,
        "projection_stalled": 1,
    }


async def test_without_a_watch_the_age_of_the_views_tells_and_a_dead_watchs_word_is_not_taken(scene: Scene) -> None:
    await given(scene.store, submitted(PING))
    await scene.seconds(3, projecting=True)
    await scene.seconds(20)
    assert (await scene.note()).alarm
    scene.time += timedelta(seconds=30)
    await scene.project()

    assert await ready(scene) is None
    assert (await gauges(scene))["projection_stalled"] == 0
    scene.time += timedelta(seconds=11)
    assert await ready(scene) == "the views are 11 s behind, or no projector runs"
    assert await gauges(scene, scene.store) == {
        "projection_position": 2,
        "projection_lag_events": 0,
        "projection_lag_seconds": 11,
        "projection_stalled": 1,
    }


async def test_views_that_are_not_there_are_nothing_to_rely_on(scene: Scene) -> None:
    assert await ready(scene) == "the views have not been built yet"
    assert await gauges(scene) == {"projection_position": 0, "projection_stalled": 1}
