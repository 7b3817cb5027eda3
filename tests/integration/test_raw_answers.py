"""Raw answers: each lookup keeps what was said such that its parser makes the same result of it again, without a network."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from app.demo.peers import DemoPeers
from domain.commands import Succeeded, TaskOutcome, lines_of
from events.bus import COMMANDS, OUTCOMES
from events.ending import end
from events.facts import Priority, Target
from events.memory import MemoryBus
from results.postgres import PostgresDocuments
from tests.builders import PING, look_up_command
from tests.peers.lookups import address, domain, network, running_peers
from workers import geoip, ping, rdap, reverse_dns
from workers.lookup import Answer, RawAnswer, Result
from workers.network import PingSettings
from workers.parsers import PARSERS
from workers.runner import Outbox, Worker

IP_API: dict[str, Any] = {"geoip_mmdb": None}
KNOCK: dict[str, Any] = {"ping": PingSettings(method="tcp", echoes=2, interval_s=0.0)}


@pytest.fixture(scope="module")
async def peers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[DemoPeers]:
    async with running_peers(tmp_path_factory.mktemp("peers")) as running:
        yield running


@pytest.mark.parametrize(
    ("look_up", "target", "changes", "provider", "parser"),
    [
        (rdap.look_up, address("127.0.0.1"), {}, "127.0.0.1", "rdap/1"),
        (rdap.look_up, address("2001:db8::1"), {}, "127.0.0.1", "rdap/1"),
        (rdap.look_up, domain("example.com"), {}, "127.0.0.1", "rdap/1"),
        (geoip.look_up, address("127.0.0.1"), {}, "mmdb", "mmdb/1"),
        (geoip.look_up, address("8.8.8.8"), IP_API, "ip-api.com", "ip-api/1"),
        (ping.look_up, address("127.0.0.1"), {}, "icmp", "ping/1"),
        (ping.look_up, domain("example.com"), KNOCK, "tcp", "ping/1"),
        (reverse_dns.look_up, address("127.0.0.1"), {}, "127.0.0.1", "ptr/1"),
        (reverse_dns.look_up, address("127.0.0.6"), {}, "127.0.0.1", "ptr/1"),
        (reverse_dns.look_up, address("127.0.0.99"), {}, "dns", "ptr/1"),
    ],
)
async def test_a_stored_answer_is_read_again_to_the_byte(
    peers: DemoPeers,
    look_up: Callable[..., Awaitable[Answer[Result]]],
    target: Target,
    changes: dict[str, Any],
    provider: str,
    parser: str,
) -> None:
    async with network(peers.settings, **changes) as net:
        answer = await look_up(target, net)

    assert (answer.provider, answer.parser) == (provider, parser)
    assert answer.raw is not None
    again = PARSERS[parser.partition("/")[0]].parse(RawAnswer.of(answer.raw.stored()))
    assert again.model_dump_json() == answer.result.model_dump_json()


async def test_a_table_that_comes_with_the_program_says_nothing_that_could_be_kept(peers: DemoPeers) -> None:
    async with network(peers.settings, geoip_mmdb=None, ip_api_url=None) as net:
        answer = await geoip.look_up(address("8.8.8.8"), net)

    assert (answer.provider, answer.parser, answer.raw) == ("iptocc", None, None)


async def test_rdaps_body_is_kept_as_it_was_received(peers: DemoPeers, tmp_path: Path) -> None:
    async with network(peers.settings) as net:
        answer = await rdap.look_up(domain("example.com"), net)

    assert answer.raw is not None
    assert answer.raw.body.startswith(b'{"rdapConformance": [')  # With the spaces of its sender.


async def test_result_and_raw_answer_go_down_in_one_write(migrated_database_url: str) -> None:
    """What was said is not worth a round trip of its own on the way to an outcome."""

    async def told(_: Target) -> Answer[Result]:
        echoes = b'[{"success":true,"status":"Success","roundtripTimeMs":1.5}]'
        return ping.PARSER.read(RawAnswer({"target": "a", "address": "b", "method": "icmp"}, echoes), "icmp")

    documents, bus = PostgresDocuments(migrated_database_url), MemoryBus()
    await documents.open()
    worker = Worker(PING, told, bus, Outbox(bus), documents, "worker-1", lambda: datetime.now(UTC))
    inboxes, outcomes = worker.subscribe(), bus.subscribe(OUTCOMES, in_hand_max=1)
    working = asyncio.create_task(worker.run(inboxes))
    try:
        item = look_up_command(PING, expires_at=datetime.now(UTC) + timedelta(minutes=1))
        await bus.publish(COMMANDS[PING, Priority.INTERACTIVE], lines_of([item]))
        (delivery,) = await outcomes.take(1)
    finally:
        await end([working], 5.0)
        await documents.close()

    ending = TaskOutcome.model_validate_json(delivery.body).ending
    assert isinstance(ending, Succeeded)
    assert ending.raw is not None
    with psycopg.connect(migrated_database_url) as conn:
        rows = conn.execute("SELECT key, xmin::text FROM result_documents").fetchall()
    assert {key for key, _ in rows} == {ending.result.location.key, ending.raw.location.key}
    assert len({transaction for _, transaction in rows}) == 1
