"""Kill -9 of everything at once. What kills part after part, and the servers, is tests/chaos."""

import asyncio
import signal
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import pytest

from tests.e2e import independent_check
from tests.e2e.journey import client_of
from tests.e2e.processes import LookupProcess, database_of, until
from tests.e2e.served import Served
from tests.e2e.traffic import Traffic, all_closed, assert_ended_in_time, at

JOBS = 200
LIFETIME_S = 60
TIMES: Mapping[str, str] = {
    "LOOKUP_INTERACTIVE_LIFETIME_S": str(LIFETIME_S),
    "LOOKUP_REDISPATCH_AFTER_S": "6",
    "LOOKUP_TIMEOUT_S": '{"GeoIP": 4, "Ping": 4, "RDAP": 4, "ReverseDNS": 4}',
}

pytestmark = pytest.mark.timeout(240)


async def test_every_accepted_job_ends_though_everything_is_killed_at_once(tmp_path: Path, peers: Served) -> None:
    env = {**peers.environment(), **TIMES}
    up = LookupProcess("up", "--port", "0", "--data-dir", "data", folder=tmp_path, env=env)
    try:
        traffic = await submit_and_kill(up)
        restarted_at = datetime.now().astimezone()
        url = await up.start()
        async with client_of(url, url) as client:
            traffic.client = client
            await traffic.follow_all(LIFETIME_S)

        assert_ended_in_time(client.finished, LIFETIME_S)
        assert any(at(document["completedAt"]) > restarted_at for document in client.finished.values()), "none was in flight"
        database_url = database_of(tmp_path / "data")
        await until(lambda: all_closed(database_url), LIFETIME_S, "jobs whose answer was lost to end")
        independent_check.check(database_url, client.finished, peers)
    finally:
        await up.stop()


async def submit_and_kill(up: LookupProcess) -> Traffic:
    """Kill -9 while jobs are in flight and more are coming in."""
    url = await up.start()
    async with client_of(url, url) as client:
        traffic = Traffic(client)
        submitting = asyncio.create_task(traffic.submit(JOBS, 0.0))
        await until(lambda: len(traffic.accepted) >= JOBS // 4, 30, "jobs to be accepted")
        up.send(signal.SIGKILL)
        submitting.cancel()
        await asyncio.wait({submitting})
    assert await up.ended() == -signal.SIGKILL
    return traffic
