"""The runner: everything about a worker that is the same for all services.

Promises:

- **Stored, then told.** A result document is durable before its outcome is published; the outcome is confirmed before the
  command is acknowledged. What dies in between comes again.
- **One at a time.** Each outcome leaves when its own item ends. A message that comes back is split into single items first, so
  that an item that kills its worker takes no neighbours with it; it goes to the dead letters alone.
- **Stopping is not failing.** A stopping worker publishes its unfinished items again and then acknowledges them.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import stamina

from domain.commands import Deferred, Failed, LookUp, Succeeded, TaskOutcome, TimedOut, lines_of
from events.batching import Batcher
from events.bus import COMMANDS, DEAD_LETTERS, OUTCOMES, Bus, BusUnavailable, Delivery, Inbox, Queue
from events.facts import Priority, Service, Source, TaskError
from events.lines import read_items
from results.documents import DOCUMENT_BYTES_MAX, ResultDocuments, ResultsUnavailable
from workers import lookup
from workers.lookup import LookupDeferred, LookupFailed

IN_HAND = {Priority.INTERACTIVE: 16, Priority.BULK: 4}
"""Messages in hand by lane: under full load, interactive work gets four fifths of a worker."""
DELIVERIES_MAX = 5
OUTCOMES_PER_MESSAGE = 100
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
    counters: WorkerCounters = field(default_factory=WorkerCounters)

    def __post_init__(self) -> None:
        self._room = asyncio.Semaphore(self.concurrency)
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
        items, unreadable = await read_items(LookUp, delivery, queue, self.bus)
        self.counters.unreadable += unreadable
        if delivery.delivery_count > 1 and len(items) > 1:
            for item in items:
                await self.bus.publish(queue, lines_of([item]))
        elif delivery.delivery_count > DELIVERIES_MAX:
            await self._bury(queue, items)
        else:
            self._unfinished[delivery] = list(items)
            async with asyncio.TaskGroup() as attempts:
                for item in items:
                    attempts.create_task(self._attempt(item, delivery))
            self._unfinished.pop(delivery, None)
        await inbox.ack([delivery])

    async def _attempt(self, item: LookUp, delivery: Delivery) -> None:
        """One attempt, reported; or dropped, when its job has expired meanwhile."""
        async with self._room:
            started_at = self.now()
            ending = None if started_at >= item.expires_at else await self._ending_of(item)
        if ending is None:
            self.counters.expired += 1
        else:
            await self._report(item, ending, started_at)
        self._unfinished[delivery].remove(item)

    async def _ending_of(self, item: LookUp) -> Ending | None:
        """How the attempt ends; None when no result could be stored before the job expired."""
        try:
            async with asyncio.timeout(item.timeout_s):
                result = await self._with_retries(item)
        except LookupDeferred as deferred:
            return Deferred(until=self.now() + timedelta(seconds=deferred.retry_after_s), reason=deferred.reason)
        except LookupFailed as failed:
            return Failed(error=TaskError(code=failed.code, message=failed.message), transient=failed.transient)
        except TimeoutError:
            return TimedOut()
        except Exception:
            log.exception("The %s lookup of job %s broke down.", item.service, item.job_id)
            broken = TaskError(code="internal_error", message="The lookup broke down. The service's log says more.")
            return Failed(error=broken, transient=False)
        return await self._stored(item, result.model_dump_json().encode())

    async def _with_retries(self, item: LookUp) -> lookup.Result:
        """Transient failures are tried again inside the attempt's own time, with backoff and jitter."""
        try:
            return await self.look_up(item.target)
        except LookupFailed as failed:
            if not failed.transient:
                raise
            first = failed
        # Most lookups do not fail, and a retry's machinery costs more than the rest of the runner: it is set up only now.
        async for attempt in stamina.retry_context(
            on=_is_transient, attempts=TRIES, timeout=item.timeout_s, wait_initial=0.2, wait_max=2.0
        ):
            with attempt:
                if attempt.num == 1:
                    raise first
                return await self.look_up(item.target)
        raise AssertionError("The last try returns or raises.")

    async def _stored(self, item: LookUp, document: bytes) -> Ending | None:
        """A store that is down is no failed lookup: the answer is kept in hand until it is stored, or nobody waits for it."""
        if len(document) > DOCUMENT_BYTES_MAX:
            too_large = TaskError(code="answer_too_large", message="The answer is larger than this service keeps.")
            return Failed(error=too_large, transient=False)
        observed_at = self.now()
        while self.now() < item.expires_at:
            try:
                result = await self.documents.put(item.job_id, document)
            except ResultsUnavailable:
                await asyncio.sleep(PAUSE_S)
            else:
                return Succeeded(result=result, source=Source.LIVE, observed_at=observed_at)
        return None

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

    async def _bury(self, queue: Queue, items: Sequence[LookUp]) -> None:
        """An item that was handed out again and again and never came to an end: its task fails, and the item is kept."""
        for item in items:
            await self.bus.publish(DEAD_LETTERS, lines_of([item]), {"queue": queue.name, "reason": "delivered too often"})
            error = TaskError(code="worker_crashed", message="The lookup did not end, however often it was tried.")
            await self._report(item, Failed(error=error, transient=False), self.now())

    async def _hand_back(self, inboxes: dict[Queue, Inbox]) -> None:
        """Publish what is unfinished again, then acknowledge it: the broker must not count it as another delivery."""
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
            for delivery in inbox.waiting():
                await self._publish_again(queue, inbox, delivery, delivery.body)

    async def _publish_again(self, queue: Queue, inbox: Inbox, delivery: Delivery, body: bytes) -> None:
        if body:
            await self.bus.publish(queue, body)
            self.counters.handed_back += 1
        await inbox.ack([delivery])


def _is_transient(error: Exception) -> bool:
    return isinstance(error, LookupFailed) and error.transient
