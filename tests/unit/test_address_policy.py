"""Where packets may go. A wrong row here lets a stranger reach our own network through us."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from domain.address_policy import SPECIAL_BLOCKS, AddressPolicy

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network
MANY = settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # The machine may be busy.

STRICT = AddressPolicy()
SILENT = AddressPolicy(ask_about_special=False)
LABORATORY = AddressPolicy(allowed_networks=(IPv4Network("127.0.0.0/8"), IPv6Network("::1/128")))

# The blocks, written down a second time as ranges: the first and the last address that each speaks for, and the kind said.
REFUSED = [
    ("0.0.0.0", "0.0.0.0", "an unspecified"),
    ("0.0.0.1", "0.255.255.255", "a this-network"),
    ("10.0.0.0", "10.255.255.255", "a private"),
    ("100.64.0.0", "100.127.255.255", "a shared"),
    ("127.0.0.0", "127.255.255.255", "a loopback"),
    ("169.254.0.0", "169.254.255.255", "a link-local"),
    ("172.16.0.0", "172.31.255.255", "a private"),
    ("192.0.0.0", "192.0.0.7", "a private"),
    ("192.0.0.8", "192.0.0.8", "a dummy"),
    ("192.0.0.9", "192.0.0.9", "an anycast"),
    ("192.0.0.10", "192.0.0.10", "an anycast"),
    ("192.0.0.11", "192.0.0.169", "a reserved"),
    ("192.0.0.170", "192.0.0.171", "a reserved"),
    ("192.0.0.172", "192.0.0.255", "a reserved"),
    ("192.0.2.0", "192.0.2.255", "a documentation"),
    ("192.31.196.0", "192.31.196.255", "an anycast"),
    ("192.52.193.0", "192.52.193.255", "an anycast"),
    ("192.88.99.0", "192.88.99.255", "an anycast"),
    ("192.168.0.0", "192.168.255.255", "a private"),
    ("192.175.48.0", "192.175.48.255", "an anycast"),
    ("198.18.0.0", "198.19.255.255", "a benchmarking"),
    ("198.51.100.0", "198.51.100.255", "a documentation"),
    ("203.0.113.0", "203.0.113.255", "a documentation"),
    ("224.0.0.0", "239.255.255.255", "a multicast"),
    ("240.0.0.0", "255.255.255.254", "a reserved"),
    ("255.255.255.255", "255.255.255.255", "a broadcast"),
    ("::", "::", "an unspecified"),
    ("::1", "::1", "a loopback"),
    ("::2", "::fffe:ffff:ffff", "a reserved"),
    ("::1:0:0:0", "64:ff9a:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("64:ff9b::1:0:0", "64:ff9b::ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("64:ff9b:1::", "64:ff9b:1:ffff:ffff:ffff:ffff:ffff", "a translated"),
    ("64:ff9b:2::", "ff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("100::", "100::ffff:ffff:ffff:ffff", "a discard"),
    ("100:0:0:1::", "100:0:0:1:ffff:ffff:ffff:ffff", "a dummy"),
    ("100:0:0:2::", "1ff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("200::", "3ff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("400::", "7ff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("800::", "fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("1000::", "1fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("2001:1::", "2001:1::", "a reserved"),
    ("2001:1::1", "2001:1::1", "an anycast"),
    ("2001:1::2", "2001:1::2", "an anycast"),
    ("2001:1::3", "2001:1::3", "an anycast"),
    ("2001:1::4", "2001:1:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("2001:2::", "2001:2:0:ffff:ffff:ffff:ffff:ffff", "a benchmarking"),
    ("2001:2:1::", "2001:2:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("2001:3::", "2001:3:ffff:ffff:ffff:ffff:ffff:ffff", "an anycast"),
    ("2001:4::", "2001:4:111:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("2001:4:112::", "2001:4:112:ffff:ffff:ffff:ffff:ffff", "an anycast"),
    ("2001:4:113::", "2001:f:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("2001:10::", "2001:1f:ffff:ffff:ffff:ffff:ffff:ffff", "an identifier"),
    ("2001:20::", "2001:2f:ffff:ffff:ffff:ffff:ffff:ffff", "an identifier"),
    ("2001:30::", "2001:3f:ffff:ffff:ffff:ffff:ffff:ffff", "an identifier"),
    ("2001:40::", "2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("2001:db8::", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", "a documentation"),
    ("2620:4f:8000::", "2620:4f:8000:ffff:ffff:ffff:ffff:ffff", "an anycast"),
    ("3fff::", "3fff:fff:ffff:ffff:ffff:ffff:ffff:ffff", "a documentation"),
    ("4000::", "5eff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("5f00::", "5f00:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "an identifier"),
    ("5f01::", "5fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("6000::", "7fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("8000::", "9fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("a000::", "bfff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("c000::", "dfff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("e000::", "efff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("f000::", "f7ff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("f800::", "fbff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("fc00::", "fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "a private"),
    ("fe00::", "fe7f:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "a reserved"),
    ("fe80::", "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "a link-local"),
    ("fec0::", "feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "a site-local"),
    ("ff00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "a multicast"),
]

# The ordinary neighbours of all these blocks: the last address before one, the first one after it.
ORDINARY = [
    *("1.0.0.0", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0"),
    *("169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0", "191.255.255.255", "192.0.1.0", "192.0.1.255"),
    *("192.0.3.0", "192.31.195.255", "192.31.197.0", "192.52.192.255", "192.52.194.0", "192.88.98.255", "192.88.100.0"),
    *("192.167.255.255", "192.169.0.0", "192.175.47.255", "192.175.49.0", "198.17.255.255", "198.20.0.0"),
    *("198.51.99.255", "198.51.101.0", "203.0.112.255", "203.0.114.0", "223.255.255.255"),
    *(
        "2000::",
        "2000:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        "2001:200::",
        "2001:db7:ffff:ffff:ffff:ffff:ffff:ffff",
        "2001:db9::",
    ),
    *("2001:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "2003::", "2620:4f:7fff:ffff:ffff:ffff:ffff:ffff", "2620:4f:8001::"),
    *("3ffe:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "3fff:1000::", "3fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    *("8.8.8.8", "1.1.1.1", "2001:4860:4860::8888", "2606:4700:4700::1111"),
]

LOCALHOST_INSIDE = [
    "::ffff:127.0.0.1",
    "::ffff:7f00:1",
    "64:ff9b::127.0.0.1",
    "2002:7f00:1::",
    "2002:7f00:1:ffff:ffff:ffff:ffff:ffff",
    "2001:0:808:808:0:0:80ff:fffe",  # Teredo: the client's bits are inverted.
    "2001:0:7f00:1:0:0:f7f7:f7f7",  # Teredo: this one's server is the loopback.
]
GOOGLE_INSIDE = ["::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1", "2001:0:808:808:0:0:f7f7:f7f7"]


@pytest.mark.parametrize(("first", "last", "kind"), REFUSED)
def test_the_first_and_last_address_of_every_block_are_refused(first: str, last: str, kind: str) -> None:
    for address in (first, last):
        assert STRICT.refusal_to_probe(address) == f"The address is {kind} address; this service does not send packets to it."
        assert (
            SILENT.refusal_to_ask_about(address) == f"The address is {kind} address; this service does not ask others about it."
        )


@pytest.mark.parametrize("address", ORDINARY)
def test_the_neighbours_just_outside_are_not(address: str) -> None:
    assert STRICT.refusal_to_probe(address) is None
    assert SILENT.refusal_to_ask_about(address) is None


def test_no_block_is_missing_from_this_page() -> None:
    ends = {ip_address(end) for first, last, _ in REFUSED for end in (first, last)}

    assert {smallest_block(end) for end in ends} == {block.network for block in SPECIAL_BLOCKS if block.carries is None}


def smallest_block(address: IPAddress) -> IPNetwork:
    return max((block.network for block in SPECIAL_BLOCKS if address in block.network), key=lambda network: network.prefixlen)


@pytest.mark.parametrize("address", LOCALHOST_INSIDE)
def test_a_carried_address_is_judged(address: str) -> None:
    assert STRICT.refusal_to_probe(address) == (
        "The address leads to a loopback address; this service does not send packets to it."
    )
    assert SILENT.refusal_to_ask_about(address) == (
        "The address leads to a loopback address; this service does not ask others about it."
    )
    assert LABORATORY.refusal_to_probe(address) is None


@pytest.mark.parametrize("address", GOOGLE_INSIDE)
def test_a_carried_ordinary_address_is_ordinary(address: str) -> None:
    assert STRICT.refusal_to_probe(address) is None
    assert SILENT.refusal_to_ask_about(address) is None


def test_allowing_a_carrier_does_not_allow_what_it_carries() -> None:
    """Whoever opens all of IPv6 has not opened the IPv4 network behind it."""
    policy = AddressPolicy(allowed_networks=(IPv6Network("::/0"),))

    assert policy.refusal_to_probe("fd00::1") is None
    for address in LOCALHOST_INSIDE:
        assert policy.refusal_to_probe(address) is not None


def test_an_allowed_network_opens_nothing_else() -> None:
    assert LABORATORY.refusal_to_probe("127.0.0.1") is None
    assert LABORATORY.refusal_to_probe("::1") is None
    assert LABORATORY.refusal_to_probe("10.0.0.1") is not None
    assert LABORATORY.refusal_to_probe("::") is not None


def test_allowed_to_be_probed_is_not_allowed_to_be_told() -> None:
    policy = AddressPolicy(allowed_networks=(IPv4Network("10.0.0.0/8"),), ask_about_special=False)

    assert policy.refusal_to_probe("10.0.0.1") is None
    assert policy.refusal_to_ask_about("10.0.0.1") is not None


def test_others_are_asked_about_special_addresses_unless_told_otherwise() -> None:
    assert AddressPolicy().refusal_to_ask_about("10.0.0.1") is None


@pytest.mark.parametrize("address", ["fe80::1%eth0", "::1%lo", "::ffff:127.0.0.1%eth0", "ff02::1%1"])
def test_a_zone_hides_nothing(address: str) -> None:
    without_zone = address.partition("%")[0]

    assert STRICT.refusal_to_probe(address) == STRICT.refusal_to_probe(without_zone) is not None
    assert STRICT.refusal_to_probe(ip_address(address)) == STRICT.refusal_to_probe(ip_address(without_zone)) is not None


def test_a_zone_makes_nothing_special() -> None:
    assert STRICT.refusal_to_probe("2001:4860:4860::8888%eth0") is None


@pytest.mark.parametrize(
    "text", ["", "localhost", "example.com", "127.1", "0x7f.0.0.1", "8.8.8.8 ", "[::1]", "8.8.8.8/32", "\x00"]
)
def test_what_is_no_address_is_never_probed(text: str) -> None:
    """A name is judged by the addresses that it resolves to, never by itself."""
    assert STRICT.refusal_to_probe(text) == "This is not an IP address; this service does not send packets to it."


def addresses_in(network: IPNetwork) -> st.SearchStrategy[IPAddress]:
    first, last = int(network.network_address), int(network.broadcast_address)
    return st.integers(first, last).map(IPv4Address if network.version == 4 else IPv6Address)


REFUSING_BLOCKS = [block.network for block in SPECIAL_BLOCKS if block.carries is None]
SPECIAL_IPV4 = st.sampled_from([network for network in REFUSING_BLOCKS if network.version == 4]).flatmap(addresses_in)
CARRIERS = [block.network for block in SPECIAL_BLOCKS if block.carries is not None]


@given(address=st.sampled_from(REFUSING_BLOCKS).flatmap(addresses_in))
@MANY
def test_every_address_of_every_block_is_refused_unless_allowed(address: IPAddress) -> None:
    # A carrier inside a larger block is judged by what it carries, as the next test shows.
    assume(not any(address in carrier for carrier in CARRIERS))

    assert STRICT.refusal_to_probe(address) is not None
    assert STRICT.refusal_to_probe(str(address)) is not None
    assert AddressPolicy(allowed_networks=(ip_network(address),)).refusal_to_probe(address) is None


@given(inner=SPECIAL_IPV4, ordinary=st.integers(0, 2**64 - 1))
@example(inner=IPv4Address("169.254.169.254"), ordinary=0)
@MANY
def test_no_carrier_smuggles_a_special_address(inner: IPAddress, ordinary: int) -> None:
    """The four ways to write an IPv4 address into an IPv6 one: RFC 4291, RFC 6052, RFC 3056, RFC 4380."""
    value, google = int(inner), 0x08080808
    carriers = [
        IPv6Address(0xFFFF << 32 | value),
        IPv6Address(0x64FF9B << 96 | value),
        IPv6Address(0x2002 << 112 | value << 80 | ordinary),
        IPv6Address(0x20010000 << 96 | value << 64 | ordinary & 0xFFFFFFFF00000000 | ~google & 0xFFFFFFFF),
        IPv6Address(0x20010000 << 96 | google << 64 | ordinary & 0xFFFFFFFF00000000 | ~value & 0xFFFFFFFF),
    ]

    assert all(STRICT.refusal_to_probe(carrier) is not None for carrier in carriers)


@given(address=st.ip_addresses())
@example(address=IPv4Address("192.0.0.9"))
@MANY
def test_nothing_that_python_calls_local_is_let_through(address: IPAddress) -> None:
    """`is_private` and its like are no guard, but where even they object, so must the table."""
    if address.is_private or address.is_loopback or address.is_link_local or address.is_multicast or address.is_reserved:
        embedded = isinstance(address, IPv6Address) and any(address in carrier for carrier in CARRIERS)

        assert embedded or STRICT.refusal_to_probe(address) is not None
