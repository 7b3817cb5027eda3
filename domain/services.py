"""The four services: what each answers, what it accepts, and how a client names it. The order is the public one."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from events.facts import Service, TargetType

_ENTRIES_MAX = 10
_ANY_TARGET = frozenset(TargetType)


@dataclass(frozen=True, slots=True)
class ServiceRule:
    """One service: `value` is its public number; `probes` says that it sends packets to the target itself.

    `refusal` is the public sentence for a target of a type that is not in `accepts` (empty when every type is).
    """

    service: Service
    value: int
    description: str
    accepts: frozenset[TargetType] = _ANY_TARGET
    probes: bool = False
    refusal: str = ""

    def refusal_of(self, target_type: TargetType) -> str | None:
        """Why this service has nothing to say about such a target; None when it applies."""
        return None if target_type in self.accepts else self.refusal


SERVICES = (
    ServiceRule(Service.GEOIP, 0, "Geographic location and ISP information"),
    ServiceRule(Service.PING, 1, "Network reachability and latency check", probes=True),
    ServiceRule(Service.RDAP, 2, "Registration data via RDAP protocol"),
    ServiceRule(
        Service.REVERSE_DNS,
        3,
        "Reverse DNS lookup (PTR record)",
        accepts=frozenset({TargetType.IP_ADDRESS}),
        refusal="Reverse DNS lookup requires an IP address target.",
    ),
)

_RULES = {rule.service: rule for rule in SERVICES}
_BY_NUMBER = {rule.value: rule.service for rule in SERVICES}
_BY_TEXT = {str(rule.value): rule.service for rule in SERVICES} | {rule.service.lower(): rule.service for rule in SERVICES}


@dataclass(eq=False)
class InvalidServices(ValueError):  # noqa: N818 - a refusal in the domain's words
    """The requested services cannot be served: `code` is stable, `message` is the public sentence."""

    code: str
    message: str

    def __str__(self) -> str:
        return self.message


def rule_of(service: Service) -> ServiceRule:
    return _RULES[service]


def parse_services(value: object) -> tuple[Service, ...]:
    """The services that a client asked for, in its order; all four for None. Raises `InvalidServices` and nothing else.

    An entry is a number, a digit string or a name in any case. The first failing check answers: type, empty, over 10,
    duplicates, unknown. Two equal unknown texts or numbers are duplicates; lists, objects and nulls are only unknown.
    """
    if value is None:
        return tuple(_RULES)
    if not isinstance(value, list | tuple):
        raise InvalidServices("services_not_a_list", "Services must be a list/array of ServiceType")
    if not value:
        raise InvalidServices("services_empty", "At least one service must be specified if services is provided")
    if len(value) > _ENTRIES_MAX:
        raise InvalidServices("services_too_many", f"Maximum {_ENTRIES_MAX} services can be requested at once")
    _refuse_duplicates(value)
    return tuple(_known(entry) for entry in value)


def _refuse_duplicates(entries: Sequence[object]) -> None:
    meanings = [meaning for meaning in map(_meaning, entries) if meaning is not None]
    if len(set(meanings)) < len(meanings):
        raise InvalidServices("services_duplicate", "Duplicate services are not allowed")


def _known(entry: object) -> Service:
    service = _service_of(entry)
    if service is None:
        raise InvalidServices("services_unknown", "Invalid service type specified")
    return service


def _meaning(entry: object) -> Hashable:
    """What makes two entries the same: the service, or else the text in lower case or the number; None for all the rest."""
    service = _service_of(entry)
    if service is not None:
        return service
    if isinstance(entry, str):
        return entry.lower()
    return entry if isinstance(entry, int | float) else None


def _service_of(entry: object) -> Service | None:
    # Looked up, never converted: int() reads the digits of every script, and refuses 5,000 of them.
    if isinstance(entry, str):
        return _BY_TEXT.get(entry.lower())
    if isinstance(entry, int) and not isinstance(entry, bool):
        return _BY_NUMBER.get(entry)
    return None
