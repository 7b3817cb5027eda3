"""SIGTERM: nothing new is begun, what is in hand is finished or handed back, in time, and the exit code is 0."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from itertools import cycle, islice
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from uuid_utils.compat import uuid7

from tests.e2e import independent_check
from tests.e2e.deployment import EACH_ALONE, HTTP, Deployment, deployed
from tests.e2e.journey import Client, client_of
from tests.e2e.processes import LookupProcess, database_of, until
from tests.e2e.served import Served
from tests.e2e.traffic import Traffic, all_closed, assert_nothing_was_lost_on_its_way
from write_side.checkpoints import RELAY_LOCK

RESTARTS = 20
PACE_S = 0.1
END_S = 60.0
GRACE_S = 30.0
"""What compose.yaml gives a part before it is killed."""
TAKEOVER_S = 30.0
"""The lock is lost within 5 s; no deadline comes before ten minutes."""
TIMES = {
    "LOOKUP_INTERACTIVE_LIFETIME_S": "900",
    "LOOKUP_REDISPATCH_AFTER_S": "600",
    "LOOKUP_TIMEOUT_S": '{"GeoIP": 4, "Ping": 4, "RDAP": 4, "ReverseDNS": 4}',
}
"""So long that no deadline can help."""

_LEADER = (
    "SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid)"
    " WHERE locktype = 'advisory' AND granted AND classid = %s AND objid = %s"
)

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(params=["rabbitmq", pytest.param("redis", marks=pytest.mark.long)], scope="module")
async def running(
    request: pytest.FixtureRequest, servers_folder: Path, peers: Served
) -> AsyncIterator[tuple[Deployment, Client]]:
    env = {**peers.environment(), **TIMES}
    with_rabbitmq = request.param == "rabbitmq"
    async with deployed(servers_folder / f"rolling-{request.param}", env, EACH_ALONE, with_rabbitmq=with_rabbitmq) as running:
        yield running


async def test_rolling_restarts_under_load_lose_nothing(running: tuple[Deployment, Client], peers: Served) -> None:
    deployment, client = running
    traffic = Traffic(client)
    rolling = asyncio.create_task(roll(deployment, RESTARTS))
    await traffic.submit_while(lambda: not rolling.done(), PACE_S)
    codes = await rolling

    await traffic.follow_all(END_S)

    assert codes == [0] * RESTARTS
    assert len(traffic.accepted) > RESTARTS
    assert_nothing_was_lost_on_its_way({job_id: client.finished[job_id] for job_id in traffic.accepted})
    await until(lambda: all_closed(deployment.database_url), END_S, "jobs whose answer was lost to end")
    independent_check.check(deployment.database_url, client.finished, peers)


async def test_requests_in_flight_get_their_answers(running: tuple[Deployment, Client]) -> None:
    deployment, _ = running
    body = json.dumps({"target": "127.0.0.1"}).encode()
    head = f"POST /api/lookup HTTP/1.1\r\nHost: lookup\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    submits = await asyncio.open_connection(*address_of(deployment.write_url))
    submits[1].write(head.encode() + body[:5])
    # A job that does not exist yet, as far as anybody can tell: the answer waits for the views.
    polls = await asyncio.open_connection(*address_of(deployment.read_url))
    polls[1].write(f"GET /api/lookup/{uuid7()} HTTP/1.1\r\nHost: lookup\r\n\r\n".encode())
    await asyncio.sleep(0.05)

    for name in HTTP:
        deployment.parts[name].send(signal.SIGTERM)
    await asyncio.sleep(0.3)
    submits[1].write(body[5:])
    answers = [(await reader.readline()).split()[1] for reader, _ in (submits, polls)]
    codes = [await deployment.parts[name].ended() for name in HTTP]
    for _, writer in (submits, polls):
        writer.close()
        await writer.wait_closed()

    for name in HTTP:
        deployment.launch(name)
    await deployment.listening()
    assert answers[0] == b"202"
    assert answers[1] in {b"404", b"503"}
    assert codes == [0, 0]


async def test_a_frozen_relay_is_replaced_within_seconds_and_when_it_wakes_it_does_no_harm(
    running: tuple[Deployment, Client], peers: Served
) -> None:
    deployment, client = running
    traffic = Traffic(client)
    deployment.launch("relay", twin="-twin")
    await deployment.works("relay-twin")
    leader, other = await leader_first(deployment)

    deployment.parts[leader].send(signal.SIGSTOP)
    await traffic.submit(10, PACE_S)
    started_at = time.monotonic()
    await traffic.follow_all(TAKEOVER_S)
    took_s = time.monotonic() - started_at
    deployment.parts[leader].send(signal.SIGCONT)
    await traffic.submit(20, PACE_S)
    await traffic.follow_all(END_S)

    assert took_s < TAKEOVER_S
    assert (await leader_first(deployment))[0] == other
    assert_nothing_was_lost_on_its_way({job_id: client.finished[job_id] for job_id in traffic.accepted})
    independent_check.check(deployment.database_url, client.finished, peers)
    await deployment.parts.pop("relay-twin").stop()


async def test_parts_end_in_time_though_no_server_answers(running: tuple[Deployment, Client]) -> None:
    """Last in this file: what is frozen is thawed, and the parts start again."""
    deployment, client = running
    parts = list(deployment.parts)
    for server in deployment.servers:
        server.freeze()
    try:
        # Something to be held up by.
        await asyncio.gather(*(client.post({"target": "127.0.0.1"}) for _ in range(3)))
        for name in parts:
            deployment.parts[name].send(signal.SIGTERM)
        codes = {name: await deployment.parts[name].ended(GRACE_S) for name in parts}
    finally:
        for server in deployment.servers:
            server.thaw()

    assert codes == dict.fromkeys(parts, 0)
    for name in parts:
        deployment.launch(name)
    await deployment.listening()
    traffic = Traffic(client)
    await traffic.submit(1, PACE_S)
    await traffic.follow_all(END_S)


async def test_lookup_up_stops_under_load_and_the_next_start_goes_on(tmp_path: Path, peers: Served) -> None:
    env = {**peers.environment(), **TIMES}
    up = LookupProcess("up", "--port", "0", "--data-dir", "data", folder=tmp_path, env=env)
    try:
        url = await up.start()
        async with client_of(url, url) as client:
            traffic = Traffic(client)
            submitting = asyncio.create_task(traffic.submit(1_000, 0.0))
            await traffic.has_come_to(accepted=50)
            up.send(signal.SIGTERM)
            code = await up.ended()
            submitting.cancel()
            await asyncio.wait({submitting})

        url = await up.start()
        async with client_of(url, url) as client:
            traffic.client = client
            await traffic.follow_all(END_S)
        independent_check.check(database_of(tmp_path / "data"), client.finished, peers)
    finally:
        await up.stop()
    assert code == 0
    assert_nothing_was_lost_on_its_way(client.finished)


async def roll(deployment: Deployment, restarts: int) -> list[int]:
    """Each part in turn; its successor starts after it, or, where two may run, every other time before it."""
    codes = []
    for number, name in enumerate(islice(cycle(deployment.processes), restarts)):
        old = deployment.parts[name]
        before = name not in HTTP and number // len(deployment.processes) % 2 == 1
        if before:
            deployment.launch(name)
            await deployment.works(name)
        old.send(signal.SIGTERM)
        codes.append(await old.ended(GRACE_S))
        if not before:
            deployment.launch(name)
            await (deployment.parts[name].listens() if name in HTTP else deployment.works(name))
    return codes


async def leader_first(deployment: Deployment) -> list[str]:
    """The two relays by name, the one that leads first: PostgreSQL knows who holds the lock."""
    with psycopg.connect(deployment.database_url) as database:
        (leader,) = database.execute(_LEADER, (RELAY_LOCK >> 32, RELAY_LOCK & 0xFFFFFFFF)).fetchone() or ("",)
    return sorted(("relay", "relay-twin"), key=lambda name: name != leader)


def address_of(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port
