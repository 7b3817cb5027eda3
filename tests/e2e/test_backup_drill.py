"""The whole drill, as somebody would do it: jobs, a backup while more come, an erasure, a disaster, a restore, and the service
goes on.
"""

import asyncio
import json
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.e2e.journey import Client, client_of
from tests.e2e.processes import LookupProcess, descendants, lives, lookup, until
from tests.e2e.served import Served
from tests.e2e.traffic import Traffic

PATIENCE_S = 30.0
DATA = ("--data-dir", "data")


@asynccontextmanager
async def running(folder: Path, peers: Served) -> AsyncIterator[tuple[LookupProcess, Client]]:
    up = LookupProcess("up", "--port", "0", *DATA, folder=folder, env=peers.environment())
    try:
        await up.start()
        async with client_of(up.url, up.url) as client:
            await client.ready(up.url)
            yield up, client
    finally:
        await up.stop()


async def said(client: Client, job_id: str) -> tuple[int, str | None, bytes]:
    """What a poller gets, to the byte."""
    async with client.http.get(f"{client.read_url}/api/lookup/{job_id}") as response:
        return response.status, response.headers.get("ETag"), await response.read()


@pytest.mark.long
async def test_the_drill(tmp_path: Path, peers: Served) -> None:
    async with running(tmp_path, peers) as (up, client):
        finished = [(await client.look_up(target))["jobId"] for target in ("127.0.0.1", "127.0.2.1", "example.com")]
        before = {job_id: await said(client, job_id) for job_id in finished}

        traffic = Traffic(client)
        backing_up = asyncio.create_task(lookup("backup", "backup", "--json", *DATA, cwd=tmp_path))
        await traffic.submit_while(lambda: not backing_up.done(), pace_s=0.02)
        backup = await backing_up
        assert (backup.code, backup.err) == (0, "")
        lost = (await client.look_up("127.0.3.1"))["jobId"]
        erased = await lookup("erase", "--target", "example.com", "--reason", "they asked", *DATA, cwd=tmp_path)
        assert erased.code == 0, erased

        servers = {pid for pids in descendants(up.pid).values() for pid in pids}
        up.send(signal.SIGKILL)
        await up.ended()
        await until(lambda: not any(map(lives, servers)), PATIENCE_S, "the servers to follow their owner")
    # The log is gone; Valkey has the views of jobs that the backup does not know.
    shutil.rmtree(tmp_path / "data" / "postgres")

    restored = await lookup("restore", "backup", "--verify", "--json", *DATA, cwd=tmp_path)

    told, made = json.loads(restored.out), json.loads(backup.out)
    assert (restored.code, told["verified"], told["survey"]) == (0, True, made["survey"])
    assert restored.err == "Erased again what 1 erasures had erased from this log.\n"
    assert told["restored_as"] != told["log_id"] == made["log_id"]
    assert told["survey"]["facts"] > 15
    async with running(tmp_path, peers) as (_, client):
        after = {job_id: await said(client, job_id) for job_id in finished}
        forgotten = finished[2]
        assert b"example.com" in before.pop(forgotten)[2]
        assert b"example.com" not in after.pop(forgotten)[2]
        assert after == before
        assert (await said(client, lost))[0] == 404
        assert (await client.look_up("127.0.4.1"))["status"] == "Completed"
        kept = [job_id for job_id in traffic.accepted if (await said(client, job_id))[0] != 404]
        assert 0 < len(kept) < len(traffic.accepted)
        traffic.client, traffic.accepted = client, kept
        await traffic.follow_all(PATIENCE_S)

        doctor = await lookup("doctor", *DATA, cwd=tmp_path)

    assert (doctor.code, doctor.err) == (0, ""), doctor.out
