"""Whatever keeps the views from moving raises the alarm `stalled` in time, wherever one looks, and it is over after the repair.

The projector is a process of its own, which is frozen, killed, kept out, or stopped; nobody else is told. Each way has its own
log and its own Redis, and all go side by side. The short form has small thresholds; `pytest -m long` measures the default ones.
"""

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import psycopg
import pytest
from redis.asyncio import Redis

from app import lag
from app.migrate import migrate
from app.parts import READ, RELAY, Part, PartNames, Process
from app.settings import Settings
from app.status import status_of
from app.wiring import Wiring, utc_now
from events.ending import end
from events.memory import MemoryBus
from events.postgres import PostgresStore
from events.record import StoredFact
from projections.projector import Projector
from tests.e2e.processes import LookupProcess
from tests.servers.postgres import fresh_database
from tests.servers.valkey import RedisDatabases

IN_TIME_S = 30.0
"""What is promised of the alarm, whatever the thresholds."""
PATIENCE_S = 45.0
SHORT = {"stalled_after_s": 2.5, "canary_idle_s": 1.0}
LOOK_S = 0.1


@dataclass
class Stage:
    """A log, a Redis, everything that watches, and a projector to be broken."""

    wiring: Wiring
    url: str
    projector: LookupProcess
    owner_url: str
    took: dict[str, float] = field(default_factory=dict)

    @property
    def redis(self) -> Redis:
        return self.wiring.redis

    async def alarm(self) -> str:
        """What the watch says; empty while all is well."""
        note = await lag.last_note(self.redis)
        return "" if note is None else note.alarm

    async def is_well(self) -> bool:
        """A canary has come back, nobody complains."""
        note = await lag.last_note(self.redis)
        return note is not None and note.canary_ms is not None and not note.alarm and (await self.ready())[0] == 200

    async def ready(self) -> tuple[int, Any]:
        async with aiohttp.ClientSession() as http, http.get(f"{self.url}/health/ready") as answer:
            return answer.status, await answer.json()

    async def gauge(self, name: str) -> float:
        async with aiohttp.ClientSession() as http, http.get(f"{self.url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def restart(self) -> None:
        self.projector.launch()

    async def kill(self) -> None:
        self.projector.send(signal.SIGKILL)
        await self.projector.ended()


# --- Ways to break it -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way to keep the views from moving, what the alarm says then, and how it is repaired."""

    name: str
    says: str
    breaks: Callable[[Stage], Awaitable[None]]
    repairs: Callable[[Stage], Awaitable[None]]


async def freeze(stage: Stage) -> None:
    stage.projector.send(signal.SIGSTOP)


async def thaw(stage: Stage) -> None:
    stage.projector.send(signal.SIGCONT)


async def kill(stage: Stage) -> None:
    await stage.kill()


async def start_again(stage: Stage) -> None:
    stage.restart()


async def give_the_lead_to_nobody(stage: Stage) -> None:
    """A lease that a stranger holds who never falls silent: the projector lives, and waits for its turn."""
    await stage.kill()
    await stage.redis.set(stage.wiring.keys.lease, "a dead stranger")
    stage.restart()


async def take_the_lead_back(stage: Stage) -> None:
    await stage.redis.delete(stage.wiring.keys.lease)


async def write_an_unknown_fact(stage: Stage) -> None:
    """As a newer version would: who does not know it must not pass it by."""
    envelope = f'{{"event_id":"{uuid4()}","recorded_at":"{utc_now().isoformat()}","actor":"a newer version"}}'
    with psycopg.connect(stage.owner_url, autocommit=True) as database:
        database.execute(
            "INSERT INTO stored_events (originator_id, originator_version, topic, state) VALUES (%s, 1, %s, %s)",
            (uuid4(), "lookup.SomethingNew.v1", f"{envelope}\n{{}}\n{'00' * 32}".encode()),
        )


async def know_that_fact(stage: Stage) -> None:
    """Stands for the upgrade that it waits for."""
    with psycopg.connect(stage.owner_url, autocommit=True) as database:
        database.execute("DELETE FROM stored_events WHERE topic = 'lookup.SomethingNew.v1'")


async def wipe_and_kill(stage: Stage) -> None:
    await stage.kill()
    await stage.redis.flushdb()


STANDS_STILL = r"It stands still at position \d+ of \d+; the next fact has waited \d+ s\."
FORSAKEN = r"No projector leads: nobody has looked after the views since .+ UTC\."
WAYS = (
    Way("frozen", f"{STANDS_STILL}|{FORSAKEN}", freeze, thaw),
    Way("killed", f"{STANDS_STILL}|{FORSAKEN}", kill, start_again),
    Way("kept out by a lease", f"{STANDS_STILL}|{FORSAKEN}", give_the_lead_to_nobody, take_the_lead_back),
    Way("stopped by a fact that it does not know", f"{STANDS_STILL}|{FORSAKEN}", write_an_unknown_fact, know_that_fact),
    Way("wiped, and nobody to fill it", re.escape(lag.NO_VIEWS), wipe_and_kill, start_again),
)


@asynccontextmanager
async def staged(
    folder: Path, postgres: str, valkey: RedisDatabases, times: dict[str, float], *, name: str
) -> AsyncIterator[Stage]:
    """The query side, the relay and the watch here, a projector in a process of its own."""
    async with AsyncExitStack() as stack:
        owner_url, redis_url = stack.enter_context(fresh_database(postgres)), stack.enter_context(valkey.fresh())
        migrate(owner_url, uuid4(), {})
        settings = Settings(database_url=owner_url, redis_url=redis_url, data_dir=folder, **times)
        wiring, stop = Wiring(settings), asyncio.Event()
        said: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        parts = Process(wiring, PartNames(frozenset({READ, RELAY})), "127.0.0.1", 0, said.set_result)
        running = asyncio.create_task(parts.run(stop))
        stack.push_async_callback(_stopped, running, stop)
        watch = asyncio.create_task(Part("keeper.watch", wiring.watch_views).keep_running())
        stack.push_async_callback(end, [watch], PATIENCE_S)
        env = {"LOOKUP_DATABASE_URL": owner_url, "LOOKUP_REDIS_URL": redis_url}
        projector = LookupProcess("projector", folder=folder, env=env, name=name)
        stack.push_async_callback(projector.stop)
        yield Stage(wiring, await said, projector, owner_url)


async def _stopped(running: asyncio.Task[None], stop: asyncio.Event) -> None:
    stop.set()
    await running


async def comes(holds: Callable[[], Awaitable[bool]], what: str, within_s: float = PATIENCE_S) -> float:
    """Waits for it; gives how long that took, in seconds."""
    began = time.monotonic()
    while not await holds():
        assert time.monotonic() - began < within_s, f"waited {within_s:g} s for {what}"
        await asyncio.sleep(LOOK_S)
    return time.monotonic() - began


async def broken_and_repaired(way: Way, stage: Stage) -> str:
    """Gives a line of what was measured."""
    stage.restart()
    await comes(stage.is_well, f"a first canary ({way.name})")
    assert await stage.gauge("lookup_projection_stalled") == 0
    round_trip_ms = 1000 * await stage.gauge("lookup_canary_round_trip_seconds")

    await way.breaks(stage)
    rang_s = await comes(lambda: _rings(stage), f"the alarm ({way.name})")
    await comes(lambda: _is_told_everywhere(stage, way), f"the alarm to say what is wrong ({way.name})", IN_TIME_S)

    await way.repairs(stage)
    over_s = await comes(stage.is_well, f"the end of the alarm ({way.name})")
    assert await stage.gauge("lookup_projection_stalled") == 0
    assert rang_s < IN_TIME_S
    return f"{way.name:<40} alarm after {rang_s:5.1f} s, over {over_s:4.1f} s after the repair, canary {round_trip_ms:5.0f} ms"


async def _rings(stage: Stage) -> bool:
    return bool(await stage.alarm())


async def _is_told_everywhere(stage: Stage, way: Way) -> bool:
    """By the watch, by readiness (which the process survives), by the metrics and by `lookup status`."""
    alarm, (status, body) = await stage.alarm(), await stage.ready()
    problems = (await status_of(stage.wiring)).problems
    async with aiohttp.ClientSession() as http, http.get(f"{stage.url}/health/live") as live:
        assert live.status == 200
    return (
        re.fullmatch(way.says, alarm) is not None
        and status == 503
        and body["checks"]["projection"].startswith("stalled: ")
        and any("stalled: " in problem for problem in problems)
        and await stage.gauge("lookup_projection_stalled") == 1
    )


async def all_ways(folder: Path, postgres: str, valkey: RedisDatabases, times: dict[str, float]) -> list[str]:
    async def one(way: Way) -> str:
        async with staged(folder, postgres, valkey, times, name=way.name) as stage:
            return await broken_and_repaired(way, stage)

    return await asyncio.gather(*map(one, WAYS))


async def test_the_alarm_comes_in_time_whichever_way_the_projector_is_broken(
    tmp_path: Path, postgres: str, valkey: RedisDatabases
) -> None:
    lines = await all_ways(tmp_path, postgres, valkey, SHORT)

    assert len(lines) == len(WAYS)


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_the_alarm_comes_in_time_with_the_default_thresholds(
    tmp_path: Path, postgres: str, valkey: RedisDatabases, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = await all_ways(tmp_path, postgres, valkey, {})

    with capsys.disabled():
        print("\n" + "\n".join(lines))  # noqa: T201 - it measures


# --- One that believes in itself --------------------------------------------------------------------------------------


class StaleLog(PostgresStore):
    """A log that is read from a copy which has stopped to follow, once somebody says so. Nothing fails."""

    ends_at: int | None = None

    async def read_all(self, after: int, limit: int) -> Sequence[StoredFact]:
        page = await super().read_all(after, limit)
        return page if self.ends_at is None else [stored for stored in page if stored.position <= self.ends_at]


async def test_a_projector_that_hears_and_reads_nothing_and_believes_itself_current_is_found_by_the_canary(
    tmp_path: Path, postgres: str, valkey: RedisDatabases
) -> None:
    async with staged(tmp_path, postgres, valkey, SHORT, name="stale") as stage:
        wiring = stage.wiring
        assert wiring.settings.database_url is not None
        stale = StaleLog(wiring.settings.database_url, wiring.store._scribe)
        settings, documents = wiring.settings, await wiring.documents()
        deaf = Projector(wiring.views, stale, documents, MemoryBus(), settings.rules, settings.retention, utc_now)
        projecting = asyncio.create_task(deaf.run())
        try:
            await comes(stage.is_well, "a first canary")
            stale.ends_at = await wiring.store.head()

            took_s = await comes(lambda: _rings(stage), "the alarm")

            assert re.fullmatch(STANDS_STILL, await stage.alarm())
            assert took_s < IN_TIME_S
            stale.ends_at = None
            await comes(stage.is_well, "the end of the alarm")
        finally:
            await end([projecting], PATIENCE_S)
            await stale.close()
