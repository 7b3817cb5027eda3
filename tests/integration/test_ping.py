"""Ping against loopback: ICMP where this machine permits it, TCP against ports that accept, refuse, or say nothing."""

import asyncio
import ipaddress
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import pytest
from icmplib import ICMPRequest, ICMPv4Socket, SocketPermissionError

from app.demo.peers import LOOPBACK, DemoPeers
from domain.address_policy import AddressPolicy
from tests.peers.lookups import address, closed_port, deaf_port, domain, failure_of, network, open_port, running_peers
from workers import ping
from workers.network import PingSettings

ROOT = Path(__file__).parents[2]


def permitted(*, privileged: bool) -> bool:
    try:
        ICMPv4Socket(privileged=privileged).close()
    except SocketPermissionError:
        return False
    return True


RAW = permitted(privileged=True)
DATAGRAM = permitted(privileged=False)
AUTO = "icmp" if RAW or DATAGRAM else "tcp"


@pytest.fixture(scope="module")
async def peers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[DemoPeers]:
    async with running_peers(tmp_path_factory.mktemp("peers")) as running:
        yield running


@pytest.mark.parametrize("asked", ["127.0.0.1", "::1"])
async def test_loopback_answers_every_echo(peers: DemoPeers, asked: str) -> None:
    async with network(peers.settings) as net:
        then = (await ping.look_up(address(asked), net)).result

    assert (then.target, then.address, then.method) == (asked, asked, AUTO)
    assert (then.packets_sent, then.packets_received, then.packet_loss) == (4, 4, 0.0)
    assert 0 < then.min_roundtrip_ms <= then.average_roundtrip_ms <= then.max_roundtrip_ms < 1000
    assert [echo.success for echo in then.results] == [True] * 4
    assert {echo.ttl for echo in then.results} == ({64} if AUTO == "icmp" else {None})


async def test_document_is_camel_case(peers: DemoPeers) -> None:
    async with network(peers.settings) as net:
        then = (await ping.look_up(address("127.0.0.1"), net)).result.model_dump(mode="json")

    assert set(then) == {
        "target", "address", "packetsSent", "packetsReceived", "packetLoss", "averageRoundtripMs", "minRoundtripMs",
        "maxRoundtripMs", "method", "results",
    }  # fmt: skip
    assert set(then["results"][0]) == {"success", "roundtripTimeMs", "status", "ttl"}


async def test_domain_is_pinged_at_its_first_address(peers: DemoPeers) -> None:
    async with network(peers.settings) as net:
        then = (await ping.look_up(domain("example.com"), net)).result

    assert (then.target, then.address, then.packets_received) == ("example.com", "127.0.0.1", 4)


async def test_ipv4_address_in_ipv6_clothes_is_pinged_as_what_it_is(peers: DemoPeers) -> None:
    async with network(peers.settings) as net:
        then = (await ping.look_up(address("::ffff:127.0.0.1"), net)).result

    assert (then.address, then.packets_received) == ("127.0.0.1", 4)


@pytest.mark.parametrize("asked", ["127.0.0.1", "::1"])
async def test_pings_at_the_same_time_lose_nothing_to_each_other(peers: DemoPeers, asked: str) -> None:
    """A raw socket hears the replies to all pings of the host; unfiltered, a few hundred pings drown in each other's."""
    settings = PingSettings(interval_s=0.01, reply_timeout_s=5.0)
    async with network(peers.settings, ping=settings) as net:
        then = await asyncio.gather(*(ping.look_up(address(asked), net) for _ in range(300)))

    assert sum(answer.result.packets_received for answer in then) == 1200


@pytest.mark.parametrize(
    ("number", "sequence", "payload", "expected"),
    [(7, 1, b"ours", "Success"), (8, 1, b"ours", None), (7, 2, b"ours", None), (7, 1, b"another's", None)],
)
def test_reply_counts_only_with_number_sequence_and_payload_of_its_echo(
    number: int, sequence: int, payload: bytes, expected: str | None
) -> None:
    reply = bytes(4) + number.to_bytes(2, "big") + sequence.to_bytes(2, "big") + payload

    then = ping._status(reply, ICMPRequest("127.0.0.1", id=7, sequence=1, payload=b"ours"), v6=False)

    assert then == expected


@pytest.mark.parametrize(("icmp_type", "expected"), [(3, "DestinationUnreachable"), (11, "TtlExpired"), (5, None)])
def test_error_that_quotes_our_echo_says_how_it_ended(icmp_type: int, expected: str | None) -> None:
    ip_header = bytes([0x45]) + bytes(19)
    echo = bytes([8, 0, 0, 0]) + (7).to_bytes(2, "big") + (1).to_bytes(2, "big")
    error = bytes([icmp_type, 0]) + bytes(6) + ip_header + echo

    then = ping._status(error, ICMPRequest("127.0.0.1", id=7, sequence=1), v6=False)

    assert then == expected


@pytest.mark.parametrize("packet", [b"", b"\x00", b"\x03\x00" + bytes(6), b"\x03\x00" + bytes(6) + b"\x4f" + bytes(19)])
def test_stump_of_a_packet_is_nobodys_reply(packet: bytes) -> None:
    assert ping._status(packet, ICMPRequest("127.0.0.1", id=0, sequence=0), v6=False) is None


async def test_silence_is_a_failure_of_its_own_with_icmp(peers: DemoPeers) -> None:
    """No time to answer in is the one silence that every machine can make: even loopback needs longer."""
    settings = PingSettings(reply_timeout_s=0.0, interval_s=0.0, method="auto", tcp_ports=(9,))
    async with network(peers.settings, ping=settings) as net:
        then = await failure_of(ping.look_up(address("127.0.0.1"), net))

    assert (then.code, then.transient) == ("no_reply", False)
    assert "100 % packet loss" in then.message


async def test_silence_is_a_failure_of_its_own_with_tcp(peers: DemoPeers) -> None:
    with deaf_port() as port:
        settings = PingSettings(method="tcp", tcp_ports=(port,), reply_timeout_s=0.2, interval_s=0.0, echoes=2)
        async with network(peers.settings, ping=settings) as net:
            then = await failure_of(ping.look_up(address("127.0.0.1"), net))

    assert then.code == "no_reply"


async def test_address_that_this_host_cannot_send_to_is_told_apart_from_silence(peers: DemoPeers) -> None:
    everything = AddressPolicy(allowed_networks=(ipaddress.ip_network("255.255.255.255/32"),))
    if not (RAW or DATAGRAM):
        pytest.skip("this machine permits no ICMP, and TCP has no broadcast")
    settings = PingSettings(method="icmp" if RAW else "icmp-datagram", interval_s=0.0)
    async with network(peers.settings, policy=everything, ping=settings) as net:
        then = await failure_of(ping.look_up(address("255.255.255.255"), net))

    assert then.code == "network_unreachable"


@pytest.mark.parametrize("method", ["auto", "tcp"])
async def test_zone_of_no_interface_cannot_be_sent_to(peers: DemoPeers, method: Literal["auto", "tcp"]) -> None:
    everything = AddressPolicy(allowed_networks=(ipaddress.ip_network("fe80::/10"),))
    async with network(peers.settings, policy=everything, ping=PingSettings(method=method, interval_s=0.0)) as net:
        then = await failure_of(ping.look_up(address("fe80::1%nosuch0"), net))

    assert then.code == "network_unreachable"


async def test_tcp_probe_says_so_and_takes_a_refusal_for_an_answer(peers: DemoPeers) -> None:
    with closed_port() as port:
        async with network(peers.settings, ping=PingSettings(method="tcp", tcp_ports=(port,), interval_s=0.0)) as net:
            then = (await ping.look_up(address("127.0.0.1"), net)).result

    assert (then.method, then.packets_received) == ("tcp", 4)
    assert {(echo.status, echo.ttl) for echo in then.results} == {("Refused", None)}


async def test_tcp_probe_finds_the_open_port_behind_a_deaf_one(peers: DemoPeers) -> None:
    with deaf_port() as deaf, open_port() as listening:
        settings = PingSettings(method="tcp", tcp_ports=(deaf, listening), interval_s=0.0)
        async with network(peers.settings, ping=settings) as net:
            then = (await ping.look_up(address("127.0.0.1"), net)).result

    assert [echo.status for echo in then.results] == ["Success"] * 4


@pytest.mark.parametrize(("method", "is_permitted"), [("icmp", RAW), ("icmp-datagram", DATAGRAM)])
async def test_forced_method_is_used_or_honestly_refused(
    peers: DemoPeers, method: Literal["icmp", "icmp-datagram"], is_permitted: bool
) -> None:
    async with network(peers.settings, ping=PingSettings(method=method)) as net:
        if is_permitted:
            assert (await ping.look_up(address("127.0.0.1"), net)).result.method == "icmp"
        else:
            assert (await failure_of(ping.look_up(address("127.0.0.1"), net))).code == "probe_not_permitted"


def test_process_without_raw_sockets_falls_back_and_says_by_which_method() -> None:
    """As root the right to raw sockets is dropped first; other users seldom have it."""
    with closed_port() as port:
        code = (
            "import asyncio; from workers import ping; from workers.network import PingSettings;"
            f"print(*asyncio.run(ping._echoes('127.0.0.1', PingSettings(tcp_ports=({port},), interval_s=0.0))))"
        )
        drop = ["setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw"] if os.geteuid() == 0 else []
        done = subprocess.run(
            [*drop, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )

    assert done.stdout.startswith("icmp " if DATAGRAM else "tcp ")
    assert done.stdout.count("success=True") == 4


async def test_policy_keeps_loopback_from_strangers(peers: DemoPeers) -> None:
    async with network(peers.settings, policy=AddressPolicy()) as net:
        then = await failure_of(ping.look_up(address("127.0.0.1"), net))

    assert (then.code, then.transient) == ("address_refused", False)


async def test_name_with_one_forbidden_address_is_refused_as_a_whole(peers: DemoPeers) -> None:
    async with network(peers.settings, policy=AddressPolicy(allowed_networks=LOOPBACK)) as net:
        then = await failure_of(ping.look_up(domain("inside.example.org"), net))

    assert then.code == "address_refused"
    assert then.message == "The address is a private address; this service does not send packets to it."


@pytest.mark.parametrize(
    ("name", "code", "transient"),
    [
        ("nowhere.example.com", "name_not_found", False),
        ("mail.example.org", "name_not_found", False),
        ("broken.example.org", "name_resolution_failed", True),
        ("silent.example.org", "timeout", True),
    ],
)
async def test_name_without_address_fails_with_its_own_code(peers: DemoPeers, name: str, code: str, transient: bool) -> None:
    async with network(peers.settings, dns_timeout_s=0.5) as net:
        then = await failure_of(ping.look_up(domain(name), net))

    assert (then.code, then.transient) == (code, transient)


async def test_half_an_answer_of_the_name_servers_is_enough(peers: DemoPeers) -> None:
    async with network(peers.settings) as net:
        then = (await ping.look_up(domain("half.example.org"), net)).result

    assert then.address == "127.0.0.1"
