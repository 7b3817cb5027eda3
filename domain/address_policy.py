"""Which addresses this service may send packets to, and which it may ask others about.

One explicit table decides, because `ipaddress.is_global` changes between Python releases and lets multicast, the
unassigned parts of IPv6 and embedded IPv4 addresses through. The policy is asked at submit, and again by the workers for
every resolved address and redirect.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

_SEND = "this service does not send packets to it."
_ASK = "this service does not ask others about it."


def _last_32_bits(address: IPv6Address) -> tuple[IPv4Address, ...]:
    return (IPv4Address(int(address) & 0xFFFFFFFF),)


def _bits_16_to_47(address: IPv6Address) -> tuple[IPv4Address, ...]:
    return (IPv4Address(int(address) >> 80 & 0xFFFFFFFF),)


def _teredo_server_and_client(address: IPv6Address) -> tuple[IPv4Address, ...]:
    """RFC 4380 section 4: the server in the clear, the client with every bit inverted."""
    return IPv4Address(int(address) >> 64 & 0xFFFFFFFF), IPv4Address(~int(address) & 0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class SpecialBlock:
    """A block of addresses that are not ordinary hosts of the internet; `why` names the block and its source.

    Where `carries` is given, an address of the block leads to the IPv4 addresses within it and is judged by them alone.
    """

    network: IPNetwork
    kind: str
    why: str
    carries: Callable[[IPv6Address], tuple[IPv4Address, ...]] | None = None


def _block(
    network: str, kind: str, why: str, carries: Callable[[IPv6Address], tuple[IPv4Address, ...]] | None = None
) -> SpecialBlock:
    return SpecialBlock(ip_network(network), kind, why, carries)


# The IANA IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890, RFC 8190), the multicast blocks, and every part of
# the IPv6 address space outside 2000::/3. The anycast rows are reachable, but answered by the nearest machine: often ours.
SPECIAL_BLOCKS = (
    _block("0.0.0.0/8", "this-network", "This network, RFC 791 section 3.2"),
    _block("0.0.0.0/32", "unspecified", "This host on this network, RFC 1122 section 3.2.1.3"),
    _block("10.0.0.0/8", "private", "Private use, RFC 1918"),
    _block("100.64.0.0/10", "shared", "Shared address space of carriers, RFC 6598"),
    _block("127.0.0.0/8", "loopback", "Loopback, RFC 1122 section 3.2.1.3"),
    _block("169.254.0.0/16", "link-local", "Link local, clouds' metadata services included, RFC 3927"),
    _block("172.16.0.0/12", "private", "Private use, RFC 1918"),
    _block("192.0.0.0/24", "reserved", "IETF protocol assignments, RFC 6890 section 2.1"),
    _block("192.0.0.0/29", "private", "IPv4 service continuity prefix (DS-Lite, 464XLAT), RFC 7335"),
    _block("192.0.0.8/32", "dummy", "IPv4 dummy address, RFC 7600"),
    _block("192.0.0.9/32", "anycast", "Port Control Protocol anycast, RFC 7723"),
    _block("192.0.0.10/32", "anycast", "TURN anycast, RFC 8155"),
    _block("192.0.0.170/31", "reserved", "NAT64/DNS64 discovery, RFC 7050, RFC 8880"),
    _block("192.0.2.0/24", "documentation", "TEST-NET-1, RFC 5737"),
    _block("192.31.196.0/24", "anycast", "AS112-v4, RFC 7535"),
    _block("192.52.193.0/24", "anycast", "Automatic multicast tunneling relays, RFC 7450"),
    _block("192.88.99.0/24", "anycast", "6to4 relays (deprecated) and 6a44 relays, RFC 7526, RFC 6751"),
    _block("192.168.0.0/16", "private", "Private use, RFC 1918"),
    _block("192.175.48.0/24", "anycast", "Direct delegation AS112 service, RFC 7534"),
    _block("198.18.0.0/15", "benchmarking", "Benchmarking, RFC 2544"),
    _block("198.51.100.0/24", "documentation", "TEST-NET-2, RFC 5737"),
    _block("203.0.113.0/24", "documentation", "TEST-NET-3, RFC 5737"),
    _block("224.0.0.0/4", "multicast", "Multicast, RFC 5771"),
    _block("240.0.0.0/4", "reserved", "Reserved for future use, RFC 1112 section 4"),
    _block("255.255.255.255/32", "broadcast", "Limited broadcast, RFC 919 section 7, RFC 8190"),
    _block("::/8", "reserved", "Reserved by the IETF, RFC 4291 section 4; IPv4-compatible addresses included"),
    _block("::/128", "unspecified", "Unspecified address, RFC 4291 section 2.5.2"),
    _block("::1/128", "loopback", "Loopback address, RFC 4291 section 2.5.3"),
    _block("::ffff:0:0/96", "mapped", "IPv4-mapped address, RFC 4291 section 2.5.5.2", _last_32_bits),
    _block("64:ff9b::/96", "translated", "NAT64 well-known prefix, RFC 6052 section 2.1", _last_32_bits),
    _block("64:ff9b:1::/48", "translated", "NAT64 prefix for local use, RFC 8215"),
    _block("100::/8", "reserved", "Reserved by the IETF, RFC 4291 section 4"),
    _block("100::/64", "discard", "Discard-only address block, RFC 6666"),
    _block("100:0:0:1::/64", "dummy", "Dummy IPv6 prefix, RFC 9780"),
    _block("200::/7", "reserved", "Once mapped NSAP addresses, RFC 4048"),
    _block("400::/6", "reserved", "Reserved by the IETF, RFC 4291 section 4"),
    _block("800::/5", "reserved", "Reserved by the IETF, RFC 4291 section 4"),
    _block("1000::/4", "reserved", "Reserved by the IETF, RFC 4291 section 4"),
    _block("2001::/23", "reserved", "IETF protocol assignments, RFC 2928"),
    _block("2001::/32", "teredo", "Teredo, RFC 4380 section 4", _teredo_server_and_client),
    _block("2001:1::1/128", "anycast", "Port Control Protocol anycast, RFC 7723"),
    _block("2001:1::2/128", "anycast", "TURN anycast, RFC 8155"),
    _block("2001:1::3/128", "anycast", "DNS-SD service registration anycast, RFC 9665"),
    _block("2001:2::/48", "benchmarking", "Benchmarking, RFC 5180"),
    _block("2001:3::/32", "anycast", "Automatic multicast tunneling relays, RFC 7450"),
    _block("2001:4:112::/48", "anycast", "AS112-v6, RFC 7535"),
    _block("2001:10::/28", "identifier", "ORCHID (deprecated), RFC 4843"),
    _block("2001:20::/28", "identifier", "ORCHIDv2, RFC 7343"),
    _block("2001:30::/28", "identifier", "Drone remote identification tags, RFC 9374"),
    _block("2001:db8::/32", "documentation", "Documentation, RFC 3849"),
    _block("2002::/16", "6to4", "6to4, RFC 3056 section 2", _bits_16_to_47),
    _block("2620:4f:8000::/48", "anycast", "Direct delegation AS112 service, RFC 7534"),
    _block("3fff::/20", "documentation", "Documentation, RFC 9637"),
    _block("4000::/3", "reserved", "Reserved by the IETF, RFC 4291 section 4"),
    _block("5f00::/16", "identifier", "Segment routing (SRv6) segment identifiers, RFC 9602"),
    _block("6000::/3", "reserved", "Reserved by the IETF, RFC 4291 section 4"),
    _block("8000::/3", "reserved", "Reserved by the IETF, RFC 4291 section 4"),
    _block("a000::/3", "reserved", "Reserved by the IETF, RFC 4291 section 4"),
    _block("c000::/3", "reserved", "Reserved by the IETF, RFC 4291 section 4"),
    _block("e000::/4", "reserved", "Reserved by the IETF, RFC 4291 section 4"),
    _block("f000::/5", "reserved", "Reserved by the IETF, RFC 4291 section 4"),
    _block("f800::/6", "reserved", "Reserved by the IETF, RFC 4291 section 4"),
    _block("fc00::/7", "private", "Unique local, RFC 4193"),
    _block("fe00::/9", "reserved", "Reserved by the IETF, RFC 4291 section 4"),
    _block("fe80::/10", "link-local", "Link-local unicast, RFC 4291 section 2.5.6"),
    _block("fec0::/10", "site-local", "Site-local unicast (deprecated), RFC 3879"),
    _block("ff00::/8", "multicast", "Multicast, RFC 4291 section 2.7"),
)

# The smallest block that holds an address speaks for it.
_SMALLEST_FIRST = sorted(SPECIAL_BLOCKS, key=lambda block: block.network.prefixlen, reverse=True)


@dataclass(frozen=True)
class AddressPolicy:
    """The operator's choices.

    `allowed_networks` are special blocks that may be probed all the same (a laboratory's 10.0.0.0/8). They do not reach
    through IPv6: an IPv6 address that carries an IPv4 address may be probed when that IPv4 address may be. A NAT64 prefix
    of the operator's own looks like any other network; where one is in use, its gateway has to refuse private targets.
    `ask_about_special` says whether third parties may be told about special addresses, which can reveal an inner network.
    """

    allowed_networks: tuple[IPNetwork, ...] = ()
    ask_about_special: bool = True

    def refusal_to_probe(self, address: str | IPAddress) -> str | None:
        """One public sentence on why no packet may be sent to this address; None when it may. A zone is ignored.

        Text that is not an IP address is refused: a domain name is judged by each address that it resolves to.
        """
        return _refusal(address, self.allowed_networks, _SEND)

    def refusal_to_ask_about(self, address: str | IPAddress) -> str | None:
        """One public sentence on why nobody else may be told about this address; None when they may."""
        return None if self.ask_about_special else _refusal(address, (), _ASK)


def _refusal(address: str | IPAddress, exceptions: tuple[IPNetwork, ...], consequence: str) -> str | None:
    text = str(address).partition("%")[0]
    try:
        judged = ip_address(text)
    except ValueError:
        return f"This is not an IP address; {consequence}"
    special = _special_part(judged, exceptions)
    if special is None:
        return None
    part, kind = special
    article = "an" if kind[0] in "aeiou" else "a"
    if part == judged:
        return f"The address is {article} {kind} address; {consequence}"
    return f"The address leads to {article} {kind} address; {consequence}"


@lru_cache(maxsize=4_096)
def _special_part(address: IPAddress, exceptions: tuple[IPNetwork, ...]) -> tuple[IPAddress, str] | None:
    """The address that is special, with its kind: this one, or one that it carries; None when all are ordinary or excepted."""
    block = next((block for block in _SMALLEST_FIRST if address in block.network), None)
    if block is None:
        return None
    if block.carries is not None and isinstance(address, IPv6Address):
        specials = (_special_part(carried, exceptions) for carried in block.carries(address))
        return next((special for special in specials if special is not None), None)
    if any(address in network for network in exceptions):
        return None
    return address, block.kind
