"""GeoIP: where an address is said to be, and whose it is. A local database, else ip-api.com, else a table of countries."""

import ipaddress
import json
from typing import Any, Literal

import iptocc
import maxminddb
import orjson
from pydantic import Field

from domain.errors import ErrorCode
from events.facts import DeferReason, Target
from workers.lookup import Answer, LookupDeferred, LookupFailed, Parser, RawAnswer, Result
from workers.network import HttpAnswer, Network, bounded_wait_s, printable, without_zone

IP_API_FIELDS = "status,message,country,countryCode,region,regionName,city,zip,lat,lon,timezone,isp,org,as,query"
IP_API_WINDOW_S = 60.0


class GeoIPResult(Result):
    """Null is unknown. `ip` is the address that was located (a domain's first); `source` says who answered.

    `countryCode` is ISO 3166-1 alpha-2, `region` the code of its subdivision, `lat` and `lon` are degrees, `timezone` an IANA
    name, `as` number and name such as `AS64500 Example`.
    """

    ip: str
    country: str | None = None
    country_code: str | None = None
    region: str | None = None
    region_name: str | None = None
    city: str | None = None
    zip: str | None = None
    lat: float | None = None
    lon: float | None = None
    timezone: str | None = None
    isp: str | None = None
    org: str | None = None
    as_: str | None = Field(default=None, alias="as")
    source: Literal["mmdb", "ip-api.com", "iptocc"]


async def look_up(target: Target, net: Network) -> Answer[GeoIPResult]:
    """Only ip-api.com is somebody else, so only then does the policy say what may be asked."""
    if net.mmdb is not None:
        return _from_mmdb(await _address(target, net), net.mmdb)
    url = net.settings.ip_api_url
    if url is None:
        return _from_iptocc(await _address(target, net), "ip-api.com is switched off")
    address = without_zone((await net.addresses_of(target, net.policy.refusal_to_ask_about))[0])
    try:
        answer = await _ask_ip_api(f"{url.rstrip('/')}/{address}", net)
    except IpApiDown:
        return _from_iptocc(address, "ip-api.com could not be reached")
    return IP_API.read(RawAnswer({"address": address}, answer.body), "ip-api.com")


async def _address(target: Target, net: Network) -> str:
    return without_zone((await net.addresses_of(target, lambda _address: None))[0])


def _from_mmdb(address: str, mmdb: maxminddb.Reader) -> Answer[GeoIPResult]:
    record = mmdb.get(address) if _fits(address, mmdb) else None
    # Not orjson: a record may hold integers of 128 bits.
    return MMDB.read(RawAnswer({"address": address}, json.dumps(record, default=lambda value: value.hex()).encode()), "mmdb")


def parse_mmdb(raw: RawAnswer) -> GeoIPResult:
    """Reads records of the City, Country, ISP and ASN kinds; what a kind does not have stays null. The body is the record."""
    address, record = raw.about["address"], json.loads(raw.body)
    if not isinstance(record, dict):
        raise LookupFailed(ErrorCode.NOT_FOUND, "The GeoIP database has no entry for this address.")
    traits = {**_part(record, "traits"), **record}
    organization = printable(traits.get("autonomous_system_organization"))
    return GeoIPResult(
        ip=address,
        country=_name(record, "country"),
        country_code=printable(_part(record, "country").get("iso_code")),
        region=printable(_part(record, "subdivisions").get("iso_code")),
        region_name=_name(record, "subdivisions"),
        city=_name(record, "city"),
        zip=printable(_part(record, "postal").get("code")),
        lat=_degrees(_part(record, "location").get("latitude")),
        lon=_degrees(_part(record, "location").get("longitude")),
        timezone=printable(_part(record, "location").get("time_zone")),
        isp=printable(traits.get("isp")) or organization,
        org=printable(traits.get("organization")) or organization,
        as_=_autonomous_system(traits.get("autonomous_system_number"), organization),
        source="mmdb",
    )


MMDB = Parser("mmdb", 1, parse_mmdb)


def _fits(address: str, mmdb: maxminddb.Reader) -> bool:
    return mmdb.metadata().ip_version >= ipaddress.ip_address(address).version


def _part(record: dict[str, Any], key: str) -> dict[str, Any]:
    part = record.get(key)
    if isinstance(part, list) and part:
        # Subdivisions go from the largest to the smallest; the region is the largest.
        part = part[0]
    return part if isinstance(part, dict) else {}


def _name(record: dict[str, Any], key: str) -> str | None:
    names = _part(record, key).get("names")
    return printable(names.get("en")) if isinstance(names, dict) else None


def _autonomous_system(number: object, organization: str | None) -> str | None:
    return f"AS{number} {organization or ''}".strip() if isinstance(number, int) else None


def _degrees(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


class IpApiDown(Exception):  # noqa: N818 - a state, not a mistake
    pass


async def _ask_ip_api(url: str, net: Network) -> HttpAnswer:
    await net.ip_api_pace.take_turn()
    try:
        answer = await net.get_configured(f"{url}?fields={IP_API_FIELDS}", {"Accept": "application/json"})
    except LookupFailed as failed:
        if failed.transient:
            raise IpApiDown from failed
        raise
    _heed_limit(answer, net)
    if answer.status >= 500:  # noqa: PLR2004 - server errors
        raise IpApiDown
    if answer.status != 200:  # noqa: PLR2004 - OK
        raise LookupFailed(ErrorCode.UPSTREAM_ERROR, f"ip-api.com refused the question with status {answer.status}.")
    return answer


def _heed_limit(answer: HttpAnswer, net: Network) -> None:
    """X-Rl is how many questions are left, X-Ttl the seconds until they are counted anew; asking on at 429 leads to a ban."""
    over = answer.status == 429  # noqa: PLR2004 - Too Many Requests
    if over or answer.headers.get("x-rl") == "0":
        wait_s = bounded_wait_s(answer.headers.get("x-ttl"), IP_API_WINDOW_S)
        net.ip_api_pace.close_for(wait_s)
        if over:
            raise LookupDeferred(DeferReason.QUOTA, wait_s)


def parse_ip_api(raw: RawAnswer) -> GeoIPResult:
    """`raw.about`: `address` is what was asked about."""
    address = raw.about["address"]
    try:
        document = orjson.loads(raw.body)
    except orjson.JSONDecodeError:
        document = None
    match document:
        case {"status": "success"}:
            return _located(address, document)
        case {"status": "fail", "message": "private range" | "reserved range" as kind}:
            raise LookupFailed(ErrorCode.NO_LOCATION, f"The address is in a {kind}: such addresses have no location.")
        case {"status": "fail"}:
            raise LookupFailed(ErrorCode.UPSTREAM_ERROR, "ip-api.com could not look up this address.")
        case _:
            raise LookupFailed(ErrorCode.UNPARSABLE_ANSWER, "ip-api.com gave an answer that is not in its documented form.")


IP_API = Parser("ip-api", 1, parse_ip_api)


def _located(address: str, document: dict[str, Any]) -> GeoIPResult:
    return GeoIPResult(
        ip=address,
        country=printable(document.get("country")),
        country_code=printable(document.get("countryCode")),
        region=printable(document.get("region")),
        region_name=printable(document.get("regionName")),
        city=printable(document.get("city")),
        zip=printable(document.get("zip")),
        lat=_degrees(document.get("lat")),
        lon=_degrees(document.get("lon")),
        timezone=printable(document.get("timezone")),
        isp=printable(document.get("isp")),
        org=printable(document.get("org")),
        as_=printable(document.get("as")),
        source="ip-api.com",
    )


def _from_iptocc(address: str, why: str) -> Answer[GeoIPResult]:
    """A table that comes with the program: nobody was asked, and there is nothing to read again."""
    country_code = iptocc.country_code(address)
    if country_code is None:
        message = f"{why}, and the offline table has no country for this address."
        raise LookupFailed(ErrorCode.UPSTREAM_UNREACHABLE, message, transient=True)
    return Answer(GeoIPResult(ip=address, country_code=country_code, source="iptocc"), "iptocc")
