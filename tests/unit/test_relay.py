"""The relay over the in-memory twins: what has to have left before a checkpoint moves, and what holds nobody up."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext, suppress
from functools import partial
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from events.bus import COMMANDS, FACTS, Bus, BusUnavailable, Queue
from events.facts import Priority
from events.log_tail import LogTail
from events.memory import MemoryBus
from events.wire import stretch_of
from tests.builders import (
    GEOIP,
    NOW,
    PING,
    RDAP,
    Clock,
    dispatched,
    eventually,
    given,
    memory_store,
    remember,
    skipped,
    submitted,
)
from write_side import checkpoints
from write_side import relay as module
from write_side.checkpoints import Checkpoint
from write_side.memory import MemoryLedgers
from write_side.relay import CheckpointAhead, Relay

LANES = {service: COMMANDS[service, Priority.INTERACTIVE] for service in (PING, RDAP, GEOIP)}


class Ailing(MemoryBus):
    """A broker with queues that take nothing, and which goes down altogether after so many messages."""

    def __init__(self, *, broken: set[Queue], goes_down_after: int | None = None) -> None:
        super().__init__()
        self.broken = broken
        self.left = goes_down_after
        self.down = False
        self.refused = 0

    async def publish(self, queue: Queue, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        if self.down or queue in self.broken:
            self.refused += 1
            raise BusUnavailable
        await super().publish(queue, body, headers)
        if self.left is not None and queue != FACTS:
            self.left -= 1
            self.down = self.left == 0

    async def read_epoch(self) -> str | None:
        if self.down:
            raise BusUnavailable
        return await super().read_epoch()


class Slow(Ailing):
    """A broker that takes its time for commands."""

    def __init__(self) -> None:
        super().__init__(broken=set())
        self.asked = asyncio.Event()
        self.confirms = asyncio.Event()

    async def publish_each(self, bodies: Mapping[Queue, bytes]) -> None:
        self.asked.set()
        await self.confirms.wait()
        await super().publish_each(bodies)


class Relaying:
    """A log with one job for three services, and a relay between it and a broker."""

    def __init__(self, bus: Ailing) -> None:
        self.bus = bus
        self.store = memory_store()
        self.ledgers = MemoryLedgers(self.store)
        self.log_id: UUID | None = None
        self.tail = LogTail()

    async def begin(self) -> None:
        self.log_id = await self.store.log_id()
        await self.bus.write_epoch(str(self.log_id))
        await given(self.store, submitted(*LANES), dispatched(*LANES))

    async def remember(self) -> None:
        """The whole log was appended by the relay's own process."""
        remember(self.tail, await self.store.read_all(0, 100))

    @asynccontextmanager
    async def beside_a_projector(self) -> AsyncIterator[None]:
        """The same, and a projector in that process waits for it."""
        await self.begin()
        await self.remember()
        with self.tail.waking(asyncio.Event()):
            yield

    @asynccontextmanager
    async def running(self, bus: Bus) -> AsyncIterator["asyncio.Task[None]"]:
        task = asyncio.create_task(Relay(self.ledgers.open, self.store, bus, Clock(NOW), tail=self.tail).run())
        try:
            yield task
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, BusUnavailable, CheckpointAhead):
                await task

    def stands_at(self) -> int:
        return self.ledgers.checkpoints[checkpoints.COMMANDS].position

    def has_come_to(self, position: int) -> bool:
        return self.stands_at() == position

    def waiting(self) -> set[Queue]:
        return {queue for queue in LANES.values() if self.bus.waiting(queue.name)}


async def test_one_queue_that_takes_nothing_holds_up_nobody() -> None:
    relaying = Relaying(Ailing(broken={LANES[RDAP]}))
    await relaying.begin()

    async with relaying.running(relaying.bus):
        await eventually(lambda: relaying.stands_at() == 2)

    assert relaying.waiting() == {LANES[PING], LANES[GEOIP]}
    assert relaying.bus.refused == 1 + 3, "once among the others, and then alone"


async def test_a_queue_that_takes_nothing_costs_the_others_one_repetition() -> None:
    """Nobody tells which of several queues refused; each command that comes twice is looked up twice."""
    relaying = Relaying(Ailing(broken={LANES[RDAP]}))
    await relaying.begin()

    async with relaying.running(relaying.bus):
        for reached in (2, 4, 6):
            await eventually(partial(relaying.has_come_to, reached))
            job_id = uuid7()
            await given(relaying.store, submitted(*LANES, job_id=job_id), dispatched(*LANES, job_id=job_id), job_id=job_id)
        await eventually(lambda: relaying.stands_at() == 8)

    assert [len(relaying.bus.waiting(LANES[service].name)) for service in (PING, GEOIP)] == [4 + 1, 4]


async def test_a_broker_that_goes_down_halfway_is_not_taken_for_a_bad_queue() -> None:
    """What had not left yet would wait for its deadline, although the broker may be back in a second."""
    relaying = Relaying(Ailing(broken=set(), goes_down_after=1))
    await relaying.begin()

    async with relaying.running(relaying.bus) as relay:
        await eventually(relay.done)
    assert isinstance(relay.exception(), BusUnavailable)
    assert relaying.stands_at() == 0

    relaying.bus.down, relaying.bus.left = False, None
    async with relaying.running(relaying.bus):
        await eventually(lambda: relaying.stands_at() == 2)
    assert relaying.waiting() == set(LANES.values())


async def test_facts_are_told_when_the_commands_of_their_stretch_are_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEAD_START_S", 600.0)
    bus = Slow()
    relaying = Relaying(bus)
    await relaying.begin()

    async with relaying.running(bus):
        await eventually(bus.asked.is_set)
        await asyncio.sleep(0.01)
        assert not bus.waiting(FACTS.name)
        bus.confirms.set()
        await eventually(lambda: bool(bus.waiting(FACTS.name)))

    assert relaying.waiting() == set(LANES.values())


async def test_commands_that_nobody_confirms_keep_no_facts() -> None:
    bus = Slow()
    relaying = Relaying(bus)
    await relaying.begin()

    async with relaying.running(bus):
        await eventually(lambda: bool(bus.waiting(FACTS.name)))
        assert bus.asked.is_set()

    assert relaying.waiting() == set()


async def test_a_neighbour_has_facts_when_their_commands_are_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEAD_START_S", 600.0)
    monkeypatch.setattr(module, "TOGETHER_S", 600.0)
    bus = Slow()
    relaying = Relaying(bus)

    async with relaying.beside_a_projector(), relaying.running(bus):
        await eventually(bus.asked.is_set)
        await asyncio.sleep(0.01)
        assert relaying.tail.released == 0
        bus.confirms.set()
        await eventually(lambda: relaying.tail.released == 2)

    assert relaying.waiting() == set(LANES.values())


async def test_commands_that_nobody_confirms_keep_no_neighbour() -> None:
    bus = Slow()
    relaying = Relaying(bus)

    async with relaying.beside_a_projector(), relaying.running(bus):
        await eventually(lambda: relaying.tail.released == 2)
        assert bus.asked.is_set()

    assert relaying.waiting() == set()


async def test_facts_that_a_neighbour_has_leave_later_and_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOGETHER_S", 2.0)
    relaying = Relaying(Ailing(broken=set()))

    async with relaying.beside_a_projector(), relaying.running(relaying.bus):
        await eventually(lambda: relaying.stands_at() == 2)
        job_id = uuid7()
        await given(relaying.store, submitted(PING, job_id=job_id), skipped(PING, job_id=job_id), job_id=job_id)
        remember(relaying.tail, await relaying.store.read_all(2, 2))
        await eventually(lambda: relaying.stands_at() == 4)
        assert relaying.tail.released == 4
        assert not relaying.bus.waiting(FACTS.name)
        assert relaying.ledgers.checkpoints[checkpoints.FACTS].position == 0
        await eventually(lambda: relaying.ledgers.checkpoints[checkpoints.FACTS].position == 4)

    (stretch,) = relaying.bus.waiting(FACTS.name)
    assert stretch_of(stretch.headers) == (0, 4)


@pytest.mark.parametrize("why", ["nobody listens", "another process appended"])
async def test_facts_that_no_neighbour_has_leave_at_once(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    monkeypatch.setattr(module, "TOGETHER_S", 600.0)
    relaying = Relaying(Ailing(broken=set()))
    await relaying.begin()
    heard = nullcontext() if why == "nobody listens" else relaying.tail.waking(asyncio.Event())
    if why == "nobody listens":
        await relaying.remember()

    with heard:
        async with relaying.running(relaying.bus):
            await eventually(lambda: bool(relaying.bus.waiting(FACTS.name)))

    assert relaying.waiting() == set(LANES.values())


@pytest.mark.parametrize("broker", ["is there", "is down"])
async def test_facts_that_wait_leave_when_the_relay_is_stopped_or_when_it_starts_again(
    monkeypatch: pytest.MonkeyPatch, broker: str
) -> None:
    monkeypatch.setattr(module, "TOGETHER_S", 600.0)
    relaying = Relaying(Ailing(broken=set()))
    async with relaying.beside_a_projector(), relaying.running(relaying.bus):
        await eventually(lambda: relaying.stands_at() == 2)
        assert not relaying.bus.waiting(FACTS.name)
        relaying.bus.down = broker == "is down"
    if broker == "is down":
        assert not relaying.bus.waiting(FACTS.name)
        relaying.bus.down = False
        async with relaying.running(relaying.bus):
            await eventually(lambda: bool(relaying.bus.waiting(FACTS.name)))

    (stretch,) = relaying.bus.waiting(FACTS.name)
    assert stretch_of(stretch.headers) == (0, 2)
    assert relaying.ledgers.checkpoints[checkpoints.FACTS].position == 2
    assert len(relaying.bus.waiting(LANES[PING].name)) == 1, "the command left once"


async def test_a_broker_that_served_another_log_is_told_of_all_open_tasks() -> None:
    """After a restore the broker may be full of what the lost log told, and its marker is that log's."""
    relaying = Relaying(Ailing(broken=set()))
    await relaying.begin()
    relaying.ledgers.checkpoints[checkpoints.COMMANDS] = Checkpoint(2, bytes(32))
    await relaying.bus.write_epoch("another-log")

    async with relaying.running(relaying.bus):
        await eventually(lambda: relaying.waiting() == set(LANES.values()))
        await eventually(lambda: relaying.bus.epoch() == str(relaying.log_id))


async def test_a_checkpoint_beyond_the_end_of_the_log_is_refused() -> None:
    """What comes to lie below it would never be told."""
    relaying = Relaying(Ailing(broken=set()))
    await relaying.begin()
    relaying.ledgers.checkpoints[checkpoints.FACTS] = Checkpoint(3, bytes(32))

    async with relaying.running(relaying.bus) as relay:
        await eventually(relay.done)

    assert isinstance(relay.exception(), CheckpointAhead)
    assert relaying.waiting() == set()


class Lingering(Ailing):
    """A broker whose answer is waited for, and that takes a moment to be let go of."""

    def __init__(self) -> None:
        super().__init__(broken=set())
        self.asked = False
        self.let_go = False

    async def read_epoch(self) -> str | None:
        self.asked = True
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        try:
            return await answer
        finally:
            await asyncio.sleep(0.05)
            self.let_go = True


async def test_a_relay_that_has_ended_does_nothing_any_more() -> None:
    """Its bus is stopped next: what still worked on it then would open connections that nobody closes."""
    bus = Lingering()
    relaying = Relaying(bus)
    async with relaying.running(bus):
        await eventually(lambda: bus.asked)

    assert bus.let_go


async def test_a_relay_that_is_stopped_has_saved_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not saved is published again, and looked up again."""
    monkeypatch.setattr(module, "SAVE_AFTER_S", 3600.0)
    relaying = Relaying(Ailing(broken=set()))
    await relaying.begin()

    async with relaying.running(relaying.bus):
        await eventually(lambda: relaying.waiting() == set(LANES.values()) and bool(relaying.bus.waiting(FACTS.name)))
        assert relaying.stands_at() == 0

    assert {name: one.position for name, one in relaying.ledgers.checkpoints.items()} == {"commands": 2, "facts": 2}


async def test_what_left_is_saved_though_the_rest_does_not_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start would else publish all commands once more, for as long as the queue of the facts is bad."""
    monkeypatch.setattr(module, "SAVE_AFTER_S", 3600.0)
    relaying = Relaying(Ailing(broken={FACTS}))
    await relaying.begin()

    async with relaying.running(relaying.bus) as relay:
        await eventually(relay.done)

    assert isinstance(relay.exception(), BusUnavailable)
    assert {name: one.position for name, one in relaying.ledgers.checkpoints.items()} == {"commands": 2, "facts": 0}


async def test_what_is_published_is_saved_after_a_moment_of_quiet_and_under_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVE_AFTER_S", 0.2)
    relaying = Relaying(Ailing(broken=set()))
    await relaying.begin()
    loop = asyncio.get_running_loop()

    async with relaying.running(relaying.bus):
        await eventually(lambda: relaying.stands_at() == 2)
        busy_until = loop.time() + 2.0
        appended = 2
        while loop.time() < busy_until and relaying.stands_at() == 2:
            job_id = uuid7()
            await given(relaying.store, submitted(*LANES, job_id=job_id), dispatched(*LANES, job_id=job_id), job_id=job_id)
            appended += 2
            await asyncio.sleep(0.01)
        saved_under_load = relaying.stands_at()
        await eventually(lambda: relaying.stands_at() == appended)

    assert saved_under_load > 2
