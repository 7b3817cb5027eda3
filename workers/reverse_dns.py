"""ReverseDNS: the names that the owner of an address block gave the address."""

import asyncio
from datetime import datetime

import dns.reversename
from pydantic import Field

from events.facts import Target
from workers.lookup import LookupFailed, Result
from workers.network import Network, printable, without_zone

NAMES_MAX = 32
FORWARD_TIMEOUT_S = 2.0


class ReverseDNSResult(Result):
    r"""`found` false = the address has no name, which is true of most. `queriedAtUtc` is when the answer was in.

    `hostName` is the first name in alphabetical order and `aliases` are the others, because records of one name have no order
    (RFC 2181 section 5) and servers rotate them: the same names give the same document. They come without the final dot,
    unprintable bytes as `\ddd` (RFC 1035 section 5.1). `addresses` are what `hostName` itself resolves to, none when it does
    not: the address looked up should be among them, and where it is not, the name is only claimed.
    """

    input: str
    found: bool
    host_name: str | None = None
    aliases: list[str] = Field(default_factory=list)
    addresses: list[str] = Field(default_factory=list)
    queried_at_utc: datetime


async def look_up(target: Target, net: Network) -> ReverseDNSResult:
    """The PTR names of an IP address (RFC 1035 section 3.5, RFC 3596 section 2.5)."""
    [address] = await net.addresses_of(target, net.policy.refusal_to_ask_about)
    records = await net.records(dns.reversename.from_address(without_zone(address)), "PTR")
    names = [name for record in records if (name := printable(record.to_text().rstrip(".")))]
    if not names:
        return ReverseDNSResult(input=target.canonical, found=False, queried_at_utc=net.now())
    host_name, *aliases = sorted(set(names))[:NAMES_MAX]
    addresses = await _addresses_of(host_name, net)
    return ReverseDNSResult(
        input=target.canonical,
        found=True,
        host_name=host_name,
        aliases=aliases,
        addresses=addresses,
        queried_at_utc=net.now(),
    )


async def _addresses_of(name: str, net: Network) -> list[str]:
    try:
        async with asyncio.timeout(FORWARD_TIMEOUT_S):
            return await net.resolve(name)
    except (LookupFailed, TimeoutError):
        # The name is the answer; that it leads nowhere, or not now, does not take it back.
        return []
