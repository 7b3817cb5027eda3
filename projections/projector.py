"""The projector: folds stretches of the log into views and moves views and checkpoint in one step.

Promises:

- **Exactly-once effect.** Views and checkpoint move in one step (`projections/view_store.py`), which is refused unless the
  store stands where we believe it to. Then the store is believed, and the log is read from its checkpoint on.
- **No gaps.** A stretch that begins behind our checkpoint is folded from the log instead. So is the log itself, once a second,
  when the broker is silent: a wiped or rolled back store and a lost message heal by themselves.
- **Neighbours first.** What this process appended itself is folded before the broker brings it, which is then too late.
- **Stops loudly** at a fact of the log that it does not know (`UnknownFact`), rather than skip it. A message that cannot
  be read loses nothing: it goes to the dead letters when the log has been read instead.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from domain.commands import Rules
from events.batching import happens_within
from events.bus import FACTS, Bus, Delivery, Inbox
from events.catalog import UnknownFact
from events.dead_letters import Reason, put_aside
from events.ending import end
from events.facts import ResultReference
from events.log_tail import LogTail
from events.record import Recorded, read
from events.store import HistoryReader, StoreUnavailable
from events.wire import is_of_log, read_batch, stretch_of
from projections import arrangement
from projections.folding import NOTHING, Folded, Folder
from projections.generations import GenerationStore
from projections.job_views import Terms, View
from projections.replay import CannotReplay, Rebuild, leading
from projections.table import PROJECTIONS
from projections.view_store import Fed, Generation, Move, Standing, Verdict, ViewStore
from results.documents import ResultDocuments, ResultsUnavailable

TICK_S = 1.0
STOP_S = 10.0
IN_HAND_MAX = 16
CATCH_UP_PAGE = 1_000
COMMIT_MAX = 1_000
BUILD_PAGE = 500
"""Small, as others wait meanwhile: the views that are shown have to move on."""
UNREADABLE = (UnknownFact, ValueError, KeyError, TypeError)
"""What a batch raises that nobody of ours wrote, or a newer one of us."""

log = logging.getLogger(__name__)


class Superseded(Exception):  # noqa: N818 - an outcome, in the field's words
    """Another projector leads."""


@dataclass(slots=True)
class Checkpoint:
    """How far the views have come, as their store has it: all generations that are fed, of which some may be ahead."""

    roster: str
    fed: Sequence[Fed]
    position: int
    hash: str
    complete: bool

    @property
    def next_stop(self) -> int | None:
        """Where the first of the generations that are ahead stands: no commit may pass it."""
        return min((one.checkpoint for one in self.fed if one.checkpoint > self.position), default=None)

    def move(self, position: int, fact_hash: str) -> None:
        moved = [replace(one, checkpoint=position) if one.checkpoint == self.position else one for one in self.fed]
        self.fed, self.position, self.hash = moved, position, fact_hash


@dataclass
class ProjectorCounters:
    """Facts that were folded into views, again after Redis had lost some."""

    folded: int = 0


@dataclass
class Projector:
    """One of any number of projectors; one leads, the others wait for its lease to end. Runs until cancelled."""

    views: ViewStore
    store: HistoryReader
    documents: ResultDocuments
    bus: Bus
    rules: Rules
    retention: timedelta
    now: Callable[[], datetime]
    counters: ProjectorCounters = field(default_factory=ProjectorCounters)
    table: Sequence[View] = PROJECTIONS
    generations: GenerationStore | None = None
    tail: LogTail = field(default_factory=LogTail)
    """What this process appends itself, if anything."""

    def __post_init__(self) -> None:
        self._folder = Folder(self.store, self.table, Terms(self.rules, self.retention))
        self._fence = ""
        self._log_id = ""
        self._at = Checkpoint("", [], 0, "", complete=False)
        self._kept_until_ms: int | None = None
        self._outdated: Sequence[View] = ()
        self._caught_up_until = datetime.fromtimestamp(0, tz=self.now().tzinfo)

    async def run(self) -> None:
        """Lead, catch up, then follow the bus. Starts the bus itself: who does not lead must not take its messages."""
        await self._become_leader()
        self._log_id = str(await self.store.log_id())
        inbox = self.bus.subscribe(FACTS, in_hand_max=IN_HAND_MAX)
        # The log needs no broker: with one that is down, the views are brought up to date at each start.
        await self._take_over()
        await self.catch_up()
        building = asyncio.create_task(self._build_outdated())
        try:
            await self.bus.start()
            await self._follow(inbox, building)
        finally:
            await end([building], STOP_S)
            await self.bus.stop()

    async def _become_leader(self) -> None:
        while not await self._leads():  # noqa: ASYNC110 - the lease is the store's: nothing here could set an event
            await asyncio.sleep(TICK_S)

    async def _leads(self) -> bool:
        """Take the lead, unless somebody else has it."""
        fence = await self.views.lead()
        self._fence = fence or ""
        return fence is not None

    async def _follow(self, inbox: Inbox, building: "asyncio.Task[None]") -> None:
        """Ends in an error if `building` does. No task group: it passes on one cancellation only, and that may get lost."""
        clock = asyncio.get_running_loop().time
        woken = asyncio.Event()
        taking = _taking(inbox, woken)
        quiet_since = clock()
        try:
            with self.tail.waking(woken):
                while True:
                    if building.done():
                        building.result()
                    left_s = quiet_since + TICK_S - clock()
                    if left_s <= 0 or not await happens_within(woken, left_s):
                        await self.catch_up()
                        quiet_since = clock()
                        continue
                    woken.clear()
                    await self._project_own()
                    if taking.done():
                        deliveries = taking.result()
                        taking = _taking(inbox, woken)
                        await self.project(deliveries)
                        await inbox.ack(deliveries)
                        quiet_since = clock()
        finally:
            taking.cancel()

    async def _project_own(self) -> None:
        """Fold what this process appended and its relay has released, before the broker brings it."""
        await self._fold_surely(self.tail.released_behind(self._at.position, COMMIT_MAX))

    async def project(self, deliveries: Sequence[Delivery]) -> None:
        """Fold what these deliveries bring behind our checkpoint, and what they leave out from the log."""
        ours = [delivery for delivery in deliveries if is_of_log(delivery.headers, self._log_id)]
        stretches, unreadable = _stretches_of(ours)
        facts: list[Recorded] = []
        reached = self._at.position
        for previous, position, delivery in stretches:
            if position <= reached:
                continue
            if previous > reached:
                log.info("A stretch is missing behind position %d; reading the log.", reached)
                await self._fold_and_commit(facts)
                await self.catch_up()
                facts, reached = [], self._at.position
                if position <= reached or previous > reached:
                    continue  # In the second case the store was taken back meanwhile: the log is read once more.
            try:
                facts += [recorded for recorded in read_batch(delivery.body) if recorded.position > reached]
            except UNREADABLE:
                unreadable.append(delivery)
            else:
                reached = position
        await self._fold_surely(facts)
        if unreadable:
            await self._put_aside(unreadable)

    async def _fold_surely(self, facts: Sequence[Recorded]) -> None:
        """If the view store turns out to stand elsewhere, the log is read at once: somebody may wait for what was in hand."""
        stood = self._at
        await self._fold_and_commit(facts)
        if self._at is not stood:
            await self.catch_up()

    async def _put_aside(self, unreadable: Sequence[Delivery]) -> None:
        """The log has what these were to bring. If that is a fact that we do not know, it stops us there, and they stay."""
        await self.catch_up()
        for delivery in unreadable:
            log.warning("A stretch cannot be read; it was read from the log, and goes to the dead letters.")
            await put_aside(self.bus, FACTS, delivery, delivery.body, Reason.WRONG_SCHEMA, at=self.now())

    async def catch_up(self) -> None:
        """Fold the log up to its end, then say so: also without traffic, so that a store that lost data is noticed."""
        while True:
            asked_at = self.now()
            page = await self.store.read_all(self._at.position, CATCH_UP_PAGE)
            if not page:
                break
            await self._fold_and_commit([read(stored) for stored in page])
        self._caught_up_until = asked_at
        self._at.complete = True
        await self._commit_views(NOTHING, self._at.position, self._at.hash)
        if self._kept_until_ms is not None and self._kept_until_ms <= _ms(self.now()):
            await self._take_over()
        await self.views.sweep()

    # --- views of a new version ---------------------------------------------------------------------------------------

    async def _build_outdated(self) -> None:
        """Views that this program makes otherwise, or that are not shown at all, are built beside what is shown."""
        while self.generations is not None:
            if self._outdated and (views := arrangement.outdated(await self.views.standing(), self.table)):
                try:
                    await self._build(views, self.generations)
                except (CannotReplay, StoreUnavailable) as error:
                    log.warning("The views of a new version are not built yet: %s", error)
            await asyncio.sleep(TICK_S)

    async def _build(self, views: Sequence[View], generations: GenerationStore) -> None:
        log.info("Building %s beside what is shown.", ", ".join(f"{view.name} {view.version}" for view in views))
        terms = Terms(self.rules, self.retention)
        async with leading(generations) as fence:
            documents = self.documents.get
            rebuild = Rebuild(fence, generations, self.store, documents, views, terms, self.now, page=BUILD_PAGE)
            await rebuild.open()
            await rebuild.build()
            await rebuild.show(keep=timedelta(0))

    # --- folding ------------------------------------------------------------------------------------------------------

    async def _fold_and_commit(self, facts: Sequence[Recorded]) -> None:
        stood, left = self._at, facts
        while left:
            some = self._next_some(left)
            await self._fold_and_commit_some(some)
            if self._at is not stood:
                return  # The store stands elsewhere: what follows would leave a gap, and the log is read from there.
            left = left[len(some) :]

    def _next_some(self, facts: Sequence[Recorded]) -> Sequence[Recorded]:
        """So many that they go down in one commit, and none past a generation that waits further on."""
        some, stop = facts[:COMMIT_MAX], self._at.next_stop
        if stop is None or facts[0].position > stop:
            return some
        return [recorded for recorded in some if recorded.position <= stop]

    async def _fold_and_commit_some(self, facts: Sequence[Recorded]) -> None:
        if facts[0].position <= self._at.position:
            return  # The store was taken back to an earlier checkpoint meanwhile: the log is read from there.
        stood = self._at
        await self._folder.prepare(facts, self._documents)
        if self._at is not stood:
            self._folder.forget()
            return  # The store turned out to stand elsewhere while the documents were waited for.
        last = facts[-1]
        self._caught_up_until = max(self._caught_up_until, last.recorded_at)
        await self._commit_views(self._folder.fold(facts), last.position, last.hash)
        self.counters.folded += len(facts)

    async def _documents(self, references: Sequence[ResultReference]) -> Mapping[str, bytes]:
        """Unreachable documents are waited for, and the lag tells: a view without them would be wrong for good."""
        while True:
            try:
                return await self.documents.get(references)
            except ResultsUnavailable:
                log.warning("The results cannot be read; the views wait for them.")
                await self._commit_views(NOTHING, self._at.position, self._at.hash)
                await asyncio.sleep(TICK_S)

    # --- the view store -----------------------------------------------------------------------------------------------

    async def _take_over(self) -> None:
        """Go on from where the store stands, if it stands in our log; else begin a new generation."""
        self._folder.forget()
        while True:
            standing = await self.views.standing()
            ours = {one.name for one in standing.fed if await self._stands_in_our_log(one)}
            if not any(standing.live.get(view.name) in ours for view in self.table):
                if standing.fed:
                    log.warning("The views are of another log, or ahead of this one: building them anew.")
                await self._begin_generation()
            elif not (changes := [*arrangement.changes(standing, ours, self.table, _ms(self.now()))]):
                break
            elif await self.views.arrange(self._fence, standing.roster, changes) is Verdict.FENCED and not await self._leads():
                raise Superseded
        self._stand_at(standing)

    def _stand_at(self, standing: Standing) -> None:
        fed = [Fed(one.name, one.checkpoint or 0, arrangement.fed_views(one, self.table)) for one in standing.fed]
        last = min(standing.fed, key=lambda one: one.checkpoint or 0)
        self._at = Checkpoint(standing.roster, fed, last.checkpoint or 0, last.hash, last.complete)
        self._kept_until_ms = min(standing.kept.values(), default=None)
        self._outdated = arrangement.outdated(standing, self.table)

    async def _stands_in_our_log(self, generation: Generation) -> bool:
        if generation.log_id != self._log_id or generation.checkpoint is None:
            return False
        if generation.checkpoint == 0:
            return True
        found = await self.store.read_all(generation.checkpoint - 1, 1)
        return bool(found) and found[0].position == generation.checkpoint and read(found[0]).hash == generation.hash

    async def _begin_generation(self) -> None:
        versions = {view.name: view.version for view in self.table}
        begun = await self.views.begin(self._fence, f"g{_ms(self.now())}", self._log_id, versions)
        if not begun and not await self._leads():
            raise Superseded

    async def _commit_views(self, folded: Folded, position: int, fact_hash: str) -> None:
        move = Move(
            fence=self._fence,
            roster=self._at.roster,
            log_id=self._log_id,
            fed=self._at.fed,
            stood_at=self._at.position,
            position=position,
            hash=fact_hash,
            complete=self._at.complete,
            caught_up_ms=_ms(self._caught_up_until),
            checked_ms=_ms(self.now()),
            folded=folded,
        )
        await self._judge(await self.views.commit(move), position, fact_hash)

    async def _judge(self, verdict: Verdict, position: int, fact_hash: str) -> None:
        if verdict is Verdict.OK:
            self._at.move(position, fact_hash)
            return
        if verdict is Verdict.FENCED and not await self._leads():
            raise Superseded
        # Whoever attaches or shows a generation has done so by intent; a checkpoint or a lead that moved was lost.
        level = logging.INFO if verdict is Verdict.GENERATION else logging.WARNING
        log.log(level, "The views are not where we left them (%s): going on from where they stand.", verdict)
        await self._take_over()


def _taking(inbox: Inbox, woken: asyncio.Event) -> "asyncio.Future[list[Delivery]]":
    """What the inbox is given next, and an event that is set then."""
    taking = asyncio.ensure_future(inbox.take(IN_HAND_MAX))
    taking.add_done_callback(lambda _: woken.set())
    return taking


def _stretches_of(deliveries: Sequence[Delivery]) -> tuple[list[tuple[int, int, Delivery]], list[Delivery]]:
    """The deliveries in order of the stretches that they bring, and those that do not tell which."""
    stretches: list[tuple[int, int, Delivery]] = []
    unreadable: list[Delivery] = []
    for delivery in deliveries:
        try:
            stretches.append((*stretch_of(delivery.headers), delivery))
        except UNREADABLE:
            unreadable.append(delivery)
    return sorted(stretches, key=lambda stretch: stretch[:2]), unreadable


def _ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)
