"""RDAP against a real server on loopback that behaves like a registry, and misbehaves like one."""

import asyncio
import ipaddress
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.demo.dns_server import DEMO_ZONE
from app.demo.peers import DEMO_TLDS, LOOPBACK, DemoPeers, bootstrap_file
from app.demo.rdap_documents import domain_document, network_document
from app.demo.rdap_server import RdapServer
from domain.address_policy import AddressPolicy
from events.facts import DeferReason
from tests.peers.lookups import address, closed_port, deaf_port, deferral_of, domain, failure_of, network, running_peers
from workers import rdap
from workers.lookup import LookupFailed
from workers.rdap_bootstrap import Bootstrap, parse_registry


@pytest.fixture(scope="module")
async def peers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[DemoPeers]:
    async with running_peers(tmp_path_factory.mktemp("peers")) as running:
        yield running


def bootstrap_dir(directory: Path, base_url: str, tlds: list[str] | None = None) -> Path:
    for kind, entries in {"ipv4": ["0.0.0.0/0"], "ipv6": ["::/0"], "dns": tlds or DEMO_TLDS}.items():
        (directory / f"{kind}.json").write_bytes(bootstrap_file(entries, base_url))
    return directory


def last_path(server: RdapServer) -> str:
    return server.served[-1][0]


@pytest.mark.parametrize(
    ("asked", "about", "cidr"),
    [
        ("198.51.100.7", "198.51.100.7", "198.51.100.0/24"),
        ("2001:db8::1", "2001:db8::1", "2001:db8::/48"),
        ("::ffff:192.0.2.1", "192.0.2.1", "192.0.2.0/24"),
        ("fe80::1%eth0", "fe80::1", "fe80::/48"),
    ],
)
async def test_address_brings_its_network(peers: DemoPeers, asked: str, about: str, cidr: str) -> None:
    async with network(peers.settings) as net:
        then = (await rdap.look_up(address(asked), net)).result

    document = network_document(about)
    assert then.raw == document
    assert last_path(peers.rdap) == f"/ip/{about}"
    assert then.model_dump(mode="json", exclude={"raw", "events"}) == {
        "handle": document["handle"],
        "name": document["name"],
        "status": ["active"],
        "domain": None,
        "network": {
            "startAddress": document["startAddress"],
            "endAddress": document["endAddress"],
            "cidr": cidr,
            "country": "NL",
            "type": "ASSIGNED PA",
            "parentHandle": "DEMO-PARENT-1",
            "ipVersion": document["ipVersion"],
        },
    }
    assert then.events[1] == rdap.RDAPEvent(action="last changed", date="2024-11-05T14:31:08+01:00")


async def test_domain_brings_its_registration(peers: DemoPeers) -> None:
    async with network(peers.settings) as net:
        then = (await rdap.look_up(domain("example.com"), net)).result

    assert then.raw == domain_document("example.com")
    assert then.model_dump(mode="json", exclude={"raw", "events"}) == {
        "handle": "D-EXAMPLE.COM-DEMO",
        "name": "example.com",
        "status": ["client transfer prohibited", "active"],
        "network": None,
        "domain": {
            "ldhName": "example.com",
            "unicodeName": None,
            "registrar": "Made-up Registrar B.V.",
            "registrarIanaId": "9999",
            "nameservers": ["ns1.hosting.example", "ns2.hosting.example"],
            "secureDNS": True,
        },
    }
    assert [event.action for event in then.events] == ["registration", "expiration", "last update of RDAP database"]


@pytest.mark.parametrize(
    ("asked", "registered"),
    [
        ("www.bbc.co.uk", "bbc.co.uk"),
        ("a.b.example.com", "example.com"),
        ("co.uk", "co.uk"),
        ("pages.github.io", "github.io"),
        ("xn--bcher-kva.de", "xn--bcher-kva.de"),
    ],
)
async def test_registry_is_asked_for_the_registrable_domain(peers: DemoPeers, asked: str, registered: str) -> None:
    async with network(peers.settings) as net:
        await rdap.look_up(domain(asked), net)

    assert last_path(peers.rdap) == f"/domain/{registered}"


@pytest.mark.parametrize(
    ("name", "code", "transient"),
    [
        ("missing.org", "not_found", False),
        ("broken.org", "upstream_error", True),
        ("loop.org", "upstream_error", False),
        ("astray.org", "address_refused", False),
        ("adrift.org", "upstream_error", False),
        ("page.org", "unparsable_answer", False),
        ("list.org", "unparsable_answer", False),
        ("nameserver.org", "unparsable_answer", False),
        ("huge.org", "answer_too_large", False),
        ("slow.org", "timeout", True),
        ("dripping.org", "timeout", True),
        ("example.museum", "rdap_no_server", False),
    ],
)
async def test_each_way_to_go_wrong_has_its_code(peers: DemoPeers, name: str, code: str, transient: bool) -> None:
    async with network(peers.settings, http_timeout_s=0.3 if code == "timeout" else 2.0) as net:
        then = await failure_of(rdap.look_up(domain(name), net))

    assert (then.code, then.transient) == (code, transient)


@pytest.mark.parametrize(
    ("name", "reason", "wait_s"), [("busy.org", DeferReason.QUOTA, 7.0), ("resting.org", DeferReason.BREAKER, 9.0)]
)
async def test_registry_that_says_when_to_come_back_defers_until_then(
    peers: DemoPeers, name: str, reason: DeferReason, wait_s: float
) -> None:
    async with network(peers.settings) as net:
        then = await deferral_of(rdap.look_up(domain(name), net))

    assert (then.reason, then.retry_after_s) == (reason, wait_s)


async def test_redirects_are_followed_to_the_document(peers: DemoPeers) -> None:
    async with network(peers.settings) as net:
        then = (await rdap.look_up(domain("moved.org"), net)).result

    assert then.name == "moved.org"
    assert last_path(peers.rdap) == "/moved/3/domain/moved.org"


async def test_endless_redirects_are_followed_a_bounded_number_of_times(peers: DemoPeers) -> None:
    peers.rdap.served.clear()
    async with network(peers.settings) as net:
        await failure_of(rdap.look_up(domain("loop.org"), net))

    assert len(peers.rdap.served) == rdap.REDIRECTS_MAX + 1


async def test_fields_of_the_wrong_type_are_unknown_and_lists_are_bounded(peers: DemoPeers) -> None:
    async with network(peers.settings) as net:
        then = (await rdap.look_up(domain("tangled.org"), net)).result

    assert then.handle == "ESC[31mAPE"
    assert (then.name, then.status, then.events) == (None, [], [rdap.RDAPEvent(action=None, date=None)])
    assert then.domain is not None
    assert (then.domain.registrar, then.domain.secure_dns) == (None, None)
    assert len(then.domain.nameservers) == rdap.ITEMS_MAX
    assert len(then.raw["nameservers"]) == 200


def test_answer_about_another_network_is_no_answer() -> None:
    document = network_document("198.51.100.7")

    with pytest.raises(LookupFailed) as caught:
        rdap._about_network(document, ipaddress.ip_address("203.0.113.1"))

    assert caught.value.code == "unparsable_answer"


async def test_server_named_by_a_third_party_must_pass_the_policy(peers: DemoPeers) -> None:
    async with network(peers.settings, policy=AddressPolicy()) as net:
        then = await failure_of(rdap.look_up(domain("example.com"), net))

    assert then.code == "address_refused"


async def test_server_is_found_by_our_name_servers_and_told_its_name(peers: DemoPeers, tmp_path: Path) -> None:
    """The connection goes to the address that passed the policy; the server still hears the name it was asked under."""
    port = peers.rdap.base_url.rstrip("/").rpartition(":")[2]
    assert ("*.example.net.", "A") in DEMO_ZONE
    directory = bootstrap_dir(tmp_path, f"http://rdap.example.net:{port}/")

    async with network(peers.settings, rdap_bootstrap_dir=directory) as net:
        then = (await rdap.look_up(domain("example.com"), net)).result

    assert then.name == "example.com"
    assert peers.rdap.hosts[-1] == f"rdap.example.net:{port}"


async def test_server_whose_name_leads_to_a_forbidden_address_is_not_asked(peers: DemoPeers, tmp_path: Path) -> None:
    directory = bootstrap_dir(tmp_path, "http://inside.example.org/")

    async with network(peers.settings, rdap_bootstrap_dir=directory) as net:
        then = await failure_of(rdap.look_up(domain("example.com"), net))

    assert then.code == "address_refused"


@pytest.mark.parametrize("host", ["nowhere.example.com", "broken.example.org"])
async def test_server_whose_name_does_not_resolve_is_unreachable(peers: DemoPeers, tmp_path: Path, host: str) -> None:
    async with network(peers.settings, rdap_bootstrap_dir=bootstrap_dir(tmp_path, f"http://{host}/")) as net:
        then = await failure_of(rdap.look_up(domain("example.com"), net))

    assert (then.code, then.transient) == ("upstream_unreachable", True)


async def test_closed_server_is_unreachable(peers: DemoPeers, tmp_path: Path) -> None:
    with closed_port() as port:
        async with network(peers.settings, rdap_bootstrap_dir=bootstrap_dir(tmp_path, f"http://127.0.0.1:{port}")) as net:
            then = await failure_of(rdap.look_up(domain("example.com"), net))

    assert (then.code, then.transient) == ("upstream_unreachable", True)


async def test_deaf_server_times_out(peers: DemoPeers, tmp_path: Path) -> None:
    with deaf_port() as port:
        directory = bootstrap_dir(tmp_path, f"http://127.0.0.1:{port}/")
        async with network(peers.settings, rdap_bootstrap_dir=directory, http_timeout_s=0.4) as net:
            then = await failure_of(rdap.look_up(domain("example.com"), net))

    assert (then.code, then.transient) == ("timeout", True)


async def test_unencrypted_registry_is_not_asked_unless_permitted(peers: DemoPeers) -> None:
    async with network(peers.settings, rdap_allow_http=False) as net:
        then = await failure_of(rdap.look_up(domain("example.com"), net))

    assert then.code == "rdap_no_server"
    assert "without encryption" in then.message


async def test_policy_may_keep_special_addresses_from_the_registries(peers: DemoPeers) -> None:
    peers.rdap.served.clear()
    policy = AddressPolicy(allowed_networks=LOOPBACK, ask_about_special=False)

    async with network(peers.settings, policy=policy) as net:
        then = await failure_of(rdap.look_up(address("10.0.0.1"), net))

    assert then.code == "address_refused"
    assert not peers.rdap.served


def test_longest_prefix_and_most_labels_win() -> None:
    def registry(kind: str, services: dict[str, str]) -> Any:
        document = {"services": [[[entry], [f"http://{server}/", f"https://{server}/"]] for entry, server in services.items()]}
        return parse_registry(kind, json.dumps(document).encode())

    bootstrap = Bootstrap(
        ipv4=registry("ipv4", {"0.0.0.0/0": "all", "192.0.0.0/8": "eight", "192.0.2.0/24": "tf"}),
        ipv6=registry("ipv6", {"2001:db8::/32": "doc"}),
        dns=registry("dns", {"UK": "uk", "co.uk": "co"}),
    )

    assert bootstrap.servers_for_address(ipaddress.ip_address("192.0.2.1")) == ("https://tf/", "http://tf/")
    assert bootstrap.servers_for_address(ipaddress.ip_address("192.9.2.1"))[0] == "https://eight/"
    assert bootstrap.servers_for_address(ipaddress.ip_address("8.8.8.8"))[0] == "https://all/"
    assert bootstrap.servers_for_address(ipaddress.ip_address("2002::1")) == ()
    assert bootstrap.servers_for_domain("bbc.co.uk")[0] == "https://co/"
    assert bootstrap.servers_for_domain("other.uk")[0] == "https://uk/"
    assert bootstrap.servers_for_domain("notuk") == ()


def test_base_url_that_nobody_could_ask_is_left_out() -> None:
    urls = ["https://rdap.example:port/", "ftp://rdap.example/", "", "https://rdap.example/"]

    then = parse_registry("dns", json.dumps({"services": [[["com"], urls]]}).encode())

    assert then.services["com"] == ("https://rdap.example/",)


def test_shipped_bootstrap_knows_the_registries() -> None:
    shipped = Bootstrap.load(None)

    assert shipped.servers_for_address(ipaddress.ip_address("8.8.8.8"))[0] == "https://rdap.arin.net/registry/"
    assert shipped.servers_for_address(ipaddress.ip_address("2001:67c:2e8::1"))[0] == "https://rdap.db.ripe.net/"
    assert shipped.servers_for_domain("example.com")[0] == "https://rdap.verisign.com/com/v1/"
    assert shipped.ipv4.publication.startswith("2019-")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"services": []}', '{"services": [[["com"]]]}', '{"services": [["com", "x"]]}']
)
def test_what_is_no_bootstrap_file_is_refused(content: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        parse_registry("dns", content.encode())


async def test_refresh_replaces_the_list_and_asks_next_time_whether_it_changed(peers: DemoPeers) -> None:
    server, url = peers.rdap, f"{peers.rdap.base_url}bootstrap/dns.json"
    server.bootstrap_files["dns.json"] = bootstrap_file(["museum"], "https://rdap.museum.example/")
    async with network(peers.settings) as net:
        first = await net.bootstrap.refresh("dns", url, net.get_configured)
        second = await net.bootstrap.refresh("dns", url, net.get_configured)
        servers = net.bootstrap.servers_for_domain("example.museum")

    assert (first, second) == (True, True)
    assert servers == ("https://rdap.museum.example/",)
    assert [(status, etag is not None) for _path, status, etag in list(server.served)[-2:]] == [(200, False), (304, True)]


@pytest.mark.parametrize("content", [None, b"<html>maintenance</html>", b'{"services": []}'])
async def test_failed_refresh_leaves_the_list_in_use(peers: DemoPeers, content: bytes | None) -> None:
    peers.rdap.bootstrap_files.clear()
    if content is not None:
        peers.rdap.bootstrap_files["dns.json"] = content
    async with network(peers.settings) as net:
        before = net.bootstrap.dns
        then = await net.bootstrap.refresh("dns", f"{peers.rdap.base_url}bootstrap/dns.json", net.get_configured)

        assert then is False
        assert net.bootstrap.dns is before


async def test_lookup_does_not_wait_for_the_refresh(peers: DemoPeers) -> None:
    with deaf_port() as port:
        urls = {"dns": f"http://127.0.0.1:{port}/dns.json"}
        async with network(peers.settings, rdap_refresh=True, rdap_bootstrap_urls=urls, http_timeout_s=30.0) as net:
            async with asyncio.timeout(5):
                then = (await rdap.look_up(domain("example.com"), net)).result

            assert then.name == "example.com"
            assert net.refreshing is not None
            assert not net.refreshing.done()
