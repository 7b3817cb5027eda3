"""Relay: follows the log in order and puts it on the broker: every stretch of facts, and each dispatched task as a command.

Promises:

- **At least once.** A checkpoint moves only after the broker confirmed. Facts and commands have their own.
- **One at a time.** The leader holds an advisory lock on a connection of its own, which the database ends when it falls silent
  (`idle_session_timeout`): a frozen leader loses the lock, and when it wakes it can only publish again what was published.
- **No queue holds up the rest.** A queue that takes nothing is tried again within a bound, then passed over: the deadlines
  dispatch its tasks again.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from psycopg import AsyncConnection, sql

from domain.commands import LookUp, lines_of
from domain.saga import replay
from events.bus import COMMANDS, FACTS, Bus, BusUnavailable, Queue
from events.catalog import TOPICS
from events.chain import next_head
from events.facts import Erased, Fact, JobCancelled, JobCompleted, JobFailed, JobSubmitted, Service, Task, TasksDispatched
from events.record import StoredFact, envelope_of, fact_of, hash_of
from events.store import EventStore
from events.wire import cloud_events, stretch_headers
from write_side import checkpoints

RELAY_LOCK = 0x72656C6179  # "relay"
LOG_CHANNEL = "stored_events"  # The eventsourcing library's NOTIFY channel is the name of its table.
STRETCH_MAX = 500
COMMANDS_PER_MESSAGE = 20
QUEUE_TRIES = 3
HEARTBEAT_S = 1.0
SILENCE_MAX_S = 5
EPOCH_INTERVAL_S = 2.0
REPUBLISH_PAGE = 200
CLOSING_TOPICS = tuple(TOPICS[fact] for fact in (JobCompleted, JobFailed, JobCancelled))

log = logging.getLogger(__name__)


class LeadershipLost(Exception):  # noqa: N818 - an outcome, in the field's words
    """Somebody else leads now, or the database ended our connection."""


@dataclass
class Checkpoint:
    position: int
    log_head: bytes


@dataclass
class Relay:
    """Follows the log while it leads; waits for its turn otherwise. Runs until cancelled or an error ends it."""

    database_url: str
    store: EventStore
    bus: Bus
    now: Callable[[], datetime]
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    leading: bool = False

    async def run(self) -> None:
        async with await AsyncConnection.connect(self.database_url, autocommit=True, connect_timeout=2) as conn:
            await self._become_leader(conn)
            self.leading = True
            try:
                await self._lead(conn)
            finally:
                self.leading = False

    async def _become_leader(self, conn: AsyncConnection) -> None:
        await conn.execute(sql.SQL("SET idle_session_timeout = {}").format(sql.Literal(f"{SILENCE_MAX_S}s")))
        # A checkpoint that a crash of the database takes back costs a second publish, which is promised anyway.
        await conn.execute("SET synchronous_commit = off")
        while True:
            cursor = await conn.execute("SELECT pg_try_advisory_lock(%s)", (RELAY_LOCK,))
            if await cursor.fetchone() == (True,):
                return
            await asyncio.sleep(HEARTBEAT_S)

    async def _lead(self, conn: AsyncConnection) -> None:
        await conn.execute(sql.SQL("LISTEN {}").format(sql.Identifier(LOG_CHANNEL)))
        rows = await (await conn.execute(checkpoints.SELECT)).fetchall()
        self.checkpoints = {name: Checkpoint(position, log_head) for name, position, log_head in rows}
        source = f"/lookup/{await self.store.log_id()}"
        epoch_checked_at = float("-inf")
        clock = asyncio.get_running_loop().time
        while True:
            if clock() - epoch_checked_at >= EPOCH_INTERVAL_S:
                await self._alive(conn, self._check_epoch())
                epoch_checked_at = clock()
            stretch = await self.store.read_all(min(c.position for c in self.checkpoints.values()), STRETCH_MAX)
            if stretch:
                await self._alive(conn, self._relay(conn, stretch, source))
            if len(stretch) < STRETCH_MAX:
                # What was committed meanwhile has notified us already: then this wait is none.
                await self._wait_for_more(conn)

    async def _wait_for_more(self, conn: AsyncConnection) -> None:
        """Until NOTIFY, but a second at most: a notification can be lost, and silence would cost the lock."""
        notified = False
        async for _ in conn.notifies(timeout=HEARTBEAT_S, stop_after=1):
            notified = True
        if not notified:
            await conn.execute("SELECT 1")

    async def _alive(self, conn: AsyncConnection, work: Awaitable[None]) -> None:
        """Await work and keep the connection, and with it the lock, alive meanwhile."""
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=HEARTBEAT_S))[0]:
                await conn.execute("SELECT 1")
            await task
        finally:
            task.cancel()

    async def _relay(self, conn: AsyncConnection, stretch: Sequence[StoredFact], source: str) -> None:
        """Publish a stretch; facts and commands go side by side, and neither's failure undoes the other."""
        results = await asyncio.gather(
            self._relay_commands(conn, stretch), self._relay_facts(conn, stretch, source), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _relay_facts(self, conn: AsyncConnection, stretch: Sequence[StoredFact], source: str) -> None:
        done = self.checkpoints[checkpoints.FACTS]
        new = [stored for stored in stretch if stored.position > done.position]
        if not new:
            return
        await self.bus.publish(FACTS, cloud_events(new, source), stretch_headers(done.position, new[-1].position))
        log_head = done.log_head
        for stored in new:
            log_head = next_head(log_head, stored.position, hash_of(stored.state))
        await self._move(conn, checkpoints.FACTS, new[-1].position, log_head)

    async def _relay_commands(self, conn: AsyncConnection, stretch: Sequence[StoredFact]) -> None:
        done = self.checkpoints[checkpoints.COMMANDS]
        new = [stored for stored in stretch if stored.position > done.position]
        if not new:
            return
        await self._publish_commands(commands_of(new, self.now()))
        await self._move(conn, checkpoints.COMMANDS, new[-1].position, done.log_head)

    async def _move(self, conn: AsyncConnection, name: str, position: int, log_head: bytes) -> None:
        cursor = await conn.execute(checkpoints.MOVE, (position, log_head, name, position))
        if cursor.rowcount != 1:
            raise LeadershipLost("The checkpoint stands further than ours: somebody else leads.")
        self.checkpoints[name] = Checkpoint(position, log_head)

    async def _publish_commands(self, commands: Mapping[Queue, Sequence[LookUp]]) -> None:
        """Publish in small batches. Raises `BusUnavailable` only when the broker takes nothing at all."""
        messages = [
            (queue, lines_of(items[first : first + COMMANDS_PER_MESSAGE]))
            for queue, items in commands.items()
            for first in range(0, len(items), COMMANDS_PER_MESSAGE)
        ]
        for attempt in range(1, QUEUE_TRIES + 1):
            results = await asyncio.gather(*(self.bus.publish(*message) for message in messages), return_exceptions=True)
            failed = [(message, result) for message, result in zip(messages, results, strict=True) if result is not None]
            unexpected = next((result for _, result in failed if not isinstance(result, BusUnavailable)), None)
            if unexpected is not None:
                raise unexpected
            if failed and len(failed) == len(messages) and attempt == 1:
                raise BusUnavailable("The broker takes no commands.")
            messages = [message for message, _ in failed]
            if not messages:
                return
        for queue, _ in messages:
            log.error("Queue %s takes nothing; its tasks are dispatched again when they are due.", queue.name)

    async def _check_epoch(self) -> None:
        """A broker that lost our marker lost messages too: publish the commands of all open tasks again, at once."""
        if await self.bus.read_epoch() is not None:
            return
        published = await self._republish_open_tasks()
        await self.bus.write_epoch(str(await self.store.log_id()))
        if published:
            log.warning("The broker came back empty: the commands of %d open tasks were published again.", published)

    async def _republish_open_tasks(self) -> int:
        published = 0
        after: UUID | None = None
        passed = self.checkpoints[checkpoints.COMMANDS].position
        while job_ids := await self.store.open_streams(TOPICS[JobSubmitted], CLOSING_TOPICS, after, REPUBLISH_PAGE):
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


def commands_of(stretch: Sequence[StoredFact], now: datetime) -> dict[Queue, list[LookUp]]:
    """The commands that a stretch of the log tells workers, by queue. What has expired meanwhile is not worth sending."""
    commands: dict[Queue, list[LookUp]] = {}
    for stored in stretch:
        if stored.topic != _DISPATCHED:
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


_DISPATCHED = TOPICS[TasksDispatched]


def _open_commands(stream: Sequence[StoredFact]) -> list[tuple[Queue, LookUp]]:
    """The last command of each task of a job that still waits for its outcome."""
    if not stream:
        return []
    facts: list[Fact] = [fact_of(stored.topic, stored.state) for stored in stream]
    saga = replay(facts)
    last: dict[Service, tuple[TasksDispatched, Task]] = {
        task.service: (fact, task) for fact in facts if isinstance(fact, TasksDispatched) for task in fact.tasks
    }
    return [
        (COMMANDS[service, saga.submitted.priority], _command(*last[service], None))
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
