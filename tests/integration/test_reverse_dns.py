"""Reverse DNS against a real DNS server on loopback."""

from collections.abc import AsyncIterator

import pytest

from app.demo.peers import DemoPeers
from domain.address_policy import AddressPolicy
from tests.peers.lookups import NOW, address, failure_of, network, running_peers
from workers import reverse_dns


@pytest.fixture(scope="module")
async def peers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[DemoPeers]:
    async with running_peers(tmp_path_factory.mktemp("peers")) as running:
        yield running


async def test_name_of_an_address_is_found_and_resolved_back(peers: DemoPeers) -> None:
    async with network(peers.settings) as net:
        then = (await reverse_dns.look_up(address("127.0.0.1"), net)).result

    assert then.model_dump(mode="json") == {
        "input": "127.0.0.1",
        "found": True,
        "hostName": "loopback.example.net",
        "aliases": [],
        "addresses": ["127.0.0.1"],
        "queriedAtUtc": NOW.isoformat().replace("+00:00", "Z"),
    }


@pytest.mark.parametrize("asked", ["::1", "::1%lo"])
async def test_ipv6_address_is_asked_for_without_its_zone(peers: DemoPeers, asked: str) -> None:
    async with network(peers.settings) as net:
        then = (await reverse_dns.look_up(address(asked), net)).result

    assert (then.input, then.host_name) == (asked, "loopback6.example.net")


async def test_several_names_always_come_in_the_same_order(peers: DemoPeers) -> None:
    """The name server shuffles them, as real ones do."""
    async with network(peers.settings) as net:
        then = (await reverse_dns.look_up(address("127.0.0.2"), net)).result

    assert (then.host_name, then.aliases) == ("alpha.example.net", ["lost.example.org", "zeta.example.net"])


async def test_answer_too_long_for_udp_comes_over_tcp_and_is_bounded(peers: DemoPeers) -> None:
    async with network(peers.settings) as net:
        then = (await reverse_dns.look_up(address("127.0.0.6"), net)).result

    assert then.host_name == "host-000.example.net"
    assert len(then.aliases) == reverse_dns.NAMES_MAX - 1


@pytest.mark.parametrize(("asked", "name"), [("127.0.0.3", "lost.example.org"), ("127.0.0.9", "silent.example.org")])
async def test_name_that_leads_nowhere_is_still_the_answer(peers: DemoPeers, asked: str, name: str) -> None:
    async with network(peers.settings, dns_timeout_s=30.0) as net:
        then = (await reverse_dns.look_up(address(asked), net)).result

    assert (then.found, then.host_name, then.addresses) == (True, name, [])


@pytest.mark.parametrize("asked", ["127.0.0.4", "127.0.0.5"])
async def test_address_without_name_is_a_success_with_found_false(peers: DemoPeers, asked: str) -> None:
    """127.0.0.4 does not exist in the zone; 127.0.0.5 does, with records of another type only."""
    async with network(peers.settings) as net:
        then = (await reverse_dns.look_up(address(asked), net)).result

    assert then == reverse_dns.ReverseDNSResult(input=asked, found=False, queried_at_utc=NOW)


@pytest.mark.parametrize(("asked", "code"), [("127.0.0.7", "name_resolution_failed"), ("127.0.0.8", "timeout")])
async def test_name_server_without_answer_is_a_failure_and_not_a_missing_name(peers: DemoPeers, asked: str, code: str) -> None:
    async with network(peers.settings, dns_timeout_s=0.5) as net:
        then = await failure_of(reverse_dns.look_up(address(asked), net))

    assert (then.code, then.transient) == (code, True)


async def test_policy_may_keep_special_addresses_from_the_name_servers(peers: DemoPeers) -> None:
    async with network(peers.settings, policy=AddressPolicy(ask_about_special=False)) as net:
        then = await failure_of(reverse_dns.look_up(address("127.0.0.1"), net))

    assert then.code == "address_refused"
