"""GeoIP against an MMDB that the test built, an ip-api stand-in, and iptocc's own table."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.demo.ip_api import IpApi, location
from app.demo.peers import DemoPeers
from domain.address_policy import AddressPolicy
from events.facts import DeferReason
from tests.peers.lookups import address, closed_port, deferral_of, domain, failure_of, network, running_peers
from tests.peers.mmdb import DEMO_CITY, build_mmdb
from workers import geoip


@pytest.fixture(scope="module")
async def peers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[DemoPeers]:
    async with running_peers(tmp_path_factory.mktemp("peers")) as running:
        yield running


@pytest.fixture
async def ip_api() -> AsyncIterator[IpApi]:
    server = IpApi()
    await server.start()
    yield server
    await server.stop()


def only_source(url: str | None) -> dict[str, Any]:
    return {"geoip_mmdb": None, "ip_api_url": url}


async def test_city_database_fills_every_field(peers: DemoPeers, tmp_path: Path) -> None:
    mmdb = build_mmdb(tmp_path / "city.mmdb", {"198.51.100.0/24": DEMO_CITY})

    async with network(peers.settings, geoip_mmdb=mmdb) as net:
        then = (await geoip.look_up(address("198.51.100.7"), net)).result

    assert then.model_dump(mode="json") == {
        "ip": "198.51.100.7",
        "country": "Netherlands",
        "countryCode": "NL",
        "region": "NH",
        "regionName": "North Holland",
        "city": "Loopback City",
        "zip": "1012",
        "lat": 52.37,
        "lon": 4.89,
        "timezone": "Europe/Amsterdam",
        "isp": "Demo Access B.V.",
        "org": "Demo Hosting",
        "as": "AS64500 Demo Networks",
        "source": "mmdb",
    }


async def test_country_database_leaves_the_rest_null(peers: DemoPeers, tmp_path: Path) -> None:
    record = {"country": {"iso_code": "SE", "names": {"en": "Sweden"}}}
    mmdb = build_mmdb(tmp_path / "country.mmdb", {"2001:db8::/32": record}, "Demo-Country")

    async with network(peers.settings, geoip_mmdb=mmdb) as net:
        then = (await geoip.look_up(address("2001:db8::1"), net)).result

    assert then == geoip.GeoIPResult(ip="2001:db8::1", country="Sweden", country_code="SE", source="mmdb")


async def test_asn_database_names_the_network_only(peers: DemoPeers, tmp_path: Path) -> None:
    record = {"autonomous_system_number": 64501, "autonomous_system_organization": "Example Transit"}
    mmdb = build_mmdb(tmp_path / "asn.mmdb", {"203.0.113.0/24": record}, "Demo-ASN")

    async with network(peers.settings, geoip_mmdb=mmdb) as net:
        then = (await geoip.look_up(address("203.0.113.9"), net)).result

    assert (then.as_, then.isp, then.country) == ("AS64501 Example Transit", "Example Transit", None)


@pytest.mark.parametrize("asked", ["192.0.2.1", "2001:db8::1"])
async def test_address_that_the_database_lacks_is_not_found_and_nobody_else_is_asked(
    peers: DemoPeers, tmp_path: Path, asked: str
) -> None:
    mmdb = build_mmdb(tmp_path / "four.mmdb", {"198.51.100.0/24": DEMO_CITY}, ip_version=4)
    asked_before = peers.ip_api.asked

    async with network(peers.settings, geoip_mmdb=mmdb) as net:
        then = await failure_of(geoip.look_up(address(asked), net))

    assert (then.code, then.transient) == ("not_found", False)
    assert peers.ip_api.asked == asked_before


async def test_record_of_unexpected_types_is_read_as_unknown(peers: DemoPeers, tmp_path: Path) -> None:
    record = {"country": "NL", "city": {"names": ["x"]}, "subdivisions": [], "location": {"latitude": "north"}, "isp": 7}
    mmdb = build_mmdb(tmp_path / "odd.mmdb", {"198.51.100.0/24": record})

    async with network(peers.settings, geoip_mmdb=mmdb) as net:
        then = (await geoip.look_up(address("198.51.100.7"), net)).result

    assert then == geoip.GeoIPResult(ip="198.51.100.7", source="mmdb")


async def test_domain_is_located_by_its_first_address(peers: DemoPeers) -> None:
    async with network(peers.settings) as net:
        then = (await geoip.look_up(domain("example.com"), net)).result

    assert (then.ip, then.city) == ("127.0.0.1", "Loopback City")


@pytest.mark.parametrize("asked", ["198.51.100.7", "2001:db8::99"])
async def test_ip_api_answer_is_taken_over(peers: DemoPeers, ip_api: IpApi, asked: str) -> None:
    async with network(peers.settings, **only_source(ip_api.url)) as net:
        then = (await geoip.look_up(address(asked), net)).result

    told = location(asked)
    told["ip"] = told.pop("query")
    del told["status"]
    # ip-api gives an empty text for what it does not know.
    assert then.model_dump(mode="json") == {**told, "zip": None, "source": "ip-api.com"}


@pytest.mark.parametrize(("asked", "kind"), [("10.0.0.1", "private range"), ("127.0.0.1", "reserved range")])
async def test_address_without_location_fails_for_good(peers: DemoPeers, ip_api: IpApi, asked: str, kind: str) -> None:
    async with network(peers.settings, **only_source(ip_api.url)) as net:
        then = await failure_of(geoip.look_up(address(asked), net))

    assert (then.code, then.transient) == ("no_location", False)
    assert kind in then.message


async def test_exhausted_quota_defers_and_is_not_asked_again(peers: DemoPeers) -> None:
    ip_api = IpApi(per_minute=0)
    await ip_api.start()
    async with network(peers.settings, **only_source(ip_api.url)) as net:
        refused = await deferral_of(geoip.look_up(address("198.51.100.7"), net))
        held_back = await deferral_of(geoip.look_up(address("198.51.100.7"), net))
    await ip_api.stop()

    assert refused.reason is DeferReason.QUOTA
    assert 50 < refused.retry_after_s <= 60
    assert 50 < held_back.retry_after_s <= 65
    assert ip_api.asked == 1


async def test_last_question_of_the_window_closes_it(peers: DemoPeers) -> None:
    ip_api = IpApi(per_minute=1)
    await ip_api.start()
    async with network(peers.settings, **only_source(ip_api.url)) as net:
        answered = (await geoip.look_up(address("198.51.100.7"), net)).result
        await deferral_of(geoip.look_up(address("198.51.100.8"), net))
    await ip_api.stop()

    assert answered.source == "ip-api.com"
    assert ip_api.asked == 1


async def test_own_pace_defers_each_to_a_turn_of_its_own(peers: DemoPeers, ip_api: IpApi) -> None:
    async with network(peers.settings, **only_source(ip_api.url), ip_api_per_minute=6) as net:
        for _ in range(2):
            await geoip.look_up(address("198.51.100.7"), net)
        turns = [(await deferral_of(geoip.look_up(address("198.51.100.7"), net))).retry_after_s for _ in range(3)]

    assert ip_api.asked == 2
    assert turns == sorted(turns)
    assert turns[2] - turns[0] == pytest.approx(30, abs=1)


@pytest.mark.parametrize("asked", ["8.8.8.8", "2001:4860:4860::8888"])
async def test_unreachable_ip_api_leaves_the_country_from_the_wheel(peers: DemoPeers, asked: str) -> None:
    with closed_port() as port:
        async with network(peers.settings, **only_source(f"http://127.0.0.1:{port}/json")) as net:
            then = (await geoip.look_up(address(asked), net)).result

    assert then == geoip.GeoIPResult(ip=asked, country_code="US", source="iptocc")


async def test_broken_ip_api_leaves_the_country_from_the_wheel(peers: DemoPeers, ip_api: IpApi) -> None:
    ip_api.status = 503

    async with network(peers.settings, **only_source(ip_api.url)) as net:
        then = (await geoip.look_up(address("8.8.8.8"), net)).result

    assert then.source == "iptocc"


async def test_address_that_no_source_can_place_fails_with_the_reason(peers: DemoPeers) -> None:
    with closed_port() as port:
        async with network(peers.settings, **only_source(f"http://127.0.0.1:{port}/json")) as net:
            then = await failure_of(geoip.look_up(address("192.0.2.1"), net))

    assert (then.code, then.transient) == ("upstream_unreachable", True)
    assert "ip-api.com could not be reached" in then.message


async def test_refusal_by_ip_api_is_no_reason_to_guess(peers: DemoPeers, ip_api: IpApi) -> None:
    ip_api.status = 403

    async with network(peers.settings, **only_source(ip_api.url)) as net:
        then = await failure_of(geoip.look_up(address("8.8.8.8"), net))

    assert (then.code, then.transient) == ("upstream_error", False)


async def test_answer_in_another_form_is_unparsable(peers: DemoPeers) -> None:
    async with network(peers.settings, **only_source(f"{peers.rdap.base_url}domain")) as net:
        then = await failure_of(geoip.look_up(address("8.8.8.8"), net))

    assert then.code == "unparsable_answer"


async def test_switched_off_ip_api_is_not_asked(peers: DemoPeers) -> None:
    async with network(peers.settings, **only_source(None)) as net:
        then = (await geoip.look_up(address("8.8.8.8"), net)).result

    assert then.source == "iptocc"


async def test_nobody_is_told_about_an_address_that_the_policy_keeps(peers: DemoPeers, ip_api: IpApi) -> None:
    policy = AddressPolicy(ask_about_special=False)

    async with network(peers.settings, **only_source(ip_api.url), policy=policy) as net:
        by_address = await failure_of(geoip.look_up(address("10.0.0.1"), net))
        by_name = await failure_of(geoip.look_up(domain("inside.example.org"), net))

    assert {by_address.code, by_name.code} == {"address_refused"}
    assert ip_api.asked == 0


async def test_missing_database_stops_the_start(peers: DemoPeers, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        async with network(peers.settings, geoip_mmdb=tmp_path / "missing.mmdb"):
            pytest.fail("the network opened without its database")
