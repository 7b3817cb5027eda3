"""What the lookups need of the network, opened once and passed to each: resolver, HTTP, policy, pacing, GeoIP and RDAP sources.

Every address that a lookup is about to talk to, or to talk about, passes the address policy here, after its name is resolved.
"""

import asyncio
import ipaddress
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Literal

import dns.asyncresolver
import dns.exception
import dns.message
import dns.name
import dns.nameserver
import dns.rdata
import dns.resolver
import httpx
import maxminddb
from aiolimiter import AsyncLimiter
from publicsuffixlist import PublicSuffixList

from domain.address_policy import AddressPolicy
from domain.errors import ErrorCode
from events.ending import end
from events.facts import DeferReason, Target, TargetType
from workers.lookup import LookupDeferred, LookupFailed
from workers.rdap_bootstrap import IANA_URLS, Bootstrap

ADDRESSES_MAX = 16
"""A name with more addresses than this is cut off: nobody reads on, and each must pass the policy."""

CONNECTS_MAX = 3
"""How many of a server's addresses are tried before it counts as unreachable."""

DEFER_MAX_S = 900.0

CLOSE_S = 5.0

Refusal = Callable[[str], str | None]
"""Says why an address must be left alone, or None when it need not be."""


@dataclass(frozen=True, kw_only=True)
class PingSettings:
    """`auto` takes the first that the kernel permits of raw ICMP, datagram ICMP and TCP connect; the rest force one of them."""

    method: Literal["auto", "icmp", "icmp-datagram", "tcp"] = "auto"
    echoes: int = 4
    interval_s: float = 0.1
    reply_timeout_s: float = 1.0
    tcp_ports: tuple[int, ...] = (443, 80)


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Everything that may be set about the lookups. The defaults ask the real internet.

    `nameservers` are (address, port) pairs, none = the system's. `ip_api_url` None = ip-api.com is never asked.
    `geoip_mmdb` set = nobody else is asked for locations. `rdap_bootstrap_dir` holds `ipv4.json`, `ipv6.json` and `dns.json`,
    None = the shipped ones. `rdap_allow_http` lets RDAP go unencrypted where a registry, or a test, offers nothing better.
    """

    policy: AddressPolicy = field(default_factory=AddressPolicy)
    nameservers: tuple[tuple[str, int], ...] = ()
    dns_timeout_s: float = 5.0
    http_timeout_s: float = 8.0
    use_env_proxies: bool = False
    body_bytes_max: int = 1024 * 1024
    ping: PingSettings = field(default_factory=PingSettings)
    geoip_mmdb: Path | None = None
    ip_api_url: str | None = "http://ip-api.com/json"
    ip_api_per_minute: int = 45
    rdap_bootstrap_dir: Path | None = None
    rdap_bootstrap_urls: Mapping[str, str] = field(default_factory=lambda: dict(IANA_URLS))
    rdap_refresh: bool = True
    rdap_allow_http: bool = False


@dataclass(frozen=True)
class HttpAnswer:
    status: int
    headers: httpx.Headers
    body: bytes


@dataclass(frozen=True)
class DnsAnswer:
    """`nameserver` is who gave it, "dns" where the resolver does not say."""

    message: dns.message.QueryMessage
    nameserver: str


class IpApiPace:
    """ip-api.com's free limit: so many questions a minute, and none while it says that we are over it.

    A third of the minute's questions may go out at once, the other two thirds trickle, so that no window of a minute ever
    holds more than the limit. Whoever is too early is sent away with a turn of its own, instead of all with the same.
    """

    def __init__(self, per_minute: int) -> None:
        self._limiter = AsyncLimiter(max(1, per_minute // 3), 30)
        self._closed_until = 0.0
        self._next_turn_at = 0.0

    async def take_turn(self) -> None:
        """Raises `LookupDeferred` instead of waiting."""
        now = asyncio.get_running_loop().time()
        if now >= self._closed_until and self._limiter.has_capacity():
            await self._limiter.acquire()
            return
        interval_s = self._limiter.time_period / self._limiter.max_rate
        self._next_turn_at = max(now, self._closed_until, self._next_turn_at) + interval_s
        raise LookupDeferred(DeferReason.QUOTA, min(self._next_turn_at - now, DEFER_MAX_S))

    def close_for(self, seconds: float) -> None:
        self._closed_until = asyncio.get_running_loop().time() + seconds


@dataclass(kw_only=True)
class Network:
    """One per worker process. Made by `open_network`, ended by `aclose`."""

    settings: NetworkSettings
    policy: AddressPolicy
    resolver: dns.asyncresolver.Resolver
    http: httpx.AsyncClient
    mmdb: maxminddb.Reader | None
    ip_api_pace: IpApiPace
    bootstrap: Bootstrap
    suffixes: PublicSuffixList
    now: Callable[[], datetime]
    refreshing: asyncio.Task[None] | None = None

    async def addresses_of(self, target: Target, refusal: Refusal) -> list[str]:
        """The target itself, or its name's addresses: A before AAAA, ascending, at least one, at most `ADDRESSES_MAX`.

        Name servers rotate their answers; in one order, all services of a job mean the same address by the first.
        An IPv4 address in IPv6 clothes (RFC 4291 section 2.5.5.2) comes out as the IPv4 address that it is.

        Fails with `address_refused` when `refusal` objects to any of them: a name must not smuggle a forbidden address in
        among harmless ones. Fails with `name_not_found`, `name_resolution_failed` or `timeout` when there is none.
        """
        if target.type is TargetType.IP_ADDRESS:
            return allowed([_unmapped(target.canonical)], refusal)
        return allowed(await self.resolve(target.canonical), refusal)

    async def resolve(self, name: str) -> list[str]:
        answers = await asyncio.gather(self._addresses(name, "A"), self._addresses(name, "AAAA"))
        addresses = [address for answer in answers if isinstance(answer, list) for address in answer]
        if addresses:
            return addresses[:ADDRESSES_MAX]
        for answer in answers:
            if isinstance(answer, LookupFailed):
                raise answer
        raise LookupFailed(ErrorCode.NAME_NOT_FOUND, "The name does not exist or has no address.")

    async def _addresses(self, name: str, kind: str) -> list[str] | LookupFailed:
        try:
            addresses = [ipaddress.ip_address(record.to_text()) for record in await self.records(name, kind)]
            return [_unmapped(str(address)) for address in sorted(addresses, key=int)]
        except LookupFailed as failure:
            # Half an answer is enough: many name servers know A and stumble over AAAA.
            return failure

    async def records(self, name: str | dns.name.Name, kind: str) -> list[dns.rdata.Rdata]:
        """The records in no order; none when the name, or this kind of record, does not exist. Fails as `query` does."""
        return records_of((await self.query(name, kind)).message)

    async def query(self, name: str | dns.name.Name, kind: str) -> DnsAnswer:
        """What a name server answers, also that the name, or this kind of record, does not exist.

        Fails with `timeout` or `name_resolution_failed`, both transient.
        """
        try:
            answer = await self.resolver.resolve(
                name, kind, lifetime=self.settings.dns_timeout_s, search=False, raise_on_no_answer=False
            )
        except dns.resolver.NXDOMAIN as nothing:
            return DnsAnswer(_said_no(nothing), "dns")
        except dns.exception.Timeout:
            message = f"No name server answered within {self.settings.dns_timeout_s:g} s."
            raise LookupFailed(ErrorCode.TIMEOUT, message, transient=True) from None
        except dns.exception.DNSException:
            message = "The name servers could not answer."
            raise LookupFailed(ErrorCode.NAME_RESOLUTION_FAILED, message, transient=True) from None
        return DnsAnswer(answer.response, answer.nameserver or "dns")

    async def get_policed(self, url: httpx.URL, accept: str) -> HttpAnswer:
        """One GET to a server that a third party named. Redirects are not followed.

        The connection goes to the very address that passed the policy: a second resolution could give another one.
        """
        failure = LookupFailed(ErrorCode.UPSTREAM_UNREACHABLE, f"{url.host} has no address.", transient=True)
        for address in (await self._server_addresses(url.host))[:CONNECTS_MAX]:
            try:
                return await self._get(
                    url.copy_with(host=address),
                    {"Accept": accept, "Host": url.netloc.decode()},
                    {"sni_hostname": url.host} if not _is_address(url.host) else {},
                )
            except LookupFailed as failed:
                if failed.code != ErrorCode.UPSTREAM_UNREACHABLE:
                    raise
                failure = LookupFailed(failed.code, f"{url.host} could not be reached.", transient=True)
        raise failure

    async def get_configured(self, url: str, headers: Mapping[str, str]) -> HttpAnswer:
        """One GET to a server that the operator named. Redirects are not followed.

        Fails with `upstream_unreachable`, `timeout` (both transient) or `answer_too_large`.
        """
        return await self._get(httpx.URL(url), headers, {})

    async def _server_addresses(self, host: str) -> list[str]:
        if _is_address(host):
            return allowed([host], self.policy.refusal_to_probe)
        try:
            addresses = await self.resolve(host)
        except LookupFailed as failed:
            message = f"The name of the server {host} could not be resolved."
            raise LookupFailed(ErrorCode.UPSTREAM_UNREACHABLE, message, transient=True) from failed
        return allowed(addresses, self.policy.refusal_to_probe)

    async def _get(self, url: httpx.URL, headers: Mapping[str, str], extensions: dict[str, str]) -> HttpAnswer:
        # Without a content encoding the bytes on the wire are the bytes that are counted: nothing can inflate behind the bound.
        headers = {**headers, "Accept-Encoding": "identity"}
        try:
            async with self.http.stream("GET", url, headers=headers, extensions=extensions) as response:
                return HttpAnswer(response.status_code, response.headers, await self._body(response))
        except httpx.TimeoutException:
            message = f"{url.host} did not answer in time."
            raise LookupFailed(ErrorCode.TIMEOUT, message, transient=True) from None
        except httpx.TransportError:
            raise LookupFailed(ErrorCode.UPSTREAM_UNREACHABLE, f"{url.host} could not be reached.", transient=True) from None

    async def _body(self, response: httpx.Response) -> bytes:
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > self.settings.body_bytes_max:
                message = f"The answer is larger than {self.settings.body_bytes_max} bytes."
                raise LookupFailed(ErrorCode.ANSWER_TOO_LARGE, message)
        return bytes(body)

    async def aclose(self) -> None:
        if self.refreshing is not None:
            await end([self.refreshing], CLOSE_S)
        await self.http.aclose()
        if self.mmdb is not None:
            self.mmdb.close()


async def open_network(settings: NetworkSettings, now: Callable[[], datetime]) -> Network:
    """Opens the files at once, so that a wrong path stops the start: OSError, ValueError or `maxminddb.InvalidDatabaseError`.

    Nothing is asked of the network here; the RDAP bootstrap files are refreshed in the background.
    """
    net = Network(
        settings=settings,
        policy=settings.policy,
        resolver=_resolver(settings.nameservers),
        http=_http(settings),
        mmdb=maxminddb.open_database(settings.geoip_mmdb) if settings.geoip_mmdb else None,
        ip_api_pace=IpApiPace(settings.ip_api_per_minute),
        bootstrap=Bootstrap.load(settings.rdap_bootstrap_dir),
        # The private part of the list (github.io and its like) names hosting offers: their names are in no registry.
        suffixes=PublicSuffixList(only_icann=True),
        now=now,
    )
    if settings.rdap_refresh:
        net.refreshing = asyncio.create_task(net.bootstrap.keep_fresh(settings.rdap_bootstrap_urls, net.get_configured))
    return net


def records_of(answer: dns.message.QueryMessage) -> list[dns.rdata.Rdata]:
    """The records that answer a message's question, behind all its aliases (RFC 1034 section 3.6.2); in no order."""
    return list(answer.resolve_chaining().answer or ())


def allowed(addresses: list[str], refusal: Refusal) -> list[str]:
    for address in addresses:
        if reason := refusal(address):
            raise LookupFailed(ErrorCode.ADDRESS_REFUSED, reason)
    return addresses


def without_zone(address: str) -> str:
    """`fe80::1%eth0` as others know it: `fe80::1`. The zone (RFC 4007) means something on this host only."""
    return address.partition("%")[0]


def bounded_wait_s(header: str | None, default_s: float) -> float:
    """Seconds from a header such as Retry-After: between 1 and `DEFER_MAX_S`, `default_s` when it gives no number."""
    text = (header or "").strip()
    if not (text.isascii() and text.isdigit()):
        return default_s
    # Six digits hold any wait that is not cut off anyway.
    return min(max(float(text[:6]), 1.0), DEFER_MAX_S)


def printable(value: object, limit: int = 256) -> str | None:
    """Text from a stranger, without control and direction characters; None when nothing is left or it was no text."""
    if not isinstance(value, str):
        return None
    return "".join(character for character in value if character.isprintable()).strip()[:limit] or None


def _said_no(error: dns.resolver.NXDOMAIN) -> dns.message.QueryMessage:
    """The answer behind the exception: one name was asked for, so there is one."""
    responses: dict[dns.name.Name, dns.message.QueryMessage] = error.kwargs["responses"]
    return next(iter(responses.values()))


def _unmapped(address: str) -> str:
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _resolver(nameservers: tuple[tuple[str, int], ...]) -> dns.asyncresolver.Resolver:
    if not nameservers:
        with suppress(dns.resolver.NoResolverConfiguration):
            return dns.asyncresolver.Resolver()
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers = [dns.nameserver.Do53Nameserver(host, port) for host, port in nameservers]
    return resolver


def _http(settings: NetworkSettings) -> httpx.AsyncClient:
    # Connections are not kept: the pool knows a connection by its address, and two registries may share one
    # behind different certificates. Cookies are not kept either: no server needs to know us again.
    return httpx.AsyncClient(
        timeout=httpx.Timeout(settings.http_timeout_s, connect=settings.http_timeout_s / 2),
        limits=httpx.Limits(max_connections=500, max_keepalive_connections=0),
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        headers={"User-Agent": "distributed-lookup"},
        trust_env=settings.use_env_proxies,
        follow_redirects=False,
    )
