"""What may be asked about: one public IP address or domain name, read once at the door and trusted afterwards.

Everything is decided on the canonical form (UTS 46 mapping, then IDNA 2008), so that no other spelling of the same
target slips past a rule.
"""

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv6Address

import idna

from events.facts import Target, TargetType

_TYPED_CHARS_MAX = 1_000
_NAME_CHARS_MAX = 253
_LABEL_CHARS_MAX = 63
_QUOTED_CHARS_MAX = 100

_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = re.compile(rf"{_OCTET}(?:\.{_OCTET}){{3}}")
_ZONE = re.compile(r"[A-Za-z0-9._-]{1,32}")
_LETTERS_DIGITS_HYPHENS = re.compile(r"[a-z0-9-]+")
_HEX_NUMBER = re.compile(r"0x[0-9a-f]*")


@dataclass(eq=False)
class InvalidTarget(ValueError):  # noqa: N818 - a refusal in the domain's words
    """The target cannot be looked up: `code` is stable, `message` is the public sentence (printable, bounded)."""

    code: str
    message: str

    def __str__(self) -> str:
        return self.message


def parse_target(raw: object) -> Target:
    """The target that somebody typed, or `InvalidTarget`; nothing else is ever raised.

    `canonical` is a dotted quad, an IPv6 address as in RFC 5952 (IPv4-mapped ones in mixed notation; a zone is kept as
    typed, RFC 4007), or a domain name of lower-case A-labels without the final dot (RFC 5890). It is its own canonical form.
    """
    if not isinstance(raw, str) or not raw or raw.isspace():
        raise _target_required()
    if len(raw) > _TYPED_CHARS_MAX:
        raise InvalidTarget("target_too_long", f"Target is too long: at most {_TYPED_CHARS_MAX} characters are allowed")
    typed = raw.strip()
    text = _mapped(typed)
    if not text:
        # Characters that UTS 46 ignores (soft hyphen, zero-width space) were all there was.
        raise _target_required()
    _refuse_more_than_a_host(text)
    if ":" in text:
        return Target(raw=raw, canonical=_ipv6(typed), type=TargetType.IP_ADDRESS)
    if _IPV4.fullmatch(text):
        return Target(raw=raw, canonical=text, type=TargetType.IP_ADDRESS)
    _refuse_other_ipv4_spellings(typed, text)
    return Target(raw=raw, canonical=_domain(text), type=TargetType.DOMAIN)


def _mapped(typed: str) -> str:
    """UTS 46 section 4, step 1. Its only mapping of ASCII is to lower case, so the usual target needs no table."""
    if typed.isascii():
        return typed.lower()
    try:
        # Without the STD3 rules: underscores, spaces and the like get their own messages further down.
        return idna.uts46_remap(typed, std3_rules=False)
    except UnicodeError as error:
        raise InvalidTarget(
            "character_not_allowed",
            f"Invalid target: '{_quoted(typed)}'. It contains a character that no domain name or IP address can have.",
        ) from error


def _refuse_more_than_a_host(text: str) -> None:
    if "/" in text:
        raise InvalidTarget(
            "target_not_plain",
            "Target must be a domain name or an IP address alone, without scheme, path or prefix length",
        )
    if text.startswith("["):
        raise InvalidTarget("target_in_brackets", "Target must be written without brackets (e.g. 2001:db8::1)")
    if text.count(":") == 1:
        # Every spelling of an IPv6 address has at least two colons.
        raise InvalidTarget("target_with_port", "Target must be a domain name or an IP address alone, without a port")


def _ipv6(typed: str) -> str:
    """The canonical spelling of an IPv6 address. The zone is not mapped: interface names differ by case."""
    address_text, percent, zone = typed.partition("%")
    if percent and not _ZONE.fullmatch(zone):
        raise InvalidTarget(
            "invalid_zone",
            f"Invalid IPv6 zone: '{_quoted(zone)}'. A zone has 1 to 32 letters, digits, dots, underscores or hyphens.",
        )
    address = _ipv6_without_zone(typed, _mapped(address_text))
    # Python spells mapped addresses in mixed notation (RFC 5952 section 5) only since 3.13.
    embedded = address.ipv4_mapped
    return f"{address if embedded is None else f'::ffff:{embedded}'}{percent}{zone}"


def _ipv6_without_zone(typed: str, text: str) -> IPv6Address:
    try:
        # A full-width percent sign becomes a plain one only by mapping; the zone behind it would go unchecked.
        if "%" not in text:
            return IPv6Address(text)
    except AddressValueError:
        pass
    raise InvalidTarget(
        "invalid_ipv6",
        f"Invalid IP address format: '{_quoted(typed)}'. "
        "IPv6 must have 8 groups of up to 4 hexadecimal digits; one '::' may stand for groups of zeros.",
    )


def _refuse_other_ipv4_spellings(typed: str, text: str) -> None:
    """Many programs read `127.1`, `0177.0.0.1` or `0x7f000001` as an address; each reads it differently, so none is taken."""
    if text.replace(".", "").isdecimal() or _HEX_NUMBER.fullmatch(text.removesuffix(".")):
        raise InvalidTarget(
            "invalid_ip",
            f"Invalid IP address format: '{_quoted(typed)}'. IPv4 must have exactly 4 octets (0-255 each).",
        )


def _domain(text: str) -> str:
    name = text.removesuffix(".")
    if "." not in name and name:
        raise InvalidTarget("domain_no_dot", "Domain name must contain a dot (e.g. example.com)")
    # An A-label is never shorter than what was typed, so the work that follows is bounded here.
    _refuse_long_name(name)
    labels = [_a_label(label) for label in name.split(".")]
    _refuse_numeric_tld(labels[-1])
    canonical = ".".join(labels)
    _refuse_long_name(canonical)
    return canonical


def _refuse_long_name(name: str) -> None:
    if len(name) > _NAME_CHARS_MAX:
        raise InvalidTarget("domain_too_long", f"Domain name is too long: at most {_NAME_CHARS_MAX} characters are allowed")


def _a_label(label: str) -> str:
    """The label as it goes on the wire: RFC 1123 section 2.1, RFC 5891 section 4 for what is not ASCII."""
    _refuse_bad_shape(label)
    if label.isascii() and not label.startswith("xn--"):
        if not _LETTERS_DIGITS_HYPHENS.fullmatch(label):
            raise InvalidTarget(
                "label_invalid",
                f"Invalid domain label: '{_quoted(label)}'. Only letters, digits and hyphens are allowed.",
            )
        return label
    return _international(label)


def _refuse_bad_shape(label: str) -> None:
    if not label:
        raise InvalidTarget("label_empty", "Domain name must not contain an empty label (two dots in a row, or a leading dot)")
    if any(char.isspace() for char in label):
        raise InvalidTarget("label_space", f"Invalid domain label: '{_quoted(label)}'. Spaces are not allowed.")
    if "_" in label:
        raise InvalidTarget("label_underscore", f"Invalid domain label: '{_quoted(label)}'. Underscores are not allowed.")
    _refuse_long_label(label, label)
    if label.startswith("-") or label.endswith("-"):
        raise InvalidTarget(
            "label_hyphen", f"Invalid domain label: '{_quoted(label)}'. It must not start or end with a hyphen."
        )


def _refuse_long_label(label: str, on_the_wire: str) -> None:
    if len(on_the_wire) > _LABEL_CHARS_MAX:
        raise InvalidTarget(
            "label_too_long",
            f"Domain label is too long: '{_quoted(label)}'. At most {_LABEL_CHARS_MAX} characters are allowed.",
        )


def _international(label: str) -> str:
    """The A-label of a label that is not plain ASCII, or an A-label that survives decoding and encoding unchanged."""
    if not label.isascii():
        # Measured before the rules apply, because a long label deserves to be called long, not invalid.
        _refuse_long_label(label, "xn--" + label.encode("punycode").decode("ascii"))
    try:
        encoded = idna.alabel(idna.ulabel(label)).decode("ascii")
    except UnicodeError as error:
        raise _not_idna(label) from error
    if label.isascii() and encoded != label:
        # Older releases of idna decode a second spelling of the same label without a word (RFC 5891 section 5.3).
        raise _not_idna(label)
    return encoded


def _refuse_numeric_tld(label: str) -> None:
    """A name that ends in a number is read as an IPv4 address by some programs (URL Standard, "ends in a number")."""
    shown = idna.ulabel(label) if label.startswith("xn--") else label
    if shown.isdecimal():
        raise InvalidTarget("tld_numeric", f"Invalid TLD: '{shown}'. Top-level domain cannot be all numeric.")
    if _HEX_NUMBER.fullmatch(shown):
        raise InvalidTarget("tld_hexadecimal", f"Invalid TLD: '{shown}'. Top-level domain cannot be a hexadecimal number.")


def _target_required() -> InvalidTarget:
    return InvalidTarget("target_required", "Target is required")


def _not_idna(label: str) -> InvalidTarget:
    return InvalidTarget(
        "label_not_idna",
        f"Invalid domain label: '{_quoted(label)}'. It is not a valid internationalized label (IDNA 2008).",
    )


def _quoted(text: str) -> str:
    """Text of the caller that is safe in a message: a bounded stretch, printable characters only."""
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text[:_QUOTED_CHARS_MAX])
    return shown if len(text) <= _QUOTED_CHARS_MAX else shown + "\N{HORIZONTAL ELLIPSIS}"
