"""How clients name the services that they want, and which service has something to say about which target."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domain.services import SERVICES, InvalidServices, parse_services, rule_of
from events.facts import Service, TargetType

ALL = (Service.GEOIP, Service.PING, Service.RDAP, Service.REVERSE_DNS)
NOT_A_LIST = "Services must be a list/array of ServiceType"
EMPTY = "At least one service must be specified if services is provided"
TOO_MANY = "Maximum 10 services can be requested at once"
DUPLICATE = "Duplicate services are not allowed"
UNKNOWN = "Invalid service type specified"


def refusal(value: object) -> str:
    with pytest.raises(InvalidServices) as caught:
        parse_services(value)
    assert str(caught.value) == caught.value.message
    return caught.value.message


def test_the_table_is_the_public_one() -> None:
    assert [(rule.service.value, rule.value, rule.description) for rule in SERVICES] == [
        ("GeoIP", 0, "Geographic location and ISP information"),
        ("Ping", 1, "Network reachability and latency check"),
        ("RDAP", 2, "Registration data via RDAP protocol"),
        ("ReverseDNS", 3, "Reverse DNS lookup (PTR record)"),
    ]
    assert tuple(rule.service for rule in SERVICES) == tuple(Service)


def test_only_ping_sends_packets_to_the_target() -> None:
    assert [rule.service for rule in SERVICES if rule.probes] == [Service.PING]


def test_only_reverse_dns_turns_a_domain_away() -> None:
    refusals = {service: rule_of(service).refusal_of(TargetType.DOMAIN) for service in Service}

    assert refusals.pop(Service.REVERSE_DNS) == "Reverse DNS lookup requires an IP address target."
    assert set(refusals.values()) == {None}


def test_every_service_takes_an_address() -> None:
    assert [rule_of(service).refusal_of(TargetType.IP_ADDRESS) for service in Service] == [None] * 4


def test_every_refusal_has_its_words() -> None:
    assert all(rule.refusal for rule in SERVICES if rule.accepts != frozenset(TargetType))


def test_a_rule_is_found_by_its_service() -> None:
    assert [rule_of(service).service for service in Service] == list(Service)


@pytest.mark.parametrize(
    ("value", "services"),
    [
        (None, ALL),
        ([0], (Service.GEOIP,)),
        ([3, 1], (Service.REVERSE_DNS, Service.PING)),
        (["2", "0"], (Service.RDAP, Service.GEOIP)),
        (["reversedns", "PING", "GeoIp"], (Service.REVERSE_DNS, Service.PING, Service.GEOIP)),
        ([2, "1", "geoip"], (Service.RDAP, Service.PING, Service.GEOIP)),
        (list(Service), ALL),
        ((1, 2), (Service.PING, Service.RDAP)),
    ],
)
def test_services_come_back_in_the_requested_order(value: object, services: tuple[Service, ...]) -> None:
    assert parse_services(value) == services


@pytest.mark.parametrize("value", ["GeoIP", 0, 1.5, True, False, {}, {"0": 1}, {0}, b"0", object()])
def test_what_is_no_list_is_refused_first(value: object) -> None:
    assert refusal(value) == NOT_A_LIST


def test_an_empty_list_is_not_all_services() -> None:
    assert refusal([]) == EMPTY


def test_over_ten_is_said_before_duplicates_and_unknowns() -> None:
    assert refusal([0] * 11) == TOO_MANY
    assert refusal(["nonsense"] * 11) == TOO_MANY
    assert refusal([0] * 10) == DUPLICATE


@pytest.mark.parametrize(
    "value",
    [
        [0, 0],
        [0, "0"],
        [0, "GeoIP"],
        ["geoip", "GEOIP"],
        ["x", "x"],
        ["x", "X"],
        [9, 9],
        [1.5, 1.5],
        [True, True],
        [{}, 0, "0"],
        ["nonsense", 1, "ping"],
    ],
)
def test_duplicates_are_said_before_unknowns(value: object) -> None:
    assert refusal(value) == DUPLICATE


@pytest.mark.parametrize(
    "entry",
    [
        *(4, -1, 10**5_000, "4", "-1", "9" * 5_000, "00", "0.0", " 0", ""),
        *(0.0, 1.0, float("nan"), float("inf"), True, False, None, b"0"),
        *("²", "٠", "０", "GeoIP ", "WHOIS", "ReverſeDNS", "\ud800", "\x00"),  # noqa: RUF001 - look-alikes are the point
        *([], [0], {}, {"a": 1}, object()),
    ],
    ids=lambda entry: type(entry).__name__,
)
def test_anything_else_is_unknown(entry: object) -> None:
    assert refusal([entry]) == UNKNOWN
    assert refusal([3, entry]) == UNKNOWN


def test_true_is_not_the_number_one() -> None:
    assert refusal([True, 1]) == UNKNOWN


def test_what_cannot_be_compared_is_unknown_and_no_duplicate() -> None:
    assert refusal([[], []]) == UNKNOWN
    assert refusal([{}, {}]) == UNKNOWN
    assert refusal([None, None]) == UNKNOWN


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 5)
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["geoip", "PING", "3"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=8,
)


@given(value=JSON)
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # The machine may be busy.
def test_no_json_makes_anything_but_services_or_a_refusal(value: object) -> None:
    answer = services_or_refusal(value)

    if isinstance(answer, InvalidServices):
        assert answer.message in {NOT_A_LIST, EMPTY, TOO_MANY, DUPLICATE, UNKNOWN}
    else:
        assert 0 < len(answer) == len(set(answer))


def services_or_refusal(value: object) -> tuple[Service, ...] | InvalidServices:
    try:
        return parse_services(value)
    except InvalidServices as refused:
        return refused
