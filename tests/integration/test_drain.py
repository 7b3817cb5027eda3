"""The drain, from each transport into a real table: whatever dies is kept once, and its task is told."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import psycopg
import pytest

from domain.commands import LookUp, TaskOutcome, lines_of
from events.bus import COMMANDS, DEAD_LETTERS, FACTS, OUTCOMES, Bus, Delivery, Inbox, Queue
from events.dead_letters import Reason, put_aside
from events.ending import end
from events.facts import Priority
from events.lines import read_items
from events.memory import MemoryBus, MemoryInbox
from events.rabbit_bus import RabbitBus
from tests.builders import JOB, NOW, PING, eventually, look_up_command, outcome
from tests.servers.buses import TRANSPORTS, OpenBus, opening_buses
from write_side.dead_letters import Letter, LetterState, counts, open_letters
from write_side.drain import UNKNOWN_QUEUE, Drain, letters_of

PATIENCE_S = 30.0
COMMAND_QUEUE = COMMANDS[PING, Priority.INTERACTIVE]
NEWER = b'{"schema":2,"what":"nobody reads yet"}'
LIMIT_ON_REDIS = 2
CLAIM_IDLE_S = 1.5


@pytest.fixture(params=TRANSPORTS)
async def open_bus(request: pytest.FixtureRequest) -> AsyncIterator[OpenBus]:
    async with opening_buses(request, claim_idle_s=CLAIM_IDLE_S, delivery_limit=LIMIT_ON_REDIS) as make:
        yield make


async def take_one(inbox: Inbox) -> Delivery:
    async with asyncio.timeout(PATIENCE_S):
        (delivery,) = await inbox.take(1)
    return delivery


async def drained(bus: Bus, database_url: str, *, letters: int) -> list[Letter]:
    """What is in the table once the drain has brought it so many letters."""
    drain = Drain(database_url, bus, lambda: NOW)
    inbox = drain.subscribe()
    await bus.start()
    draining = asyncio.create_task(drain.run(inbox))
    try:
        await eventually(lambda: drain.counters.kept >= letters, patience_s=PATIENCE_S)
    finally:
        await end([draining], 5)
    return await kept(database_url)


async def kept(database_url: str) -> list[Letter]:
    async with open_letters(database_url) as table:
        return [letter async for page in table.pages(up_to=await table.last_id()) for letter in page]


async def read_from(queue: Queue, bodies: Sequence[bytes], open_bus: OpenBus) -> None:
    """Publish messages, and have a reader of the queue read them, put aside what it cannot, and acknowledge."""
    bus = open_bus()
    inbox = bus.subscribe(queue, in_hand_max=10)
    await bus.start()
    for body in bodies:
        await bus.publish(queue, body)
        delivery = await take_one(inbox)
        await read_items(TaskOutcome if queue is OUTCOMES else LookUp, delivery, queue, bus, now=NOW)
        await inbox.ack([delivery])


@pytest.mark.parametrize("queue", [COMMAND_QUEUE, OUTCOMES], ids=["commands", "outcomes"])
async def test_what_cannot_be_read_leaves_its_queue_and_is_kept(
    queue: Queue, open_bus: OpenBus, migrated_database_url: str
) -> None:
    good = lines_of([outcome(PING) if queue is OUTCOMES else look_up_command(PING)])
    await read_from(queue, [b"\xffnonsense", good + b"\n" + NEWER, b"\xffnonsense"], open_bus)

    letters = await drained(open_bus(), migrated_database_url, letters=3)

    assert [(letter.queue, letter.reason, letter.body) for letter in letters] == [
        (queue.name, "unparsable", b"\xffnonsense"),
        (queue.name, "wrong_schema", NEWER),
        (queue.name, "unparsable", b"\xffnonsense"),
    ]
    assert {letter.job_id for letter in letters} == {None}


async def test_a_letter_that_comes_twice_is_one_row(open_bus: OpenBus, migrated_database_url: str) -> None:
    """Its reader died after putting it aside; the message came again, and the next reader put it aside again."""
    bus = open_bus()
    inbox = bus.subscribe(OUTCOMES, in_hand_max=10)
    await bus.start()
    await bus.publish(OUTCOMES, b"nonsense")
    delivery = await take_one(inbox)
    for _ in range(2):
        await put_aside(bus, OUTCOMES, delivery, b"nonsense", Reason.UNPARSABLE, at=NOW)
    await put_aside(bus, OUTCOMES, delivery, b"more", Reason.UNPARSABLE, at=NOW, item=1)

    letters = await drained(open_bus(), migrated_database_url, letters=2)

    assert [letter.body for letter in letters] == [b"nonsense", b"more"]


async def test_a_command_that_is_never_acknowledged_is_kept_and_its_task_told(
    open_bus: OpenBus, migrated_database_url: str
) -> None:
    """The last net, for what kills its worker before the worker can count."""
    bus = open_bus()
    await bus.start()
    command = look_up_command(PING)
    await bus.publish(COMMAND_QUEUE, lines_of([command]))
    await hand_out_in_vain(open_bus)

    teller = open_bus()
    told = teller.subscribe(OUTCOMES, in_hand_max=10)
    if not isinstance(teller, MemoryBus):
        await teller.start()
    (letter,) = await drained(open_bus(), migrated_database_url, letters=1)

    assert (letter.queue, letter.reason, letter.job_id) == (COMMAND_QUEUE.name, "delivered_too_often", JOB)
    assert (letter.service, letter.attempt, letter.command_id) == ("Ping", 1, command.command_id)
    told_end = TaskOutcome.model_validate_json((await take_one(told)).body)
    assert (told_end.job_id, told_end.command_id, told_end.attempt) == (JOB, command.command_id, 1)
    assert told_end.ending.kind == "failed"
    assert told_end.ending.error.code == "worker_crashed"


async def hand_out_in_vain(open_bus: OpenBus) -> None:
    """Until the transport gives up on the message."""
    bus = open_bus()
    inbox = bus.subscribe(COMMAND_QUEUE, in_hand_max=1)
    if isinstance(inbox, MemoryInbox):
        while taken := inbox.take_now(1):
            assert len(taken) == 1
            await inbox.give_back()
        return
    await bus.start()
    if isinstance(bus, RabbitBus):
        for _ in range(21):
            delivery = await take_one(inbox)
            message: Any = delivery.token
            await message.channel.basic_nack(message.delivery_tag, requeue=True)  # as a lost connection would
        return
    for _ in range(LIMIT_ON_REDIS):
        await take_one(inbox)
        await bus.stop()
        bus = open_bus()
        inbox = bus.subscribe(COMMAND_QUEUE, in_hand_max=1)
        await bus.start()


async def test_what_was_drained_and_not_acknowledged_is_one_row(open_bus: OpenBus, migrated_database_url: str) -> None:
    bus = open_bus()
    drain = Drain(migrated_database_url, bus, lambda: NOW)
    inbox = drain.subscribe()
    await bus.start()
    await bus.publish(DEAD_LETTERS, b"by a stranger", {"x-first-death-queue": FACTS.name})
    delivery = await take_one(inbox)

    await drain.drain(inbox, [delivery])
    await drain.drain(inbox, [delivery])

    (letter,) = await kept(migrated_database_url)
    assert (letter.queue, letter.reason, letter.body) == (FACTS.name, "unknown", b"by a stranger")


async def test_a_letter_is_acknowledged_only_when_it_is_kept(migrated_database_url: str) -> None:
    """While the database is away the drain waits. What it had in hand when it died comes to the next one."""
    bus = MemoryBus()
    nowhere = psycopg.conninfo.make_conninfo(migrated_database_url, dbname="nowhere")
    first = Drain(nowhere, bus, lambda: NOW)
    inbox = first.subscribe()
    for number in range(3):
        await bus.publish(DEAD_LETTERS, b"%d" % number)
    draining = asyncio.create_task(first.run(inbox))
    await eventually(lambda: not bus.waiting(DEAD_LETTERS.name))
    await asyncio.sleep(0.2)  # Long enough to be acknowledged, if it were to be.
    await end([draining], 5)
    await inbox.close()
    assert isinstance(inbox, MemoryInbox)
    await inbox.give_back()

    letters = await drained(bus, migrated_database_url, letters=3)

    assert sorted(letter.body for letter in letters) == [b"0", b"1", b"2"]


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, b""),
        ({"dead-letter-queue": "no such \x00 queue", "dead-letter-reason": "\ud800"}, b"\x00"),
        ({"dead-letter-queue": OUTCOMES.name, "dead-letter-deliveries": "9" * 40, "dead-letter-item": "-1"}, b"[1]"),
        ({"dead-letter-queue": OUTCOMES.name, "dead-letter-died-at": "yesterday"}, b'{"attempt":99999999999,"job_id":7}'),
        ({"dead-letter-queue": OUTCOMES.name, "dead-letter-died-at": "2026-01-01"}, b'{"service":"a\\u0000","attempt":true}'),
        ({"n\x00ul": "\x00", "sur": "\ud800"}, b"[" * 100_000),
        ({"dead-letter-queue": COMMAND_QUEUE.name, "dead-letter-reason": "delivered_too_often"}, b"{}"),
    ],
)
async def test_no_letter_is_so_odd_that_it_stops_the_drain(
    headers: dict[str, str], body: bytes, migrated_database_url: str
) -> None:
    bus = MemoryBus()
    await bus.publish(DEAD_LETTERS, body, headers)

    (letter,) = await drained(bus, migrated_database_url, letters=1)

    assert letter.body == body
    assert letter.queue in {UNKNOWN_QUEUE, OUTCOMES.name, COMMAND_QUEUE.name}


async def test_a_batch_that_the_transport_gave_up_on_is_a_letter_for_each_item(migrated_database_url: str) -> None:
    bus = MemoryBus()
    commands = [look_up_command(PING), look_up_command(PING, attempt=2)]
    headers = {"x-first-death-queue": COMMAND_QUEUE.name, "x-first-death-reason": "delivery_limit", "x-death": "…"}
    await bus.publish(DEAD_LETTERS, lines_of(commands), headers)

    letters = await drained(bus, migrated_database_url, letters=2)

    assert [LookUp.model_validate_json(letter.body) for letter in letters] == commands
    assert {letter.reason for letter in letters} == {"delivered_too_often"}
    assert len(bus.waiting(OUTCOMES.name)) == 1
    (count,) = await counts(migrated_database_url)
    assert (count.state, count.count) == (LetterState.WAITING, 2)


def test_a_letter_without_a_time_of_death_died_when_it_was_drained() -> None:
    (letter,) = letters_of(Delivery(b"x", {}, 1, None, "id"), NOW)

    assert letter.died_at == NOW
