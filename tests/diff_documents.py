"""Result documents in the shape of the real ones, with made-up content: what the four services bring about one target."""

import copy
import ipaddress
from collections.abc import Callable
from typing import Any

import orjson

from workers import rdap
from workers.geoip import GeoIPResult
from workers.ping import Echo, PingResult
from workers.reverse_dns import ReverseDNSResult

Document = dict[str, Any]


def edited(document: Document, **values: Any) -> Document:
    """A copy with other values: `network__country="NL"`, `events__1__date="…"`; a function is given the old value."""
    copied = copy.deepcopy(document)
    for path, value in values.items():
        *steps, last = path.split("__")
        place: Any = copied
        for step in steps:
            place = place[_step(place, step)]
        at = _step(place, last)
        place[at] = value(copy.deepcopy(place[at])) if isinstance(value, Callable) else value  # type: ignore[arg-type]
    return copied


def _step(place: Any, step: str) -> Any:
    return int(step) if isinstance(place, list) else step


# --- Ping -------------------------------------------------------------------------------------------------------------


def ping(*times_ms: float | None, ttl: int | None = 57, method: str = "icmp", address: str = "198.51.100.7") -> Document:
    """One echo for each time; None is a lost one."""
    answered = [time for time in times_ms if time is not None]
    result = PingResult(
        target="198.51.100.7",
        address=address,
        packets_sent=len(times_ms),
        packets_received=len(answered),
        packet_loss=round(100 * (1 - len(answered) / len(times_ms)), 1),
        average_roundtrip_ms=round(sum(answered) / len(answered), 3),
        min_roundtrip_ms=min(answered),
        max_roundtrip_ms=max(answered),
        method=method,
        results=[
            Echo(success=False, status="TimedOut")
            if time is None
            else Echo(success=True, status="Success", roundtrip_time_ms=time, ttl=ttl)
            for time in times_ms
        ],
    )
    return _data(result.model_dump_json(by_alias=True))


# --- GeoIP ------------------------------------------------------------------------------------------------------------


def geoip(**other: Any) -> Document:
    """As ip-api.com tells it."""
    result = GeoIPResult(
        ip="198.51.100.7",
        country="Netherlands",
        country_code="NL",
        region="NH",
        region_name="North Holland",
        city="Amsterdam",
        zip="1012",
        lat=52.3716,
        lon=4.8883,
        timezone="Europe/Amsterdam",
        isp="Example Hosting B.V.",
        org="Example Hosting",
        as_="AS64500 Example Hosting B.V.",
        source="ip-api.com",
    )
    return _data(result.model_dump_json(by_alias=True)) | other


def country_only(code: str = "NL") -> Document:
    """As the offline table tells it."""
    return _data(GeoIPResult(ip="198.51.100.7", country_code=code, source="iptocc").model_dump_json(by_alias=True))


# --- ReverseDNS -------------------------------------------------------------------------------------------------------


def reverse_dns(*names: str, addresses: tuple[str, ...] = ("198.51.100.7",), at: str = "2026-01-02T03:04:05Z") -> Document:
    first, *others = names or (None,)
    document: Document = {
        "input": "198.51.100.7",
        "found": bool(names),
        "hostName": first,
        "aliases": others,
        "addresses": list(addresses) if names else [],
        "queriedAtUtc": at,
    }
    ReverseDNSResult.model_validate_json(orjson.dumps(document))
    return document


# --- RDAP -------------------------------------------------------------------------------------------------------------


def rdap_result(raw: Document) -> Document:
    """The result of a registry's document, as the worker makes it."""
    if raw["objectClassName"] == "domain":
        result = rdap._about_domain(raw)
    else:
        result = rdap._about_network(raw, ipaddress.ip_address(raw["startAddress"]))
    return _data(result.model_dump_json(by_alias=True))


def gtld_domain() -> Document:
    """A thin registry's: upper case, a registrar with its abuse contact, no holder."""
    return {
        "objectClassName": "domain",
        "handle": "2138_DOMAIN_TLD-EX",
        "ldhName": "EXAMPLE.TEST",
        "links": [_link("https://rdap.registry.test/v1/domain/EXAMPLE.TEST")],
        "status": ["client delete prohibited", "client transfer prohibited", "server update prohibited"],
        "entities": [
            {
                "objectClassName": "entity",
                "handle": "9292",
                "roles": ["registrar"],
                "publicIds": [{"type": "IANA Registrar ID", "identifier": "9292"}],
                "vcardArray": card(["fn", {}, "text", "Marks & Names, Inc."]),
                "entities": [
                    {
                        "objectClassName": "entity",
                        "roles": ["abuse"],
                        "vcardArray": card(
                            ["fn", {}, "text", ""],
                            ["tel", {"type": "voice"}, "uri", "tel:+1.5550100"],
                            ["email", {}, "text", "abuse@marks.test"],
                        ),
                    }
                ],
            }
        ],
        "events": [
            {"eventAction": "registration", "eventDate": "1997-09-15T04:00:00Z"},
            {"eventAction": "expiration", "eventDate": "2028-09-14T04:00:00Z"},
            {"eventAction": "last changed", "eventDate": "2019-09-09T15:39:04Z"},
            {"eventAction": "last update of RDAP database", "eventDate": "2026-01-02T03:00:01Z"},
        ],
        "secureDNS": {"delegationSigned": False},
        "nameservers": [{"objectClassName": "nameserver", "ldhName": f"NS{number}.EXAMPLE.TEST"} for number in (1, 2, 3, 4)],
        "rdapConformance": ["rdap_level_0", "icann_rdap_technical_implementation_guide_0"],
        "notices": [{"title": "Terms of Use", "description": ["Service subject to Terms of Use."]}],
    }


def cctld_domain() -> Document:
    """A thick registry's: contacts with cards and events, name servers with addresses and truncation remarks, a signed zone."""
    return {
        "objectClassName": "domain",
        "handle": "DOM000001-EXNIC",
        "ldhName": "example.test",
        "unicodeName": "example.test",
        "status": ["active"],
        "port43": "whois.nic.test",
        "entities": [
            _contact("AB1-EXNIC", ["technical"], "Ada Byron"),
            _contact("CD2-EXNIC", ["registrant", "administrative"], "Example Association"),
            {
                "objectClassName": "entity",
                "handle": "RAR9-EXNIC",
                "roles": ["registrar", "sponsor"],
                "publicIds": [{"type": "IANA Registrar ID", "identifier": "81"}],
                "vcardArray": card(["fn", {}, "text", "REGISTRAR NINE"]),
            },
            {
                "objectClassName": "entity",
                "roles": ["billing"],
                "vcardArray": card(["fn", {}, "text", "REDACTED FOR PRIVACY"]),
                "remarks": [{"title": "REDACTED FOR PRIVACY", "type": "object redacted due to authorization"}],
            },
        ],
        "events": [
            {"eventAction": "registration", "eventDate": "2001-12-10T23:00:00Z"},
            {"eventAction": "last changed", "eventDate": "2022-09-28T11:21:02.785057Z"},
            {"eventAction": "transfer", "eventDate": "2017-07-18T08:26:59Z"},
        ],
        "secureDNS": {
            "delegationSigned": True,
            "dsData": [
                {"keyTag": 4711, "algorithm": 13, "digestType": 2, "digest": "AB12CD"},
                {"keyTag": 815, "algorithm": 8, "digestType": 2, "digest": "FF00EE"},
            ],
        },
        "nameservers": [
            {
                "objectClassName": "nameserver",
                "handle": f"HOST{number}-EXNIC",
                "ldhName": f"ns{number}.example.test",
                "ipAddresses": {"v4": [f"192.0.2.{number}", f"192.0.2.{number + 100}"], "v6": [f"2001:db8::{number}"]},
                "status": ["active", "linked"],
                "remarks": [{"title": "result set truncated due to authorization", "description": ["More there is."]}],
                "events": [{"eventAction": "last update of RDAP database", "eventDate": "2026-01-02T03:00:01Z"}],
            }
            for number in (1, 2)
        ],
        "remarks": [{"title": "Registration Comments", "description": ["For examples only."]}],
        "links": [_link("https://rdap.nic.test/domain/example.test")],
        "rdapConformance": ["rdap_level_0"],
    }


def network() -> Document:
    """A regional registry's block, with remarks by its holder."""
    return {
        "objectClassName": "ip network",
        "handle": "198.51.100.0 - 198.51.100.255",
        "startAddress": "198.51.100.0",
        "endAddress": "198.51.100.255",
        "ipVersion": "v4",
        "name": "EXAMPLE-NET",
        "type": "ASSIGNED PA",
        "country": "NL",
        "parentHandle": "198.51.0.0 - 198.51.255.255",
        "status": ["active"],
        "cidr0_cidrs": [{"v4prefix": "198.51.100.0", "length": 24}],
        "arin_originas0_originautnums": [64500, 64501],
        "entities": [
            {"objectClassName": "entity", "handle": "EX-MNT", "roles": ["registrant"]},
            _contact("NOC1-EX", ["technical", "administrative"], "Example NOC"),
            _contact("AB9-EX", ["abuse"], "Abuse Desk"),
        ],
        "events": [
            {"eventAction": "registration", "eventDate": "2009-03-17T09:00:00Z"},
            {"eventAction": "last changed", "eventDate": "2024-11-05T14:31:08+01:00"},
        ],
        "remarks": [
            {"title": "description", "description": ["Example Hosting", "Amsterdam"]},
            {"title": "remarks", "description": ["Abuse to abuse@example.test"]},
        ],
        "notices": [{"title": "Source", "description": ["Objects returned came from source", "EX"]}],
        "links": [_link("https://rdap.rir.test/ip/198.51.100.0/24")],
        "port43": "whois.rir.test",
        "lang": "en",
        "rdapConformance": ["rdap_level_0", "cidr0"],
    }


def card(*properties: list[Any]) -> list[Any]:
    return ["vcard", [["version", {}, "text", "4.0"], *properties]]


def _contact(handle: str, roles: list[str], full_name: str) -> Document:
    return {
        "objectClassName": "entity",
        "handle": handle,
        "roles": roles,
        "vcardArray": card(
            ["fn", {}, "text", full_name],
            ["adr", {}, "text", ["", "", "1 Example Street", "Amsterdam", "", "1012", "NL"]],
            ["email", {}, "text", f"{handle.lower()}@example.test"],
            ["tel", {"type": ["work", "voice"]}, "uri", "tel:+31.205550100"],
            ["tel", {"type": ["work", "fax"]}, "uri", "tel:+31.205550101"],
        ),
        "events": [{"eventAction": "last changed", "eventDate": "2022-10-12T18:54:01Z"}],
        "links": [_link(f"https://rdap.nic.test/entity/{handle}")],
        "port43": "whois.nic.test",
    }


def _link(address: str) -> Document:
    return {"value": address, "rel": "self", "href": address, "type": "application/rdap+json"}


def _data(text: str) -> Document:
    document: Document = orjson.loads(text)
    return document
