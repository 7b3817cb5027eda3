"""The door: what is taken for a target, in which canonical form, and what is refused with which sentence."""

import pickle
from ipaddress import IPv4Address, IPv6Address

import idna
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from domain.target import InvalidTarget, parse_target
from events.facts import Target, TargetType

INVALID_IPV4 = "Invalid IP address format: '{}'. IPv4 must have exactly 4 octets (0-255 each)."
NO_DOT = "Domain name must contain a dot (e.g. example.com)"
REQUIRED = "Target is required"


def refusal(raw: object) -> InvalidTarget:
    with pytest.raises(InvalidTarget) as caught:
        parse_target(raw)
    return caught.value


@pytest.mark.parametrize(
    ("typed", "canonical"),
    [
        ("8.8.8.8", "8.8.8.8"),
        (" 8.8.8.8 ", "8.8.8.8"),
        ("8.8.8.8\n", "8.8.8.8"),
        ("0.0.0.0", "0.0.0.0"),
        ("255.255.255.255", "255.255.255.255"),
        ("2001:db8::1", "2001:db8::1"),
        ("2001:DB8:0:0:0:0:0:1", "2001:db8::1"),
        ("::1", "::1"),
        ("::", "::"),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.1"),
        ("::FFFF:c000:201", "::ffff:192.0.2.1"),
        ("::ffff:192.0.2.1%eth0", "::ffff:192.0.2.1%eth0"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("FE80::1%Wi-Fi_2.100", "fe80::1%Wi-Fi_2.100"),
    ],
)
def test_an_address_is_taken_in_one_spelling(typed: str, canonical: str) -> None:
    target = parse_target(typed)

    assert (target.raw, target.canonical, target.type) == (typed, canonical, TargetType.IP_ADDRESS)


@pytest.mark.parametrize(
    ("typed", "canonical"),
    [
        ("example.com", "example.com"),
        ("EXAMPLE.com", "example.com"),
        ("a.co", "a.co"),
        ("example.com.", "example.com"),
        ("1.2.3.4.com", "1.2.3.4.com"),
        ("denic.de", "denic.de"),
        ("a.cafe", "a.cafe"),
        ("r3---sn-4g5e.googlevideo.com", "r3---sn-4g5e.googlevideo.com"),
        ("bücher.de", "xn--bcher-kva.de"),
        ("BÜCHER.DE", "xn--bcher-kva.de"),
        ("bu\N{COMBINING DIAERESIS}cher.de", "xn--bcher-kva.de"),
        ("xn--bcher-kva.de", "xn--bcher-kva.de"),
        ("XN--BCHER-KVA.de", "xn--bcher-kva.de"),
        ("faß.de", "xn--fa-hia.de"),
        ("example。com", "example.com"),
        ("ｅｘａｍｐｌｅ．ｃｏｍ", "example.com"),  # noqa: RUF001 - full width is the point
        ("exam\N{SOFT HYPHEN}ple.com", "example.com"),
        ("exam\N{ZERO WIDTH SPACE}ple.com", "example.com"),
    ],
)
def test_a_domain_is_taken_in_one_spelling(typed: str, canonical: str) -> None:
    target = parse_target(typed)

    assert (target.raw, target.canonical, target.type) == (typed, canonical, TargetType.DOMAIN)


@pytest.mark.parametrize(
    ("typed", "canonical"),
    [
        ("８．８．８．８", "8.8.8.8"),  # noqa: RUF001 - full width is the point
        ("127。0｡0．1", "127.0.0.1"),  # noqa: RUF001 - all three foreign dots
        ("①②⑦.0.0.1", "127.0.0.1"),
        ("𝟏𝟐𝟕.𝟎.𝟎.𝟏", "127.0.0.1"),  # noqa: RUF001 - mathematical digits
        ("127.0.0.\N{SOFT HYPHEN}1", "127.0.0.1"),
        ("127.0.0.1\N{WORD JOINER}", "127.0.0.1"),
        ("：：１", "::1"),  # noqa: RUF001 - full width is the point
    ],
)
def test_an_address_in_disguise_is_seen_as_the_address(typed: str, canonical: str) -> None:
    """Whatever a browser or resolver would make of it must be what the address policy judges."""
    target = parse_target(typed)

    assert (target.raw, target.canonical, target.type) == (typed, canonical, TargetType.IP_ADDRESS)


@pytest.mark.parametrize(
    "typed",
    [None, "", " ", "\t\r\n", "\N{NO-BREAK SPACE}", " " * 5_000, "\N{SOFT HYPHEN}", 8, 8.8, True, b"8.8.8.8", ["8.8.8.8"], {}],
)
def test_what_is_not_text_or_says_nothing_is_no_target(typed: object) -> None:
    assert (refusal(typed).code, refusal(typed).message) == ("target_required", REQUIRED)


@pytest.mark.parametrize(
    "typed",
    [
        "0177.0.0.1",
        "01.2.3.4",
        "127.1",
        "2130706433",
        "1",
        "1.2.3",
        "1.2.3.4.5",
        "256.1.1.1",
        "1.1.1.999",
        "8.8.8.8.",
        "1..2",
        ".5",
        "0x7f000001",
        "0X7F000001",
        "0x7f000001.",
        "１２７．１",  # noqa: RUF001 - full width is the point
        "८.८.८.८",  # Devanagari digits, which int() reads and UTS 46 keeps.
    ],
)
def test_every_other_spelling_of_an_ipv4_address_is_refused(typed: str) -> None:
    assert (refusal(typed).code, refusal(typed).message) == ("invalid_ip", INVALID_IPV4.format(typed))


def test_the_quoted_target_is_trimmed() -> None:
    assert refusal("  127.1 ").message == INVALID_IPV4.format("127.1")


@pytest.mark.parametrize(
    ("typed", "code"),
    [
        (":::", "invalid_ipv6"),
        ("1::2::3", "invalid_ipv6"),
        ("12345::", "invalid_ipv6"),
        ("::g", "invalid_ipv6"),
        ("1:2:3:4:5:6:7", "invalid_ipv6"),
        ("::256.1.1.1", "invalid_ipv6"),
        ("::01.2.3.4", "invalid_ipv6"),
        (":: 1", "invalid_ipv6"),
        ("::1\N{FULLWIDTH PERCENT SIGN}eth0", "invalid_ipv6"),
        ("::1%", "invalid_zone"),
        ("::1%a%b", "invalid_zone"),
        ("fe80::1%eth0;id", "invalid_zone"),
        ("fe80::1%eth0\x00", "invalid_zone"),
        ("fe80::1%é", "invalid_zone"),
        ("fe80::1%" + "e" * 33, "invalid_zone"),
        ("[::1]", "target_in_brackets"),
        ("[::1]:80", "target_in_brackets"),
        ("1.2.3.4:80", "target_with_port"),
        ("example.com:443", "target_with_port"),
        ("http://example.com", "target_not_plain"),
        ("http://[::1]/", "target_not_plain"),
        ("example.com/path", "target_not_plain"),
        ("8.8.8.0/24", "target_not_plain"),
        ("\N{ACCOUNT OF}.com", "target_not_plain"),  # UTS 46 makes "a/c" of the one character.
        ("localhost", "domain_no_dot"),
        ("localhost.", "domain_no_dot"),
        ("my host", "domain_no_dot"),
        ("xn--bcher-kva", "domain_no_dot"),
        (".", "label_empty"),
        ("..", "label_empty"),
        (".example.com", "label_empty"),
        ("a..com", "label_empty"),
        ("example.com..", "label_empty"),
        ("a." + "b" * 64, "label_too_long"),
        ("a." + "ü" * 60, "label_too_long"),
        ("éèêëàâäôöûüñçøåæðþýžšč" * 2 + ".de", "label_too_long"),
        ("exam!ple.com", "label_invalid"),
        ("user@example.com", "label_invalid"),
        ("exam\x00ple.com", "label_invalid"),
        ("1.2.3.4%eth0", "label_invalid"),
        ("-a.com", "label_hyphen"),
        ("a-.com", "label_hyphen"),
        ("ü-.com", "label_hyphen"),
        ("example.-", "label_hyphen"),
        ("_dmarc.example.com", "label_underscore"),
        ("exam ple.com", "label_space"),
        ("exam\tple.com", "label_space"),
        ("exam\N{IDEOGRAPHIC SPACE}ple.com", "label_space"),
        ("example.123", "tld_numeric"),
        ("example.123.", "tld_numeric"),
        ("0x7f.1", "tld_numeric"),
        ("example.१२३", "tld_numeric"),
        ("example.xn--e4bcd", "tld_numeric"),
        ("0x7F.0x0.0x0.0x1", "tld_hexadecimal"),
        ("example.0x", "tld_hexadecimal"),
        ("xn--a.de", "label_not_idna"),
        ("xn--example.de", "label_not_idna"),
        ("xn---bbk.de", "label_not_idna"),  # A second spelling of xn--bbk (RFC 5890 section 2.3.2.1).
        ("xn--ü.de", "label_not_idna"),
        ("exam\N{ZERO WIDTH JOINER}ple.com", "label_not_idna"),
        ("☃.net", "label_not_idna"),
        ("\ud800.com", "character_not_allowed"),
        ("exam\N{RIGHT-TO-LEFT OVERRIDE}ple.com", "character_not_allowed"),
        ("a" * 1_001, "target_too_long"),
    ],
)
def test_each_refusal_has_its_own_code_and_sentence(typed: str, code: str) -> None:
    refused = refusal(typed)

    assert refused.code == code
    assert len(refused.message) < 300
    assert refused.message.isprintable()


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("localhost", NO_DOT),
        ("example.123", "Invalid TLD: '123'. Top-level domain cannot be all numeric."),
        ("0x7F.0x0.0x0.0x1", "Invalid TLD: '0x1'. Top-level domain cannot be a hexadecimal number."),
        ("a..com", "Domain name must not contain an empty label (two dots in a row, or a leading dot)"),
        ("a.-b.com", "Invalid domain label: '-b'. It must not start or end with a hyphen."),
        ("a.b_c.com", "Invalid domain label: 'b_c'. Underscores are not allowed."),
        ("a.b c.com", "Invalid domain label: 'b c'. Spaces are not allowed."),
        ("a.b!.com", "Invalid domain label: 'b!'. Only letters, digits and hyphens are allowed."),
        ("a.b\x00.com", "Invalid domain label: 'b\N{REPLACEMENT CHARACTER}'. Only letters, digits and hyphens are allowed."),
    ],
)
def test_the_sentence_names_what_is_wrong(typed: str, message: str) -> None:
    assert refusal(typed).message == message
    assert str(refusal(typed)) == message


def test_a_name_of_253_characters_is_the_longest() -> None:
    longest = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61])

    assert parse_target(longest + ".").canonical == longest
    assert refusal("e" + longest).code == "domain_too_long"


def test_length_is_counted_as_on_the_wire() -> None:
    """44 u-umlauts are 50 octets in an A-label: five such labels fit by eye, not by RFC 1035."""
    name = ".".join(["ü" * 44] * 5)

    assert len(name) < 253
    assert refusal(name).code == "domain_too_long"


def test_a_label_of_63_octets_is_the_longest() -> None:
    assert parse_target("a" * 63 + ".com").canonical == "a" * 63 + ".com"
    assert len(parse_target("ü" * 57 + ".com").canonical) == 63 + len(".com")
    assert refusal("ü" * 58 + ".com").code == "label_too_long"


def test_a_quoted_target_is_cut() -> None:
    assert refusal("1" * 1_000).message == INVALID_IPV4.format("1" * 100 + "\N{HORIZONTAL ELLIPSIS}")


def test_a_refusal_travels_between_processes() -> None:
    travelled = pickle.loads(pickle.dumps(refusal("localhost")))  # noqa: S301 - our own bytes

    assert (travelled.code, travelled.message) == ("domain_no_dot", NO_DOT)


# Pieces that the rules turn on; strung together they reach corners that random text does not.
PIECES = st.sampled_from(
    [
        *"0123456789.:%/[]-_ aAfFxXzü",
        *("0x", "xn--", "bcher-kva", "e4bcd", "--", "::", "::ffff:", "%eth0", "127", "255", "256", "com", "fe80"),
        *("８", "．", "。", "｡", "①", "：", "％", "／", "＿", "　", "\xad", "\u200b", "\u200d", "\u0301", "\ufdfa"),  # noqa: RUF001
        *("ß", "İ", "ſ", "\u212a", "८", "١", "א", "ا", "☃", "\x00", "\x1f", "\x7f", "\x85", "\u2028", "\ud800", "\U0010ffff"),  # noqa: RUF001
    ]
)
DOTS = st.sampled_from([".", "。", "．", "｡"])  # noqa: RUF001
SCRIPTS = st.sampled_from(["abcxyzABCXYZ019-", "äöüßÄÖÜñéÑÉ", "бвгдж", "αβγΑΒΓ", "אבג", "日本語", "कखग१२३", "ａｂｃ１２３①②"])
WORDS = SCRIPTS.flatmap(lambda script: st.text(st.sampled_from(script), min_size=1, max_size=20))
NAMES = st.lists(st.tuples(WORDS, DOTS).map("".join), min_size=1, max_size=5).flatmap(
    lambda labels: st.sampled_from(["com", "DE.", "рф", "한국"]).map(lambda tld: "".join(labels) + tld)
)
ZONES = st.sampled_from(["", "%eth0", "%Wi-Fi_2.100", "%1"])
ADDRESSES = st.one_of(st.ip_addresses(v=4).map(str), st.tuples(st.ip_addresses(v=6).map(str), ZONES).map("".join))
PLAUSIBLE = st.one_of(NAMES, ADDRESSES)
TYPED = st.one_of(
    PLAUSIBLE, st.lists(PIECES, max_size=40).map("".join), st.text(max_size=80), st.text(min_size=200, max_size=1_100)
)
ANYTHING = st.one_of(TYPED, st.none(), st.booleans(), st.integers(), st.floats(), st.binary(), st.lists(st.text()))
MANY = settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # The machine may be busy.


@given(raw=ANYTHING)
@example(raw="xn--" + "9" * 59 + ".com")
@example(raw="\ufdfa" * 1_000)
@example(raw="a." * 500)
@MANY
def test_nothing_but_a_target_or_a_printable_refusal_comes_out(raw: object) -> None:
    answer = target_or_refusal(raw)

    if isinstance(answer, InvalidTarget):
        assert answer.message.isprintable()
        assert len(answer.message) < 300
        assert answer.code.isidentifier()
    else:
        assert answer.raw == raw
        assert_in_canonical_form(answer.canonical, answer.type)


@given(raw=PLAUSIBLE)
@example(raw="FE80::1%Wi-Fi")
@example(raw="::ffff:c000:201")
@example(raw="BÜCHER。DE。")
@MANY
def test_the_canonical_form_is_its_own_canonical_form(raw: str) -> None:
    """What a job was decided on can be parsed again, by a retry or a watch, and means the same."""
    answer = target_or_refusal(raw)
    assume(isinstance(answer, Target))
    assert isinstance(answer, Target)

    again = parse_target(answer.canonical)

    assert (again.canonical, again.type) == (answer.canonical, answer.type)


@given(raw=PLAUSIBLE)
@example(raw="BÜCHER。DE。")
@example(raw="faß.de")
@example(raw="00--0.com")
@settings(MANY, max_examples=200)
def test_every_spelling_of_a_target_means_the_same(raw: str) -> None:
    """Else the same question would be two, and a rule that holds for one spelling could be walked around with another."""
    answer = target_or_refusal(raw)
    assume(isinstance(answer, Target))
    assert isinstance(answer, Target)
    canonical = answer.canonical
    spellings = [f" {canonical}\n", f"\N{NO-BREAK SPACE}{canonical}"]
    if answer.type is TargetType.DOMAIN:
        labels = canonical.split(".")
        for_people = ".".join(idna.ulabel(label) if label.startswith("xn--") else label for label in labels)
        spellings += [canonical.upper(), f"{canonical}.", for_people, canonical.replace(".", "。"), full_width(canonical)]
    elif ":" not in canonical:
        spellings += [full_width(canonical), canonical.replace(".", "｡")]

    assert {(parse_target(spelling).canonical, parse_target(spelling).type) for spelling in spellings} == {
        (canonical, answer.type)
    }


def full_width(text: str) -> str:
    """The same in the wide forms of East Asian keyboards (U+FF01 to U+FF5E)."""
    return "".join(chr(ord(char) + 0xFEE0) for char in text)


def target_or_refusal(raw: object) -> Target | InvalidTarget:
    try:
        return parse_target(raw)
    except InvalidTarget as refused:
        return refused


def assert_in_canonical_form(canonical: str, target_type: TargetType) -> None:
    """What every later part relies on: a strict address, or letters, digits, hyphens and dots that end in no number."""
    if target_type is TargetType.DOMAIN:
        labels = canonical.split(".")
        assert len(labels) >= 2
        assert len(canonical) <= 253
        assert all(0 < len(label) <= 63 for label in labels)
        assert all(set(label) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for label in labels)
        assert not labels[-1].isdecimal()
    elif ":" in canonical:
        assert canonical.isascii()
        assert str(IPv6Address(canonical)) == str(IPv6Address(canonical.lower().partition("%")[0])) + zone_of(canonical)
    else:
        assert str(IPv4Address(canonical)) == canonical


def zone_of(canonical: str) -> str:
    address, percent, zone = canonical.partition("%")
    assert address == address.lower()
    assert len(zone) <= 32
    return percent + zone


@given(address=st.ip_addresses(v=4))
@MANY
def test_every_ipv4_address_is_its_own_canonical_form(address: IPv4Address) -> None:
    assert parse_target(str(address)).canonical == str(address)


@given(address=st.ip_addresses(v=6))
@MANY
def test_every_ipv6_address_is_taken_in_full_and_short_form(address: IPv6Address) -> None:
    short, full = parse_target(str(address)), parse_target(address.exploded.upper())

    assert short.canonical == full.canonical
    assert IPv6Address(short.canonical) == address


LABELS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True).filter(lambda label: not label.startswith("xn--"))


@given(labels=st.lists(LABELS, min_size=1, max_size=5), tld=st.sampled_from(["com", "de", "cafe", "xn--p1ai"]))
@MANY
def test_every_host_name_is_its_own_canonical_form(labels: list[str], tld: str) -> None:
    name = ".".join([*labels, tld])

    assert parse_target(name.upper()).canonical == name
