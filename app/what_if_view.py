"""What `lookup what-if --view MODULE:VIEW` does: another version of a projection over the whole log, beside today's.

Both are folded into a scratch in memory, which holds a digest of each document. Nothing else is touched, and nothing stays.
"""

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from events.facts import ResultReference
from events.record import read
from events.store import HistoryReader
from projections.folding import Folder
from projections.job_views import Terms, View
from projections.memory import MemoryGeneration
from projections.table import PROJECTIONS
from projections.writes import Put, Write
from results.documents import ResultDocuments

PAGE = 1_000
NOW, THEN = "now", "then"


class NoSuchView(ValueError):  # noqa: N818 - what the input is, in our words
    """What was typed names no view."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How the keys of a view would differ: so many in both, and the names of those that only one has or has otherwise."""

    view: str
    facts: int
    same: int
    changed: Sequence[str]
    added: Sequence[str]
    gone: Sequence[str]

    def as_json(self, samples_max: int) -> dict[str, Any]:
        told: dict[str, Any] = {"view": self.view, "facts": self.facts, "same": self.same}
        for name, keys in (("changed", self.changed), ("added", self.added), ("gone", self.gone)):
            told |= {name: len(keys), f"{name}_keys": list(keys[:samples_max])}
        return told


def view_named(text: str, views: Sequence[View] = PROJECTIONS) -> tuple[View, View]:
    """`projections.job_status:VIEW` -> today's view of that name, and this one. Raises `NoSuchView`."""
    module, _, attribute = text.partition(":")
    try:
        view = getattr(importlib.import_module(module), attribute or "VIEW")
    except (ImportError, AttributeError, ValueError) as error:
        raise NoSuchView(f"{text!r} cannot be loaded. A view is MODULE:NAME of a module that Python finds.") from error
    today = next((one for one in views if isinstance(view, View) and one.name == view.name), None)
    if today is None or not isinstance(view, View):
        names = ", ".join(one.name for one in views)
        raise NoSuchView(f"{text!r} is no other version of a view. These are {names}.")
    return today, view


async def compare(history: HistoryReader, documents: ResultDocuments, terms: Terms, today: View, other: View) -> Difference:
    """Fold the whole log by both. May raise `StoreUnavailable`, `ResultsUnavailable` or `UnknownFact`."""
    folder = Folder(history, [replace(today, name=NOW), replace(other, name=THEN)], terms)
    scratch = {name: MemoryGeneration(name, "", {}) for name in (NOW, THEN)}
    after = facts = 0

    async def found(references: Sequence[ResultReference]) -> Mapping[str, bytes]:
        return await documents.get(references)

    while page := await history.read_all(after, PAGE):
        recorded = [read(stored) for stored in page]
        await folder.prepare(recorded, found)
        for name, writes in folder.fold(recorded).writes.items():
            scratch[name].apply(name, list(_digested(writes)))
        after, facts = page[-1].position, facts + len(page)
    return _difference(today.name, facts, _keys(scratch[NOW], NOW), _keys(scratch[THEN], THEN))


def _digested(writes: Iterable[Write]) -> Iterator[Write]:
    for write in writes:
        yield write._replace(value=sha256(write.value).digest()) if isinstance(write, Put) else write


def _keys(scratch: MemoryGeneration, name: str) -> dict[str, Any]:
    """Everything that a view holds, by its keys."""
    held: dict[str, Any] = {key: value for (view, key), value in scratch.values.items() if view == name}
    for several in (scratch.sets, scratch.counts):
        held |= {key: dict(members) for (view, key), members in several.items() if view == name and members}
    return held


def _difference(view: str, facts: int, now: Mapping[str, Any], then: Mapping[str, Any]) -> Difference:
    changed = sorted(key for key in now.keys() & then.keys() if now[key] != then[key])
    same = len(now.keys() & then.keys()) - len(changed)
    return Difference(view, facts, same, changed, sorted(then.keys() - now.keys()), sorted(now.keys() - then.keys()))
