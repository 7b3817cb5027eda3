"""What of the log becomes a command, to which queue, and what the broker gets again when it has lost everything."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from domain.commands import LookUp
from events.bus import COMMANDS, Queue
from events.facts import Erased, JobFact, Priority, Service
from events.record import Cause, StoredFact
from events.store import AppendUnit, NewFacts, StreamHead
from tests.builders import (
    ADDRESS,
    CAUSE,
    GEOIP,
    JOB,
    LIFETIME,
    NOW,
    PING,
    RDAP,
    at,
    command_id,
    completed,
    counts,
    deferred,
    dispatched,
    failed,
    job_cancelled,
    job_completed,
    look_up_command,
    memory_store,
    skipped,
    submitted,
    timed_out,
)
from write_side.relay import _open_commands, commands_of


async def log_of(*facts: JobFact, cause: Cause = CAUSE) -> Sequence[StoredFact]:
    store = memory_store()
    await store.append(AppendUnit([NewFacts(JOB, StreamHead(), facts)], cause))
    return await store.read_all(0, 100)


async def commands(*facts: JobFact, cause: Cause = CAUSE, now: datetime = NOW) -> dict[Queue, list[LookUp]]:
    return commands_of(await log_of(*facts, cause=cause), now)


async def open_commands(*facts: JobFact) -> list[tuple[Queue, LookUp]]:
    return _open_commands(await log_of(*facts))


def lane(service: Service, priority: Priority = Priority.INTERACTIVE) -> Queue:
    return COMMANDS[service, priority]


# --- From the log to the queues ---------------------------------------------------------------------------------------


async def test_each_task_goes_to_its_own_services_queue() -> None:
    found = await commands(submitted(PING, RDAP), dispatched(PING, RDAP))

    assert found == {lane(PING): [look_up_command(PING)], lane(RDAP): [look_up_command(RDAP)]}


async def test_a_command_says_all_that_a_worker_needs() -> None:
    cause = Cause(actor="test", correlation_id=UUID(int=7), traceparent="00-aa-bb-01")

    ((command,),) = (await commands(submitted(PING), dispatched(PING, attempt=2), cause=cause)).values()

    assert command == look_up_command(PING, attempt=2).model_copy(update={"traceparent": "00-aa-bb-01"})
    assert (command.target, command.expires_at, command.timeout_s) == (ADDRESS, NOW + LIFETIME, 10.0)


async def test_bulk_work_has_its_own_queue() -> None:
    bulk = dispatched(PING).model_copy(update={"priority": Priority.BULK})

    assert list(await commands(submitted(PING), bulk)) == [lane(PING, Priority.BULK)]


async def test_only_dispatches_become_commands() -> None:
    everything_else: list[JobFact] = [
        submitted(PING, RDAP),
        completed(PING),
        failed(PING),
        timed_out(PING),
        skipped(PING),
        deferred(PING, until=at(1)),
        job_completed(counts()),
        job_cancelled(),
    ]

    assert await commands(*everything_else) == {}


async def test_commands_of_one_queue_keep_the_order_of_the_log() -> None:
    facts = [dispatched(PING, job_id=UUID(int=number)) for number in range(1, 8)]

    found = await commands(submitted(PING), *facts)

    assert [command.job_id.int for command in found[lane(PING)]] == [1, 2, 3, 4, 5, 6, 7]


async def test_what_has_expired_meanwhile_is_not_worth_sending() -> None:
    facts: list[JobFact] = [submitted(PING), dispatched(PING)]

    assert await commands(*facts, now=at(89.999)) != {}
    assert await commands(*facts, now=at(90)) == {}


async def test_without_a_target_there_is_nothing_to_ask() -> None:
    erased = dispatched(PING).model_copy(update={"target": Erased()})

    assert await commands(submitted(PING), erased) == {}


# --- When the broker has lost everything ------------------------------------------------------------------------------


async def test_the_open_tasks_commands_are_sent_again_as_they_were() -> None:
    """The same command ids: a worker that still has the first copy can only repeat an outcome, never add one."""
    found = await open_commands(submitted(PING, RDAP, GEOIP), dispatched(PING, RDAP, GEOIP), completed(RDAP))

    assert found == [(lane(PING), look_up_command(PING)), (lane(GEOIP), look_up_command(GEOIP))]


async def test_only_the_last_command_of_a_task_is_sent_again() -> None:
    found = await open_commands(submitted(PING), dispatched(PING), dispatched(PING, attempt=2))

    assert [command.command_id for _, command in found] == [command_id(PING, 2)]


async def test_a_deferred_task_is_not_sent_before_its_turn() -> None:
    assert await open_commands(submitted(PING), dispatched(PING), deferred(PING, until=at(20))) == []


async def test_a_job_whose_target_was_erased_is_not_sent_again() -> None:
    erased = dispatched(PING).model_copy(update={"target": Erased()})

    assert await open_commands(submitted(PING), erased) == []


async def test_a_job_of_which_nothing_was_relayed_yet_has_nothing_to_repeat() -> None:
    assert _open_commands([]) == []
    assert await open_commands(submitted(PING)) == []
