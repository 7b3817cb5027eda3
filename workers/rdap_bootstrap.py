"""Which RDAP server to ask about what (RFC 9224): IANA's lists, read at start and kept fresh beside the lookups."""

import asyncio
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import orjson

from workers.lookup import LookupFailed

IANA_URLS: Mapping[str, str] = {
    "ipv4": "https://data.iana.org/rdap/ipv4.json",
    "ipv6": "https://data.iana.org/rdap/ipv6.json",
    "dns": "https://data.iana.org/rdap/dns.json",
}
SHIPPED = Path(__file__).parent / "bootstrap"
FRESH_FOR_S = 24 * 3600.0
TRY_AGAIN_AFTER_S = 3600.0

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

log = logging.getLogger(__name__)


class Answer(Protocol):
    """As much of an HTTP answer as a refresh looks at."""

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def body(self) -> bytes: ...


Get = Callable[[str, Mapping[str, str]], Awaitable[Answer]]


@dataclass(frozen=True)
class Registry:
    """One bootstrap file: base URLs by entry, an entry being a prefix (`192.0.0.0/8`) or a domain (`com`)."""

    publication: str
    services: Mapping[str, tuple[str, ...]]
    networks: Mapping[IPNetwork, tuple[str, ...]]
    etag: str | None = None


@dataclass
class Bootstrap:
    ipv4: Registry
    ipv6: Registry
    dns: Registry

    @classmethod
    def load(cls, directory: Path | None) -> "Bootstrap":
        """From `ipv4.json`, `ipv6.json` and `dns.json` in the directory, or in the package. Raises OSError or ValueError."""
        files = {kind: ((directory or SHIPPED) / f"{kind}.json").read_bytes() for kind in IANA_URLS}
        return cls(**{kind: parse_registry(kind, content) for kind, content in files.items()})

    def servers_for_address(self, address: IPAddress) -> tuple[str, ...]:
        """Base URLs of the longest prefix that holds the address (RFC 9224 section 5); none when no registry has it."""
        networks = (self.ipv4 if address.version == 4 else self.ipv6).networks  # noqa: PLR2004 - IP's own numbers
        holding = [network for network in networks if address in network]
        if not holding:
            return ()
        return networks[max(holding, key=lambda network: network.prefixlen)]

    def servers_for_domain(self, name: str) -> tuple[str, ...]:
        """Base URLs of the entry that shares most labels with the name (RFC 9224 section 4); none without one."""
        labels = name.lower().split(".")
        suffixes = [".".join(labels[start:]) for start in range(len(labels) + 1)]
        return next((self.dns.services[suffix] for suffix in suffixes if suffix in self.dns.services), ())

    async def keep_fresh(self, urls: Mapping[str, str], get: Get) -> None:
        """Until cancelled: asks once a day, an hour after a failure. What cannot be had anew stays in use as it is."""
        while True:
            fresh = [await self.refresh(kind, url, get) for kind, url in urls.items()]
            await asyncio.sleep(FRESH_FOR_S if all(fresh) else TRY_AGAIN_AFTER_S)

    async def refresh(self, kind: str, url: str, get: Get) -> bool:
        """Says whether the list is now known to be current. A list that does not parse never takes a good one's place."""
        current: Registry = getattr(self, kind)
        try:
            answer = await get(url, {"If-None-Match": current.etag} if current.etag else {})
            if answer.status == 304:  # noqa: PLR2004 - Not Modified
                return True
            if answer.status != 200:  # noqa: PLR2004 - OK
                raise ValueError(f"status {answer.status}")
            setattr(self, kind, parse_registry(kind, answer.body, answer.headers.get("etag")))
        except (LookupFailed, ValueError) as error:
            log.warning("The RDAP bootstrap file %s was not refreshed, that of %s stays: %s", url, current.publication, error)
            return False
        return True


def parse_registry(kind: str, content: bytes, etag: str | None = None) -> Registry:
    """Reads the format of RFC 9224 section 3. Raises ValueError when it is another, or lists nothing."""
    document = orjson.loads(content)
    if not isinstance(document, dict) or not isinstance(document.get("services"), list):
        raise ValueError("not an RDAP bootstrap file")  # noqa: TRY004 - the content is wrong, not the caller's type
    services = {entry.lower().strip("."): urls for service in document["services"] for entry, urls in _entries(service)}
    if not services:
        raise ValueError("an RDAP bootstrap file without services")
    networks = {} if kind == "dns" else {ipaddress.ip_network(prefix): urls for prefix, urls in services.items()}
    return Registry(str(document.get("publication", "an unknown date")), services, networks, etag)


def _entries(service: Any) -> list[tuple[str, tuple[str, ...]]]:
    match service:
        case [[*entries], [*urls]] if all(isinstance(text, str) for text in (*entries, *urls)):
            # RFC 9224 section 3: https comes first where there is a choice.
            in_order = tuple(sorted(filter(_usable, urls), key=lambda url: not url.startswith("https://")))
            return [(entry, in_order) for entry in entries]
        case _:
            raise ValueError("a service that is not two lists of text")


def _usable(url: str) -> bool:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("https", "http") and bool(parsed.host)
