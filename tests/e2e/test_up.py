"""`lookup up`: how it starts, how it ends, and what it leaves behind (nothing but the data)."""

import re
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.e2e.journey import client_of
from tests.e2e.processes import LookupProcess, descendants, lives, lookup, until
from tests.e2e.served import Served

ORPHANS_S = 15.0


@asynccontextmanager
async def running(folder: Path, peers: Served) -> AsyncIterator[LookupProcess]:
    """On the data in `folder`, started and in any case ended."""
    up = LookupProcess("up", "--port", "0", "--data-dir", "data", folder=folder, env=peers.environment())
    try:
        await up.start()
        yield up
    finally:
        await up.stop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_ends_well_and_leaves_no_process(number: signal.Signals, tmp_path: Path, peers: Served) -> None:
    async with running(tmp_path, peers) as up:
        servers = descendants(up.pid)

        up.send(number)

        assert await up.ended() == 0
    assert {"postgres", "valkey-server"} <= servers.keys()
    assert [name for name, pids in servers.items() for pid in pids if lives(pid)] == []
    assert not (tmp_path / "data" / "servers.json").exists()
    assert "Traceback" not in up.err


async def test_ctrl_c_during_the_start_leaves_no_process(tmp_path: Path, peers: Served) -> None:
    up = LookupProcess("up", "--port", "0", "--data-dir", "data", folder=tmp_path, env=peers.environment())
    up.launch()
    try:
        await until(lambda: "postgres" in descendants(up.pid) or up.has_ended, 30, "PostgreSQL to be launched")
        servers = descendants(up.pid)

        up.send(signal.SIGINT)

        assert await up.ended() in {0, 130}
    finally:
        await up.stop()
    assert [name for name, pids in servers.items() for pid in pids if lives(pid)] == []
    assert "Traceback" not in up.err


async def test_kill_9_leaves_no_orphan_and_the_next_start_has_the_data(tmp_path: Path, peers: Served) -> None:
    async with running(tmp_path, peers) as up:
        async with client_of(up.url, up.url) as client:
            before = await client.look_up("127.0.0.1")
        servers = descendants(up.pid)
        up.send(signal.SIGKILL)
        await up.ended()

        pids = {pid for pids in servers.values() for pid in pids}
        await until(lambda: not any(map(lives, pids)), ORPHANS_S, "the servers to follow their owner")

        await up.start()
        async with client_of(up.url, up.url) as client:
            after = await client.get(f"/api/lookup/{before['jobId']}")
    assert (after.status, after.document) == (200, before)


async def test_a_second_start_on_the_same_data_is_refused(tmp_path: Path, peers: Served) -> None:
    async with running(tmp_path, peers) as up:
        second = await lookup("up", "--port", "0", "--data-dir", "data", cwd=tmp_path)

        async with client_of(up.url, up.url) as client:
            assert (await client.ask("GET", f"{up.url}/health/live")).status == 200
    assert second.code == 1
    assert second.err == (
        f"lookup: Another lookup (process {up.pid}) is using {tmp_path}/data. Stop it, or give another --data-dir.\n"
    )


async def test_a_taken_port_is_said_and_nothing_is_left_running(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])

        refused = await lookup("up", "--port", port, "--data-dir", "data", cwd=tmp_path)

    assert refused.code == 1
    assert refused.err.splitlines()[-1] == f"lookup: 127.0.0.1:{port} cannot be listened on (Address already in use)."
    assert "Traceback" not in refused.err
    assert processes_in(tmp_path) == []


async def test_the_welcome_says_what_to_try(tmp_path: Path, peers: Served) -> None:
    async with running(tmp_path, peers) as up:
        welcome, url = up.out, up.url

    assert re.search(rf"in a browser +{url}/\n", welcome)
    assert re.search(rf"lookup run example\.com --url {url}\n", welcome)
    assert f"curl -i {url}/api/lookup -H 'Content-Type: application/json' -d '{{\"target\": \"example.com\"}}'" in welcome


async def test_the_demo_gives_four_answers(tmp_path: Path) -> None:
    up = LookupProcess("up", "--demo", "--port", "0", "--data-dir", "data", folder=tmp_path)
    try:
        url = await up.start()
        async with client_of(url, url) as client:
            job = await client.look_up("127.0.0.1")
    finally:
        await up.stop()

    assert [result["status"] for result in job["results"]] == ["Succeeded"] * 4


def processes_in(folder: Path) -> list[str]:
    """The programs that work in a folder or below it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve().is_relative_to(folder) and lives(int(process.name)):
                found.append((process / "comm").read_text(encoding="utf-8").strip())
        except OSError:
            # It ended while we looked, or belongs to somebody else.
            continue
    return found
