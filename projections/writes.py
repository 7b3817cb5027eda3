"""What a view may do to the store: eight kinds of writes, and how those of one batch become fewer.

Keys are relative to the view: `""` for a view of one key, else any sub-key. A key holds one kind of thing: a value (`Put`), a
sorted set (`Rank` and its siblings) or counters (`Count`). Scores are whole numbers below 2**53.

`Expire` is by the log's own time: what it names goes when a fact is folded that was recorded at that time or later. A key
that expires has therefore to be trimmed by its own writes too (`UnrankBelow`): else it would depend on how the log is cut
whether it was gone before it was written again. `KeepLast` asks that the score of a member only ever rises.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Put(NamedTuple):
    """Set a value. It goes at that Unix second by the store's own clock (0 = never), so it must not be written afterwards."""

    key: str
    value: bytes
    expires_at_s: int = 0


class Remove(NamedTuple):
    """Take a key away, whatever it holds."""

    key: str


class Rank(NamedTuple):
    """Put a member into a sorted set, or move it within."""

    key: str
    member: str
    score: int


class Unrank(NamedTuple):
    """Take a member out of a sorted set."""

    key: str
    member: str


class UnrankBelow(NamedTuple):
    """Take out all members of a sorted set with this score or a lower one."""

    key: str
    score: int


class KeepLast(NamedTuple):
    """Keep the `n` members of a sorted set with the highest scores."""

    key: str
    n: int


class Count(NamedTuple):
    """Add to a counter: a field of a hash."""

    key: str
    field: str
    by: int


class Expire(NamedTuple):
    """Let a key go when the log's time has come to this Unix second; never earlier than was said before."""

    key: str
    at_s: int


Write = Put | Remove | Rank | Unrank | UnrankBelow | KeepLast | Count | Expire


@dataclass(slots=True)
class _Stage:
    """Changes of a sorted set that may be made in any order, and what is trimmed after them. A score of None: taken out."""

    scores: dict[str, int | None] = field(default_factory=dict)
    below: int | None = None
    keep: int | None = None

    @property
    def is_trimmed(self) -> bool:
        return self.below is not None or self.keep is not None

    def takes(self, later: "_Stage") -> bool:
        """Whether both stages at once come to the same as one after the other."""
        grows = self.below is None or (later.below is not None and later.below >= self.below)
        return grows and (self.keep is None or (self.keep == later.keep and None not in later.scores.values()))

    def take(self, later: "_Stage") -> None:
        self.scores |= later.scores
        self.below, self.keep = later.below, later.keep

    def writes(self, key: str) -> Iterator[Write]:
        # Each member is written once, so that their order does not matter; neighbours of one kind are made at once.
        yield from (Unrank(key, member) for member, score in self.scores.items() if score is None)
        yield from (Rank(key, member, score) for member, score in self.scores.items() if score is not None)
        if self.below is not None:
            yield UnrankBelow(key, self.below)
        if self.keep is not None:
            yield KeepLast(key, self.keep)


class Pending:
    """The writes of one view in one batch. `writes` gives as few as come to the same: the last value, the sum of counts."""

    def __init__(self) -> None:
        self._removed: dict[str, None] = {}
        self._values: dict[str, Put] = {}
        self._sets: dict[str, list[_Stage]] = {}
        self._counts: dict[str, dict[str, int]] = {}
        self._expiries: dict[str, int] = {}
        self._adding: Mapping[type[Any], Callable[[Any], None]] = {
            Put: self._put,
            Rank: self._rank,
            Unrank: self._unrank,
            Count: self._count,
            UnrankBelow: self._unrank_below,
            KeepLast: self._keep_last,
            Expire: self._expire,
            Remove: self._remove,
        }

    def add(self, writes: Iterable[Write]) -> None:
        for write in writes:
            self._adding[type(write)](write)

    def _put(self, write: Put) -> None:
        self._values[write.key] = write

    def _rank(self, write: Rank) -> None:
        key, member, score = write
        self._open_stage(key).scores[member] = score

    def _unrank(self, write: Unrank) -> None:
        key, member = write
        self._open_stage(key).scores[member] = None

    def _count(self, write: Count) -> None:
        key, name, by = write
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = {}
        counts[name] = counts.get(name, 0) + by

    def _unrank_below(self, write: UnrankBelow) -> None:
        key, score = write
        stage = self._last_stage(key)
        stage.below = score if stage.below is None else max(stage.below, score)

    def _keep_last(self, write: KeepLast) -> None:
        key, n = write
        stage = self._last_stage(key)
        stage.keep = n if stage.keep is None else min(stage.keep, n)

    def _expire(self, write: Expire) -> None:
        key, at_s = write
        if at_s > self._expiries.get(key, -1):
            self._expiries[key] = at_s

    def _remove(self, write: Remove) -> None:
        for pending in (self._values, self._sets, self._counts, self._expiries):
            pending.pop(write.key, None)
        self._removed[write.key] = None

    def writes(self) -> Iterator[Write]:
        """In the order in which they have to be made."""
        for key in self._removed:
            yield Remove(key)
        yield from self._values.values()
        for key, stages in self._sets.items():
            for stage in _merged(stages):
                yield from stage.writes(key)
        for key, counts in self._counts.items():
            for name, by in counts.items():
                yield Count(key, name, by)
        for key, at_s in self._expiries.items():
            yield Expire(key, at_s)

    def _last_stage(self, key: str) -> _Stage:
        return self._sets.setdefault(key, [_Stage()])[-1]

    def _open_stage(self, key: str) -> _Stage:
        """Where a change of a sorted set belongs now: before nothing that was trimmed already."""
        stages = self._sets.get(key)
        if stages is None:
            stages = self._sets[key] = [_Stage()]
        if stages[-1].is_trimmed:
            stages[-2:] = _merged(stages[-2:])
            stages.append(_Stage())
        return stages[-1]


def coalesce(writes: Iterable[Write]) -> list[Write]:
    """As few writes of one view as come to the same."""
    pending = Pending()
    pending.add(writes)
    return list(pending.writes())


def _merged(stages: list[_Stage]) -> list[_Stage]:
    merged = stages[:1]
    for stage in stages[1:]:
        if merged[-1].takes(stage):
            merged[-1].take(stage)
        else:
            merged.append(stage)
    return merged
