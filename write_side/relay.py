"""Relay: follows the log in order and puts it on the broker: every stretch of facts, and each dispatched task as a command.

Promises:

- **At least once.** A checkpoint moves only after the broker confirmed. Facts and commands have their own.
- **One at a time.** Who leads, and how far the relay has come, is kept by the ledger (`write_side/checkpoints.py`). A leader
  that was frozen and wakes can only publish again what was published.
- **No queue holds up the rest.** A queue that takes nothing is tried again within a bound, then passed over: the deadlines
  dispatch its tasks again.
- **Neighbours first.** Where the leading projector is a part of this process, it has the facts from the log's tail as soon as
  their commands have left. For the broker they leave a moment later, together with what has come meanwhile.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from domain.commands import LookUp, lines_of
from domain.saga import replay
from events.bus import COMMANDS, FACTS, Bus, BusUnavailable, Queue
from events.catalog import topics_of
from events.chain import next_head
from events.ending import end
from events.facts import Erased, Fact, JobCancelled, JobCompleted, JobFailed, JobSubmitted, Service, Task, TasksDispatched
from events.log_tail import LogTail
from events.record import StoredFact, envelope_of, fact_of, hash_of
from events.store import EventStore
from events.wire import cloud_events, stretch_headers
from write_side import checkpoints
from write_side.checkpoints import HEARTBEAT_S, Checkpoint, OpenLedger, RelayLedger

STOP_S = 5.0
LAST_WORDS_S = 2.0
STRETCH_MAX = 500
COMMANDS_PER_MESSAGE = 20
QUEUE_TRIES = 3
EPOCH_INTERVAL_S = 2.0
REPUBLISH_PAGE = 200
APART_S = 30.0
HEAD_START_S = 0.005
"""So long at most facts wait for the commands of their stretch to be confirmed: a queue that takes nothing keeps no view."""
TOGETHER_S = 0.05
"""So long at most facts wait for others to leave with, where the leading projector has them from the log's tail."""
SAVE_AFTER_S = 0.02
"""What was published in so short a time is written down together, and when whoever waits for an answer has it."""
OPENING_TOPICS = topics_of(JobSubmitted)
CLOSING_TOPICS = topics_of(JobCompleted, JobFailed, JobCancelled)

log = logging.getLogger(__name__)


class CheckpointAhead(Exception):  # noqa: N818 - a finding about the log, in the domain's words
    """The relay has published facts that the log does not have: they were taken out, or the database was put back by hand."""


@dataclass
class RelayCounters:
    """What was published and confirmed. `commands_again` are of tasks that waited when the broker had lost its messages."""

    facts: int = 0
    commands: int = 0
    commands_again: int = 0


@dataclass
class Relay:
    """Follows the log while it leads; waits for its turn otherwise. Runs until cancelled or an error ends it."""

    open_ledger: OpenLedger
    store: EventStore
    bus: Bus
    now: Callable[[], datetime]
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    leading: bool = False
    counters: RelayCounters = field(default_factory=RelayCounters)
    tail: LogTail = field(default_factory=LogTail)
    """What this process appends itself, if anything."""
    _log_id: str = ""
    _held: Sequence[StoredFact] = ()
    """Facts whose commands have left, and which wait for others to leave with."""
    _held_until: float = 0.0
    _unsaved: dict[str, Checkpoint] = field(default_factory=dict)
    _save_at: float = 0.0
    _apart_until: float = 0.0

    async def run(self) -> None:
        async with self.open_ledger() as ledger:
            await ledger.lead()
            self.leading = True
            try:
                await self._lead(ledger)
            finally:
                self.leading = False

    async def _lead(self, ledger: RelayLedger) -> None:
        self.checkpoints, self._unsaved, self._held = await ledger.read(), {}, ()
        await self._check_checkpoints()
        self._log_id = str(await self.store.log_id())
        try:
            await self._follow(ledger)
        finally:
            await self._tell_what_waits()
            await self._save(ledger)

    async def _follow(self, ledger: RelayLedger) -> None:
        epoch_checked_at = float("-inf")
        clock = asyncio.get_running_loop().time
        while True:
            if clock() - epoch_checked_at >= EPOCH_INTERVAL_S:
                await self._alive(ledger, self._check_epoch())
                epoch_checked_at = clock()
            stretch = [*self._held, *await self._read_on()]
            if stretch:
                await self._relay(ledger, stretch)
            if self._unsaved and clock() >= self._save_at:
                await self._save(ledger)
            if len(stretch) == STRETCH_MAX:
                continue
            # What was committed meanwhile has notified us already: then this wait is none.
            if not await ledger.wait_for_more(self._patience_s()):
                await (self._save(ledger) if self._unsaved else ledger.keep_alive())

    async def _alive(self, ledger: RelayLedger, work: Awaitable[None]) -> None:
        """Await work and keep the lead meanwhile. When this ends, the work has ended too."""
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=HEARTBEAT_S))[0]:
                await ledger.keep_alive()
            await task
        finally:
            await end([task], STOP_S)

    async def _check_checkpoints(self) -> None:
        """Facts that come to lie below a checkpoint would never be told: rather tell nothing."""
        head = await self.store.head()
        ahead = max(checkpoint.position for checkpoint in self.checkpoints.values())
        if ahead > head:
            raise CheckpointAhead(f"The relay has told the log up to position {ahead}, and the log ends at {head}.")

    async def _read_on(self) -> Sequence[StoredFact]:
        """What comes after all that was read. Who asks for less is not kept waiting for what is being appended (ADR 35)."""
        after = self._held[-1].position if self._held else min(one.position for one in self.checkpoints.values())
        return await self.store.read_all(after, STRETCH_MAX - len(self._held))

    def _patience_s(self) -> float:
        """How long to wait for more, while there is something left to be done about what there is."""
        patience_s = SAVE_AFTER_S if self._unsaved else HEARTBEAT_S
        if not self._held:
            return patience_s
        return max(0.0, min(patience_s, self._held_until - asyncio.get_running_loop().time()))

    async def _relay(self, ledger: RelayLedger, stretch: Sequence[StoredFact]) -> None:
        done, new = self._not_told(checkpoints.COMMANDS, stretch)
        to_all = not self._can_wait(stretch)
        if to_all or any(stored.topic in _DISPATCHED for stored in new):
            await self._alive(ledger, self._publish(stretch, to_all=to_all))
        elif new:
            self.tail.release(new[-1].position)
            self._move({checkpoints.COMMANDS: Checkpoint(new[-1].position, done.log_head)})
        self._held = () if to_all else stretch

    def _can_wait(self, stretch: Sequence[StoredFact]) -> bool:
        """Whether the leading projector has heard of all these facts, or will in a moment, and none has waited for too long."""
        now = asyncio.get_running_loop().time()
        if not self._held:
            self._held_until = now + TOGETHER_S
        has_heard = self.tail.is_heard and self.tail.holds(stretch)
        return has_heard and len(stretch) < STRETCH_MAX and now < self._held_until

    async def _publish(self, stretch: Sequence[StoredFact], *, to_all: bool) -> None:
        """Publish a stretch; facts and commands go side by side, and neither's failure undoes the other."""
        telling = asyncio.ensure_future(self._tell_commands(stretch))
        told = {checkpoints.COMMANDS: telling, checkpoints.FACTS: self._tell_facts(stretch, after=telling, to_all=to_all)}
        results = dict(zip(told, await asyncio.gather(*told.values(), return_exceptions=True), strict=True))
        self._move({name: reached for name, reached in results.items() if isinstance(reached, Checkpoint)})
        for result in results.values():
            if isinstance(result, BaseException):
                raise result

    async def _tell_facts(
        self, stretch: Sequence[StoredFact], after: "asyncio.Future[Any]", *, to_all: bool
    ) -> Checkpoint | None:
        """Tell our neighbours the facts, and publish those that are new; gives how far that leads, None when none is.

        The commands go first: they have the longest way before them, and who reads the facts may share a process with a worker.
        """
        if not after.done():
            await asyncio.wait({after}, timeout=HEAD_START_S)
        self.tail.release(stretch[-1].position)
        return await self._publish_facts(stretch) if to_all else None

    async def _tell_what_waits(self) -> None:
        """Who is stopped lets no facts wait for others any more. What does not leave now leaves at the next start."""
        with suppress(BusUnavailable, TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                if reached := await self._publish_facts(self._held):
                    self._move({checkpoints.FACTS: reached})

    async def _publish_facts(self, stretch: Sequence[StoredFact]) -> Checkpoint | None:
        done, new = self._not_told(checkpoints.FACTS, stretch)
        if not new:
            return None
        headers = stretch_headers(done.position, new[-1].position, self._log_id)
        await self.bus.publish(FACTS, cloud_events(new, f"/lookup/{self._log_id}"), headers)
        log_head = done.log_head
        for stored in new:
            log_head = next_head(log_head, stored.position, hash_of(stored.state))
        self.counters.facts += len(new)
        return Checkpoint(new[-1].position, log_head)

    async def _tell_commands(self, stretch: Sequence[StoredFact]) -> Checkpoint | None:
        """As `_tell_facts`, with the commands that the new facts are about."""
        done, new = self._not_told(checkpoints.COMMANDS, stretch)
        if not new:
            return None
        commands = commands_of(new, self.now())
        await self._publish_commands(commands)
        self.counters.commands += sum(len(of_queue) for of_queue in commands.values())
        return Checkpoint(new[-1].position, done.log_head)

    def _not_told(self, name: str, stretch: Sequence[StoredFact]) -> tuple[Checkpoint, list[StoredFact]]:
        """A checkpoint, and what of a stretch lies behind it."""
        done = self.checkpoints[name]
        return done, [stored for stored in stretch if stored.position > done.position]

    def _move(self, reached: Mapping[str, Checkpoint]) -> None:
        """The broker has confirmed so far. What is not saved when we die is published again, which is promised."""
        if reached and not self._unsaved:
            self._save_at = asyncio.get_running_loop().time() + SAVE_AFTER_S
        self.checkpoints |= reached
        self._unsaved |= reached

    async def _save(self, ledger: RelayLedger) -> None:
        """Handed in at the same time, both checkpoints are moved in one statement."""
        unsaved, self._unsaved = self._unsaved, {}
        await asyncio.gather(*(ledger.move(name, reached) for name, reached in unsaved.items()))

    async def _publish_commands(self, commands: Mapping[Queue, Sequence[LookUp]]) -> None:
        """Publish in small batches, to all queues at once; a queue that takes nothing is tried again alone.

        Which of them it is, nobody tells: the others get their commands twice then, so for a while each queue is published to
        on its own. Raises `BusUnavailable` only when the broker takes nothing at all.
        """
        rounds = _rounds_of(commands)
        clock = asyncio.get_running_loop().time
        if clock() < self._apart_until:
            refused = list(range(len(rounds)))
        elif refused := await _not_taken(self.bus.publish_each(bodies) for bodies in rounds):
            self._apart_until = clock() + APART_S
        messages = [message for at in refused for message in rounds[at].items()]
        takes_some = len(refused) < len(rounds)
        for attempt in range(1, QUEUE_TRIES + 1):
            if not messages:
                return
            refused = await _not_taken(self.bus.publish(*message) for message in messages)
            if len(refused) == len(messages) and attempt == 1 and not takes_some:
                raise BusUnavailable("The broker takes no commands.")
            messages = [messages[at] for at in refused]
        if not messages:
            return
        # Raises when it is not these queues that are bad, but the broker that went down meanwhile: then nothing is passed over.
        await self.bus.read_epoch()
        for queue, _ in messages:
            log.error("Queue %s takes nothing; its tasks are dispatched again when they are due.", queue.name)

    async def _check_epoch(self) -> None:
        """A broker that lost our marker lost messages too, and one with another log's never had ours: publish the commands
        of all open tasks again, at once.
        """
        if await self.bus.read_epoch() == self._log_id:
            return
        published = await self._republish_open_tasks()
        await self.bus.write_epoch(self._log_id)
        self.counters.commands_again += published
        if published:
            log.warning("The broker has nothing of this log: the commands of %d open tasks were published again.", published)

    async def _republish_open_tasks(self) -> int:
        published = 0
        after: UUID | None = None
        passed = self.checkpoints[checkpoints.COMMANDS].position
        while job_ids := await self.store.open_streams(OPENING_TOPICS, CLOSING_TOPICS, after, REPUBLISH_PAGE):
            streams = await self.store.read(job_ids)
            commands: dict[Queue, list[LookUp]] = {}
            for stream in streams.values():
                for queue, command in _open_commands([stored for stored in stream if stored.position <= passed]):
                    commands.setdefault(queue, []).append(command)
                    published += 1
            if commands:
                await self._publish_commands(commands)
            after = job_ids[-1]
        return published


async def _not_taken(publishing: Iterable[Awaitable[None]]) -> list[int]:
    """Which of several publishes, all at once, the broker did not confirm."""
    results = await asyncio.gather(*publishing, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, BusUnavailable):
            raise result
    return [at for at, result in enumerate(results) if result is not None]


def _rounds_of(commands: Mapping[Queue, Sequence[LookUp]]) -> list[dict[Queue, bytes]]:
    """Each round has a small batch for each queue that has commands left."""
    longest = max(map(len, commands.values()), default=0)
    return [
        {queue: lines_of(items[at : at + COMMANDS_PER_MESSAGE]) for queue, items in commands.items() if at < len(items)}
        for at in range(0, longest, COMMANDS_PER_MESSAGE)
    ]


def commands_of(stretch: Sequence[StoredFact], now: datetime) -> dict[Queue, list[LookUp]]:
    """The commands that a stretch of the log tells workers, by queue. What has expired meanwhile is not worth sending."""
    commands: dict[Queue, list[LookUp]] = {}
    for stored in stretch:
        if stored.topic not in _DISPATCHED:
            continue
        fact = fact_of(stored.topic, stored.state)
        assert isinstance(fact, TasksDispatched)
        if fact.expires_at <= now or isinstance(fact.target, Erased):
            continue
        traceparent = envelope_of(stored.state).get("traceparent")
        for task in fact.tasks:
            queue = COMMANDS[task.service, fact.priority]
            commands.setdefault(queue, []).append(_command(fact, task, traceparent))
    return commands


_DISPATCHED = topics_of(TasksDispatched)


def _open_commands(stream: Sequence[StoredFact]) -> list[tuple[Queue, LookUp]]:
    """The last command of each task of a job that still waits for its outcome."""
    if not stream:
        return []
    facts: list[Fact] = [fact_of(stored.topic, stored.state) for stored in stream]
    saga = replay(facts)
    traceparent = envelope_of(stream[0].state).get("traceparent")
    last: dict[Service, tuple[TasksDispatched, Task]] = {
        task.service: (fact, task) for fact in facts if isinstance(fact, TasksDispatched) for task in fact.tasks
    }
    return [
        (COMMANDS[service, saga.submitted.priority], _command(*last[service], traceparent))
        for service, task in saga.open_tasks.items()
        if task.dispatched_at is not None and not isinstance(last[service][0].target, Erased)
    ]


def _command(fact: TasksDispatched, task: Task, traceparent: str | None) -> LookUp:
    assert not isinstance(fact.target, Erased)
    return LookUp(
        job_id=fact.job_id,
        command_id=task.command_id,
        service=task.service,
        attempt=task.attempt,
        target=fact.target,
        sensitivity=fact.sensitivity,
        timeout_s=task.timeout_s,
        max_age_s=task.max_age_s,
        expires_at=fact.expires_at,
        traceparent=traceparent,
    )
