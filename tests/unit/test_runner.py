"""The runner's promises, with a lookup that does as it is told and everything else real or the product's own twin."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, cast
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from domain.commands import Deferred, Failed, LookUp, Succeeded, TaskOutcome, TimedOut, lines_of
from events import dead_letters
from events.bus import COMMANDS, DEAD_LETTERS, OUTCOMES, BusUnavailable, Delivery, Inbox, Queue
from events.facts import DeferReason, Priority, RawAbsence, ResultReference, Service, Target
from events.memory import MemoryBus, MemoryInbox
from results.documents import DOCUMENT_BYTES_MAX, MemoryDocuments, ResultsUnavailable, reference_to
from tests.builders import ADDRESS, PING, eventually, look_up_command
from workers import runner
from workers.lookup import Answer, LookupDeferred, LookupFailed, RawAnswer, Result
from workers.lookup import LookUp as LookUpOf
from workers.runner import SUSPECT_AFTER, TRIALS_MAX, Outbox, Worker
from workers.trials import MemoryTrials

PATIENCE_S = 10.0
QUEUE = COMMANDS[PING, Priority.INTERACTIVE]


class Echo(Result):
    """What the lookups of these tests bring."""

    text: str


Behaviour = Callable[[Target], Awaitable[Result | Answer[Result]]]


def answering(behaviour: Behaviour) -> LookUpOf:
    """A lookup that brings what the behaviour brings; of a bare result, nothing that it was made of."""

    async def look_up(target: Target) -> Answer[Result]:
        brought = await behaviour(target)
        return brought if isinstance(brought, Answer) else Answer(brought)

    return look_up


async def answer(target: Target) -> Result:
    return Echo(text=target.raw)


async def never(_: Target) -> Result:
    await asyncio.Event().wait()
    raise AssertionError


class Journal:
    """What was done, in order, by the parts that a runner is given."""

    def __init__(self) -> None:
        self.entries: list[str] = []

    def index(self, entry: str) -> int:
        return self.entries.index(entry)


class WatchedBus(MemoryBus):
    """The in-memory bus, but it tells what was done when, and confirms nothing for a queue that is out of order."""

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self.journal = journal
        self.out_of_order: set[Queue] = set()
        self.takes_its_time = False

    async def publish(self, queue: Queue, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        if queue in self.out_of_order:
            self.journal.entries.append(f"refused {queue.name}")
            raise BusUnavailable
        await super().publish(queue, body, headers)
        if self.takes_its_time:
            await asyncio.sleep(0.01)
        self.journal.entries.append(f"published {queue.name}")


class WatchedInbox:
    """An inbox that tells when something was acknowledged."""

    def __init__(self, inbox: Inbox, journal: Journal) -> None:
        self._inbox = inbox
        self._journal = journal

    async def take(self, limit: int) -> list[Delivery]:
        return await self._inbox.take(limit)

    def waiting(self) -> list[Delivery]:
        return self._inbox.waiting()

    async def close(self) -> None:
        await self._inbox.close()

    async def drain(self) -> None:
        await self._inbox.drain()

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        await self._inbox.ack(deliveries)
        self._journal.entries.append("acknowledged")


class WatchedDocuments(MemoryDocuments):
    """The in-memory documents, which cannot be reached the first few times."""

    def __init__(self, journal: Journal, refusals: int = 0) -> None:
        super().__init__()
        self._journal = journal
        self._refusals = refusals

    async def put(self, job_id: UUID, document: bytes, *, shown: bool = True) -> ResultReference:
        if self._refusals:
            self._refusals -= 1
            self._journal.entries.append("not stored")
            raise ResultsUnavailable
        reference = await super().put(job_id, document, shown=shown)
        self._journal.entries.append("stored")
        return reference


class Workshop:
    """A worker on its bus. `outcomes` are taken off the queue as they come; what it has in hand is in `inboxes`."""

    def __init__(self, look_up: Behaviour, *, concurrency: int = 64, refusals: int = 0) -> None:
        self.journal = Journal()
        self.bus = WatchedBus(self.journal)
        self.documents = WatchedDocuments(self.journal, refusals)
        outbox = Outbox(self.bus)
        self.worker = Worker(PING, answering(look_up), self.bus, outbox, self.documents, "worker-1", _utc_now, concurrency)
        self.inboxes = self.worker.subscribe()
        self._told = self.bus.subscribe(OUTCOMES, in_hand_max=1_000)
        self._dead = self.bus.subscribe(DEAD_LETTERS, in_hand_max=1_000)
        self._task: asyncio.Task[None] | None = None

    async def send(self, *items: LookUp, queue: Queue = QUEUE) -> None:
        await self.bus.publish(queue, lines_of(items))

    async def delivered_before(self, *items: LookUp, times: int) -> None:
        """A message that has been handed out so often already, each time to a worker that died of it."""
        await self.send(*items)
        await self.died(times=times)

    async def died(self, *, times: int) -> None:
        inbox = cast("MemoryInbox", self.inboxes[QUEUE])
        for _ in range(times):
            await inbox.take(100)
            await inbox.give_back()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        watched: dict[Queue, Inbox] = {queue: WatchedInbox(inbox, self.journal) for queue, inbox in self.inboxes.items()}
        self._task = asyncio.create_task(self.worker.run(watched))
        try:
            yield
        finally:
            await self.stop()

    async def stop(self) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task}, timeout=PATIENCE_S)
        assert self._task.done()

    def has_ended(self) -> bool:
        return self._task is not None and self._task.done()

    def is_cancelled(self) -> bool:
        return self._task is not None and self._task.cancelled()

    async def outcomes(self, count: int) -> list[TaskOutcome]:
        found: list[TaskOutcome] = []
        async with asyncio.timeout(PATIENCE_S):
            while len(found) < count:
                for delivery in await self._told.take(100):
                    found += [TaskOutcome.model_validate_json(line) for line in delivery.body.split(b"\n")]
        return found

    async def outcome(self) -> TaskOutcome:
        (only,) = await self.outcomes(1)
        return only

    async def acknowledged(self, count: int = 1) -> None:
        await eventually(lambda: self.journal.entries.count("acknowledged") == count)

    async def dead_letters(self) -> list[Delivery]:
        return await _what_is_there(self._dead)

    async def told(self) -> list[Delivery]:
        return await _what_is_there(self._told)

    async def would_come(self, queue: Queue = QUEUE) -> list[tuple[list[LookUp], int]]:
        """What another worker would be handed now: the items and delivery count of each message."""
        await cast("MemoryInbox", self.inboxes[queue]).give_back()
        return [
            ([LookUp.model_validate_json(line) for line in delivery.body.split(b"\n")], delivery.delivery_count)
            for delivery in await _what_is_there(self.bus.subscribe(queue, in_hand_max=100))
        ]


async def _what_is_there(inbox: Inbox) -> list[Delivery]:
    found: list[Delivery] = []
    with suppress(TimeoutError):
        while True:
            async with asyncio.timeout(0.02):
                found += await inbox.take(100)
    return found


def _utc_now() -> datetime:
    return datetime.now(UTC)


def item(text: str = "a", *, timeout_s: float = 5.0, lives_s: float = 60.0) -> LookUp:
    """A command of a job of its own; its target's raw text is what the lookups here go by."""
    return look_up_command(
        job_id=uuid7(),
        target=ADDRESS.model_copy(update={"raw": text}),
        timeout_s=timeout_s,
        expires_at=_utc_now() + timedelta(seconds=lives_s),
    )


@pytest.fixture
def quick_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause is for the sake of a server that is down, not the test's."""
    monkeypatch.setattr(runner, "PAUSE_S", 0.01)


# --- How an attempt ends ----------------------------------------------------------------------------------------------


async def test_an_answer_is_stored_then_told_then_acknowledged() -> None:
    workshop = Workshop(answer)
    command = item("hello")

    async with workshop.running():
        await workshop.send(command)
        outcome = await workshop.outcome()
        await workshop.acknowledged()

    reference = reference_to(command.job_id, b'{"text":"hello"}')
    assert isinstance(outcome.ending, Succeeded)
    assert outcome.ending.result == reference
    assert await workshop.documents.get([reference]) == {reference.location.key: b'{"text":"hello"}'}
    stages = [workshop.journal.index(entry) for entry in ("stored", f"published {OUTCOMES.name}", "acknowledged")]
    assert stages == sorted(stages)


async def test_an_outcome_tells_whose_it_is() -> None:
    workshop = Workshop(answer)
    command = item().model_copy(update={"attempt": 2})

    async with workshop.running():
        await workshop.send(command)
        outcome = await workshop.outcome()

    assert (outcome.job_id, outcome.command_id, outcome.service, outcome.attempt, outcome.worker) == (
        command.job_id,
        command.command_id,
        PING,
        2,
        "worker-1",
    )
    assert 0 <= outcome.duration_ms < 5_000


async def test_a_failure_is_told_with_its_code_and_sentence() -> None:
    async def refused(_: Target) -> Result:
        raise LookupFailed("refused", "The server refuses to answer.")

    workshop = Workshop(refused)
    async with workshop.running():
        await workshop.send(item())
        ending = (await workshop.outcome()).ending

    assert isinstance(ending, Failed)
    assert (ending.error.code, ending.error.message, ending.transient) == ("refused", "The server refuses to answer.", False)


async def test_a_transient_failure_is_tried_again_within_the_attempt() -> None:
    tries: list[str] = []

    async def better_the_second_time(target: Target) -> Result:
        tries.append(target.raw)
        if len(tries) == 1:
            raise LookupFailed("reset", "The connection broke.", transient=True)
        return Echo(text="at last")

    workshop = Workshop(better_the_second_time)
    async with workshop.running():
        await workshop.send(item())
        outcome = await workshop.outcome()

    assert isinstance(outcome.ending, Succeeded)
    assert len(tries) == 2


async def test_a_permanent_failure_is_not_tried_again() -> None:
    tries: list[str] = []

    async def refused(target: Target) -> Result:
        tries.append(target.raw)
        raise LookupFailed("refused", "The server refuses to answer.")

    workshop = Workshop(refused)
    async with workshop.running():
        await workshop.send(item())
        await workshop.outcome()

    assert len(tries) == 1


async def test_a_failure_that_stays_transient_is_told_as_such() -> None:
    async def down(_: Target) -> Result:
        raise LookupFailed("down", "The server is down.", transient=True)

    workshop = Workshop(down)
    async with workshop.running():
        await workshop.send(item())
        ending = (await workshop.outcome()).ending

    assert isinstance(ending, Failed)
    assert ending.transient


async def test_a_failure_is_told_as_what_it_was_though_there_is_no_time_for_another_try() -> None:
    """What the first try heard is an answer to why; that the second was cut off is none."""
    tries: list[str] = []

    async def down_and_then_silent(target: Target) -> Result:
        tries.append(target.raw)
        if len(tries) > 1:
            return await never(target)
        raise LookupFailed("down", "The server is down.", transient=True)

    workshop = Workshop(down_and_then_silent)
    async with workshop.running():
        await workshop.send(item(timeout_s=1.5))
        outcome = await workshop.outcome()

    assert isinstance(outcome.ending, Failed)
    assert (outcome.ending.error.code, outcome.ending.transient) == ("down", True)
    assert outcome.duration_ms < 5_000


async def test_an_attempt_that_runs_out_of_time_is_ended_and_told_as_timed_out() -> None:
    workshop = Workshop(never)
    async with workshop.running():
        await workshop.send(item(timeout_s=0.05))
        outcome = await workshop.outcome()

    assert isinstance(outcome.ending, TimedOut)
    assert outcome.duration_ms >= 50


async def test_a_lookup_that_may_not_ask_now_is_deferred_until_then() -> None:
    async def over_quota(_: Target) -> Result:
        raise LookupDeferred(DeferReason.QUOTA, 12.5)

    workshop = Workshop(over_quota)
    before = _utc_now()
    async with workshop.running():
        await workshop.send(item())
        ending = (await workshop.outcome()).ending

    assert isinstance(ending, Deferred)
    assert ending.reason is DeferReason.QUOTA
    assert timedelta(0) <= ending.until - before - timedelta(seconds=12.5) < timedelta(seconds=5)


async def test_an_unexpected_error_is_told_without_its_text_and_logged_with_it(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(_: Target) -> Result:
        raise KeyError("password=hunter2")

    workshop = Workshop(broken)
    async with workshop.running():
        with caplog.at_level(logging.ERROR, logger="workers.runner"):
            await workshop.send(item())
            outcome = await workshop.outcome()

    assert isinstance(outcome.ending, Failed)
    assert (outcome.ending.error.code, outcome.ending.transient) == ("internal_error", False)
    assert "hunter2" not in outcome.model_dump_json()
    assert "hunter2" in caplog.text


async def test_an_answer_that_is_too_large_to_keep_is_a_failure_of_its_own() -> None:
    async def large(_: Target) -> Result:
        return Echo(text="x" * DOCUMENT_BYTES_MAX)

    workshop = Workshop(large)
    async with workshop.running():
        await workshop.send(item())
        ending = (await workshop.outcome()).ending

    assert isinstance(ending, Failed)
    assert ending.error.code == "answer_too_large"
    assert "stored" not in workshop.journal.entries


# --- What was said ----------------------------------------------------------------------------------------------------

RAW = RawAnswer({"asked": "who"}, b"somebody")


async def told(_: Target) -> Answer[Result]:
    """An answer that somebody gave, and that can be read again."""
    return Answer(Echo(text="somebody"), "rdap.example.net", "rdap/1", RAW)


async def test_what_was_said_is_stored_with_the_result_before_the_outcome_is_told() -> None:
    workshop = Workshop(told)
    async with workshop.running():
        await workshop.send(item())
        ending = (await workshop.outcome()).ending

    assert isinstance(ending, Succeeded)
    assert ending.raw is not None
    assert (ending.provider, ending.parser, ending.raw_absent) == ("rdap.example.net", "rdap/1", None)
    assert await workshop.documents.get([ending.raw]) == {ending.raw.location.key: RAW.stored()}
    assert await workshop.documents.get([ending.result]) == {ending.result.location.key: b'{"text":"somebody"}'}
    told_at = workshop.journal.index(f"published {OUTCOMES.name}")
    assert workshop.journal.entries[:told_at].count("stored") == 2


@pytest.mark.parametrize(
    ("raw_bytes_max", "absent"),
    [
        (len(RAW.stored()), None),
        (len(RAW.stored()) - 1, RawAbsence.TOO_LARGE),
        (0, RawAbsence.SWITCHED_OFF),
    ],
)
async def test_what_was_said_is_kept_up_to_a_bound_and_it_is_told_when_it_is_not(
    raw_bytes_max: int, absent: RawAbsence | None
) -> None:
    """The answer counts all the same."""
    workshop = Workshop(told)
    workshop.worker.raw_bytes_max = raw_bytes_max
    async with workshop.running():
        await workshop.send(item())
        ending = (await workshop.outcome()).ending

    assert isinstance(ending, Succeeded)
    assert ending.raw_absent is absent
    assert (ending.raw is None) == (absent is not None)
    assert ending.parser == "rdap/1"
    assert workshop.journal.entries.count("stored") == (1 if absent else 2)


async def test_where_nothing_was_said_nothing_is_told_of_it() -> None:
    workshop = Workshop(answer)
    async with workshop.running():
        await workshop.send(item())
        ending = (await workshop.outcome()).ending

    assert isinstance(ending, Succeeded)
    assert (ending.provider, ending.parser, ending.raw, ending.raw_absent) == (None, None, None, None)


async def test_a_store_that_is_down_is_waited_for_with_all_that_is_to_be_kept() -> None:
    workshop = Workshop(told, refusals=1)
    async with workshop.running():
        await workshop.send(item())
        ending = (await workshop.outcome()).ending

    assert isinstance(ending, Succeeded)
    assert ending.raw is not None
    assert len(await workshop.documents.get([ending.raw, ending.result])) == 2


async def test_an_item_whose_job_has_expired_is_dropped_without_a_question_or_an_outcome() -> None:
    asked: list[str] = []

    async def remember(target: Target) -> Result:
        asked.append(target.raw)
        return await answer(target)

    workshop = Workshop(remember)
    async with workshop.running():
        await workshop.send(item("late", lives_s=-1), item("in time"))
        outcome = await workshop.outcome()
        await workshop.acknowledged()

    assert isinstance(outcome.ending, Succeeded)
    assert asked == ["in time"]
    assert await workshop.told() == []
    assert (workshop.worker.counters.expired, workshop.worker.counters.reported) == (1, 1)


class NobodyWaits:
    """Says of every item that nobody waits for it, and remembers who asked."""

    def __init__(self) -> None:
        self.asked_about: list[LookUp] = []

    async def is_wanted(self, item: LookUp) -> bool:
        self.asked_about.append(item)
        return False


def aged(seconds: float, **changes: Any) -> LookUp:
    """An item whose command was made so long ago."""
    made_at_ms = int((_utc_now() - timedelta(seconds=seconds)).timestamp() * 1000)
    return item().model_copy(update={"command_id": UUID(int=made_at_ms << 80 | 7 << 76 | 2 << 62 | 1), **changes})


@pytest.mark.parametrize(
    ("late", "deliveries_before"),
    [(partial(aged, 31), 0), (partial(aged, 0, attempt=2), 0), (partial(aged, 0), 1)],
    ids=["old", "a further attempt", "delivered again"],
)
async def test_an_item_that_comes_late_and_that_nobody_waits_for_is_dropped_unasked(
    late: Callable[[], LookUp], deliveries_before: int
) -> None:
    asked: list[str] = []

    async def remember(target: Target) -> Result:
        asked.append(target.raw)
        return await answer(target)

    workshop = Workshop(remember)
    workshop.worker.standing = NobodyWaits()
    await workshop.delivered_before(late(), times=deliveries_before)

    async with workshop.running():
        await workshop.acknowledged()

    assert asked == []
    assert await workshop.told() == []
    assert (workshop.worker.counters.superseded, workshop.worker.counters.reported) == (1, 0)


async def test_nobody_is_asked_about_an_item_that_comes_in_time() -> None:
    """A question for each would cost every lookup a query, and the answer is known."""
    workshop = Workshop(answer)
    workshop.worker.standing = standing = NobodyWaits()

    async with workshop.running():
        await workshop.send(aged(25), item())
        await workshop.outcomes(2)

    assert standing.asked_about == []


async def test_a_late_item_that_somebody_waits_for_is_looked_up() -> None:
    workshop = Workshop(answer)

    async with workshop.running():
        await workshop.send(aged(31))
        assert isinstance((await workshop.outcome()).ending, Succeeded)


# --- What is down -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_pauses")
async def test_a_document_store_that_is_down_is_waited_for_and_is_no_failed_lookup() -> None:
    workshop = Workshop(answer, refusals=3)
    async with workshop.running():
        await workshop.send(item())
        outcome = await workshop.outcome()

    assert isinstance(outcome.ending, Succeeded)
    assert workshop.journal.entries.count("not stored") == 3


@pytest.mark.usefixtures("quick_pauses")
async def test_an_answer_that_cannot_be_stored_before_its_job_expires_is_dropped() -> None:
    workshop = Workshop(answer, refusals=1_000_000)
    async with workshop.running():
        await workshop.send(item(lives_s=0.1))
        await workshop.acknowledged()

    assert await workshop.told() == []
    assert workshop.worker.counters.expired == 1


@pytest.mark.usefixtures("quick_pauses")
async def test_nothing_is_acknowledged_before_its_outcome_is_confirmed() -> None:
    workshop = Workshop(answer)
    workshop.bus.out_of_order = {OUTCOMES}
    async with workshop.running():
        await workshop.send(item())
        await eventually(lambda: workshop.journal.entries.count(f"refused {OUTCOMES.name}") >= 3)
        assert "acknowledged" not in workshop.journal.entries

        workshop.bus.out_of_order = set()
        await workshop.outcome()
        await workshop.acknowledged()

    assert workshop.journal.entries.count("stored") == 1


# --- Messages ---------------------------------------------------------------------------------------------------------


async def test_each_outcome_leaves_when_its_own_item_ends() -> None:
    async def one_hangs(target: Target) -> Result:
        return await (never if target.raw == "slow" else answer)(target)

    workshop = Workshop(one_hangs)
    quick, slow = item("quick"), item("slow")
    async with workshop.running():
        await workshop.send(slow, quick)
        outcome = await workshop.outcome()

    assert outcome.job_id == quick.job_id


async def test_a_message_that_comes_back_is_split_into_single_items_before_anything_is_tried() -> None:
    """One of its items may have killed the last worker. `concurrency=1` and a lookup that hangs: nothing else can end it."""
    asked: list[str] = []

    async def remember(target: Target) -> Result:
        asked.append(target.raw)
        return await never(target)

    workshop = Workshop(remember, concurrency=1)
    items = [item("a"), item("b"), item("c")]
    await workshop.delivered_before(*items, times=1)

    async with workshop.running():
        await eventually(lambda: bool(asked))

    # Two sent it first; three messages of one item each replaced it; none of them counts as delivered more than once.
    assert workshop.journal.entries.count(f"published {QUEUE.name}") >= 4
    would_come = await workshop.would_come()
    assert sorted(command.target.raw for commands, _ in would_come for command in commands) == ["a", "b", "c"]
    assert all(len(commands) == 1 for commands, _ in would_come)
    split = [number for number, entry in enumerate(workshop.journal.entries) if entry == f"published {QUEUE.name}"][1:4]
    assert workshop.journal.index("acknowledged") > max(split)


async def test_a_split_message_is_worked_off_item_by_item() -> None:
    workshop = Workshop(answer)
    items = [item("a"), item("b"), item("c")]
    await workshop.delivered_before(*items, times=2)

    async with workshop.running():
        outcomes = await workshop.outcomes(3)
        await workshop.acknowledged(4)

    assert {outcome.job_id for outcome in outcomes} == {command.job_id for command in items}


async def test_a_single_item_that_comes_back_is_tried_again_up_to_the_bound() -> None:
    workshop = Workshop(answer)
    await workshop.delivered_before(item(), times=SUSPECT_AFTER)

    async with workshop.running():
        assert isinstance((await workshop.outcome()).ending, Succeeded)

    assert await workshop.dead_letters() == []


async def test_an_item_that_kills_its_workers_is_buried_and_its_task_fails() -> None:
    asked: list[str] = []

    async def deadly(target: Target) -> Result:
        asked.append(target.raw)
        return await answer(target)

    workshop = Workshop(deadly)
    command = item("deadly")
    await workshop.delivered_before(command, times=SUSPECT_AFTER)
    for _ in range(TRIALS_MAX):
        await workshop.worker.trials.begin(command.command_id)

    async with workshop.running():
        outcome = await workshop.outcome()
        await workshop.acknowledged()

    assert asked == []
    assert isinstance(outcome.ending, Failed)
    assert (outcome.ending.error.code, outcome.ending.transient) == ("worker_crashed", False)
    assert (outcome.job_id, outcome.command_id) == (command.job_id, command.command_id)
    (letter,) = await workshop.dead_letters()
    assert LookUp.model_validate_json(letter.body) == command
    assert (letter.headers[dead_letters.QUEUE], letter.headers[dead_letters.REASON]) == (QUEUE.name, "delivered_too_often")


async def test_suspects_are_tried_one_at_a_time_and_what_ends_is_no_suspect_any_more() -> None:
    """When a worker dies, everything in hand was handed out in vain: only who was alone with its death is at fault."""
    under_way, most = 0, 0

    async def watched(target: Target) -> Result:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        return await answer(target)

    workshop = Workshop(watched)
    for number in range(5):
        await workshop.send(item(f"bystander {number}"))
    await workshop.died(times=SUSPECT_AFTER + 5)

    async with workshop.running():
        outcomes = await workshop.outcomes(5)

    assert all(isinstance(outcome.ending, Succeeded) for outcome in outcomes)
    assert most == 1
    assert await workshop.dead_letters() == []
    assert cast("MemoryTrials", workshop.worker.trials).begun == {}


async def test_no_item_of_a_batch_that_came_back_is_begun_before_the_batch_is_acknowledged() -> None:
    """One that kills its worker would else bring the whole batch back, each time as so many more messages."""
    seen: list[bool] = []
    workshop: Workshop

    async def deadly(target: Target) -> Result:
        seen.append("acknowledged" in workshop.journal.entries)
        return await answer(target)

    workshop = Workshop(deadly)
    workshop.bus.takes_its_time = True
    await workshop.delivered_before(item("a"), item("b"), times=1)

    async with workshop.running():
        await workshop.outcomes(2)

    assert seen == [True, True]


async def test_a_suspect_whose_worker_is_stopped_has_killed_nobody() -> None:
    workshop = Workshop(never)
    command = item("slow")
    await workshop.delivered_before(command, times=SUSPECT_AFTER)
    trials = cast("MemoryTrials", workshop.worker.trials)

    async with workshop.running():
        await eventually(lambda: trials.begun == {command.command_id: 1})

    assert trials.begun == {}
    assert await workshop.would_come() == [([command], 1)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [(b"{}", "wrong_schema"), (b"\xff", "unparsable"), (b"", "unparsable"), (b'{"job_id":1}', "wrong_schema")],
)
async def test_a_line_that_cannot_be_read_goes_to_the_dead_letters_alone(line: bytes, reason: str) -> None:
    workshop = Workshop(answer)
    good = item()

    async with workshop.running():
        await workshop.bus.publish(QUEUE, line + b"\n" + lines_of([good]))
        outcome = await workshop.outcome()
        await workshop.acknowledged()

    assert outcome.job_id == good.job_id
    (letter,) = await workshop.dead_letters()
    assert (letter.body, letter.headers[dead_letters.REASON]) == (line, reason)
    assert workshop.worker.counters.unreadable == 1


async def test_no_more_lookups_are_under_way_than_may_be() -> None:
    under_way: set[str] = set()
    most = 0

    async def count(target: Target) -> Result:
        nonlocal most
        under_way.add(target.raw)
        most = max(most, len(under_way))
        await asyncio.sleep(0)
        under_way.remove(target.raw)
        return await answer(target)

    workshop = Workshop(count, concurrency=3)
    async with workshop.running():
        await workshop.send(*(item(str(number)) for number in range(20)))
        await workshop.outcomes(20)

    assert most == 3


async def test_both_lanes_are_worked_off() -> None:
    workshop = Workshop(answer)
    interactive, bulk = item(), item()
    async with workshop.running():
        await workshop.send(interactive)
        await workshop.send(bulk, queue=COMMANDS[PING, Priority.BULK])
        outcomes = await workshop.outcomes(2)

    assert {outcome.job_id for outcome in outcomes} == {interactive.job_id, bulk.job_id}


async def test_a_worker_reads_the_queues_of_its_own_service_only() -> None:
    assert set(Workshop(answer).inboxes) == {COMMANDS[PING, priority] for priority in Priority}
    assert all(COMMANDS[service, Priority.BULK] not in Workshop(answer).inboxes for service in Service if service is not PING)


# --- Stopping ---------------------------------------------------------------------------------------------------------


async def test_stopping_hands_unfinished_items_back_as_new_and_acknowledges_them() -> None:
    """A hand-back must not count as another delivery, or a few deployments would bury an innocent item."""

    async def some_hang(target: Target) -> Result:
        return await (never if target.raw.startswith("slow") else answer)(target)

    workshop = Workshop(some_hang)
    done, slow, slow_too = item("done"), item("slow"), item("slow too")
    async with workshop.running():
        await workshop.send(done, slow)
        await workshop.send(slow_too)
        assert (await workshop.outcome()).job_id == done.job_id

    assert sorted(await workshop.would_come(), key=lambda message: message[0][0].target.raw) == [([slow], 1), ([slow_too], 1)]
    assert workshop.worker.counters.handed_back == 2


async def test_stopping_is_not_failing() -> None:
    workshop = Workshop(never)
    async with workshop.running():
        await workshop.send(item())
        await eventually(lambda: bool(workshop.worker._in_hand))

    assert await workshop.told() == []


async def test_what_was_handed_back_is_published_before_it_is_acknowledged() -> None:
    workshop = Workshop(never)
    async with workshop.running():
        await workshop.send(item())
        await eventually(lambda: bool(workshop.worker._in_hand))

    assert workshop.journal.entries[-2:] == [f"published {QUEUE.name}", "acknowledged"]


async def test_a_worker_that_cannot_hand_back_ends_all_the_same_and_leaves_everything_unacknowledged() -> None:
    """Who cancelled it must see it cancelled: an error instead would have the part started again."""
    workshop = Workshop(never)
    command = item()
    async with workshop.running():
        await workshop.send(command)
        await eventually(lambda: bool(workshop.worker._in_hand))
        workshop.bus.out_of_order = {QUEUE}

    assert workshop.is_cancelled()
    assert "acknowledged" not in workshop.journal.entries
    assert await workshop.would_come() == [([command], 2)]


async def test_stopping_does_not_hand_back_what_is_finished() -> None:
    workshop = Workshop(answer)
    async with workshop.running():
        await workshop.send(item())
        await workshop.acknowledged()

    assert await workshop.would_come() == []
    assert workshop.worker.counters.handed_back == 0


async def test_the_other_half_of_a_message_is_not_done_again_after_a_hand_back() -> None:
    """The worker that goes on does the rest, and only the rest."""

    async def hang_at_b(target: Target) -> Result:
        return await (never if target.raw == "b" else answer)(target)

    workshop = Workshop(hang_at_b)
    a, b = item("a"), item("b")
    async with workshop.running():
        await workshop.send(a, b)
        await workshop.outcome()
    outbox = Outbox(workshop.bus)
    workshop.worker = Worker(PING, answering(answer), workshop.bus, outbox, workshop.documents, "worker-2", _utc_now)
    workshop.inboxes = workshop.worker.subscribe()

    async with workshop.running():
        outcome = await workshop.outcome()

    assert (outcome.job_id, outcome.worker) == (b.job_id, "worker-2")
    assert await workshop.told() == []


async def test_a_message_that_cannot_be_worked_off_ends_the_worker_and_comes_again() -> None:
    """Left in hand without an end it would keep its place for as long as the worker lives; the next start frees it."""
    workshop = Workshop(answer)
    workshop.bus.out_of_order.add(DEAD_LETTERS)
    await workshop.bus.publish(QUEUE, b"no command")

    async with workshop.running():
        await eventually(workshop.has_ended)

    assert not workshop.is_cancelled()
    assert "acknowledged" not in workshop.journal.entries
    await cast("MemoryInbox", workshop.inboxes[QUEUE]).give_back()
    successor = workshop.bus.subscribe(QUEUE, in_hand_max=1)
    assert [delivery.body for delivery in await successor.take(1)] == [b"no command"]
