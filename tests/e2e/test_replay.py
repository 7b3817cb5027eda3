"""`lookup replay` as an operator runs it, beside a service at work: what is refused, and how one goes on that was killed.

What clients see meanwhile is tests/replay_proofs.
"""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from tests.e2e.journey import client_of
from tests.e2e.processes import Finished, LookupProcess, lookup
from tests.e2e.served import Served

JOBS = 10
MADE_S = 60.0
SLOW = ("--rate", "1")
"""An event a second: it does not end by itself while it is looked at."""

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
async def up(tmp_path_factory: pytest.TempPathFactory, peers: Served) -> AsyncIterator[LookupProcess]:
    """With some jobs that have ended, so that there is something to replay."""
    folder = tmp_path_factory.mktemp("up")
    process = LookupProcess("up", "--port", "0", "--data-dir", "data", folder=folder, env=peers.environment())
    try:
        url = await process.start()
        async with client_of(url, url) as client:
            job_ids = [await client.submit(f"127.0.{number}.1", ["GeoIP"]) for number in range(1, JOBS + 1)]
            for job_id in job_ids:
                await client.follow(job_id)
        yield process
    finally:
        await process.stop()


async def replay(up: LookupProcess, *words: str) -> Finished:
    return await lookup("replay", *words, "--data-dir", "data", cwd=up.folder)


async def test_what_cannot_be_done_is_said_plainly(up: LookupProcess, tmp_path: Path) -> None:
    assert (await replay(up, "--view", "nothing")).code == 2
    assert (await replay(up, "--rate", "0")).code == 2
    nowhere = await lookup("replay", "--data-dir", "none", cwd=tmp_path)
    assert (nowhere.code, "LOOKUP_REDIS_URL" in nowhere.err) == (3, True)


async def test_of_two_at_once_one_is_refused_and_one_that_was_killed_is_gone_on_with(up: LookupProcess) -> None:
    slow = LookupProcess("replay", *SLOW, "--data-dir", "data", folder=up.folder, name="slow")
    slow.launch()
    try:
        async with _redis(up) as redis:
            await _has_folded(redis, 1)
            refused = await replay(up)
            assert (refused.code, refused.out) == (1, "")
            assert refused.err.startswith("lookup: Another replay is under way")
            slow.send(signal.SIGKILL)
            await slow.ended()
            done = await _folded(redis)
            told = await replay(up, "--json")
    finally:
        await slow.stop()

    assert told.code == 0, told.err
    outcome = json.loads(told.out)
    assert outcome["resumed"]
    assert outcome["events"] == outcome["position"] - done, "what was folded before the kill was folded again"
    assert outcome["digest_new"]["hex"] == outcome["digest_shown"]["hex"]


async def test_a_dry_run_changes_nothing(up: LookupProcess) -> None:
    async with _redis(up) as redis:
        before = await redis.hgetall("views:{0}:shown")

        dry = await replay(up, "--dry-run")

        assert (dry.code, dry.err) == (0, "")
        assert "Nothing was changed" in dry.out
        assert await redis.hgetall("views:{0}:shown") == before


async def _has_folded(redis: Redis, facts: int) -> None:
    async with asyncio.timeout(MADE_S):
        while await _folded(redis) < facts:  # noqa: ASYNC110 - Redis sets no event
            await asyncio.sleep(0.05)


async def _folded(redis: Redis) -> int:
    """How far the generation has come that is being built."""
    built: list[bytes] = list(await cast("Any", redis.smembers("views:{0}:built")))
    found = [await redis.hget(f"views:{{0}}:{name.decode()}:meta", "checkpoint") for name in built]
    return max((int(checkpoint) for checkpoint in found if checkpoint), default=0)


def _redis(up: LookupProcess) -> Redis:
    note = json.loads((up.folder / "data" / "servers.json").read_text(encoding="utf-8"))
    return Redis.from_url(note["redis_url"])
