"""What the demo's RDAP server knows: made-up registrations in the shape that real registries serve (RFC 9083).

Pure functions of the question, so that a check can tell afterwards what an answer must have been.
"""

import ipaddress
from typing import Any

CONFORMANCE = ["rdap_level_0", "cidr0", "icann_rdap_technical_implementation_guide_1"]


def network_document(address: str) -> dict[str, Any]:
    """The registration of the /24 or /48 around the address."""
    parsed = ipaddress.ip_address(address)
    block = ipaddress.ip_network((parsed, 24 if parsed.version == 4 else 48), strict=False)  # noqa: PLR2004 - IP's own number
    return {
        "rdapConformance": CONFORMANCE,
        "objectClassName": "ip network",
        "handle": f"DEMO-{block.network_address}",
        "startAddress": str(block.network_address),
        "endAddress": str(block.broadcast_address),
        "ipVersion": f"v{parsed.version}",
        "name": f"DEMONET-{parsed.version}",
        "type": "ASSIGNED PA",
        "country": "NL",
        "parentHandle": "DEMO-PARENT-1",
        "status": ["active"],
        "cidr0_cidrs": [{f"v{parsed.version}prefix": str(block.network_address), "length": block.prefixlen}],
        "entities": [_entity("DEMO-OPS", ["technical", "abuse"], "Demo Network Operations")],
        "events": [
            {"eventAction": "registration", "eventDate": "2009-03-17T09:00:00Z"},
            {"eventAction": "last changed", "eventDate": "2024-11-05T14:31:08+01:00"},
        ],
        "remarks": [{"title": "remarks", "description": ["A made-up network for demonstrations."]}],
        "notices": _notices(),
        "port43": "whois.registry.example",
    }


def domain_document(name: str) -> dict[str, Any]:
    """The registration of the domain. The name is in upper case, as large registries write it."""
    registrar = _entity("9999", ["registrar"], "Made-up Registrar B.V.")
    registrar["publicIds"] = [{"type": "IANA Registrar ID", "identifier": "9999"}]
    return {
        "rdapConformance": CONFORMANCE,
        "objectClassName": "domain",
        "handle": f"D-{name.upper()}-DEMO",
        "ldhName": name.upper(),
        "status": ["client transfer prohibited", "active"],
        "entities": [_entity("R-77", ["registrant"], "Redacted for privacy"), registrar],
        "nameservers": [
            {"objectClassName": "nameserver", "ldhName": f"NS{number}.HOSTING.EXAMPLE", "status": ["active"]}
            for number in (1, 2)
        ],
        "secureDNS": {
            "delegationSigned": True,
            "dsData": [{"keyTag": 4711, "algorithm": 13, "digestType": 2, "digest": "00FF"}],
        },
        "events": [
            {"eventAction": "registration", "eventDate": "1998-02-11T05:00:00Z"},
            {"eventAction": "expiration", "eventDate": "2031-02-10T05:00:00Z"},
            {"eventAction": "last update of RDAP database", "eventDate": "2025-01-20T12:00:51Z"},
        ],
        "links": [{"rel": "related", "href": f"https://rdap.registrar.example/domain/{name}", "type": "application/rdap+json"}],
        "notices": _notices(),
    }


def error_document(code: int, title: str) -> dict[str, Any]:
    """RFC 9083 section 6: what comes with an unsuccessful status."""
    return {"rdapConformance": CONFORMANCE, "errorCode": code, "title": title, "description": [f"{title}, says the demo."]}


def _entity(handle: str, roles: list[str], full_name: str) -> dict[str, Any]:
    card = [["version", {}, "text", "4.0"], ["fn", {}, "text", full_name], ["kind", {}, "text", "org"]]
    return {"objectClassName": "entity", "handle": handle, "roles": roles, "vcardArray": ["vcard", card]}


def _notices() -> list[dict[str, Any]]:
    return [{"title": "Terms of Use", "description": ["These registrations are made up."]}]
