"""What changed between two answers about one target, by the rules of `read_side/diff_rules.py`. Pure.

What the rules set aside is counted, rule by rule. Where one side has no answer nothing is known, and nothing was removed.
"""

import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import zip_longest
from typing import Any

from events.facts import Service
from read_side.diff_rules import (
    ANY_ORDER,
    EMPTY,
    REDACTED,
    RULES,
    SPACING,
    Bands,
    BothKnown,
    How,
    Ignored,
    InOrder,
    Json,
    Rule,
    Same,
    Told,
    Unordered,
    Within,
    canonical,
    family,
    plain,
)

CHANGES_MAX = 200
"""So many changes of a service are listed; the others are only counted."""

DEPTH_MAX = 64
STEPS_MAX = 100_000
"""Documents that are deeper, or take more steps (about a second's), are not compared: strangers wrote them."""

LIKENESS_MAX = 32
"""Items of one key that are tried against each other; more of them are paired in the order of their text."""

Data = Mapping[str, Json]


# --- What comes of it -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """`path` is a JSON pointer (RFC 6901) into the later data; of something removed, into the earlier.

    `note` says what a pointer cannot: the bands of two numbers, or which item of a list it is.
    """

    path: str
    kind: str
    before: Json
    after: Json
    note: str | None = None

    def as_json(self) -> dict[str, Json]:
        return {"path": self.path, "kind": self.kind, "from": self.before, "to": self.after, "note": self.note}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One service's part. `why` (from, to) is for unknown ones: a stable code for each side that has no answer, or None.

    `measured_by` (from, to) names two sources whose answers cannot be held against each other.
    `ignored` has (rule, how often it set a difference aside); `unlisted` counts changes beyond `CHANGES_MAX`.
    """

    service: Service
    outcome: str
    changes: Sequence[Change] = ()
    unlisted: int = 0
    ignored: Sequence[tuple[Rule, int]] = ()
    why: tuple[str | None, str | None] | None = None
    measured_by: tuple[str, str] | None = None

    def as_json(self) -> dict[str, Json]:
        return {
            "service": self.service,
            "outcome": self.outcome,
            "changes": [change.as_json() for change in self.changes],
            "unlistedChanges": self.unlisted,
            "unknown": _from_to(self.why),
            "measuredBy": _from_to(self.measured_by),
            "ignored": sum(times for _, times in self.ignored),
            "ignoredBy": [{"rule": rule.path, "why": rule.why, "count": times} for rule, times in self.ignored],
        }


def _from_to(pair: tuple[Json, Json] | None) -> dict[str, Json] | None:
    return None if pair is None else {"from": pair[0], "to": pair[1]}


SAME, CHANGED, UNKNOWN = "same", "changed", "unknown"
NOT_ASKED = "not_asked"
RESULT_GONE = "result_gone"
OTHER_SOURCE = "other_source"
TOO_LARGE = "too_large"
NEVER_ASKED = frozenset({"skipped", NOT_ASKED})


def new_steps() -> Counter[str]:
    """How many steps are left, at first. Those who share it share the bound."""
    return Counter(left=STEPS_MAX)


def compare_jobs(before: Data, after: Data, steps: Counter[str] | None = None) -> list[Comparison]:
    """Two jobs' documents (as a poller gets them, `data` parsed), service by service, in the public order."""
    earlier, later, steps = _results(before), _results(after), new_steps() if steps is None else steps
    return [
        compare_results(service, earlier.get(service), later.get(service), steps)
        for service in Service
        if service in earlier or service in later
    ]


def outcome_of(comparisons: Sequence[Comparison]) -> str:
    """Of the whole: changed if anything did; else unknown if anything is; else same.

    A service that neither job had to ask (reverse DNS of a domain) leaves nothing open.
    """
    outcomes = {comparison.outcome for comparison in comparisons if not NEVER_ASKED.issuperset(comparison.why or (None,))}
    if CHANGED in outcomes:
        return CHANGED
    return UNKNOWN if UNKNOWN in outcomes or not outcomes else SAME


def compare_results(service: Service, before: Data | None, after: Data | None, steps: Counter[str] | None = None) -> Comparison:
    """One entry of `results` against another. Without an answer on both sides nothing is known, and nothing was removed."""
    why = (_no_answer(before), _no_answer(after))
    if before is None or after is None or any(why):
        return Comparison(service, UNKNOWN, why=why)
    return compare_data(service, before["data"], after["data"], steps)


def compare_data(service: Service, before: Data, after: Data, steps: Counter[str] | None = None) -> Comparison:
    try:
        return _compared(service, before, after, new_steps() if steps is None else steps)
    except _TooLarge:
        return Comparison(service, UNKNOWN, why=(TOO_LARGE, TOO_LARGE))


def _compared(service: Service, before: Data, after: Data, steps: Counter[str]) -> Comparison:
    if _is_too_deep(before) or _is_too_deep(after):
        raise _TooLarge
    sources = _source(service, before), _source(service, after)
    if sources[0] != sources[1]:
        return _across_sources(_Walk(service, before, after, steps), sources)
    walk = _Walk(service, _prepared(service, before), _prepared(service, after), steps)
    walk.pair((), (), walk.before, walk.after)
    return walk.comparison()


def _across_sources(walk: "_Walk", sources: tuple[str, str]) -> Comparison:
    """Only the address that was asked about can be held against another source's: what is not another is unknown, not same."""
    asked = ASKED_ABOUT[walk.service]
    before, after = walk.before.get(asked), walk.after.get(asked)
    if family(before) == family(after):
        walk.pair((asked,), (asked,), before, after)
    if walk.changes:
        return walk.comparison(sources)
    return Comparison(walk.service, UNKNOWN, why=(OTHER_SOURCE, OTHER_SOURCE), measured_by=sources)


SOURCES = {Service.GEOIP: "source", Service.PING: "method"}
ASKED_ABOUT = {Service.GEOIP: "ip", Service.PING: "address"}
"""A domain's first address. If it is of the other family, the first family's name servers may just not have answered."""


def _source(service: Service, data: Data) -> str:
    """What answers have to have in common to be held against each other: the source, and the family of the address."""
    if service not in SOURCES:
        return ""
    ip_version = family(data.get(ASKED_ABOUT[service]))
    return f"{plain(data.get(SOURCES[service]))}, IPv{ip_version}" if ip_version else plain(data.get(SOURCES[service]))


def _no_answer(result: Data | None) -> str | None:
    """Why there is nothing to compare, as a stable code; None when there is."""
    if result is None:
        return NOT_ASKED
    if result.get("status") != "Succeeded":
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", plain(result.get("status"))).lower()
    return None if isinstance(result.get("data"), dict) else RESULT_GONE


def _results(job: Data) -> dict[Json, Data]:
    return {result["serviceType"]: result for result in job["results"]}


def _prepared(service: Service, data: Data) -> Data:
    """ReverseDNS: all names as one list. Which of them is the `hostName` is only a matter of the alphabet."""
    if service is not Service.REVERSE_DNS:
        return data
    first = data.get("hostName")
    others = data.get("aliases")
    names = [*([first] if first else []), *(others if isinstance(others, list) else [])]
    return {key: value for key, value in data.items() if key not in {"hostName", "aliases"}} | {"names": names}


def _pointer(service: Service, path: Sequence[str]) -> str:
    if service is Service.REVERSE_DNS and path[0] == "names":
        path = ["hostName"] if path[1] == "0" else ["aliases", str(int(path[1]) - 1)]
    return _pointer_of(path)


def _pointer_of(path: Sequence[str]) -> str:
    """RFC 6901."""
    return "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in path)


# --- The walk ---------------------------------------------------------------------------------------------------------

Path = tuple[str, ...]


class _TooLarge(Exception):  # noqa: N818 - a state, in our words
    pass


@dataclass
class _Walk:
    """Goes through two documents together. `path` says where we are, `shape` the same with `*` for each item of a list.

    `steps` has one item, how many are left: those of trials on the way count as well.
    """

    service: Service
    before: Data
    after: Data
    steps: Counter[str]
    changes: list[Change] = field(default_factory=list)
    ignored: Counter[Rule] = field(default_factory=Counter)

    def comparison(self, sources: tuple[str, str] | None = None) -> Comparison:
        ignored = sorted(self.ignored.items(), key=lambda item: item[0].path)
        listed, unlisted = self.changes[:CHANGES_MAX], max(0, len(self.changes) - CHANGES_MAX)
        return Comparison(self.service, CHANGED if listed else SAME, listed, unlisted, ignored, measured_by=sources)

    def pair(self, path: Path, shape: Path, before: Json, after: Json, note: str | None = None) -> None:
        self._step()
        if before == after and type(before) is type(after):
            return
        rule = _rule_of(self.service, shape)
        if (reason := self._set_aside_by(rule, before, after)) is not None:
            self.ignored[reason] += 1
        elif _are(dict, before, after):
            self._objects(
                path, shape, before if isinstance(before, dict) else {}, after if isinstance(after, dict) else {}, note
            )
        elif _are(list, before, after):
            self._lists(
                path, shape, rule, before if isinstance(before, list) else [], after if isinstance(after, list) else [], note
            )
        elif _is_nothing(before) or _is_nothing(after):
            self._report(path, before, after, note)
        elif (told := _difference(rule, before, after)) is None:
            self.ignored[rule or SPACING] += 1
        else:
            self._report(path, before, after, told or note)

    def _step(self) -> None:
        self.steps["left"] -= 1
        if self.steps["left"] < 0:
            raise _TooLarge

    def _set_aside_by(self, rule: Rule | None, before: Json, after: Json) -> Rule | None:
        """The rule by which these need not be compared at all."""
        if rule is not None and self._says_nothing(rule.how):
            return rule
        nothing = _is_nothing(before), _is_nothing(after)
        if all(nothing):
            return EMPTY
        if rule is not None and isinstance(rule.how, Bands | BothKnown) and any(nothing):
            return rule
        return REDACTED if _is_redacted(before) or _is_redacted(after) else None

    def _says_nothing(self, how: How) -> bool:
        if isinstance(how, Told):
            return not (_is_nothing(_at(self.before, how.by)) or _is_nothing(_at(self.after, how.by)))
        return isinstance(how, Ignored)

    def _objects(self, path: Path, shape: Path, before: Data, after: Data, note: str | None) -> None:
        for key in [*after, *(key for key in before if key not in after)]:
            self.pair((*path, key), (*shape, key), before.get(key), after.get(key), note)

    def _lists(
        self, path: Path, shape: Path, rule: Rule | None, before: list[Json], after: list[Json], note: str | None
    ) -> None:
        if rule is not None and isinstance(rule.how, InOrder):
            self._in_order(path, shape, rule, before, after, note)
            return
        if rule is None or not isinstance(rule.how, Unordered):
            rule = ANY_ORDER
        found = len(self.changes), self.ignored.total()
        self._unordered(path, shape, rule, before, after)
        if found == (len(self.changes), self.ignored.total()):
            self.ignored[rule] += 1  # They are not equal, and nothing was found: it is their order.

    def _in_order(self, path: Path, shape: Path, rule: Rule, before: list[Json], after: list[Json], note: str | None) -> None:
        """Places of a list of fixed meaning are steps of their own in a rule's path."""
        whole = isinstance(rule.how, InOrder) and rule.how.same_length
        for at, (old, new) in enumerate(zip_longest(before, after) if whole else zip(before, after, strict=False)):
            self.pair((*path, str(at)), (*shape, str(at) if whole else "*"), old, new, note)
        if not whole and len(before) != len(after):
            self.ignored[rule] += 1

    def _unordered(self, path: Path, shape: Path, rule: Rule, before: list[Json], after: list[Json]) -> None:
        how = rule.how
        assert isinstance(how, Unordered)
        old, new = _by_key(how, before), _by_key(how, after)
        if canonical([*filter(how.apart_from, before)]) != canonical([*filter(how.apart_from, after)]):
            self.ignored[rule] += 1
        kinds = set(map(how.kinds, before)) & set(map(how.kinds, after)) if how.kinds else set()
        for key in [*new, *(key for key in old if key not in new)]:
            for (old_at, earlier), (new_at, later) in self._matched(shape, old.get(key, []), new.get(key, [])):
                place, only = (*path, str(old_at if later is None else new_at)), later if earlier is None else earlier
                if earlier is not None and later is not None:
                    self._items(place, shape, rule, earlier, later, _named(key))
                elif how.told or _is_redacted(only) or (how.kinds is not None and how.kinds(only) not in kinds):
                    self.ignored[rule] += 1
                else:
                    self._report(place, earlier, later, _named(key))

    def _items(self, path: Path, shape: Path, rule: Rule, before: Json, after: Json, note: str | None) -> None:
        """Two items of one key. Of plain ones the key is all that there is to say."""
        self._step()
        if isinstance(before, dict | list) or isinstance(after, dict | list):
            self.pair(path, (*shape, "*"), before, after, note)
        elif before != after:
            self.ignored[rule] += 1

    def _matched(self, shape: Path, old: "_Items", new: "_Items") -> Iterator[tuple["_Item", "_Item"]]:
        """Pairs of items of one key: the equal ones, then those between which the rules see no change, then what is left."""
        old, new = _without_equals(old, new)
        if max(len(old), len(new)) <= LIKENESS_MAX and len(old) + len(new) > 2:  # noqa: PLR2004 - one on each side is a pair
            for earlier in list(old):
                like = next((later for later in new if self._are_alike(shape, earlier[1], later[1])), None)
                if like is not None:
                    old.remove(earlier)
                    new.remove(like)
                    yield earlier, like
        nobody: _Item = (-1, None)
        yield from zip_longest(old, new, fillvalue=nobody)

    def _are_alike(self, shape: Path, before: Json, after: Json) -> bool:
        trial = _Walk(self.service, self.before, self.after, self.steps)
        trial.pair((), (*shape, "*"), before, after)
        return not trial.changes

    def _report(self, path: Path, before: Json, after: Json, note: str | None) -> None:
        kind = "added" if _is_nothing(before) else "removed" if _is_nothing(after) else "changed"
        self.changes.append(Change(_pointer(self.service, path), kind, before, after, note))


_Item = tuple[int, Json]
_Items = list[_Item]


def _by_key(how: Unordered, items: Sequence[Json]) -> dict[Hashable, _Items]:
    groups: dict[Hashable, _Items] = {}
    for at, item in enumerate(items):
        if not (how.apart_from(item) or _is_nothing(item)):
            groups.setdefault(how.key(item), []).append((at, item))
    return groups


def _without_equals(old: _Items, new: _Items) -> tuple[_Items, _Items]:
    """Both in the order of their text, without the items that both have."""
    if len(old) == len(new) == 1:
        return list(old), list(new)
    counts = Counter(canonical(item) for _, item in old) & Counter(canonical(item) for _, item in new)
    return _less(old, counts.copy()), _less(new, counts)


def _less(items: _Items, gone: Counter[bytes]) -> _Items:
    left = []
    for at, item in items:
        text = canonical(item)
        if gone[text] > 0:
            gone[text] -= 1
        else:
            left.append((text, at, item))
    return [(at, item) for text, at, item in sorted(left, key=lambda entry: entry[:2])]


def _difference(rule: Rule | None, before: Json, after: Json) -> str | None:
    """None when the rule makes the same of both; else what there is to say about the difference, perhaps nothing."""
    how = rule.how if rule else SPACING.how
    if _is_number(before) and _is_number(after):
        if isinstance(how, Within):
            return None if _distance(before, after, how) <= how.tolerance else ""
        if isinstance(how, Bands):
            return _between_bands(before, after, how)
        return None if before == after else ""
    if isinstance(before, str) and isinstance(after, str):
        reading = how.reading if isinstance(how, Same) else plain
        return None if reading(before) == reading(after) else ""
    return ""


def _distance(before: float, after: float, how: Within) -> float:
    apart = round(abs(before - after), 9)
    return apart if how.around is None else min(apart, how.around - apart)


def _between_bands(before: float, after: float, how: Bands) -> str | None:
    bands = _band(before, how), _band(after, how)
    apart = abs(before - after)
    if bands[0] == bands[1] or apart < how.apart or apart < how.share * max(before, after):
        return None
    return f"{bands[0]} to {bands[1]}"


def _band(value: float, how: Bands) -> str:
    return how.names[sum(value > end for end in how.ends)]


@lru_cache(maxsize=4_096)
def _rule_of(service: Service, shape: Path) -> Rule | None:
    """The first rule that fits."""
    pointer = _pointer_of(shape)
    return next((rule for rule in RULES[service] if _pattern(rule.path).fullmatch(pointer)), None)


@lru_cache(maxsize=512)
def _pattern(path: str) -> re.Pattern[str]:
    steps = {"**": "(?:/.+)?", "*": "/[^/]+"}
    return re.compile("".join(steps.get(step, "/" + re.escape(step)) for step in path.split("/")[1:]), re.DOTALL)


def _at(data: Data, pointer: str) -> Json:
    value: Json = data
    for step in pointer.split("/")[1:]:
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _named(key: Hashable) -> str | None:
    """What a list's item is called, where that is short enough to help."""
    text = key if isinstance(key, str) else " ".join(map(str, key)) if isinstance(key, tuple) else ""
    return text if 0 < len(text) <= 80 else None  # noqa: PLR2004 - a line


def _is_nothing(value: Json) -> bool:
    """Also a list or object that holds nothing but nothings, as a jCard's empty address does."""
    if isinstance(value, list):
        return all(map(_is_nothing, value))
    if isinstance(value, dict):
        return all(map(_is_nothing, value.values()))
    return value is None or (isinstance(value, str) and not value.strip())


def _is_redacted(value: Json) -> bool:
    return isinstance(value, str) and "redacted" in value.casefold()


def _are(kind: type[dict[Any, Any]] | type[list[Any]], before: Json, after: Json) -> bool:
    """Whether both are of this kind, or one is and the other is nothing."""
    if isinstance(before, kind):
        return isinstance(after, kind) or _is_nothing(after)
    return isinstance(after, kind) and _is_nothing(before)


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_too_deep(document: Json) -> bool:
    """Walked level by level, since what is too deep for us would be too deep for a walk of ours, too."""
    level = [document]
    for _ in range(DEPTH_MAX):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return False
    return True


def _inside(value: Json) -> Sequence[Json]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else ()
