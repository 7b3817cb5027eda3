"""The diff's rules, service by service: what is compared how, and why. `read_side/diff.py` applies them.

A field that no rule names is compared as it is, but for white space; a list, without regard to its order. Null, `""`, `[]`,
`{}` and a field that is not there are all the same nothing.
"""

import ipaddress
import re
import unicodedata
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson

from events.facts import Service

Json = Any

# --- How a field is compared ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ignored:
    """Whatever it says, it is no change."""


@dataclass(frozen=True, slots=True)
class Told:
    """Another field says the same: compared only when that one is unknown on either side."""

    by: str


@dataclass(frozen=True, slots=True)
class BothKnown:
    """Compared as it is, but where one side has none, nothing is known of it."""


@dataclass(frozen=True, slots=True)
class Same:
    """The same when this makes the same of both."""

    reading: Callable[[Json], Hashable]


@dataclass(frozen=True, slots=True)
class Within:
    """Numbers that are at most so far apart are the same. On a circle, `around` is its length."""

    tolerance: float
    around: float | None = None


@dataclass(frozen=True, slots=True)
class Bands:
    """Numbers of one band are the same: band i ends where `ends[i]` does, the last has no end. Null was not measured.

    Numbers of two bands are the same, too, unless the greater exceeds the smaller by this share of itself and by `apart`: what
    trembles around the border of two bands has not changed.
    """

    names: tuple[str, ...]
    ends: tuple[float, ...]
    share: float = 0.0
    apart: float = 0.0


@dataclass(frozen=True, slots=True)
class Unordered:
    """A list whose order says nothing. Items of one `key` are compared with each other, others were added or removed.

    Items that `apart_from` holds for are set aside. `told`: which items there are, another list says; only their inside counts.
    `kinds`: a kind of item that one side has none of was perhaps never asked for, and is unknown there.
    """

    key: Callable[[Json], Hashable]
    apart_from: Callable[[Json], bool] = lambda _item: False
    told: bool = False
    kinds: Callable[[Json], Hashable] | None = None


@dataclass(frozen=True, slots=True)
class InOrder:
    """A list whose places have a meaning."""

    same_length: bool = True


How = Ignored | Told | BothKnown | Same | Within | Bands | Unordered | InOrder


@dataclass(frozen=True, slots=True)
class Rule:
    """`path` is a JSON pointer into the service's data, in which `*` is any one step and `**` any number of them."""

    path: str
    how: How
    why: str


# --- How a value is read ----------------------------------------------------------------------------------------------


def plain(value: Json) -> str:
    """A text in one form (NFC), without needless white space; of other values their text, whatever the order of their lists."""
    if value is None:
        return ""
    if isinstance(value, list):
        return f"[{','.join(sorted(map(plain, value)))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{plain(value[key])}' for key in sorted(value))}}}"
    return " ".join(unicodedata.normalize("NFC", value).split()) if isinstance(value, str) else canonical(value).decode()


def canonical(value: Json) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def texts(values: Json) -> list[str]:
    return [wording(value) for value in values if isinstance(value, str)] if isinstance(values, list) else []


def name(value: Json) -> str:
    """A domain name, whatever its case (RFC 4343) and with or without the final dot."""
    return plain(value).casefold().rstrip(".")


def names_item(item: Json) -> str:
    return name(item.get("ldhName") or item.get("unicodeName")) if isinstance(item, dict) else name(item)


def address(value: Json) -> str:
    """An IP address, however it is spelled."""
    try:
        return str(ipaddress.ip_address(plain(value)))
    except ValueError:
        return plain(value)


def family(value: Json) -> int:
    """4 or 6; 0 is no address."""
    try:
        return ipaddress.ip_address(plain(value)).version
    except ValueError:
        return 0


def caseless(value: Json) -> str:
    return plain(value).casefold()


def instant(value: Json) -> str:
    """A time (RFC 3339), in whatever zone it is told; to the second, as some registries drop the rest."""
    try:
        at = datetime.fromisoformat(plain(value).upper())
        return str(int(at.timestamp())) if at.tzinfo else plain(value)
    except (ValueError, OverflowError):
        return plain(value)


def wording(value: Json) -> str:
    """A name as people write it: without case, punctuation and spaces, which differ from one edition to the next."""
    text = unicodedata.normalize("NFKC", plain(value)).casefold()
    return "".join(filter(str.isalnum, text)) or text


def as_number(value: Json) -> str:
    """Of `AS64500 Example`, the number: the name beside it is only a label."""
    return plain(value).partition(" ")[0].upper()


# --- How the items of a list are told apart ---------------------------------------------------------------------------

_NOTES = re.compile(r"truncated|redacted|authori[sz]ation|unavailable|privacy", re.IGNORECASE)


def _is_database_update(event: Json) -> bool:
    return isinstance(event, dict) and "last update of rdap database" in {
        plain(event.get(key)).casefold() for key in ("action", "eventAction")
    }


def _action(event: Json) -> str:
    return plain(event.get("action") or event.get("eventAction")).casefold() if isinstance(event, dict) else ""


def _is_registrar(entity: Json) -> bool:
    return isinstance(entity, dict) and "registrar" in texts(entity.get("roles"))


def _who(entity: Json) -> Hashable:
    """An entity's handle; one without, as redacted contacts are, is known by its roles."""
    if not isinstance(entity, dict):
        return plain(entity)
    return plain(entity.get("handle")).casefold() or tuple(sorted(texts(entity.get("roles"))))


def _is_note(remark: Json) -> bool:
    """A remark about the answer, not about what was registered (RFC 9083 section 10.2.1)."""
    told = (plain(remark.get("type")), plain(remark.get("title"))) if isinstance(remark, dict) else ()
    return any(_NOTES.search(text) for text in told)


def _which(item: Json) -> Hashable:
    """What tells the items of a list apart that we know nothing of."""
    if isinstance(item, dict) and (known_as := item.get("handle") or item.get("ldhName")):
        return caseless(known_as)
    return plain(item)


def _title(remark: Json) -> str:
    return plain(remark.get("title")).casefold() if isinstance(remark, dict) else ""


def _is_card_detail(card_property: Json) -> bool:
    """What a jCard says of itself."""
    return isinstance(card_property, list) and card_property[:1] in (["version"], ["kind"], ["rev"], ["prodid"], ["uid"])


def _card_property(card_property: Json) -> Hashable:
    """`["tel", {"type": ["work"]}, "uri", "tel:+1.555"]` (RFC 7095): its name and type."""
    match card_property:
        case [str() as kind, {"type": types}, *_]:
            return kind.casefold(), *sorted(texts(types if isinstance(types, list) else [types]))
        case [str() as kind, *_]:
            return (kind.casefold(),)
        case _:
            return plain(card_property)


def _key_of_key(item: Json) -> Hashable:
    """A DS record's or DNSKEY's identity (RFC 4034)."""
    return plain(item.get("keyTag") or item.get("publicKey")) if isinstance(item, dict) else plain(item)


def _id_type(item: Json) -> str:
    return plain(item.get("type")).casefold() if isinstance(item, dict) else ""


# --- The rules --------------------------------------------------------------------------------------------------------

ROUND_TRIP = Bands(
    names=("local", "near", "regional", "continental", "intercontinental", "far"),
    ends=(2.0, 20.0, 60.0, 150.0, 400.0),
    share=1 / 3,
    apart=2.0,
)
"""Round-trip times in ms: up to 2 local, 20 near, 60 regional, 150 continental, 400 intercontinental, above it far."""

HOPS_LEFT = Bands(names=("of 64", "of 128", "of 255"), ends=(64.0, 128.0))
"""Hosts send with 64, 128 or 255 hops to go, by their system; how many are left on arrival differs with the way."""

COORDINATES_DEGREES = 0.25
"""About 28 km: databases move a city's centre by so much from one edition to the next."""

_TOLD_ABOVE = "The typed fields beside the raw document tell it."

PING = (
    Rule("/averageRoundtripMs", ROUND_TRIP, "Times of one band, or hardly apart, are the same."),
    Rule("/minRoundtripMs", ROUND_TRIP, "Times of one band, or hardly apart, are the same."),
    Rule("/maxRoundtripMs", Ignored(), "One slow echo says nothing about the way."),
    Rule("/packetLoss", Told("/packetsReceived"), "Follows from the packet counts."),
    Rule("/address", Same(address), "One address has several spellings."),
    Rule("/results", InOrder(same_length=False), "How many echoes there are, the packet counts say."),
    Rule("/results/*/ttl", HOPS_LEFT, "The way varies by some hops; another starting value is another host."),
    Rule("/results/*/*", Ignored(), "Which echo was slow or lost is chance; counts and times above say what it comes to."),
)

GEOIP = (
    Rule("/ip", Same(address), "One address has several spellings."),
    Rule("/lat", Within(COORDINATES_DEGREES), "Databases move a place a little from one edition to the next."),
    Rule("/lon", Within(COORDINATES_DEGREES, around=360.0), "Databases move a place a little from one edition to the next."),
    Rule("/country", Told("/countryCode"), "The name of the country code, in words that change."),
    Rule("/regionName", Told("/region"), "The name of the region code, in words that change."),
    Rule("/as", Same(as_number), "The name beside the number is a label."),
    Rule("/city", Same(wording), "Case and punctuation are wording."),
    Rule("/isp", Same(wording), "Case and punctuation are wording."),
    Rule("/org", Same(wording), "Case and punctuation are wording."),
)

REVERSE_DNS = (
    Rule("/queriedAtUtc", Ignored(), "When it was asked says nothing about the answer."),
    Rule("/found", Ignored(), "Follows from the names."),
    Rule("/names", Unordered(name), "Records of one name have no order (RFC 2181 section 5)."),
    Rule(
        "/addresses",
        Unordered(address, kinds=family),
        "Records of one name have no order, and a kind of address that is missing may only not have been answered in time.",
    ),
)

EVENTS = Unordered(_action, apart_from=_is_database_update)

RDAP = (
    Rule("/name", Same(caseless), "Case is wording."),
    Rule("/handle", Same(caseless), "Case is wording."),
    Rule("/status", Unordered(wording), "States have no order, and two spellings (RFC 8056)."),
    Rule("/events", EVENTS, "Events have no order; RDAP's own update is none."),
    Rule("/events/*/action", Same(wording), "Case is wording."),
    Rule("/events/*/date", Same(instant), "One instant has several spellings."),
    Rule("/network/startAddress", Same(address), "One address has several spellings."),
    Rule("/network/endAddress", Same(address), "One address has several spellings."),
    Rule("/network/cidr", Told("/network/startAddress"), "Follows from the ends of the block."),
    Rule("/network/*", Same(caseless), "Case is wording."),
    Rule("/domain/ldhName", Same(name), "Domain names have no case."),
    Rule("/domain/unicodeName", Same(name), "Domain names have no case."),
    Rule("/domain/registrar", Same(wording), "Case and punctuation are wording."),
    Rule("/domain/nameservers", Unordered(name), "Name servers have no order, and their names no case."),
    # The raw document: what the fields above do not tell of it, at any depth.
    Rule("/raw", BothKnown(), "It is not always kept."),
    Rule("/raw/**/links", Ignored(), "Links are the server's addresses."),
    Rule("/raw/**/notices", Ignored(), "Notices are the server's terms."),
    Rule("/raw/**/lang", Ignored(), "The language of the answer."),
    Rule("/raw/**/port43", Ignored(), "The server's address."),
    Rule("/raw/rdapConformance", Ignored(), "What the server speaks."),
    Rule("/raw/redacted", Ignored(), "What the server leaves out (RFC 9537) is unknown."),
    Rule("/raw/handle", Ignored(), _TOLD_ABOVE),
    Rule("/raw/name", Ignored(), _TOLD_ABOVE),
    Rule("/raw/status", Ignored(), _TOLD_ABOVE),
    Rule("/raw/events", Ignored(), _TOLD_ABOVE),
    Rule("/raw/startAddress", Ignored(), _TOLD_ABOVE),
    Rule("/raw/endAddress", Ignored(), _TOLD_ABOVE),
    Rule("/raw/cidr0_cidrs", Ignored(), _TOLD_ABOVE),
    Rule("/raw/ipVersion", Ignored(), _TOLD_ABOVE),
    Rule("/raw/country", Ignored(), _TOLD_ABOVE),
    Rule("/raw/type", Ignored(), _TOLD_ABOVE),
    Rule("/raw/parentHandle", Ignored(), _TOLD_ABOVE),
    Rule("/raw/ldhName", Ignored(), _TOLD_ABOVE),
    Rule("/raw/unicodeName", Ignored(), _TOLD_ABOVE),
    Rule("/raw/secureDNS/delegationSigned", Ignored(), _TOLD_ABOVE),
    Rule("/raw/secureDns/delegationSigned", Ignored(), _TOLD_ABOVE),
    Rule("/raw/nameservers", Unordered(names_item, told=True), "Which they are is told above; here, their addresses."),
    Rule("/raw/nameservers/*/ipAddresses/*", Unordered(address), "Addresses have no order."),
    Rule("/raw/nameservers/*/ldhName", Same(name), "Domain names have no case."),
    Rule("/raw/nameservers/*/unicodeName", Same(name), "Domain names have no case."),
    Rule("/raw/nameservers/*/entities", Ignored(), "Who looks after a name server is not about the domain."),
    Rule("/raw/nameservers/*/events", Ignored(), "When a name server's entry was touched is not about the domain."),
    Rule("/raw/secureDNS/*", Unordered(_key_of_key), "Keys have no order."),
    Rule("/raw/secureDns/*", Unordered(_key_of_key), "Keys have no order."),
    Rule("/raw/**/digest", Same(caseless), "Hexadecimal digits have no case."),
    Rule("/raw/entities", Unordered(_who, apart_from=_is_registrar), "Entities have no order; the registrar is told above."),
    Rule("/raw/**/entities", Unordered(_who), "Entities have no order."),
    Rule("/raw/**/roles", Unordered(wording), "Roles have no order."),
    Rule("/raw/**/status", Unordered(wording), "States have no order, and two spellings (RFC 8056)."),
    Rule("/raw/**/events", EVENTS, "Events have no order; RDAP's own update is none."),
    Rule("/raw/**/events/*/eventAction", Same(wording), "Case is wording."),
    Rule("/raw/**/events/*/eventDate", Same(instant), "One instant has several spellings."),
    Rule("/raw/**/publicIds", Unordered(_id_type), "Identifiers have no order."),
    Rule("/raw/**/remarks", Unordered(_title, apart_from=_is_note), "Remarks have no order; those about the answer are none."),
    Rule("/raw/**/remarks/*/description", InOrder(), "Lines of a text."),
    Rule("/raw/**/vcardArray", InOrder(), "A jCard is a pair of a word and its properties (RFC 7095)."),
    Rule("/raw/**/vcardArray/0", Ignored(), "The word is `vcard`."),
    Rule("/raw/**/vcardArray/1", Unordered(_card_property, apart_from=_is_card_detail), "Properties have no order."),
    Rule("/raw/**/vcardArray/1/*", InOrder(), "A property's name, parameters, kind and value."),
    Rule("/raw/**/vcardArray/1/*/1/pref", Ignored(), "Which of several is used first."),
    Rule("/raw/**/vcardArray/1/*/1/type", Ignored(), "By their types, properties are matched."),
    Rule("/raw/**/vcardArray/1/*/2", Ignored(), "How the value is written down."),
    Rule("/raw/**/vcardArray/1/**", InOrder(), "Parts of a value."),
)

RULES: Mapping[Service, tuple[Rule, ...]] = {
    Service.GEOIP: GEOIP,
    Service.PING: PING,
    Service.RDAP: RDAP,
    Service.REVERSE_DNS: REVERSE_DNS,
}

SPACING = Rule("/**", Same(plain), "White space is wording.")
EMPTY = Rule("/**", Ignored(), "Null, empty and not there are the same nothing.")
REDACTED = Rule("/**", Ignored(), "A redacted value is unknown.")
ANY_ORDER = Rule("/**", Unordered(_which), "A list has no order unless a rule says so.")
