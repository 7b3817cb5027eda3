"""The diff: pairs of answers in three classes. Noise is no change, a change is found exactly, silence is unknown."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events.facts import Service
from read_side import diff
from read_side.diff import compare_data, compare_jobs, compare_results, outcome_of
from tests.diff_documents import (
    Document,
    card,
    cctld_domain,
    country_only,
    edited,
    geoip,
    gtld_domain,
    network,
    ping,
    rdap_result,
    reverse_dns,
)

GEOIP, PING, RDAP, REVERSE_DNS = Service
GTLD, CCTLD, NETWORK = rdap_result(gtld_domain()), rdap_result(cctld_domain()), rdap_result(network())


@dataclass(frozen=True)
class Pair:
    """Two answers of a service, and the changes between them as (kind, path)."""

    says: str
    service: Service
    before: Document
    after: Document
    changes: tuple[tuple[str, str], ...] = ()


def _reversed(items: list[Any]) -> list[Any]:
    return items[::-1]


def _shuffled(document: Any, order: random.Random) -> Any:
    """Every list of objects or names in another order, but for those whose places have a meaning (jCards, text lines)."""
    if isinstance(document, dict):
        fixed = {"description", "vcardArray"}
        return {key: value if key in fixed else _shuffled(value, order) for key, value in document.items()}
    if isinstance(document, list):
        return order.sample([_shuffled(item, order) for item in document], len(document))
    return document


NOISE = (
    Pair("times tremble around the border of two bands", PING, ping(19.9, 19.9), ping(20.1, 20.1)),
    Pair("times vary within their band", PING, ping(21.0, 22.5, 24.0), ping(55.0, 39.0, 41.0)),
    Pair("times of a near host double, by a millisecond", PING, ping(1.1, 1.2), ping(2.9, 2.8)),
    Pair("one slow echo", PING, ping(25.0, 25.2, 25.1, 24.9), ping(25.0, 70.0, 25.1, 24.9)),
    Pair("another echo was lost", PING, ping(25.0, None, 25.1, 24.9), ping(25.0, 25.2, 25.1, None)),
    Pair("the way got two hops longer", PING, ping(25.0, 25.1, ttl=57), ping(25.0, 25.1, ttl=55)),
    Pair("a place moved by some kilometres", GEOIP, geoip(), geoip(lat=52.3740, lon=4.8970)),
    Pair("a place on the date line", GEOIP, geoip(lon=179.95), geoip(lon=-179.95)),
    Pair(
        "names of country and region were reworded", GEOIP, geoip(), geoip(country="The Netherlands", regionName="N. Holland")
    ),
    Pair("a company's comma", GEOIP, geoip(), geoip(isp="Example Hosting, BV", org="EXAMPLE HOSTING", **{"as": "AS64500 EXH"})),
    Pair(
        "aliases and addresses in another order",
        REVERSE_DNS,
        reverse_dns("a.test", "b.test", "c.test", addresses=("192.0.2.1", "192.0.2.2")),
        reverse_dns("a.test", "c.test", "b.test", addresses=("192.0.2.2", "192.0.2.1"), at="2026-02-02T03:04:05Z"),
    ),
    Pair("a name's case and final dot", REVERSE_DNS, reverse_dns("Host.Example.TEST."), reverse_dns("host.example.test")),
    Pair("the forward lookup came too late", REVERSE_DNS, reverse_dns("a.test"), reverse_dns("a.test", addresses=())),
    Pair(
        "only IPv4 was answered in time",
        REVERSE_DNS,
        reverse_dns("a.test", addresses=("192.0.2.1", "2001:db8::1")),
        reverse_dns("a.test", addresses=("192.0.2.1",)),
    ),
    Pair("no name, asked twice", REVERSE_DNS, reverse_dns(), reverse_dns(at="2026-02-02T03:04:05Z")),
    Pair(
        "the RDAP database was updated",
        RDAP,
        GTLD,
        rdap_result(edited(gtld_domain(), events__3__eventDate="2026-02-02T09:00:02Z")),
    ),
    Pair(
        "the RDAP database's update is not told any more",
        RDAP,
        GTLD,
        rdap_result(edited(gtld_domain(), events=lambda events: events[:3])),
    ),
    Pair(
        "name servers, states, events and contacts in another order",
        RDAP,
        CCTLD,
        rdap_result(
            edited(
                cctld_domain(),
                nameservers=_reversed,
                entities=_reversed,
                events=_reversed,
                secureDNS__dsData=_reversed,
                entities__1__roles=_reversed,
                nameservers__0__ipAddresses__v4=_reversed,
            )
        ),
    ),
    Pair(
        "names in lower case",
        RDAP,
        GTLD,
        rdap_result(
            edited(
                gtld_domain(), ldhName=str.lower, nameservers__0__ldhName=str.lower, nameservers__1__ldhName="ns2.example.test."
            )
        ),
    ),
    Pair(
        "states in EPP's spelling",
        RDAP,
        GTLD,
        rdap_result(
            edited(gtld_domain(), status=["clientTransferProhibited", "clientDeleteProhibited", "serverUpdateProhibited"])
        ),
    ),
    Pair(
        "other terms, links and port",
        RDAP,
        NETWORK,
        rdap_result(
            edited(
                network(),
                notices=[],
                links=[],
                port43="whois2.rir.test",
                lang="nl",
                entities__1__links=[],
                rdapConformance=["rdap_level_0"],
            )
        ),
    ),
    Pair(
        "times in another zone, without fractions",
        RDAP,
        NETWORK,
        rdap_result(
            edited(
                network(),
                events__1__eventDate="2024-11-05T13:31:08.25Z",
                entities__1__events__0__eventDate="2022-10-12T20:54:01+02:00",
            )
        ),
    ),
    Pair(
        "a jCard's properties in another order, its version anew",
        RDAP,
        NETWORK,
        rdap_result(edited(network(), entities__2__vcardArray__1=lambda card: [["version", {}, "text", "5.0"], *card[:0:-1]])),
    ),
    Pair(
        "an empty field instead of none",
        RDAP,
        GTLD,
        rdap_result(gtld_domain() | {"remarks": [], "unicodeName": "", "port43": None}),
    ),
    Pair(
        "a redacted contact came into the open, and went",
        RDAP,
        CCTLD,
        rdap_result(edited(cctld_domain(), entities__3__vcardArray__1__1__3="Bill Payer", entities__3__remarks=[])),
    ),
    Pair(
        "a contact was redacted",
        RDAP,
        CCTLD,
        rdap_result(edited(cctld_domain(), entities__0__vcardArray__1__1__3="REDACTED FOR PRIVACY")),
    ),
    Pair(
        "a name server's own entry was touched",
        RDAP,
        CCTLD,
        rdap_result(
            edited(
                cctld_domain(),
                nameservers__1__events=[],
                nameservers__0__remarks=[],
                nameservers__0__entities=[{"handle": "X"}],
            )
        ),
    ),
    Pair(
        "the registrar's abuse contact moved",
        RDAP,
        GTLD,
        rdap_result(edited(gtld_domain(), entities__0__entities__0__vcardArray=card(["fn", {}, "text", "Abuse Desk"]))),
    ),
    Pair("the raw document was not kept", RDAP, GTLD, GTLD | {"raw": None}),
)

REAL = (
    Pair(
        "the host moved to another continent",
        PING,
        ping(18.0, 18.2, ttl=57),
        ping(95.0, 96.0, ttl=57),
        (("changed", "/averageRoundtripMs"), ("changed", "/minRoundtripMs")),
    ),
    Pair(
        "packets are lost", PING, ping(25.0, 25.2, 25.1, 24.9), ping(25.0, None, 25.1, None), (("changed", "/packetsReceived"),)
    ),
    Pair(
        "another kind of host answers",
        PING,
        ping(25.0, 25.2, ttl=57),
        ping(25.0, 25.2, ttl=121),
        (("changed", "/results/0/ttl"), ("changed", "/results/1/ttl")),
    ),
    Pair("the domain leads elsewhere", PING, ping(25.0), ping(25.0, address="203.0.113.8"), (("changed", "/address"),)),
    Pair(
        "it leads elsewhere, and was asked another way",
        PING,
        ping(25.0),
        ping(95.0, ttl=None, address="203.0.113.8", method="tcp"),
        (("changed", "/address"),),
    ),
    Pair(
        "another country",
        GEOIP,
        geoip(),
        geoip(
            countryCode="DE",
            country="Germany",
            region="HE",
            regionName="Hesse",
            city="Frankfurt",
            zip="60313",
            lat=50.1109,
            lon=8.6821,
            timezone="Europe/Berlin",
        ),
        (
            ("changed", "/countryCode"),
            ("changed", "/region"),
            ("changed", "/city"),
            ("changed", "/zip"),
            ("changed", "/lat"),
            ("changed", "/lon"),
            ("changed", "/timezone"),
        ),
    ),
    Pair(
        "another network",
        GEOIP,
        geoip(),
        geoip(isp="Other Transit", **{"as": "AS64501 Other Transit"}),
        (("changed", "/isp"), ("changed", "/as")),
    ),
    Pair(
        "the name of a country whose code is unknown",
        GEOIP,
        geoip(countryCode=None),
        geoip(countryCode=None, country="Germany"),
        (("changed", "/country"),),
    ),
    Pair("the city is not known any more", GEOIP, geoip(), geoip(city=None), (("removed", "/city"),)),
    Pair(
        "a name more, first in the alphabet",
        REVERSE_DNS,
        reverse_dns("b.test", "c.test"),
        reverse_dns("a.test", "b.test", "c.test"),
        (("added", "/hostName"),),
    ),
    Pair(
        "the first name is gone",
        REVERSE_DNS,
        reverse_dns("a.test", "b.test"),
        reverse_dns("b.test"),
        (("removed", "/hostName"),),
    ),
    Pair(
        "the address lost its names",
        REVERSE_DNS,
        reverse_dns("a.test", "b.test"),
        reverse_dns(),
        (("removed", "/hostName"), ("removed", "/aliases/0")),
    ),
    Pair(
        "the name leads elsewhere",
        REVERSE_DNS,
        reverse_dns("a.test"),
        reverse_dns("a.test", addresses=("203.0.113.8",)),
        (("added", "/addresses/0"), ("removed", "/addresses/0")),
    ),
    Pair(
        "a domain was transferred to another registrar",
        RDAP,
        GTLD,
        rdap_result(
            edited(
                gtld_domain(),
                entities__0__handle="77",
                entities__0__publicIds__0__identifier="77",
                entities__0__vcardArray=card(["fn", {}, "text", "Other Names Ltd"]),
                status=["pending transfer"],
            )
        ),
        (
            ("added", "/status/0"),
            ("removed", "/status/0"),
            ("removed", "/status/1"),
            ("removed", "/status/2"),
            ("changed", "/domain/registrar"),
            ("changed", "/domain/registrarIanaId"),
        ),
    ),
    Pair(
        "a domain was renewed",
        RDAP,
        GTLD,
        rdap_result(edited(gtld_domain(), events=_reversed, events__2__eventDate="2029-09-14T04:00:00Z")),
        (("changed", "/events/2/date"),),
    ),
    Pair(
        "one name server for another",
        RDAP,
        GTLD,
        rdap_result(edited(gtld_domain(), nameservers__1__ldhName="NS9.OTHER.TEST")),
        (("added", "/domain/nameservers/1"), ("removed", "/domain/nameservers/1")),
    ),
    Pair(
        "a name server got another address",
        RDAP,
        CCTLD,
        rdap_result(edited(cctld_domain(), nameservers=_reversed, nameservers__1__ipAddresses__v6=["2001:db8::99"])),
        (("added", "/raw/nameservers/1/ipAddresses/v6/0"), ("removed", "/raw/nameservers/1/ipAddresses/v6/0")),
    ),
    Pair(
        "a zone was signed",
        RDAP,
        GTLD,
        rdap_result(
            edited(
                gtld_domain(), secureDNS={"delegationSigned": True, "dsData": [{"keyTag": 1, "algorithm": 13, "digest": "AB"}]}
            )
        ),
        (("changed", "/domain/secureDNS"), ("added", "/raw/secureDNS/dsData/0")),
    ),
    Pair(
        "a zone's key was rolled over",
        RDAP,
        CCTLD,
        rdap_result(edited(cctld_domain(), secureDNS__dsData__0__keyTag=9)),
        (("added", "/raw/secureDNS/dsData/0"), ("removed", "/raw/secureDNS/dsData/0")),
    ),
    Pair(
        "a contact has another telephone",
        RDAP,
        NETWORK,
        rdap_result(edited(network(), entities=_reversed, entities__1__vcardArray__1__4__3="tel:+31.205550199")),
        (("changed", "/raw/entities/1/vcardArray/1/4/3"),),
    ),
    Pair(
        "a contact moved house",
        RDAP,
        CCTLD,
        rdap_result(edited(cctld_domain(), entities__0__vcardArray__1__2__3__2="2 Other Street")),
        (("changed", "/raw/entities/0/vcardArray/1/2/3/2"),),
    ),
    Pair(
        "a contact more",
        RDAP,
        NETWORK,
        rdap_result(edited(network(), entities=lambda entities: [{"handle": "NEW-1", "roles": ["noc"]}, *entities])),
        (("added", "/raw/entities/0"),),
    ),
    Pair(
        "a block changed hands",
        RDAP,
        NETWORK,
        rdap_result(edited(network(), name="OTHER-NET", country="DE")),
        (("changed", "/name"), ("changed", "/network/country")),
    ),
    Pair(
        "a block shrank",
        RDAP,
        NETWORK,
        rdap_result(edited(network(), endAddress="198.51.100.127")),
        (("changed", "/network/endAddress"),),
    ),
    Pair(
        "the holder's remark",
        RDAP,
        NETWORK,
        rdap_result(edited(network(), remarks=_reversed, remarks__1__description__1="Rotterdam")),
        (("changed", "/raw/remarks/1/description/1"),),
    ),
    Pair(
        "a field that no rule names",
        RDAP,
        NETWORK,
        rdap_result(edited(network(), arin_originas0_originautnums=[64501, 64502])),
        (("added", "/raw/arin_originas0_originautnums/1"), ("removed", "/raw/arin_originas0_originautnums/0")),
    ),
)


@pytest.mark.parametrize("pair", NOISE, ids=lambda pair: pair.says)
def test_noise_is_no_change_and_is_counted(pair: Pair) -> None:
    found = compare_data(pair.service, pair.before, pair.after)

    assert (found.changes, found.outcome) == ([], "same")
    assert sum(times for _, times in found.ignored) > 0
    assert compare_data(pair.service, pair.after, pair.before).outcome == "same"


@pytest.mark.parametrize("pair", REAL, ids=lambda pair: pair.says)
def test_a_real_change_is_found_and_nothing_else_is(pair: Pair) -> None:
    found = compare_data(pair.service, pair.before, pair.after)

    assert [(change.kind, change.path) for change in found.changes] == list(pair.changes)
    assert found.outcome == "changed"
    assert compare_data(pair.service, pair.after, pair.before).outcome == "changed"


# --- Silence ----------------------------------------------------------------------------------------------------------


def result(service: Service, data: Document | None = None, *, status: str = "Succeeded") -> Document:
    """An entry of a job's `results`."""
    return {"serviceType": service, "status": status, "success": status == "Succeeded", "data": data}


ANSWER = result(RDAP, GTLD)
SILENT = (
    ("failed", result(RDAP, status="Failed"), "failed"),
    ("timed out", result(RDAP, status="TimedOut"), "timed_out"),
    ("skipped", result(RDAP, status="Skipped"), "skipped"),
    ("still under way", result(RDAP, status="Pending"), "pending"),
    ("put off", result(RDAP, status="Deferred"), "deferred"),
    ("erased, missing or damaged", result(RDAP), "result_gone"),
    ("never asked", None, "not_asked"),
)


@pytest.mark.parametrize(("silent", "code"), [pair[1:] for pair in SILENT], ids=[pair[0] for pair in SILENT])
def test_a_lookup_without_an_answer_is_unknown_and_nothing_was_removed(silent: Document | None, code: str) -> None:
    for before, after, why in ((ANSWER, silent, (None, code)), (silent, ANSWER, (code, None)), (silent, silent, (code, code))):
        found = compare_results(RDAP, before, after)

        assert (found.outcome, found.changes, found.why) == ("unknown", (), why)


@pytest.mark.parametrize(
    ("service", "before", "after"),
    [
        (GEOIP, geoip(), country_only()),
        (GEOIP, geoip(), country_only("DE")),
        (GEOIP, geoip(), geoip(ip="2001:db8::7")),
        (PING, ping(25.0), ping(95.0, ttl=None, method="tcp")),
        (PING, ping(25.0), ping(95.0, address="2001:db8::7")),
    ],
    ids=["only a country", "another country", "located by IPv6", "TCP handshakes", "pinged by IPv6"],
)
def test_answers_of_two_sources_cannot_be_held_against_each_other(service: Service, before: Document, after: Document) -> None:
    found = compare_data(service, before, after)

    assert (found.outcome, found.changes, found.why) == ("unknown", (), ("other_source", "other_source"))
    assert found.measured_by is not None
    assert found.measured_by[0] != found.measured_by[1]


def test_what_strangers_made_too_deep_or_too_tangled_is_unknown() -> None:
    deep: Any = "end"
    for _ in range(diff.DEPTH_MAX):
        deep = [deep]

    def alike(first: int) -> Document:
        """Every item is a little like every other, on each level."""
        items: Any = [{"handle": "x", "at": number} for number in range(first, first + 30)]
        for level in range(3):
            items = [{"handle": "x", "entities": items, "at": f"{first}-{level}-{number}"} for number in range(30)]
        return GTLD | {"raw": {"entities": items}}

    for before, after in ((GTLD | {"deep": deep}, GTLD), (alike(0), alike(1_000))):
        found = compare_data(RDAP, before, after)
        assert (found.outcome, found.why) == ("unknown", ("too_large", "too_large"))


def test_a_job_has_changed_if_any_service_has_and_is_the_same_only_if_all_are() -> None:
    same, changed = result(PING, ping(25.0)), result(PING, ping(95.0))
    silent = result(RDAP, status="Failed")

    def compared(before: list[Document], after: list[Document]) -> tuple[str, list[str]]:
        found = compare_jobs({"results": before}, {"results": after})
        return outcome_of(found), [f"{part.service} {part.outcome}" for part in found]

    assert compared([ANSWER, same], [same, ANSWER]) == ("same", ["Ping same", "RDAP same"])
    assert compared([silent, same], [changed, ANSWER]) == ("changed", ["Ping changed", "RDAP unknown"])
    assert compared([silent, same], [same, ANSWER]) == ("unknown", ["Ping same", "RDAP unknown"])
    assert compared([], []) == ("unknown", [])
    skipped = result(REVERSE_DNS, status="Skipped")
    assert compared([same, skipped], [same, skipped]) == ("same", ["Ping same", "ReverseDNS unknown"])
    assert compared([same], [same, skipped]) == ("same", ["Ping same", "ReverseDNS unknown"])
    assert compared([same, skipped], [same, result(REVERSE_DNS, reverse_dns())])[0] == "unknown"
    assert compared([skipped], [skipped]) == ("unknown", ["ReverseDNS unknown"])


def test_changes_beyond_the_bound_are_counted() -> None:
    after = GTLD | {"extension": {str(number): number for number in range(diff.CHANGES_MAX + 5)}}

    found = compare_data(RDAP, GTLD, after)

    assert (len(found.changes), found.unlisted) == (diff.CHANGES_MAX, 5)
    assert found.as_json()["unlistedChanges"] == 5


def test_many_items_of_one_name_are_found_again_in_any_order() -> None:
    """More than are tried against each other one by one."""
    lines = [{"title": "remarks", "description": [f"Line {number}"]} for number in range(2 * diff.LIKENESS_MAX)]
    before, after = rdap_result(network() | {"remarks": lines}), rdap_result(network() | {"remarks": lines[::-1]})

    assert compare_data(RDAP, before, after).outcome == "same"
    reworded = rdap_result(network() | {"remarks": [{"title": "remarks", "description": ["New"]}, *lines[:0:-1]]})
    assert [(change.before, change.after) for change in compare_data(RDAP, before, reworded).changes] == [("Line 0", "New")]


def test_a_pointer_escapes_what_a_pointer_is_made_of() -> None:
    found = compare_data(RDAP, GTLD, GTLD | {"a/b~c": 1})

    assert [change.path for change in found.changes] == ["/a~1b~0c"]


def test_a_change_says_which_item_it_is_of_and_from_which_band_to_which() -> None:
    renewed = rdap_result(edited(gtld_domain(), events__1__eventDate="2029-09-14T04:00:00Z"))

    assert [change.note for change in compare_data(RDAP, GTLD, renewed).changes] == ["expiration"]
    assert {change.note for change in compare_data(PING, ping(18.0), ping(95.0)).changes} == {"near to continental"}


# --- Any documents ----------------------------------------------------------------------------------------------------

RAW = {"gtld": gtld_domain, "cctld": cctld_domain, "network": network}


def _noisy(raw: Document, order: random.Random) -> Document:
    """The same registration as another server, on another day, might tell it."""
    told: Document = _shuffled(raw, order)
    told["notices"] = [{"title": "Rate limit", "description": [f"{order.randrange(100)} questions left."]}]
    told["port43"] = order.choice(["whois.a.test", None])
    told["rdapConformance"] = order.choice([["rdap_level_0"], []])
    told["events"] += [
        {"eventAction": "last update of RDAP database", "eventDate": f"2026-03-{order.randint(10, 28)}T00:00:00Z"}
    ]
    if "ldhName" in told:
        told["ldhName"] = order.choice([str.upper, str.lower])(told["ldhName"])
    for server in told.get("nameservers", []):
        server["ldhName"] = order.choice([str.upper, str.lower])(server["ldhName"])
    for entity in told["entities"]:
        entity["links"] = []
        order.shuffle(properties := entity.get("vcardArray", ["vcard", []])[1])
        assert isinstance(properties, list)
    return told


def _planted(document: Document, order: random.Random) -> list[tuple[str, Any, Any]]:
    """Some real changes made to the document in place, each as (kind, from, to)."""
    changes: list[tuple[str, Any, Any]] = []
    event = next(event for event in document["events"] if event["eventAction"] == "registration")
    if order.random() < 0.5:
        changes.append(("changed", event["eventDate"], "1980-01-01T00:00:00Z"))
        event["eventDate"] = "1980-01-01T00:00:00Z"
    if order.random() < 0.5:
        gone = document["status"].pop(order.randrange(len(document["status"])))
        changes.append(("removed", gone, None))
    if order.random() < 0.5:
        who = {"objectClassName": "entity", "handle": "PLANT-1", "roles": ["noc"]}
        document["entities"].insert(order.randrange(len(document["entities"]) + 1), who)
        changes.append(("added", None, who))
    if order.random() < 0.5 and "nameservers" in document:
        server = {"objectClassName": "nameserver", "ldhName": "ns99.planted.test"}
        document["nameservers"].insert(0, server)
        changes.append(("added", None, server["ldhName"]))
    if order.random() < 0.5 and document["objectClassName"] == "ip network":
        changes.append(("changed", document["country"], "FR"))
        document["country"] = "FR"
    contact = next((entity for entity in document["entities"] if "technical" in entity["roles"]), None)
    if order.random() < 0.5 and contact is not None:
        name = next(part for part in contact["vcardArray"][1] if part[0] == "fn")
        changes.append(("changed", name[3], "Somebody Else"))
        name[3] = "Somebody Else"
    return changes


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(RAW)), st.integers(0, 2**32))
def test_no_order_and_no_noise_is_ever_a_change(kind: str, seed: int) -> None:
    order = random.Random(seed)

    found = compare_data(RDAP, rdap_result(RAW[kind]()), rdap_result(_noisy(RAW[kind](), order)))

    assert found.changes == []


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(RAW)), st.integers(0, 2**32))
def test_every_planted_change_is_found_among_the_noise_and_nothing_else_is(kind: str, seed: int) -> None:
    order = random.Random(seed)
    after = _noisy(RAW[kind](), order)
    planted = _planted(after, order)

    found = compare_data(RDAP, rdap_result(RAW[kind]()), rdap_result(after))

    told = [(change.kind, change.before, change.after) for change in found.changes]
    assert sorted(map(repr, told)) == sorted(map(repr, planted))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(-9, 9)
    | st.text(max_size=3)
    | st.sampled_from(["redacted", "NS1."]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["handle", "ldhName", "roles", "entities", "events", "eventAction", "vcardArray", "type", "a/b"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(JSON, JSON, st.sampled_from(list(Service)), st.integers(0, 2**32))
def test_whatever_strangers_write_is_compared_without_a_fault(before: Any, after: Any, service: Service, seed: int) -> None:
    fields = ["raw", "names", "aliases", "addresses", "results", "events", "status", "ip", "address", "lat", "x"]

    def holding(value: Any) -> Document:
        return {"raw": {"entities": [value], "nameservers": value}} | dict.fromkeys(fields[1:], value)

    compare_data(service, holding(before), holding(after)).as_json()
    assert compare_data(service, holding(before), holding(before)).outcome == "same"
    shuffled = _shuffled(before, random.Random(seed))
    assert compare_data(RDAP, {"x": before}, {"x": shuffled}).changes == []
