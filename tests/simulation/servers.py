"""The servers as a process sees them: the in-memory twins at the other end of a link that fails."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from copy import deepcopy
from datetime import datetime
from typing import TypeVar, cast
from uuid import UUID

from events.bus import BusUnavailable, Delivery, Queue
from events.facts import Fact, ResultReference
from events.log_tail import LogTail
from events.memory import MemoryBus, MemoryInbox, MemoryStore, Message
from events.record import StoredFact, read, recorded
from events.store import AppendUnit, OutcomeUnknown, Scribe, StoreUnavailable, StreamHead, VersionConflict
from projections.memory import MemoryViews
from projections.view_store import Change, Move, Standing, Verdict
from results.documents import MemoryDocuments, ResultsUnavailable
from tests.simulation.invariants import Watch
from tests.simulation.loop import at_once
from tests.simulation.network import Link, Network
from workers.trials import MemoryTrials
from write_side.checkpoints import COMMANDS, Checkpoint, LeadershipLost
from write_side.gather import REPORTED
from write_side.memory import MemoryLedger, MemoryLedgers

Answer = TypeVar("Answer")

DELAY_MAX_S = 6.0
REDELIVERED_AFTER_S = 2.0


class ViewsDown(Exception):  # noqa: N818 - a state, in the field's words
    """The views cannot be reached: stands for what the Redis driver raises."""


# --- The event log ----------------------------------------------------------------------------------------------------


class WatchedStore(MemoryStore):
    """The log itself. Whatever is appended is looked at."""

    def __init__(self, scribe: Scribe, log_id: UUID, watch: Watch) -> None:
        super().__init__(scribe, log_id)
        self._watch = watch

    async def append(self, unit: AppendUnit) -> Sequence[StreamHead]:
        before = len(self._log)
        try:
            heads = await super().append(unit)
        except VersionConflict:
            self._watch.conflicted("gather" if unit.cause.reason == REPORTED else unit.cause.actor)
            raise
        self._watch.appended(self._log[before:])
        return heads


class CountedTail(LogTail):
    """Counts how often a neighbour is given facts before the broker has them, and holds a writer to what it wrote."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def append(self, facts: Sequence[StoredFact], written: Sequence[Fact]) -> None:
        assert [recorded(*row) for row in zip(facts, written, strict=True)] == [read(stored) for stored in facts]
        super().append(facts, written)

    def release(self, position: int) -> None:
        self._counts["a neighbour had facts first"] += self.is_heard and position > self.released and self.ends_at(position)
        super().release(position)


class LinkedStore:
    """An `EventStore` at the other end of a link. `bus` is for mutants: those who append have no business with a broker.

    `tail` is what was appended here, as far as the answers came back.
    """

    def __init__(self, store: MemoryStore, link: Link, bus: "LinkedBus") -> None:
        self.bus = bus
        self.tail = CountedTail(link.network.counts)
        self._store = store
        self._link = link

    async def append(self, unit: AppendUnit) -> Sequence[StreamHead]:
        try:
            async with asyncio.timeout(unit.within_s):
                heads = await self._link.call(lambda: self._append(unit), StoreUnavailable, in_doubt=OutcomeUnknown)
        except TimeoutError:
            raise OutcomeUnknown from None
        facts = [fact for new in unit.streams for fact in new.facts]
        last = heads[-1].position
        self.tail.append(self._store._log[last - len(facts) : last], facts)
        return heads

    def _append(self, unit: AppendUnit) -> Sequence[StreamHead]:
        network = self._link.network
        if network.happens("append_refused"):
            raise StoreUnavailable
        if network.happens("append_in_doubt"):
            raise OutcomeUnknown
        return at_once(self._store.append(unit))

    async def read(self, stream_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[StoredFact]]:
        return await self._ask(lambda: at_once(self._store.read(stream_ids)))

    async def read_all(self, after: int, limit: int) -> Sequence[StoredFact]:
        return await self._ask(lambda: at_once(self._store.read_all(after, limit)))

    async def head(self) -> int:
        return await self._ask(lambda: at_once(self._store.head()))

    async def open_streams(
        self, opening: Sequence[str], closing: Sequence[str], after: UUID | None, limit: int
    ) -> Sequence[UUID]:
        if after is None:
            self._link.network.counts[f"{self._link.process.name.rstrip('0123456789')} read the open jobs from the log"] += 1
        return await self._ask(lambda: at_once(self._store.open_streams(opening, closing, after, limit)))

    async def stream_ids(self, after: UUID | None, limit: int) -> Sequence[UUID]:
        return await self._ask(lambda: at_once(self._store.stream_ids(after, limit)))

    async def log_id(self) -> UUID:
        return await self._ask(lambda: at_once(self._store.log_id()))

    async def _ask(self, question: Callable[[], Answer]) -> Answer:
        return await self._link.call(question, StoreUnavailable)


class LinkedDocuments:
    """`ResultDocuments` at the other end of a link."""

    def __init__(self, documents: MemoryDocuments, link: Link) -> None:
        self._documents = documents
        self._link = link

    async def put(self, job_id: UUID, document: bytes, *, shown: bool = True) -> ResultReference:
        return await self._link.call(lambda: at_once(self._documents.put(job_id, document, shown=shown)), ResultsUnavailable)

    async def get(self, references: Sequence[ResultReference]) -> Mapping[str, bytes]:
        return await self._link.call(lambda: at_once(self._documents.get(references)), ResultsUnavailable)


# --- The relay's ledger -----------------------------------------------------------------------------------------------


class WatchedLedgers(MemoryLedgers):
    """The ledgers themselves. Whoever leads and moves is looked at."""

    def __init__(self, store: MemoryStore, watch: Watch) -> None:
        super().__init__(store)
        self._watch = watch

    def take_lead(self, ledger: MemoryLedger) -> bool:
        before = self._leader
        leads = super().take_lead(ledger)
        if leads and before is not ledger:
            self._watch.relay_leads(over_another=before is not None)
        return leads

    def move(self, ledger: MemoryLedger, name: str, checkpoint: Checkpoint) -> None:
        super().move(ledger, name, checkpoint)
        self._watch.relay_moved(name, checkpoint.position)


class LinkedLedger(MemoryLedger):
    """A `RelayLedger` at the other end of a link. When its process dies, the database ends the connection."""

    def __init__(self, ledgers: MemoryLedgers, store: MemoryStore, link: Link) -> None:
        super().__init__(ledgers, store)
        self._link = link

    async def _ask(self, question: Callable[[], Answer]) -> Answer:
        return await self._link.call(question, LeadershipLost)


class Ledgers:
    """Opens ledgers for the relay of one process."""

    def __init__(self, ledgers: MemoryLedgers, store: MemoryStore, link: Link) -> None:
        self._ledgers = ledgers
        self._store = store
        self._link = link
        self._opened: list[LinkedLedger] = []

    @asynccontextmanager
    async def open(self) -> AsyncIterator[LinkedLedger]:
        ledger = LinkedLedger(self._ledgers, self._store, self._link)
        self._opened.append(ledger)
        try:
            yield ledger
        finally:
            self.end()

    def end(self) -> None:
        """What the database does when the process is gone."""
        for ledger in self._opened:
            self._ledgers.close(ledger)
        self._opened.clear()

    async def relayed_position(self) -> int:
        return await self._link.call(lambda: self._ledgers.checkpoints[COMMANDS].position, StoreUnavailable)


# --- The broker -------------------------------------------------------------------------------------------------------


class FaultyBroker(MemoryBus):
    """The broker itself: what it confirmed it may lose, repeat, keep back or hand out in another order."""

    def __init__(self, network: Network, watch: Watch) -> None:
        super().__init__()
        self._network = network
        self._watch = watch

    def accept(self, sender: str, queue: Queue, body: bytes, headers: Mapping[str, str]) -> None:
        self._watch.published(sender, queue, body)
        if self._network.happens("publish_refused"):
            raise BusUnavailable
        self._watch.confirmed(sender, queue, body, headers)
        if self._network.happens("message_dropped"):
            return
        message = Message(body, headers)
        self._keep(queue, message)
        if self._network.happens("message_duplicated"):
            self._keep(queue, message)

    def _keep(self, queue: Queue, message: Message) -> None:
        first = self._network.happens("message_reordered")
        if self._network.happens("message_delayed"):
            delay_s = self._network.chance.random() * DELAY_MAX_S
            self._network.later(delay_s, lambda: self.put(queue.name, message, first=first))
        else:
            self.put(queue.name, message, first=first)

    def purge(self, queue: Queue) -> None:
        """What an operator does who deletes the messages of one queue."""
        self.waiting(queue.name).clear()


class LinkedBus:
    """A `Bus` at the other end of a link. `end` is what the broker does when the connection is gone."""

    def __init__(self, broker: FaultyBroker, link: Link, watch: Watch) -> None:
        self._broker = broker
        self._link = link
        self._watch = watch
        self._inboxes: list[MemoryInbox] = []
        self._read_losses = 0

    async def start(self) -> None:
        await self._link.call(lambda: None, BusUnavailable)

    async def stop(self) -> None:
        self.end()

    async def publish(self, queue: Queue, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        sender = self._link.process.name
        self._watch.tried(queue, body)
        await self._link.call(lambda: self._broker.accept(sender, queue, body, headers or {}), BusUnavailable)

    async def publish_each(self, bodies: Mapping[Queue, bytes]) -> None:
        """Each message has a fate of its own."""
        await asyncio.gather(*(self.publish(queue, body) for queue, body in bodies.items()))

    def subscribe(self, queue: Queue, *, in_hand_max: int) -> "LinkedInbox":
        inbox = self._broker.subscribe(queue, in_hand_max=in_hand_max)
        self._inboxes.append(inbox)
        return LinkedInbox(inbox, queue, self._link, self._watch)

    async def read_epoch(self) -> str | None:
        self._read_losses, epoch = await self._link.call(lambda: (self._broker.losses, self._broker.epoch()), BusUnavailable)
        return epoch

    async def write_epoch(self, epoch: str) -> None:
        await self._link.call(lambda: self._broker.mark(epoch, self._read_losses), BusUnavailable)

    def give_back(self) -> None:
        """What the broker does with what a silent reader has in hand."""
        for inbox in self._inboxes:
            inbox.give_back_now(inbox.in_hand())

    def end(self) -> None:
        self.give_back()
        for inbox in self._inboxes:
            self._broker.leave(inbox)
        self._inboxes.clear()


class LinkedInbox:
    """An `Inbox` at the other end of a link."""

    def __init__(self, inbox: MemoryInbox, queue: Queue, link: Link, watch: Watch) -> None:
        self._inbox = inbox
        self._queue = queue
        self._link = link
        self._watch = watch
        self._acknowledged_by = 0.0

    async def take(self, limit: int) -> list[Delivery]:
        while True:
            await asyncio.sleep(self._link.network.latency_s())
            await self._link.is_cleared()
            if taken := self._inbox.take_now(limit):
                return taken
            self._inbox.news.clear()
            await self._inbox.news.wait()

    def waiting(self) -> list[Delivery]:
        return []

    async def close(self) -> None:
        await self._inbox.close()

    async def drain(self) -> None:
        """That an acknowledgement was lost, a reader never hears."""
        await asyncio.sleep(max(0.0, self._acknowledged_by - asyncio.get_running_loop().time()))

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Nobody waits for it. A lost one means that the broker hands the delivery out again."""
        self._watch.acknowledged(self._link.process.name, self._queue, deliveries)
        network = self._link.network
        if network.happens("ack_lost") or not self._link.is_up():
            network.later(REDELIVERED_AFTER_S, self._inbox.give_back_now, deliveries)
        else:
            latency_s = network.latency_s()
            self._acknowledged_by = max(self._acknowledged_by, asyncio.get_running_loop().time() + latency_s)
            network.later(latency_s, self._inbox.ack_now, deliveries)


# --- The views --------------------------------------------------------------------------------------------------------

STORED = (
    "generations",
    "shown",
    "kept",
    "before",
    "_fed",
    "_built",
    "_roster",
    "_fence",
    "_leads_until_ms",
    "_builder",
    "_builds_until_ms",
)
"""What a snapshot of the views' server holds."""


class WatchedViews(MemoryViews):
    """The views themselves. Whoever leads and commits is looked at; what was can come back."""

    def __init__(self, now: Callable[[], datetime], new_id: Callable[[], UUID], watch: Watch) -> None:
        super().__init__(now, new_id)
        self.restores = 0
        self._watch = watch

    async def lead(self) -> str | None:
        fence = await super().lead()
        if fence is not None:
            self._watch.projector_leads()
        return fence

    async def commit(self, move: Move) -> Verdict:
        verdict = await super().commit(move)
        self._watch.committed(verdict, [self.generations[one.name] for one in move.fed if one.name in self.generations])
        return verdict

    def snapshot(self) -> object:
        return deepcopy({name: value for name, value in vars(self).items() if name in STORED})

    def roll_back(self, snapshot: object) -> None:
        self.restores += 1
        vars(self).update(deepcopy(cast("dict[str, object]", snapshot)))


class LinkedViews:
    """A `ViewStore` at the other end of a link, and what is read of it."""

    def __init__(self, views: WatchedViews, link: Link) -> None:
        self._views = views
        self._link = link

    async def lead(self) -> str | None:
        return await self._ask(lambda: at_once(self._views.lead()))

    async def standing(self) -> Standing:
        return await self._ask(lambda: at_once(self._views.standing()))

    async def begin(self, fence: str, generation: str, log_id: str, views: Mapping[str, int]) -> bool:
        return await self._ask(lambda: at_once(self._views.begin(fence, generation, log_id, views)))

    async def commit(self, move: Move) -> Verdict:
        return await self._ask(lambda: at_once(self._views.commit(move)))

    async def arrange(self, fence: str, roster: str, changes: Sequence[Change]) -> Verdict:
        return await self._ask(lambda: at_once(self._views.arrange(fence, roster, changes)))

    async def sweep(self) -> None:
        await self._ask(lambda: at_once(self._views.sweep()))

    async def due(self, now: datetime, limit: int) -> Sequence[UUID] | None:
        try:
            return await self._ask(lambda: at_once(self._views.due(now, limit)))
        except ViewsDown:
            return None

    async def shown(self, job_id: UUID) -> tuple[str, int] | None:
        """The generation, and the position of the view in it."""
        return await self._ask(lambda: self._shown(job_id))

    def _shown(self, job_id: UUID) -> tuple[str, int] | None:
        document, live = self._views.document(job_id), self._views.live()
        if document is None or live is None:
            return None
        return f"{live.name}, restored {self._views.restores} times", int(document.partition(b"\n")[0])

    async def _ask(self, question: Callable[[], Answer]) -> Answer:
        return await self._link.call(question, ViewsDown)


class LinkedTrials:
    """`Trials` beside the views. Without them nobody is found guilty."""

    def __init__(self, trials: MemoryTrials, link: Link) -> None:
        self._trials = trials
        self._link = link

    async def begin(self, command_id: UUID) -> int:
        try:
            return await self._link.call(lambda: at_once(self._trials.begin(command_id)), ViewsDown)
        except ViewsDown:
            return 0

    async def forget(self, command_id: UUID) -> None:
        with suppress(ViewsDown):
            await self._link.call(lambda: at_once(self._trials.forget(command_id)), ViewsDown)
