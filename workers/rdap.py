"""RDAP: who registered an address block or a domain, as its registry tells (RFC 7480, 9082, 9083, 9224)."""

import asyncio
import ipaddress
from typing import Any

import httpx
import orjson
from pydantic import Field

from domain.errors import ErrorCode
from events.facts import DeferReason, Target, TargetType
from workers.lookup import Answer, LookupDeferred, LookupFailed, Parser, RawAnswer, Result
from workers.network import HttpAnswer, Network, bounded_wait_s, printable, without_zone

REDIRECTS_MAX = 5
ITEMS_MAX = 64
"""Longest list that is taken over into a typed field; the raw document has them all."""

RETRY_AFTER_S = 60.0
NETWORK, DOMAIN = "ip network", "domain"
"""The object classes that are asked for (RFC 9083 section 5)."""

REDIRECTS = {301, 302, 303, 307, 308}


class RDAPEvent(Result):
    """`action` as in RFC 9083 section 10.2.3 (registration, expiration, ...), `date` as the registry wrote it (RFC 3339)."""

    action: str | None
    date: str | None


class RDAPNetwork(Result):
    """The block that holds the address. `cidr` joins several prefixes with a comma; `country` is ISO 3166-1 alpha-2."""

    start_address: str | None
    end_address: str | None
    cidr: str | None
    country: str | None
    type: str | None
    parent_handle: str | None
    ip_version: str | None


class RDAPDomain(Result):
    """The registered domain, names in lower case. `secureDNS`: is the delegation signed; null = the registry does not say."""

    ldh_name: str | None
    unicode_name: str | None
    registrar: str | None
    registrar_iana_id: str | None
    nameservers: list[str]
    secure_dns: bool | None = Field(alias="secureDNS")


class RDAPResult(Result):
    """`network` for an address, `domain` for a domain, the other null. `raw` is the document as received."""

    handle: str | None
    name: str | None
    status: list[str]
    network: RDAPNetwork | None
    domain: RDAPDomain | None
    events: list[RDAPEvent]
    raw: dict[str, Any]


async def look_up(target: Target, net: Network) -> Answer[RDAPResult]:
    """Asks the registry of the target's block or top-level domain about the block or the registrable domain.

    Fails with `rdap_no_server` or `not_found` when there is nobody to ask or nothing registered, and is deferred when the
    registry wants to be asked less often, or says when it will be back.
    """
    if target.type is TargetType.IP_ADDRESS:
        [text] = await net.addresses_of(target, net.policy.refusal_to_ask_about)
        address = ipaddress.ip_address(without_zone(text))
        base = _server(net.bootstrap.servers_for_address(address), net)
        host, answer = await _ask(base.join(f"ip/{address}"), net)
        return PARSER.read(RawAnswer({"asked": str(address), "kind": NETWORK}, _body(answer)), host)
    name = net.suffixes.privatesuffix(target.canonical) or target.canonical
    base = _server(net.bootstrap.servers_for_domain(name), net)
    host, answer = await _ask(base.join(f"domain/{name}"), net)
    return PARSER.read(RawAnswer({"asked": name, "kind": DOMAIN}, _body(answer)), host)


def parse(raw: RawAnswer) -> RDAPResult:
    """`raw.about`: `asked` is the address or the name, `kind` the RDAP object class that it was asked for."""
    asked, kind = raw.about["asked"], raw.about["kind"]
    document = _parsed(raw.body, kind)
    return _about_network(document, ipaddress.ip_address(asked)) if kind == NETWORK else _about_domain(document)


PARSER = Parser("rdap", 1, parse)


def _server(bases: tuple[str, ...], net: Network) -> httpx.URL:
    for base in bases:
        url = httpx.URL(base if base.endswith("/") else f"{base}/")
        if _may_speak(url, net):
            return url
    if bases:
        raise LookupFailed(ErrorCode.RDAP_NO_SERVER, "The registry offers RDAP without encryption only.")
    raise LookupFailed(ErrorCode.RDAP_NO_SERVER, "No registry is known to offer RDAP for this target.")


def _may_speak(url: httpx.URL, net: Network) -> bool:
    return url.scheme == "https" or (url.scheme == "http" and net.settings.rdap_allow_http)


async def _ask(url: httpx.URL, net: Network) -> tuple[str, HttpAnswer]:
    """The answer, and the host that gave it at last.

    Follows at most `REDIRECTS_MAX` redirects; each hop's host is resolved and passes the address policy like the first.
    """
    try:
        async with asyncio.timeout(net.settings.http_timeout_s):
            for _ in range(REDIRECTS_MAX + 1):
                answer = await net.get_policed(url, "application/rdap+json")
                if answer.status not in REDIRECTS:
                    return url.host, answer
                url = _next(url, answer.headers.get("location"), net)
    except TimeoutError:
        message = f"{url.host} did not answer within {net.settings.http_timeout_s:g} s."
        raise LookupFailed(ErrorCode.TIMEOUT, message, transient=True) from None
    raise LookupFailed(ErrorCode.UPSTREAM_ERROR, f"The RDAP server redirected more than {REDIRECTS_MAX} times.")


def _next(url: httpx.URL, location: str | None, net: Network) -> httpx.URL:
    try:
        hop = url.join(location or "").copy_with(userinfo=b"", fragment=None)
    except (httpx.InvalidURL, ValueError):
        hop = httpx.URL("")
    if not (location and hop.host and _may_speak(hop, net)):
        raise LookupFailed(ErrorCode.UPSTREAM_ERROR, f"{url.host} redirected to a place that cannot be followed safely.")
    return hop


def _body(answer: HttpAnswer) -> bytes:
    """The answer's body, or the failure that its status stands for (RFC 7480 section 5)."""
    match answer.status:
        case 200:
            return answer.body
        case 404:
            raise LookupFailed(ErrorCode.NOT_FOUND, "The registry has no registration data for this target.")
        case 429:
            raise LookupDeferred(DeferReason.QUOTA, bounded_wait_s(answer.headers.get("retry-after"), RETRY_AFTER_S))
        case 503 if "retry-after" in answer.headers:
            raise LookupDeferred(DeferReason.BREAKER, bounded_wait_s(answer.headers["retry-after"], RETRY_AFTER_S))
        case status:
            message = f"The RDAP server answered with status {status}."
            raise LookupFailed(ErrorCode.UPSTREAM_ERROR, message, transient=status >= 500)  # noqa: PLR2004 - server errors


def _parsed(body: bytes, kind: str) -> dict[str, Any]:
    """The body's JSON object, of the kind asked for."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise LookupFailed(ErrorCode.UNPARSABLE_ANSWER, "The RDAP server's answer is not JSON.") from None
    if not isinstance(document, dict) or document.get("objectClassName") != kind:
        raise LookupFailed(ErrorCode.UNPARSABLE_ANSWER, f"The RDAP server's answer does not describe a {kind}.")
    return document


def _about_network(document: dict[str, Any], address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> RDAPResult:
    prefixes = _prefixes(document)
    if prefixes and not any(address in prefix for prefix in prefixes):
        raise LookupFailed(ErrorCode.UNPARSABLE_ANSWER, "The RDAP server's answer is about another network.")
    network = RDAPNetwork(
        start_address=printable(document.get("startAddress")),
        end_address=printable(document.get("endAddress")),
        cidr=", ".join(str(prefix) for prefix in prefixes) or None,
        country=printable(document.get("country")),
        type=printable(document.get("type")),
        parent_handle=printable(document.get("parentHandle")),
        ip_version=printable(document.get("ipVersion")),
    )
    return _result(document, printable(document.get("name")), network=network)


def _prefixes(document: dict[str, Any]) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """The range as prefixes; none when its ends are missing or make no sense. Not all registries say it themselves (cidr0)."""
    try:
        start = ipaddress.ip_address(document.get("startAddress", ""))
        end = ipaddress.ip_address(document.get("endAddress", ""))
        return list(ipaddress.summarize_address_range(start, end))
    except (ValueError, TypeError):
        return []


def _about_domain(document: dict[str, Any]) -> RDAPResult:
    registrar = next((entity for entity in _items(document, "entities") if "registrar" in _texts(entity, "roles")), {})
    ldh_name = _lower(document.get("ldhName"))
    domain = RDAPDomain(
        ldh_name=ldh_name,
        unicode_name=_lower(document.get("unicodeName")),
        registrar=_full_name(registrar) or printable(registrar.get("handle")),
        registrar_iana_id=_iana_id(registrar),
        nameservers=[name for server in _items(document, "nameservers") if (name := _lower(server.get("ldhName")))],
        secure_dns=_delegation_signed(document),
    )
    return _result(document, ldh_name or domain.unicode_name, domain=domain)


def _result(
    document: dict[str, Any], name: str | None, network: RDAPNetwork | None = None, domain: RDAPDomain | None = None
) -> RDAPResult:
    return RDAPResult(
        handle=printable(document.get("handle")),
        name=name,
        status=_texts(document, "status"),
        network=network,
        domain=domain,
        events=[
            RDAPEvent(action=printable(event.get("eventAction")), date=printable(event.get("eventDate")))
            for event in _items(document, "events")
        ],
        raw=document,
    )


def _delegation_signed(document: dict[str, Any]) -> bool | None:
    # RFC 9083 section 5.3 spells secureDNS; registries that spell secureDns have been met.
    secure_dns = document.get("secureDNS", document.get("secureDns"))
    signed = secure_dns.get("delegationSigned") if isinstance(secure_dns, dict) else None
    return signed if isinstance(signed, bool) else None


def _full_name(entity: dict[str, Any]) -> str | None:
    """The `fn` of a jCard (RFC 7095): `["vcard", [["fn", {}, "text", "Example Registrar"], ...]]`."""
    match entity.get("vcardArray"):
        case ["vcard", [*properties]]:
            names = [printable(name) for name in map(_fn, properties[:ITEMS_MAX])]
            return next((name for name in names if name), None)
        case _:
            return None


def _fn(card_property: object) -> object:
    match card_property:
        case ["fn", _, _, name, *_]:
            return name
        case _:
            return None


def _iana_id(entity: dict[str, Any]) -> str | None:
    ids = (item.get("identifier") for item in _items(entity, "publicIds") if item.get("type") == "IANA Registrar ID")
    return printable(next(ids, None))


def _items(document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    items = document.get(key)
    return [item for item in items[:ITEMS_MAX] if isinstance(item, dict)] if isinstance(items, list) else []


def _texts(document: dict[str, Any], key: str) -> list[str]:
    items = document.get(key)
    return [text for item in items[:ITEMS_MAX] if (text := printable(item))] if isinstance(items, list) else []


def _lower(value: object) -> str | None:
    text = printable(value)
    return text.lower() if text else None
