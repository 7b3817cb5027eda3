"""Retry and discard, on a real PostgreSQL and, where it matters, on each transport."""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from uuid_utils.compat import uuid7

from domain.commands import LookUp, lines_of
from events.bus import COMMANDS, OUTCOMES, Bus, BusUnavailable, Queue
from events.facts import DeadLetterDiscarded, DeadLetterRetried, Priority
from events.memory import MemoryBus
from events.postgres import PostgresStore
from events.record import SALT_BYTES, envelope_of, fact_of
from events.store import Scribe, StoreUnavailable
from tests.builders import NOW, PING, given, job_failed, look_up_command, submitted
from tests.builders import counts as outcome_counts
from tests.servers.buses import TRANSPORTS, OpenBus, opening_buses
from write_side.dead_letters import DeadLetters, Keep, Letter, LetterState, open_letters
from write_side.redelivery import Judgement, LeftAlone, Pace, Redelivery

QUEUE = COMMANDS[PING, Priority.INTERACTIVE]
ALICE = Judgement("alice", "the worker was mended")
PATIENCE_S = 20.0
MANY = 100_000


@pytest.fixture
async def letters(migrated_database_url: str) -> AsyncIterator[DeadLetters]:
    async with open_letters(migrated_database_url) as opened:
        yield opened


@pytest.fixture
async def store(migrated_database_url: str) -> AsyncIterator[PostgresStore]:
    opened = PostgresStore(migrated_database_url, Scribe(lambda: NOW, uuid7, partial(os.urandom, SALT_BYTES)))
    yield opened
    await opened.close()


def letter(number: int, *, job_id: UUID | None = None, queue: Queue = QUEUE, died_after_s: float | None = None) -> Keep:
    command = look_up_command(PING, job_id=job_id or UUID(int=number), attempt=number)
    return Keep(
        message=f"message {number}",
        queue=queue.name,
        reason="delivered_too_often",
        body=lines_of([command]),
        headers={"traceparent": "00-1"},
        job_id=command.job_id,
        command_id=command.command_id,
        service="Ping",
        attempt=number,
        deliveries=3,
        died_at=NOW + timedelta(seconds=number if died_after_s is None else died_after_s),
    )


async def waiting(letters: DeadLetters) -> list[Letter]:
    return [one async for page in letters.pages(up_to=await letters.last_id()) for one in page]


async def by_state(letters: DeadLetters) -> dict[str, int]:
    numbers: Counter[str] = Counter()
    for count in await letters.counts():
        numbers[count.state.value] += count.count
    return dict(numbers)


def redelivery(letters: DeadLetters, store: PostgresStore, bus: Bus) -> Redelivery:
    return Redelivery(letters, store, bus, lambda: NOW, uuid7)


async def attempts_in(bus: Bus, queue: Queue, count: int) -> list[int]:
    """The attempts of the commands that arrive in a queue, in order."""
    inbox = bus.subscribe(queue, in_hand_max=count)
    await bus.start()
    taken: list[int] = []
    async with asyncio.timeout(PATIENCE_S):
        while len(taken) < count:
            deliveries = await inbox.take(count)
            await inbox.ack(deliveries)
            taken += [LookUp.model_validate_json(delivery.body).attempt for delivery in deliveries]
    return taken


class Journal(MemoryBus):
    """The in-memory bus, which tells what else had happened when it was asked to publish, and may be out of order."""

    def __init__(self, look: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        self._look = look
        self.seen: list[Any] = []
        self.works_for = 1_000_000

    async def publish(self, queue: Queue, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        if len(self.seen) >= self.works_for:
            raise BusUnavailable
        self.seen.append(self._look())
        await asyncio.sleep(0)
        await super().publish(queue, body, headers)


# --- Retry ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=TRANSPORTS)
async def open_bus(request: pytest.FixtureRequest) -> AsyncIterator[OpenBus]:
    async with opening_buses(request) as make:
        yield make


async def test_a_retried_letter_is_in_its_queue_again_as_it_was(
    open_bus: Callable[[], Bus], letters: DeadLetters, store: PostgresStore
) -> None:
    await letters.keep([letter(1), letter(2, queue=OUTCOMES)])
    bus = open_bus()
    await bus.start()

    await redelivery(letters, store, bus).retry(None, ALICE)

    reader = open_bus()
    inboxes = [reader.subscribe(queue, in_hand_max=4) for queue in (QUEUE, OUTCOMES)]
    if not isinstance(reader, MemoryBus):
        await reader.start()
    async with asyncio.timeout(PATIENCE_S):
        (command,), (outcome,) = [await inbox.take(4) for inbox in inboxes]
    assert (command.body, outcome.body) == (letter(1).body, letter(2).body)
    assert command.headers["traceparent"] == "00-1"
    assert not [name for name in command.headers if name.startswith("dead-letter")]
    assert await by_state(letters) == {"retried": 2}


async def test_it_is_recorded_who_retried_and_why(letters: DeadLetters, store: PostgresStore) -> None:
    await letters.keep([letter(1)])
    (one,) = await waiting(letters)

    await redelivery(letters, store, MemoryBus()).retry([one], ALICE)

    (stored,) = (await store.read([one.stream_id]))[one.stream_id]
    assert fact_of(stored.topic, stored.state) == DeadLetterRetried(
        letter_id=one.id, queue=QUEUE.name, job_id=one.job_id, by="alice", reason=ALICE.why, retried_at=NOW
    )
    envelope = envelope_of(stored.state)
    assert (envelope["actor"], envelope["reason"]) == ("alice", ALICE.why)
    assert envelope["causation_id"] == envelope["correlation_id"]
    row = await letters.read(one.id)
    assert row is not None
    assert (row.state, row.decided_by, row.why, row.decided_at) == ("retried", "alice", ALICE.why, NOW)


async def test_the_letters_of_one_job_keep_their_order(
    open_bus: Callable[[], Bus], letters: DeadLetters, store: PostgresStore
) -> None:
    """Many jobs go side by side, and those of one job are drained in any order; they died one after the other."""
    jobs = [uuid7() for _ in range(3)]
    kept = [letter(number, job_id=jobs[number % 3]) for number in range(1, 301)]
    await letters.keep(kept[::-1])
    bus = open_bus()
    await bus.start()

    await redelivery(letters, store, bus).retry(None, ALICE)

    arrived = await attempts_in(open_bus(), QUEUE, 300)
    for remainder in range(3):
        of_job = [attempt for attempt in arrived if attempt % 3 == remainder]
        assert of_job == sorted(of_job)
        assert len(of_job) == 100


async def test_nothing_is_recorded_before_it_is_published(letters: DeadLetters, store: PostgresStore) -> None:
    await letters.keep([letter(1), letter(2)])
    bus = Journal()
    bus.works_for = 1

    with pytest.raises(BusUnavailable):
        await redelivery(letters, store, bus).retry(None, ALICE)

    assert await by_state(letters) == {"retried": 1, "waiting": 1}
    assert len(await store.read_all(0, 10)) == 1
    bus.works_for = 2
    await redelivery(letters, store, bus).retry(None, ALICE)
    assert await by_state(letters) == {"retried": 2}
    assert len(bus.waiting(QUEUE.name)) == 2


async def test_who_dies_before_the_record_leaves_a_letter_that_waits(
    letters: DeadLetters, store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least once: it may be published a second time, and is never lost."""
    await letters.keep([letter(1)])
    bus = MemoryBus()

    async def dies(*_: object) -> None:
        raise StoreUnavailable

    with monkeypatch.context() as patched:
        patched.setattr(PostgresStore, "append", dies)
        with pytest.raises(StoreUnavailable):
            await redelivery(letters, store, bus).retry(None, ALICE)
    assert await by_state(letters) == {"waiting": 1}

    await redelivery(letters, store, bus).retry(None, ALICE)

    assert await by_state(letters) == {"retried": 1}
    assert len(bus.waiting(QUEUE.name)) == 2


async def test_a_row_that_was_not_reached_is_brought_up_to_date_and_nothing_is_published_for_it(
    letters: DeadLetters, store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await letters.keep([letter(1)])
    bus = MemoryBus()

    async def dies(*_: object) -> int:
        raise psycopg.OperationalError

    with monkeypatch.context() as patched:
        patched.setattr(DeadLetters, "decide", dies)
        with pytest.raises(psycopg.OperationalError):
            await redelivery(letters, store, bus).retry(None, ALICE)
    assert await by_state(letters) == {"waiting": 1}

    later = redelivery(letters, store, bus)
    await later.retry(None, Judgement("bob", None))

    (row,) = await letters.list(LetterState.RETRIED, after=0, limit=2)
    assert (row.decided_by, row.why) == ("alice", ALICE.why)
    assert len(bus.waiting(QUEUE.name)) == 1
    assert (later.tally.done, dict(later.tally.left)) == (0, {LeftAlone.DECIDED: 1})


async def test_a_letter_whose_job_has_ended_is_left_alone(letters: DeadLetters, store: PostgresStore) -> None:
    """Nobody waits for it; and an item that killed its workers would kill them for nobody."""
    ended, running = uuid7(), uuid7()
    closing = job_failed(outcome_counts(failed=1), job_id=ended, reason="none")
    await given(store, submitted(PING, job_id=ended), closing, job_id=ended)
    await given(store, submitted(PING, job_id=running), job_id=running)
    await letters.keep([letter(1, job_id=ended), letter(2, job_id=running), letter(3)])
    bus = MemoryBus()

    retrying = redelivery(letters, store, bus)
    await retrying.retry(None, ALICE)

    assert (retrying.tally.done, dict(retrying.tally.left)) == (2, {LeftAlone.JOB_ENDED: 1})
    assert [LookUp.model_validate_json(message.body).attempt for message in bus.waiting(QUEUE.name)] == [2, 3]
    assert await by_state(letters) == {"retried": 2, "waiting": 1}


async def test_a_letter_from_nowhere_cannot_be_retried(letters: DeadLetters, store: PostgresStore) -> None:
    await letters.keep([letter(1, queue=Queue("unknown"))])

    retrying = redelivery(letters, store, MemoryBus())
    await retrying.retry(None, ALICE)

    assert (retrying.tally.done, dict(retrying.tally.left)) == (0, {LeftAlone.NO_QUEUE: 1})
    assert await by_state(letters) == {"waiting": 1}


async def test_a_dry_run_says_what_would_be_done_and_changes_nothing(letters: DeadLetters, store: PostgresStore) -> None:
    await letters.keep([letter(1), letter(2), letter(3, queue=Queue("unknown"))])
    bus = Journal()

    trying = redelivery(letters, store, bus)
    await trying.retry(None, ALICE, dry_run=True)
    discarding = redelivery(letters, store, bus)
    await discarding.discard(None, ALICE, dry_run=True)

    assert (trying.tally.done, dict(trying.tally.left)) == (2, {LeftAlone.NO_QUEUE: 1})
    assert discarding.tally.done == 3
    assert bus.seen == []
    assert await by_state(letters) == {"waiting": 3}
    assert await store.head() == 0


async def test_a_rate_is_kept(letters: DeadLetters, store: PostgresStore) -> None:
    """A machine that stands still may bring two of them closer together, but none before its time."""
    await letters.keep([letter(number) for number in range(1, 9)])
    clock = asyncio.get_running_loop().time
    bus, began_at = Journal(clock), clock()

    await redelivery(letters, store, bus).retry(None, ALICE, rate=20.0)

    assert len(bus.seen) == 8
    assert all(at - began_at >= 0.9 * number / 20 for number, at in enumerate(bus.seen))


async def test_what_a_rate_has_missed_is_not_made_up_for() -> None:
    """A page that took long to be recorded is no reason to hurry with the next."""
    clock = asyncio.get_running_loop().time
    pace, passed = Pace(20.0), list[float]()
    await pace.wait()
    await asyncio.sleep(0.3)
    resumed_at = clock()

    for _ in range(4):
        await pace.wait()
        passed.append(clock())

    assert all(at - resumed_at >= 0.9 * number / 20 for number, at in enumerate(passed))


async def test_what_dies_again_while_all_are_retried_is_for_the_next_time(letters: DeadLetters, store: PostgresStore) -> None:
    """Else an item that kills its workers would be retried for ever."""
    await letters.keep([letter(1)])
    again = iter(range(2, 1_000))

    class Deadly(MemoryBus):
        async def publish(self, queue: Queue, body: bytes, headers: Mapping[str, str] | None = None) -> None:
            await super().publish(queue, body, headers)
            await letters.keep([letter(next(again))])

    retrying = redelivery(letters, store, Deadly())
    async with asyncio.timeout(PATIENCE_S):
        await retrying.retry(None, ALICE)

    assert retrying.tally.done == 1
    assert await by_state(letters) == {"retried": 1, "waiting": 1}


# --- Discard ----------------------------------------------------------------------------------------------------------


async def test_it_is_recorded_who_discarded_and_why(letters: DeadLetters, store: PostgresStore) -> None:
    await letters.keep([letter(1), letter(2)])
    (one, _) = await waiting(letters)
    bus = Journal()

    discarding = redelivery(letters, store, bus)
    await discarding.discard([one], Judgement("bob", "noise"))
    await redelivery(letters, store, bus).retry([one], ALICE)

    (stored,) = (await store.read([one.stream_id]))[one.stream_id]
    assert fact_of(stored.topic, stored.state) == DeadLetterDiscarded(
        letter_id=one.id, queue=QUEUE.name, job_id=one.job_id, by="bob", reason="noise", discarded_at=NOW
    )
    assert discarding.tally.done == 1
    assert await by_state(letters) == {"discarded": 1, "waiting": 1}
    assert bus.seen == []
    row = await letters.read(one.id)
    assert row is not None
    assert (row.body, row.decided_by, row.why) == (letter(1).body, "bob", "noise")


# --- Many -------------------------------------------------------------------------------------------------------------


class Counting(MemoryBus):
    """Counts what is published, and keeps nothing of it but the last number of each job."""

    def __init__(self) -> None:
        super().__init__()
        self.published = 0
        self.out_of_order = 0
        self.memory_max = 0
        self._last: dict[bytes, int] = {}

    async def publish(self, _: Queue, body: bytes, __: Mapping[str, str] | None = None) -> None:
        job, number, *_rest = body.split(b" ", 2)
        self.out_of_order += self._last.get(job, 0) >= int(number)
        self._last[job] = int(number)
        self.published += 1
        if self.published % 1_000 == 0:
            self.memory_max = max(self.memory_max, memory_now())


def memory_now() -> int:
    """The bytes of real memory that this process has."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(240)
async def test_a_hundred_thousand_are_counted_exactly_and_retried_in_order_and_constant_memory(
    letters: DeadLetters, store: PostgresStore, migrated_database_url: str
) -> None:
    """Their bodies alone are 50 MB."""
    fill(migrated_database_url, MANY)
    assert await by_state(letters) == {"waiting": MANY}
    bus = Counting()
    retrying = redelivery(letters, store, bus)
    memory_before = memory_now()

    await retrying.retry(None, ALICE)

    assert (bus.published, bus.out_of_order) == (MANY, 0)
    assert (retrying.tally.done, dict(retrying.tally.left)) == (MANY, {})
    assert await by_state(letters) == {"retried": MANY}
    assert facts_in(migrated_database_url) == MANY
    assert bus.memory_max - memory_before < 20_000_000


def fill(database_url: str, count: int) -> None:
    """Letters of 1,000 jobs, mixed, with bodies of half a kilobyte that begin with job and number."""
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute(
            "INSERT INTO dead_letters (message, queue, reason, body, headers, job_id, died_at)"
            " SELECT n::text, %s, 'delivered_too_often',"
            "        convert_to('job' || n %% 1000 || ' ' || rpad(n || chr(32), 500), 'utf8'), '{}',"
            "        md5((n %% 1000)::text)::uuid, now() + n * interval '1 ms'"
            " FROM generate_series(1, %s) AS n ORDER BY random()",
            (QUEUE.name, count),
        )
        conn.execute("ANALYZE dead_letters")


def facts_in(database_url: str) -> int:
    with psycopg.connect(database_url) as conn:
        row: Sequence[Any] | None = conn.execute(
            "SELECT count(*) FROM stored_events WHERE topic = 'lookup.DeadLetterRetried.v1' AND originator_version = 1"
        ).fetchone()
    assert row is not None
    return int(row[0])
