"""The runner: everything about a worker that is the same for all services.

Promises:

- **Stored, then told.** A result document, and what it was made of, are durable before the outcome is published; the outcome is
  confirmed before the command is acknowledged. What dies in between comes again.
- **One at a time.** Each outcome leaves when its own item ends. A message that comes back is split into single items first.
- **The culprit alone.** When a worker dies, everything that it had in hand comes back, and is counted. So what came back
  `SUSPECT_AFTER` times is tried alone, and that it was begun is noted where the worker's death does not undo it: an item that
  killed its worker `TRIALS_MAX` times like this goes to the dead letters, and takes no neighbours with it.
- **Nothing for nobody.** An item whose job has expired is dropped; one that comes late (when the deadlines may have given up on
  it, or again, or as a further attempt) is dropped if the log says that nobody waits for it any more.
- **Stopping is not failing.** A stopping worker publishes its unfinished items again and then acknowledges them.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import stamina

from domain.commands import WORKER_CRASHED, Deferred, Failed, LookUp, Succeeded, TaskOutcome, TimedOut, lines_of
from domain.errors import ErrorCode
from events.batching import Batcher
from events.bus import COMMANDS, OUTCOMES, Bus, BusUnavailable, Delivery, Inbox, Queue
from events.dead_letters import Reason, put_aside
from events.facts import Priority, RawAbsence, ResultReference, Service, Source, TaskError
from events.ids import made_at_ms
from events.lines import read_items
from results.documents import DOCUMENT_BYTES_MAX, ResultDocuments, ResultsUnavailable
from workers import lookup
from workers.lookup import Answer, LookupDeferred, LookupFailed
from workers.standing import AlwaysWanted, Standing
from workers.trials import MemoryTrials, Trials

IN_HAND = {Priority.INTERACTIVE: 16, Priority.BULK: 4}
"""Messages in hand by lane: under full load, interactive work gets four fifths of a worker."""
SUSPECT_AFTER = 2
TRIALS_MAX = 2
OUTCOMES_PER_MESSAGE = 100
RAW_BYTES_MAX = 262_144
PAUSE_S = 0.5
HAND_BACK_S = 5.0
TRIES = 2

log = logging.getLogger(__name__)

Ending = Succeeded | Failed | TimedOut | Deferred


class MessageStuck(Exception):  # noqa: N818 - what is the case, in our words
    """The worker has a message in hand that it can neither finish nor give back, and must start anew."""


class Outbox:
    """Outcomes on their way out. The workers of a process share one: what ends together is told, and decided, together."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._outcomes: Batcher[TaskOutcome, None] = Batcher(self._publish, batch_max=OUTCOMES_PER_MESSAGE)

    async def put(self, outcome: TaskOutcome) -> None:
        """Returns when the broker has confirmed the outcome. Raises `BusUnavailable`."""
        await self._outcomes.add(outcome)

    async def _publish(self, outcomes: Sequence[TaskOutcome]) -> Sequence[None]:
        await self._bus.publish(OUTCOMES, lines_of(outcomes))
        return [None] * len(outcomes)


@dataclass
class WorkerCounters:
    """What became of the items that this worker was handed."""

    reported: int = 0
    expired: int = 0
    superseded: int = 0
    unreadable: int = 0
    handed_back: int = 0


@dataclass
class Worker:
    """Works one service's queues off, until cancelled."""

    service: Service
    look_up: lookup.LookUp
    bus: Bus
    outbox: Outbox
    documents: ResultDocuments
    name: str
    now: Callable[[], datetime]
    concurrency: int = 64
    trials: Trials = field(default_factory=MemoryTrials)
    standing: Standing = field(default_factory=AlwaysWanted)
    late_after: timedelta = timedelta(seconds=30)
    """As long as the deadlines wait before they dispatch a task again."""
    raw_bytes_max: int = RAW_BYTES_MAX
    """A raw answer that is larger is not kept; 0 = none is."""
    counters: WorkerCounters = field(default_factory=WorkerCounters)

    def __post_init__(self) -> None:
        self._room = asyncio.Semaphore(self.concurrency)
        self._suspects = asyncio.Lock()
        self._splitting = asyncio.Lock()
        self._in_hand: dict[asyncio.Task[None], tuple[Inbox, Delivery]] = {}
        self._unfinished: dict[Delivery, list[LookUp]] = {}
        self._stuck = asyncio.Event()

    def subscribe(self) -> dict[Queue, Inbox]:
        return {
            COMMANDS[self.service, priority]: self.bus.subscribe(COMMANDS[self.service, priority], in_hand_max=in_hand)
            for priority, in_hand in IN_HAND.items()
        }

    async def run(self, inboxes: dict[Queue, Inbox]) -> None:
        try:
            async with asyncio.TaskGroup() as readers:
                for queue, inbox in inboxes.items():
                    readers.create_task(self._read(queue, inbox))
                readers.create_task(self._end_when_stuck())
        finally:
            try:
                async with asyncio.timeout(HAND_BACK_S):
                    await self._hand_back(inboxes)
            except (BusUnavailable, TimeoutError):
                # Nothing is lost, and whoever stopped us must not take this for an error that wants another start.
                log.warning("The broker takes nothing back; what is unacknowledged comes again by itself.")

    async def _read(self, queue: Queue, inbox: Inbox) -> None:
        while True:
            for delivery in await inbox.take(IN_HAND[Priority.INTERACTIVE]):
                task = asyncio.create_task(self._work_off(queue, inbox, delivery))
                self._in_hand[task] = (inbox, delivery)
                task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._in_hand.pop(task, None)
        if not task.cancelled() and task.exception() is not None:
            log.error("A message could not be worked off.", exc_info=task.exception())
            self._stuck.set()

    async def _end_when_stuck(self) -> None:
        """A message in hand that nobody works on would keep its place for ever; the next start is handed it again."""
        await self._stuck.wait()
        raise MessageStuck("A message could not be worked off.")

    async def _work_off(self, queue: Queue, inbox: Inbox, delivery: Delivery) -> None:
        items, unreadable = await read_items(LookUp, delivery, queue, self.bus, now=self.now())
        self.counters.unreadable += unreadable
        if delivery.delivery_count > 1 and len(items) > 1:
            await self._split(queue, inbox, delivery, items)
            return
        if delivery.delivery_count <= SUSPECT_AFTER:
            await self._attempt_all(items, delivery)
        else:
            for item in items:
                await self._try_alone(queue, item, delivery)
        await inbox.ack([delivery])

    async def _split(self, queue: Queue, inbox: Inbox, delivery: Delivery, items: Sequence[LookUp]) -> None:
        """Nothing is begun meanwhile: the culprit comes back at once, and would kill us before the batch is acknowledged."""
        async with self._splitting:
            await asyncio.gather(*(self.bus.publish(queue, lines_of([item])) for item in items))
            await inbox.ack([delivery])
            await inbox.drain()

    async def _attempt_all(self, items: Sequence[LookUp], delivery: Delivery) -> None:
        self._unfinished[delivery] = list(items)
        if len(items) == 1:  # Mostly so, and it needs no task of its own.
            await self._attempt(items[0], delivery)
        else:
            async with asyncio.TaskGroup() as attempts:
                for item in items:
                    attempts.create_task(self._attempt(item, delivery))
        self._unfinished.pop(delivery, None)

    async def _try_alone(self, queue: Queue, item: LookUp, delivery: Delivery) -> None:
        """Others that are not suspected may be under way meanwhile: they are, should this item kill us too, begun anew."""
        async with self._suspects:
            if await self.trials.begin(item.command_id) >= TRIALS_MAX:
                await self._bury(queue, item, delivery)
                return
            try:
                await self._attempt_all([item], delivery)
            finally:
                # Ended or stopped, it killed nobody.
                await self.trials.forget(item.command_id)

    async def _attempt(self, item: LookUp, delivery: Delivery) -> None:
        """One attempt, reported; or dropped, when nobody waits for it any more."""
        if self._splitting.locked():
            async with self._splitting:
                pass
        async with self._room:
            started_at = self.now()
            if started_at >= item.expires_at:
                ending = None
                self.counters.expired += 1
            elif self._comes_late(item, delivery, started_at) and not await self.standing.is_wanted(item):
                ending = None
                self.counters.superseded += 1
            else:
                ending = await self._ending_of(item)
        if ending is not None:
            await self._report(item, ending, started_at)
        self._unfinished[delivery].remove(item)

    def _comes_late(self, item: LookUp, delivery: Delivery, now: datetime) -> bool:
        """Only these can have been superseded or have ended meanwhile: to ask about the others would cost, and tell nothing."""
        return item.attempt > 1 or delivery.delivery_count > 1 or _age_of(item, now) >= self.late_after

    async def _ending_of(self, item: LookUp) -> Ending | None:
        """How the attempt ends; None when no result could be stored before the job expired."""
        try:
            answer = await self._with_retries(item)
        except LookupDeferred as deferred:
            return Deferred(until=self.now() + timedelta(seconds=deferred.retry_after_s), reason=deferred.reason)
        except LookupFailed as failed:
            return Failed(error=TaskError(code=failed.code, message=failed.message), transient=failed.transient)
        except TimeoutError:
            return TimedOut()
        except Exception:
            log.exception("The %s lookup of job %s broke down.", item.service, item.job_id)
            broken = TaskError(code=ErrorCode.INTERNAL_ERROR, message="The lookup broke down. The service's log says more.")
            return Failed(error=broken, transient=False)
        return await self._stored(item, answer)

    async def _with_retries(self, item: LookUp) -> Answer[lookup.Result]:
        """Transient failures are tried again inside the attempt's own time, with backoff and jitter. Raises TimeoutError."""
        ends_at = asyncio.get_running_loop().time() + item.timeout_s
        try:
            async with asyncio.timeout_at(ends_at):
                return await self.look_up(item.target)
        except LookupFailed as failed:
            if not failed.transient:
                raise
            first = failed
        try:
            async with asyncio.timeout_at(ends_at):
                return await self._try_again(item, first)
        except TimeoutError:
            # No other try came to an end in time: what the first one said is what is known.
            raise first from None

    async def _try_again(self, item: LookUp, first: LookupFailed) -> Answer[lookup.Result]:
        # Most lookups do not fail, and a retry's machinery costs more than the rest of the runner: it is set up only now.
        async for attempt in stamina.retry_context(
            on=_is_transient, attempts=TRIES, timeout=item.timeout_s, wait_initial=0.2, wait_max=2.0
        ):
            with attempt:
                if attempt.num == 1:
                    raise first
                return await self.look_up(item.target)
        raise AssertionError("The last try returns or raises.")

    async def _stored(self, item: LookUp, answer: Answer[lookup.Result]) -> Ending | None:
        """A store that is down is no failed lookup: the answer is kept in hand until it is stored, or nobody waits for it."""
        document = answer.result.model_dump_json().encode()
        if len(document) > DOCUMENT_BYTES_MAX:
            too_large = TaskError(code=ErrorCode.ANSWER_TOO_LARGE, message="The answer is larger than this service keeps.")
            return Failed(error=too_large, transient=False)
        raw, raw_absent = self._raw_of(answer)
        observed_at = self.now()
        while self.now() < item.expires_at:
            try:
                result, raw_reference = await self._put(item, document, raw)
            except ResultsUnavailable:
                await asyncio.sleep(PAUSE_S)
            else:
                return Succeeded(
                    result=result,
                    source=Source.LIVE,
                    observed_at=observed_at,
                    provider=answer.provider,
                    parser=answer.parser,
                    raw=raw_reference,
                    raw_absent=raw_absent,
                )
        self.counters.expired += 1
        return None

    def _raw_of(self, answer: Answer[lookup.Result]) -> tuple[bytes | None, RawAbsence | None]:
        """What was said, if there is anything to keep and it may be kept; else why not."""
        if answer.raw is None:
            return None, None
        if self.raw_bytes_max == 0:
            return None, RawAbsence.SWITCHED_OFF
        raw = answer.raw.stored()
        return (raw, None) if len(raw) <= self.raw_bytes_max else (None, RawAbsence.TOO_LARGE)

    async def _put(self, item: LookUp, document: bytes, raw: bytes | None) -> tuple[ResultReference, ResultReference | None]:
        """Both at once go down in one write, so that what was said costs no round trip of its own."""
        if raw is None:
            return await self.documents.put(item.job_id, document), None
        return await asyncio.gather(
            self.documents.put(item.job_id, document), self.documents.put(item.job_id, raw, shown=False)
        )

    async def _report(self, item: LookUp, ending: Ending, started_at: datetime) -> None:
        ended_at = self.now()
        outcome = TaskOutcome(
            job_id=item.job_id,
            command_id=item.command_id,
            service=item.service,
            attempt=item.attempt,
            worker=self.name,
            duration_ms=round((ended_at - started_at).total_seconds() * 1000),
            ended_at=ended_at,
            ending=ending,
        )
        while True:
            try:
                await self.outbox.put(outcome)
            except BusUnavailable:
                await asyncio.sleep(PAUSE_S)
            else:
                self.counters.reported += 1
                return

    async def _bury(self, queue: Queue, item: LookUp, delivery: Delivery) -> None:
        """An item that killed its worker again and again: it is kept, and its task fails."""
        now = self.now()
        await put_aside(self.bus, queue, delivery, lines_of([item]), Reason.DELIVERED_TOO_OFTEN, at=now)
        await self._report(item, Failed(error=WORKER_CRASHED, transient=False), now)
        log.warning("The %s lookup of job %s killed its worker; it went to the dead letters.", item.service, item.job_id)

    async def _hand_back(self, inboxes: dict[Queue, Inbox]) -> None:
        """Publish what is unfinished again, then acknowledge it: the broker must not count it as another delivery."""
        for inbox in inboxes.values():
            await inbox.close()
        tasks = list(self._in_hand.items())
        for task, _ in tasks:
            task.cancel()
        await asyncio.gather(*(task for task, _ in tasks), return_exceptions=True)
        queues = {id(inbox): queue for queue, inbox in inboxes.items()}
        for task, (inbox, delivery) in tasks:
            if not task.cancelled():
                continue
            items = self._unfinished.pop(delivery, None)
            body = delivery.body if items is None else lines_of(items)
            await self._publish_again(queues[id(inbox)], inbox, delivery, body)
        for queue, inbox in inboxes.items():
            while waiting := inbox.waiting():
                for delivery in waiting:
                    await self._publish_again(queue, inbox, delivery, delivery.body)

    async def _publish_again(self, queue: Queue, inbox: Inbox, delivery: Delivery, body: bytes) -> None:
        if body:
            await self.bus.publish(queue, body)
            self.counters.handed_back += 1
        await inbox.ack([delivery])


def _age_of(item: LookUp, now: datetime) -> timedelta:
    """How long ago the command was made, as its id says."""
    made_ms = made_at_ms(item.command_id)
    return timedelta(0) if made_ms is None else now - datetime.fromtimestamp(made_ms / 1000, UTC)


def _is_transient(error: Exception) -> bool:
    return isinstance(error, LookupFailed) and error.transient
