"""`/metrics` as an operator scrapes it: of parts with HTTP and without, with real counts."""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from domain.commands import lines_of
from events.bus import OUTCOMES
from events.redis_bus import RedisBus
from tests.builders import PING, outcome
from tests.e2e.processes import LookupProcess, until

METRICS = re.compile(r"Metrics are at (http://\S+)")
PATIENCE_S = 30.0


@pytest.fixture
def environment(migrated_database_url: str, redis_url: str) -> dict[str, str]:
    return {"LOOKUP_DATABASE_URL": migrated_database_url, "LOOKUP_REDIS_URL": redis_url}


@asynccontextmanager
async def running(process: LookupProcess) -> AsyncIterator[LookupProcess]:
    process.launch()
    try:
        yield process
    finally:
        await process.stop()


async def scrape(url: str) -> dict[str, float]:
    """The values, by name and labels as they are written."""
    async with aiohttp.ClientSession() as http, http.get(url) as answer:
        assert answer.status == 200
        lines = (await answer.text()).splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


async def scraped_until(url: str, least: Mapping[str, float]) -> dict[str, float]:
    """The first scrape that says at least all of this. What one part has done, another one may not have counted yet."""
    found: dict[str, float] = {}

    async def says_so() -> bool:
        found.update(await scrape(url))
        return all(found.get(name, -math.inf) >= value for name, value in least.items())

    async with asyncio.timeout(PATIENCE_S):
        while not await says_so():  # noqa: ASYNC110 - another process sets no event
            await asyncio.sleep(0.1)
    return found


async def test_a_part_without_http_tells_of_ignored_duplicates(tmp_path: Path, environment: dict[str, str]) -> None:
    env = {**environment, "LOOKUP_METRICS_PORT": "0"}
    bus = RedisBus(environment["LOOKUP_REDIS_URL"])
    async with running(LookupProcess("relay", "saga", folder=tmp_path, env=env)) as saga:
        await until(lambda: bool(METRICS.search(saga.err)) or saga.has_ended, PATIENCE_S, "it to say where its metrics are")
        found = METRICS.search(saga.err)
        assert found is not None, saga.err
        await bus.start()
        await bus.publish(OUTCOMES, lines_of([outcome(PING)] * 3) + b"\nnonsense")
        await bus.stop()

        values = await scraped_until(found[1], {'lookup_outcomes_total{result="ignored"}': 3})

    assert values['lookup_outcomes_total{result="ignored"}'] == 3
    assert values['lookup_outcomes_total{result="recorded"}'] == 0
    assert values['lookup_outcomes_total{result="unreadable"}'] == 1
    assert values['lookup_deadlines_total{result="timed_out"}'] == 0
    assert values['lookup_part_up{part="saga.gather"}'] == 1
    assert values['lookup_part_starts_total{part="relay"}'] >= 1
    assert "lookup_log_position" not in values


async def test_parts_with_http_tell_how_far_everything_is(tmp_path: Path, environment: dict[str, str]) -> None:
    process = LookupProcess("write", "read", "relay", "projector", "--port", "0", folder=tmp_path, env=environment)
    try:
        url = await process.start()
        async with aiohttp.ClientSession() as http:
            answer = await http.post(f"{url}/api/lookup", json={"target": "example.com", "services": ["GeoIP"]})
            position = (await answer.json())["position"]

        # The projector has the facts before the broker has confirmed them to the relay, which counts and moves on only then.
        wanted = {
            "lookup_projection_position": position,
            'lookup_relay_position{what="facts"}': position,
            'lookup_relayed_total{what="facts"}': position,
            'lookup_relayed_total{what="commands"}': 1,
        }
        folded = 'lookup_projected_facts_total{result="folded"}'
        values = await scraped_until(f"{url}/metrics", wanted | {folded: position})
    finally:
        await process.stop()

    assert {name: values[name] for name in wanted} == wanted
    assert values["lookup_log_position"] == position
    assert values['lookup_decisions_total{result="begun"}'] == 1
    assert values['lookup_dead_letters{state="waiting"}'] == 0
    assert 0 <= values["lookup_projection_lag_seconds"] < 60
    assert {name: value for name, value in values.items() if name.startswith("lookup_reading_up") and value != 1} == {}


async def test_with_a_port_of_their_own_metrics_are_not_public(tmp_path: Path, environment: dict[str, str]) -> None:
    env = {**environment, "LOOKUP_METRICS_PORT": "0"}
    process = LookupProcess("write", "--port", "0", folder=tmp_path, env=env)
    try:
        url = await process.start()
        await until(lambda: bool(METRICS.search(process.err)), PATIENCE_S, "it to say where its metrics are")
        found = METRICS.search(process.err)
        assert found is not None
        async with aiohttp.ClientSession() as http, http.get(f"{url}/metrics") as answer:
            assert answer.status == 404
        assert (await scrape(found[1]))['lookup_part_up{part="write"}'] == 1
    finally:
        await process.stop()
