"""The in-memory twin of the view store. It ships with the product and passes the same contract suite."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from projections.generations import BUILD_LEASE_MS, Step
from projections.view_store import DUE_LIST_GOOD_FOR_MS, EXPIRE_MAX, LEASE_MS, Change, Generation, Move, Standing, Verdict
from projections.views import DEADLINES, JOB_STATUS
from projections.writes import Count, Expire, KeepLast, Put, Rank, Remove, Unrank, UnrankBelow, Write

Name = tuple[str, str]
"""A view, and a key of it."""


@dataclass(slots=True)
class MemoryGeneration:
    """One generation of views, as Redis would hold it."""

    name: str
    log_id: str
    versions: dict[str, str]
    checkpoint: int = 0
    hash: str = ""
    complete: bool = False
    caught_up_ms: int = 0
    checked_ms: int = 0
    log_s: int = 0
    values: dict[Name, Put] = field(default_factory=dict)
    sets: dict[Name, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    counts: dict[Name, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    expiries: dict[Name, int] = field(default_factory=dict)

    def told(self) -> Generation:
        versions = dict(self.versions)
        return Generation(self.name, self.log_id, self.checkpoint, self.hash, self.complete, versions, self.checked_ms)

    def inherit(self, other: "MemoryGeneration") -> None:
        """Who is at least as far knows all that the other one knew."""
        self.complete |= other.complete
        self.caught_up_ms = max(self.caught_up_ms, other.caught_up_ms)

    def document(self, job_id: UUID) -> bytes | None:
        """A poller's document, also one that has gone by the clock."""
        put = self.values.get((JOB_STATUS, str(job_id)))
        return None if put is None else put.value

    def apply(self, view: str, writes: Sequence[Write]) -> None:
        for write in writes:
            self._apply(view, write)

    def _apply(self, view: str, write: Write) -> None:
        name = (view, write.key)
        match write:
            case Put():
                self.values[name] = write
            case Rank(_, member, score):
                self.sets[name][member] = score
            case Unrank(_, member):
                self.sets[name].pop(member, None)
            case UnrankBelow(_, score):
                self.sets[name] = {member: held for member, held in self.sets[name].items() if held > score}
            case KeepLast(_, count):
                ranked = sorted(self.sets[name].items(), key=lambda item: (item[1], item[0].encode()))
                self.sets[name] = dict(ranked[max(0, len(ranked) - count) :])
            case Count(_, of, by):
                self.counts[name][of] = self.counts[name].get(of, 0) + by
            case Expire(_, at_s):
                self.expiries[name] = max(at_s, self.expiries.get(name, at_s))
            case Remove():
                self._remove(name)

    def expire(self, limit: int) -> None:
        gone = sorted((at_s, name) for name, at_s in self.expiries.items() if at_s <= self.log_s)[:limit]
        for _, name in gone:
            self._remove(name)

    def _remove(self, name: Name) -> None:
        for held in (self.values, self.sets, self.counts, self.expiries):
            held.pop(name, None)


class MemoryViews:
    """A `ViewStore` and a `GenerationStore` for tests and simulations. Nothing outlives the process."""

    def __init__(self, now: Callable[[], datetime], new_id: Callable[[], UUID]) -> None:
        self.generations: dict[str, MemoryGeneration] = {}
        self.shown: dict[str, str] = {}
        self.kept: dict[Name, int] = {}
        self.before: dict[str, str] = {}
        self._fed: dict[str, None] = {}
        self._built: dict[str, None] = {}
        self._roster = ""
        self._builder = ""
        self._builds_until_ms = 0
        self._now = now
        self._new_id = new_id
        self._fence = ""
        self._leads_until_ms = 0

    async def lead(self) -> str | None:
        if self._is_led():
            return None
        self._fence = self._new_id().hex
        self._leads_until_ms = self._now_ms() + LEASE_MS
        return self._fence

    async def standing(self) -> Standing:
        fed, built = ([self.generations[name].told() for name in names] for names in (self._fed, self._built))
        return Standing(self._roster, dict(self.shown), dict(self.kept), dict(self.before), fed, built)

    async def begin(self, fence: str, generation: str, log_id: str, views: Mapping[str, int]) -> bool:
        if not self._leads(fence):
            return False
        for name in self._fed:
            del self.generations[name]
        self.generations[generation] = _empty(generation, log_id, views)
        self.shown = dict.fromkeys(views, generation)
        self._fed, self.kept, self.before = {generation: None}, {}, {}
        self._rearranged()
        return True

    async def commit(self, move: Move) -> Verdict:
        if not self._leads(move.fence):
            return Verdict.FENCED
        if move.roster != self._roster:
            return Verdict.GENERATION
        if not self._moved(move):
            return Verdict.CHECKPOINT
        self._leads_until_ms = self._now_ms() + LEASE_MS
        return Verdict.OK

    async def arrange(self, fence: str, roster: str, changes: Sequence[Change]) -> Verdict:
        if not self._leads(fence):
            return Verdict.FENCED
        if roster != self._roster:
            return Verdict.GENERATION
        for change in changes:
            if change.kind == Change.MARK:
                self.generations[change.generation].versions[change.view] = change.version
            elif change.kind == Change.LOSE:
                self._lose(change.generation)
            elif self.shown.get(change.view) != change.generation:
                self._retire(change.generation, change.view)
        self._rearranged()
        return Verdict.OK

    async def sweep(self) -> None:
        """What was dropped is gone already."""

    async def due(self, now: datetime, limit: int) -> Sequence[UUID] | None:
        """Ids of jobs with something due, at most `limit`; None when the list is absent or behind."""
        live, now_ms = self.live(DEADLINES), int(now.timestamp() * 1000)
        if live is None or not live.complete or live.caught_up_ms + DUE_LIST_GOOD_FOR_MS < now_ms:
            return None
        due = sorted((due_ms, job_id) for job_id, due_ms in live.sets[DEADLINES, ""].items())
        return [UUID(job_id) for due_ms, job_id in due if due_ms <= now_ms][:limit]

    # --- Builders -----------------------------------------------------------------------------------------------------

    async def lead_build(self) -> str | None:
        if self._now_ms() < self._builds_until_ms:
            return None
        self._builder = self._new_id().hex
        self._builds_until_ms = self._now_ms() + BUILD_LEASE_MS
        return self._builder

    async def renew(self, fence: str) -> bool:
        if fence != self._builder:
            return False
        self._builds_until_ms = self._now_ms() + BUILD_LEASE_MS
        return True

    async def end_build(self, fence: str) -> None:
        if self._builds(fence):
            self._builds_until_ms = 0

    async def begin_build(self, fence: str, generation: str, log_id: str, views: Mapping[str, int]) -> Step:
        if not self._builds(fence):
            return Step.FENCED
        self.generations[generation] = _empty(generation, log_id, views)
        self._built[generation] = None
        return Step.OK

    async def commit_build(self, move: Move) -> Verdict:
        (built,) = move.fed
        if not self._builds(move.fence):
            return Verdict.FENCED
        if built.name not in self._built:
            return Verdict.GENERATION
        if not self._moved(move):
            return Verdict.CHECKPOINT
        await self.renew(move.fence)
        return Verdict.OK

    async def attach(self, fence: str, generation: str, until_ms: int) -> Step:
        if not self._builds(fence):
            return Step.FENCED
        if generation not in self._built:
            return Step.GONE
        attached = self.generations[generation]
        others = [self.generations[name] for name in self.shown.values() if self._is_of(attached.log_id, name)]
        if any(other.checkpoint > attached.checkpoint for other in others):
            return Step.BEHIND
        for other in others:
            attached.inherit(other)
        self._fed[generation] = None
        self.kept |= {(generation, view): until_ms for view in attached.versions}
        del self._built[generation]
        self._rearranged()
        return Step.OK

    async def show(self, fence: str, shown: Mapping[str, str], keep_until_ms: int) -> Step:
        if not self._builds(fence):
            return Step.FENCED
        if any(name not in self._fed or view not in self.generations[name].versions for view, name in shown.items()):
            return Step.GONE
        for view, name in shown.items():
            before = self.live(view)
            new = self.generations[name]
            if before and before.log_id == new.log_id and before.checkpoint > new.checkpoint:
                return Step.BEHIND
        for view, name in shown.items():
            self._show(view, self.generations[name], keep_until_ms)
        self._rearranged()
        return Step.OK

    async def drop(self, fence: str, generation: str) -> Step:
        if not self._builds(fence):
            return Step.FENCED
        if generation in self.shown.values():
            return Step.GONE
        was_fed = generation in self._fed
        self._lose(generation)
        if was_fed:
            self._rearranged()
        return Step.OK

    # --- What tests and simulations see and do ------------------------------------------------------------------------

    def live(self, view: str = JOB_STATUS) -> MemoryGeneration | None:
        """The generation that a view is shown of."""
        return self.generations.get(self.shown.get(view, ""))

    def document(self, job_id: UUID) -> bytes | None:
        """What a poller gets: the position of the job's last fact, a line feed, the JSON."""
        live = self.live()
        put = None if live is None else live.values.get((JOB_STATUS, str(job_id)))
        gone = put is None or 0 < put.expires_at_s <= self._now_ms() // 1000
        return None if put is None or gone else put.value

    def end_lead(self) -> None:
        """What time does to the lease of a projector that fell silent."""
        self._leads_until_ms = 0

    def wipe(self) -> None:
        """What FLUSHALL does: views and lease are gone."""
        self.generations, self.shown, self.kept, self.before = {}, {}, {}, {}
        self._fed, self._built, self._roster = {}, {}, ""
        self._builds_until_ms = 0
        self.end_lead()

    # --- How ----------------------------------------------------------------------------------------------------------

    def _moved(self, move: Move) -> bool:
        """Whether all generations stand where the move says; then it was made."""
        for one in move.fed:
            generation = self.generations.get(one.name)
            if generation is None or (generation.log_id, generation.checkpoint) != (move.log_id, one.checkpoint):
                return False
        for one in move.fed:
            if one.checkpoint == move.stood_at:
                self._move(self.generations[one.name], one.views, move)
        return True

    def _show(self, view: str, generation: MemoryGeneration, keep_until_ms: int) -> None:
        before = self.live(view)
        if before is not generation:
            if before is not None and before.log_id == generation.log_id:
                generation.inherit(before)
            if before is not None and before.name in self._fed:
                self.kept[before.name, view] = keep_until_ms
                self.before[view] = before.name
            else:
                self.before.pop(view, None)
            self.shown[view] = generation.name
        self.kept.pop((generation.name, view), None)

    def _retire(self, name: str, view: str) -> None:
        generation = self.generations[name]
        generation.versions.pop(view, None)
        self.kept.pop((name, view), None)
        if self.before.get(view) == name:
            del self.before[view]
        if not generation.versions:
            self._lose(name)

    def _lose(self, name: str) -> None:
        self.shown = {view: generation for view, generation in self.shown.items() if generation != name}
        self.before = {view: generation for view, generation in self.before.items() if generation != name}
        self.kept = {(generation, view): until for (generation, view), until in self.kept.items() if generation != name}
        for names in (self._fed, self._built, self.generations):
            names.pop(name, None)

    def _is_of(self, log_id: str, name: str) -> bool:
        return name in self.generations and self.generations[name].log_id == log_id

    def _rearranged(self) -> None:
        self._roster = self._new_id().hex

    def _builds(self, fence: str) -> bool:
        return self._now_ms() < self._builds_until_ms and fence == self._builder

    def _move(self, generation: MemoryGeneration, views: frozenset[str], move: Move) -> None:
        for view, writes in move.folded.writes.items():
            if view in views:
                generation.apply(view, writes)
        generation.checkpoint, generation.hash, generation.complete = move.position, move.hash, move.complete
        generation.caught_up_ms, generation.checked_ms = move.caught_up_ms, move.checked_ms
        generation.log_s = max(generation.log_s, move.folded.until_s)
        generation.expire(EXPIRE_MAX + sum(map(len, move.folded.writes.values())))

    def _leads(self, fence: str) -> bool:
        return self._is_led() and fence == self._fence

    def _is_led(self) -> bool:
        return self._now_ms() < self._leads_until_ms

    def _now_ms(self) -> int:
        return int(self._now().timestamp() * 1000)


def _empty(name: str, log_id: str, views: Mapping[str, int]) -> MemoryGeneration:
    return MemoryGeneration(name, log_id, {view: str(version) for view, version in views.items()})
