"""Rebuilds views from the log, beside what is shown: what `lookup replay` does, and a projector whose code has changed.

It reads the log, result documents and the view store, and nothing else: it knows no broker, so that a replay can have no side
effects (an import-linter contract holds it). Memory is bounded by a page of the log and `OPEN_JOBS_MAX` open jobs.

    async with leading(generations) as fence:
        rebuild = Rebuild(fence, generations, log, documents.get, views, terms, now)
        await rebuild.open()      # begins a generation, or goes on with one that was left half-built
        await rebuild.build()     # as far as what is shown, and then it is fed like that
        await rebuild.show(timedelta(minutes=10))   # or `drop()`

Whoever calls may look at `rebuild.name` (the generation) at any time; `projections/comparison.py` compares and digests.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from redis.exceptions import RedisError

from events.batching import happens_within
from events.facts import ResultReference
from events.record import Recorded, StoredFact, read
from events.store import HistoryReader
from projections.folding import NOTHING, Documents, Folded, Folder
from projections.generations import BUILD_LEASE_MS, FORGOTTEN_AFTER_MS, GenerationStore, Step
from projections.job_views import Terms, View
from projections.view_store import Fed, Generation, Move, Standing, Verdict
from results.documents import ResultsUnavailable

PAGE = 4_000
BIT = 200
"""After so many facts the others have their turn: our own lease has to be renewed while a page is folded."""
ATTACHED_FOR = timedelta(minutes=15)
"""An attached generation that nobody shows is fed for so long: a builder that died is soon forgotten."""
RENEW_S = 1.0
LEAD_AGAIN_S = 0.5
TRY_AGAIN_S = 1.0
CHASES_MAX = 5
"""So often we try to stand exactly where the shown views stand; while these move on, we go past them instead."""

log = logging.getLogger(__name__)


class CannotReplay(Exception):  # noqa: N818 - what is the case, in our words
    """Nothing more can be done now; the message says why. What is shown has not been touched."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rebuild has come: positions of the log, and what this run has folded in so many seconds.

    `outrun`: what is shown has moved on further than we had to come, so that at this rate we never get there.
    """

    began_at: int
    position: int
    goal: int
    folded: int
    seconds: float
    outrun: bool = False

    @property
    def per_s(self) -> float:
        return self.folded / self.seconds if self.seconds else 0.0

    @property
    def left_s(self) -> float | None:
        """None while nothing can be said, or there is no end."""
        return (self.goal - self.position) / self.per_s if self.per_s and not self.outrun else None


@asynccontextmanager
async def leading(generations: GenerationStore) -> AsyncIterator[str]:
    """The fence of the one who builds. Raises `CannotReplay` while somebody else does; a dead one's lease ends meanwhile."""
    give_up_at = time.monotonic() + 1.5 * BUILD_LEASE_MS / 1000
    while (fence := await generations.lead_build()) is None:
        if time.monotonic() > give_up_at:
            raise CannotReplay(SOMEBODY_BUILDS)
        await asyncio.sleep(LEAD_AGAIN_S)
    over = asyncio.Event()
    renewing = asyncio.create_task(_keep_lead(generations, fence, over))
    try:
        yield fence
    finally:
        # Not cancelled: before Python 3.12, a cancellation easily gets lost in a command to Redis (`events/ending.py`).
        over.set()
        await renewing
        await generations.end_build(fence)


async def _keep_lead(generations: GenerationStore, fence: str, over: asyncio.Event) -> None:
    """A lead that is lost shows at the next step. An unreachable store does as well."""
    while not await happens_within(over, RENEW_S):
        with suppress(RedisError, OSError):
            await generations.renew(fence)


@dataclass
class Rebuild:
    """One rebuild of some views, by who holds `fence`. Another table of views or other documents make another result of the
    same facts; `show` is for the program's own.

    `page` facts are folded at once, `rate` facts a second at most, but for the last page before the goal.
    Raises `CannotReplay`, and what log and store raise.
    """

    fence: str
    generations: GenerationStore
    log: HistoryReader
    documents: Documents
    views: Sequence[View]
    terms: Terms
    now: Callable[[], datetime]
    page: int = PAGE
    rate: float | None = None
    tell: Callable[[Progress], None] = lambda _: None
    name: str = ""
    position: int = 0
    hash: str = ""
    is_attached: bool = False
    resumed: bool = False
    folded: int = 0
    seconds: float = 0.0
    _complete: bool = False
    _outrun: bool = False
    _log_id: str = ""
    _began_at: int = 0
    _caught_up_ms: int = 0
    _began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._folder = Folder(self.log, self.views, self.terms)
        if self.rate is not None:
            self.page = max(1, min(self.page, int(self.rate)))

    async def open(self) -> None:
        """Go on with a generation of these views and versions that was left half-built, or begin one."""
        self._log_id = str(await self.log.log_id())
        standing = await self.generations.standing()
        await self._drop_forgotten(standing)
        left = await self._left_half_built(standing)
        if left is not None:
            self.name, self.position, self.hash = left.name, left.checkpoint or 0, left.hash
            self.is_attached = left in standing.fed
            self.resumed = True
        else:
            self.name = f"g{int(self.now().timestamp() * 1000)}"
            versions = {view.name: view.version for view in self.views}
            _made(await self.generations.begin_build(self.fence, self.name, self._log_id, versions))
        self._began_at = self.position

    async def build(self) -> None:
        """Fold the log as far as what is shown of it, and have the projector go on with it from there."""
        chases = 0
        behind: int | None = None
        while not self.is_attached:
            shown = await self._shown_position() if chases < CHASES_MAX else None
            goal = await self.log.head() if shown is None else shown
            was_behind, behind = behind, goal - self.position
            self._outrun = was_behind is not None and behind > max(was_behind, self.page)
            await self.build_up_to(goal)
            until = self.now() + ATTACHED_FOR
            step = await self.generations.attach(self.fence, self.name, _ms(until))
            if step is not Step.BEHIND:
                _made(step)
                self.is_attached = True
            chases += 1

    async def build_up_to(self, goal: int) -> None:
        """Fold the log up to a position. While a page is folded, the next one is read and the last one written."""
        reading = asyncio.create_task(self._read(self.position))
        writing: asyncio.Task[None] | None = None
        reached = self.position
        self._folder.forget()  # Who failed before may have folded what was never written.
        try:
            while reached < goal and (page := await reading):
                reached = page[-1].position
                reading = asyncio.create_task(self._read(reached))
                if not (facts := await _read_bit_by_bit(page, goal)):
                    break
                began = time.monotonic()
                folded = await self._fold(facts)
                if writing is not None:
                    await writing
                writing = asyncio.create_task(self._write(facts, folded, goal))
                if reached < goal:  # Close to what is shown, each moment of waiting lets it get away.
                    await self._slow_down(len(facts), began)
            if writing is not None:
                await writing
        finally:
            reading.cancel()
            # What is being written is written or refused, whatever else went wrong: then we know where we stand.
            await asyncio.gather(reading, *([writing] if writing else []), return_exceptions=True)
        asked_at = self.now()
        if not await self.log.read_all(self.position, 1):
            self._complete, self._caught_up_ms = True, _ms(asked_at)
            await self._commit(NOTHING, self.position, self.hash)

    async def show(self, keep: timedelta) -> None:
        """Show it from now on, and keep what was shown before for a while. Refused unless it is at least as far."""
        until_ms = _ms(self.now() + keep)
        step = await self.generations.show(self.fence, {view.name: self.name for view in self.views}, until_ms)
        if step is Step.BEHIND:
            raise CannotReplay(BEHIND)
        _made(step)

    async def drop(self) -> None:
        """Give the generation up."""
        _made(await self.generations.drop(self.fence, self.name))

    # --- how ----------------------------------------------------------------------------------------------------------

    async def _read(self, after: int) -> Sequence[StoredFact]:
        return await self.log.read_all(after, self.page)

    async def _fold(self, facts: Sequence[Recorded]) -> Folded:
        await self._folder.prepare(facts, self._documents)
        stretch = self._folder.begin()
        for first in range(0, len(facts), BIT):
            stretch.take(facts[first : first + BIT])
            await asyncio.sleep(0)
        return stretch.end()

    async def _write(self, facts: Sequence[Recorded], folded: Folded, goal: int) -> None:
        last = facts[-1]
        self._caught_up_ms = max(self._caught_up_ms, _ms(last.recorded_at))
        await self._commit(folded, last.position, last.hash)
        self.folded += len(facts)
        self.seconds = time.monotonic() - self._began
        self.tell(Progress(self._began_at, self.position, goal, self.folded, self.seconds, self._outrun))

    async def _slow_down(self, facts: int, began: float) -> None:
        if self.rate is not None:
            await asyncio.sleep(max(0.0, facts / self.rate - (time.monotonic() - began)))

    async def _documents(self, references: Sequence[ResultReference]) -> Mapping[str, bytes]:
        """Unreachable documents are waited for: a view without them would be wrong for good."""
        while True:
            try:
                return await self.documents(references)
            except ResultsUnavailable:
                log.warning("The results cannot be read; the views wait for them.")
                await asyncio.sleep(TRY_AGAIN_S)

    async def _commit(self, folded: Folded, position: int, fact_hash: str) -> None:
        move = Move(
            fence=self.fence,
            roster=BUILT,
            log_id=self._log_id,
            fed=[Fed(self.name, self.position, frozenset(view.name for view in self.views))],
            stood_at=self.position,
            position=position,
            hash=fact_hash,
            complete=self._complete,
            caught_up_ms=self._caught_up_ms,
            checked_ms=_ms(self.now()),
            folded=folded,
        )
        verdict = await self.generations.commit_build(move)
        if verdict is Verdict.FENCED and await self.generations.renew(self.fence):
            # On a busy machine a page can take longer than the lease. Nobody has taken the lead meanwhile.
            verdict = await self.generations.commit_build(move)
        if verdict is Verdict.FENCED:
            raise CannotReplay(LEAD_LOST)
        if verdict is not Verdict.OK:
            raise CannotReplay(STORE_LOST)
        self.position, self.hash = position, fact_hash

    async def _shown_position(self) -> int | None:
        """How far what is shown of our log has come, None when nothing is."""
        standing = await self.generations.standing()
        shown = [one for one in standing.fed if one.name in standing.live.values() and one.log_id == self._log_id]
        return max((one.checkpoint or 0 for one in shown), default=None)

    async def _drop_forgotten(self, standing: Standing) -> None:
        before_ms = _ms(self.now()) - FORGOTTEN_AFTER_MS
        for one in standing.built:
            if one.checked_ms < before_ms and not (one.checked_ms == 0 and one.checkpoint == 0):
                await self.generations.drop(self.fence, one.name)

    async def _left_half_built(self, standing: Standing) -> Generation | None:
        """The furthest one of just these views and versions that stands in our log, and is or was never shown."""
        versions = {view.name: str(view.version) for view in self.views}
        shown_once = {*standing.live.values(), *standing.before.values()}
        left = [one for one in (*standing.built, *standing.fed) if one.name not in shown_once and one.views == versions]
        for one in sorted(left, key=lambda one: one.checkpoint or 0, reverse=True):
            if await self._stands_in_our_log(one):
                return one
        return None

    async def _stands_in_our_log(self, one: Generation) -> bool:
        if one.log_id != self._log_id or not one.checkpoint:
            return False
        found = await self.log.read_all(one.checkpoint - 1, 1)
        return bool(found) and found[0].position == one.checkpoint and read(found[0]).hash == one.hash


async def _read_bit_by_bit(page: Sequence[StoredFact], goal: int) -> list[Recorded]:
    """The facts of a page up to a position."""
    facts: list[Recorded] = []
    for first in range(0, len(page), BIT):
        facts += [read(stored) for stored in page[first : first + BIT] if stored.position <= goal]
        await asyncio.sleep(0)
    return facts


BUILT = "built"
"""What the marker of a generation says while it is built."""
SOMEBODY_BUILDS = "Another replay is under way, or a projector that builds views of a new version. Wait for its end."
BEHIND = "The other views are behind those that are shown, and no projector brings them on. Nothing was changed."
LEAD_LOST = "Another replay has begun meanwhile. What this one has built is left for the next one to go on with."
STORE_LOST = "The half-built views are not where they were left: Redis lost data, or somebody removed them. Run it again."
GONE = "The new views are gone: the views were built anew meanwhile, or Redis lost data. Nothing was changed by us."


async def roll_back(
    fence: str, generations: GenerationStore, views: Sequence[View], keep: timedelta, now: datetime
) -> list[str]:
    """Show these views as they were shown before, and keep what is shown now; gives their names.

    Refused when that is not kept any more, is of another version, or is not as far as what is shown.
    """
    standing = await generations.standing()
    shown = {view.name: before for view in views if (before := _before(standing, view))}
    if not shown:
        raise CannotReplay("Nothing is kept that could be shown again: nothing was replayed, or its time is over.")
    step = await generations.show(fence, shown, _ms(now + keep))
    if step is Step.BEHIND:
        raise CannotReplay(BEHIND)
    _made(step)
    return list(shown)


def _before(standing: Standing, view: View) -> str | None:
    """The generation that a view was shown of before, if it is kept and of this version."""
    before = next((one for one in standing.fed if one.name == standing.before.get(view.name)), None)
    return before.name if before is not None and before.views.get(view.name) == str(view.version) else None


def _made(step: Step) -> None:
    if step is Step.FENCED:
        raise CannotReplay(LEAD_LOST)
    if step is not Step.OK:
        raise CannotReplay(GONE)


def _ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)
