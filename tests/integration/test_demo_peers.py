"""`make demo` promises four real answers without internet."""

import asyncio
import gc
from pathlib import Path

from app.demo.peers import DEMO_MMDB
from tests.peers.lookups import address, domain, network, running_peers
from tests.peers.mmdb import DEMO_CITY, DEMO_NETWORKS, build_mmdb
from workers import geoip, ping, rdap, reverse_dns


async def test_loopback_gets_four_answers(tmp_path: Path) -> None:
    async with running_peers(tmp_path) as peers, network(peers.settings) as net:
        place, echoes, registration, name = await asyncio.gather(
            geoip.look_up(address("127.0.0.1"), net),
            ping.look_up(address("127.0.0.1"), net),
            rdap.look_up(address("127.0.0.1"), net),
            reverse_dns.look_up(address("127.0.0.1"), net),
        )

    assert place.result.city == "Loopback City"
    assert echoes.result.packets_received == 4
    assert registration.result.network is not None
    assert registration.result.network.cidr == "127.0.0.0/24"
    assert name.result.host_name == "loopback.example.net"


async def test_domain_gets_three_answers_and_needs_no_fourth(tmp_path: Path) -> None:
    async with running_peers(tmp_path) as peers, network(peers.settings) as net:
        place, echoes, registration = await asyncio.gather(
            geoip.look_up(domain("example.com"), net),
            ping.look_up(domain("example.com"), net),
            rdap.look_up(domain("example.com"), net),
        )

    assert place.result.ip == "127.0.0.1"
    assert echoes.result.packets_received == 4
    assert registration.result.name == "example.com"


async def test_shipped_database_is_what_the_script_builds(tmp_path: Path) -> None:
    """The file carries its build time; everything else must be the same."""
    built = build_mmdb(tmp_path / "demo.mmdb", dict.fromkeys(DEMO_NETWORKS, DEMO_CITY)).read_bytes()
    shipped = DEMO_MMDB.read_bytes()

    end_of_data = shipped.index(b"\xab\xcd\xefMaxMind.com")
    assert built[:end_of_data] == shipped[:end_of_data]


async def test_stopped_peers_leave_no_server_behind(tmp_path: Path) -> None:
    async with running_peers(tmp_path) as peers:
        ports = [peers.dns.address[1], int(peers.rdap.base_url.rstrip("/").rpartition(":")[2])]
    gc.collect()

    for port in ports:
        refused = await asyncio.gather(asyncio.open_connection("127.0.0.1", port), return_exceptions=True)
        assert isinstance(refused[0], ConnectionRefusedError)
