"""Every fact ever written: its name in the log, its current version, and how older versions become the current one.

A topic in the log or on the broker resolves to this table only, never by importing a name that somebody else wrote.
"""

from collections.abc import Callable, Mapping
from typing import Any

from events import facts
from events.facts import Fact

VERSIONS: Mapping[type[Fact], int] = {
    facts.JobSubmitted: 1,
    facts.TasksDispatched: 1,
    facts.TaskCompleted: 2,
    facts.ResultCorrected: 1,
    facts.TaskFailed: 2,
    facts.TaskTimedOut: 1,
    facts.TaskSkipped: 1,
    facts.TaskDeferred: 1,
    facts.JobCompleted: 1,
    facts.JobFailed: 1,
    facts.JobCancelled: 1,
    facts.IdempotencyKeyClaimed: 1,
    facts.DeadLetterRetried: 1,
    facts.DeadLetterDiscarded: 1,
    facts.LogRestored: 1,
    facts.CanarySent: 1,
    facts.JobsSealed: 1,
    facts.ErasureStarted: 1,
    facts.TargetErased: 1,
}

Upcaster = Callable[[dict[str, Any]], dict[str, Any]]


def _only_added_to(old: dict[str, Any]) -> dict[str, Any]:
    """The next version has more optional fields, and whoever wrote this one did not know what would be in them."""
    return old


UPCASTERS: Mapping[str, Upcaster] = {
    "lookup.TaskCompleted.v1": _only_added_to,
    "lookup.TaskFailed.v1": _only_added_to,
}
"""Old topic -> a function that turns its JSON object into the next version's. No line is ever taken out."""

TOPICS: Mapping[type[Fact], str] = {fact: f"lookup.{fact.__name__}.v{version}" for fact, version in VERSIONS.items()}
FACTS: Mapping[str, type[Fact]] = {topic: fact for fact, topic in TOPICS.items()}


def topics_of(*kinds: type[Fact]) -> tuple[str, ...]:
    """Every topic under which facts of these kinds may lie in the log, of older versions too. `TOPICS` has only the newest:
    it is for writing.
    """
    return tuple(f"lookup.{kind.__name__}.v{version}" for kind in kinds for version in range(1, VERSIONS[kind] + 1))


class UnknownFact(Exception):  # noqa: N818 - a finding about the log, in the domain's words
    """The log or the broker holds a fact that this program does not know: it is older than what wrote the fact."""


def fact_type(topic: str) -> type[Fact]:
    """The class of a topic, of a current or an older one; raises `UnknownFact`: a reader stops loudly rather than skip."""
    return FACTS[_current(topic)]


def upcast(topic: str, value: dict[str, Any]) -> dict[str, Any]:
    """The JSON object of a fact of any known version as the current version's, one step at a time."""
    while topic not in FACTS:
        value = UPCASTERS[topic](value)
        topic = _next_version(topic)
    return value


def _current(topic: str) -> str:
    step = topic
    while step not in FACTS:
        if step not in UPCASTERS:
            raise UnknownFact(f"This program does not know facts of the kind {topic!r}. Upgrade it before it reads on.")
        step = _next_version(step)
    return step


def _next_version(topic: str) -> str:
    name, _, version = topic.rpartition(".v")
    return f"{name}.v{int(version) + 1}"
