"""ReverseDNS: the names that the owner of an address block gave the address."""

import asyncio
from datetime import datetime

import dns.exception
import dns.message
import dns.reversename
from pydantic import Field

from domain.errors import ErrorCode
from events.facts import Target
from workers.lookup import Answer, LookupFailed, Parser, RawAnswer, Result
from workers.network import Network, printable, records_of, without_zone

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


async def look_up(target: Target, net: Network) -> Answer[ReverseDNSResult]:
    """The PTR names of an IP address (RFC 1035 section 3.5, RFC 3596 section 2.5)."""
    [address] = await net.addresses_of(target, net.policy.refusal_to_ask_about)
    answer = await net.query(dns.reversename.from_address(without_zone(address)), "PTR")
    names = _names(answer.message)
    addresses = await _addresses_of(names[0], net) if names else []
    about = {
        "input": target.canonical,
        "addresses_of": names[0] if names else None,
        "addresses": addresses,
        "queried_at": net.now(),
    }
    # What is kept is what is read: the time comes out of JSON as it will then.
    raw = RawAnswer.of(RawAnswer(about, answer.message.to_wire()).stored())
    return PARSER.read(raw, answer.nameserver)


def parse(raw: RawAnswer) -> ReverseDNSResult:
    """The body is the answer to the PTR question in wire form (RFC 1035 section 4).

    `raw.about`: `addresses` are those of the name `addresses_of`; of any other name nobody asked for them.
    """
    about = raw.about
    queried_at = datetime.fromisoformat(about["queried_at"])
    names = _names(_message(raw.body))
    if not names:
        return ReverseDNSResult(input=about["input"], found=False, queried_at_utc=queried_at)
    host_name, *aliases = names
    return ReverseDNSResult(
        input=about["input"],
        found=True,
        host_name=host_name,
        aliases=aliases,
        addresses=about["addresses"] if host_name == about["addresses_of"] else [],
        queried_at_utc=queried_at,
    )


PARSER = Parser("ptr", 1, parse)


def _message(wire: bytes) -> dns.message.QueryMessage:
    try:
        message = dns.message.from_wire(wire)
    except dns.exception.DNSException:
        message = None
    if not isinstance(message, dns.message.QueryMessage):
        raise LookupFailed(ErrorCode.UNPARSABLE_ANSWER, "The name server's answer cannot be read.")
    return message


def _names(answer: dns.message.QueryMessage) -> list[str]:
    records = records_of(answer)
    return sorted({name for record in records if (name := printable(record.to_text().rstrip(".")))})[:NAMES_MAX]


async def _addresses_of(name: str, net: Network) -> list[str]:
    try:
        async with asyncio.timeout(FORWARD_TIMEOUT_S):
            return await net.resolve(name)
    except (LookupFailed, TimeoutError):
        # The name is the answer; that it leads nowhere, or not now, does not take it back.
        return []
