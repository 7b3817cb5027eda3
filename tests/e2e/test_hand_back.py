"""Stopping a worker is no failure: what it has in hand goes back as new, and its successor brings the answers.

A worker in a process of its own, on each transport; the test is the relay that dispatches and the saga that is told.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dns.reversename
import pytest
from uuid_utils.compat import uuid7

from domain.commands import LookUp, Succeeded, TaskOutcome, lines_of
from events.bus import COMMANDS, OUTCOMES, Bus, Delivery, Inbox, Queue
from events.facts import Priority, Sensitivity, Service, Target, TargetType
from events.rabbit_bus import RabbitBus
from events.redis_bus import RedisBus
from tests.e2e.processes import LookupProcess, until
from tests.e2e.served import Served
from workers.runner import IN_HAND

QUEUE = COMMANDS[Service.REVERSE_DNS, Priority.INTERACTIVE]
MESSAGES = IN_HAND[Priority.INTERACTIVE] + 8
"""More than a worker takes in hand: the broker must not hand it, while it gives back, what still waits."""
ITEMS_PER_MESSAGE = 2
PATIENCE_S = 30.0
NEVER_LATE = {"LOOKUP_REDISPATCH_AFTER_S": "3600"}
"""The jobs here are in no log, in which a worker would look what has become of one that comes late."""


@dataclass
class Transport:
    open_bus: Callable[[], Bus]
    environment: dict[str, str]


@pytest.fixture(params=["redis", "rabbitmq"])
def transport(request: pytest.FixtureRequest, redis_url: str) -> Transport:
    if request.param == "redis":
        return Transport(lambda: RedisBus(redis_url), {"LOOKUP_REDIS_URL": redis_url})
    broker_url = request.getfixturevalue("rabbitmq_vhost_url")
    return Transport(lambda: RabbitBus(broker_url), {"LOOKUP_REDIS_URL": redis_url, "LOOKUP_BROKER_URL": broker_url})


async def test_stopping_a_worker_hands_its_items_back_as_new_and_its_successor_answers_them(
    transport: Transport, peers: Served, migrated_database_url: str, tmp_path: Path
) -> None:
    environment = {**peers.environment(), **transport.environment, "LOOKUP_DATABASE_URL": migrated_database_url, **NEVER_LATE}
    commands = [command(f"127.0.{number}.1") for number in range(1, 1 + MESSAGES * ITEMS_PER_MESSAGE)]
    answered, *unanswered = commands
    peers.dns.muted = {pointer(command) for command in unanswered}
    async with reading(transport, OUTCOMES) as (bus, outcomes):
        for first in range(0, len(commands), ITEMS_PER_MESSAGE):
            await bus.publish(QUEUE, lines_of(commands[first : first + ITEMS_PER_MESSAGE]))

        async with worker("first", tmp_path, environment) as first_worker:
            (outcome,) = await told(outcomes, 1)
            assert (outcome.command_id, outcome.attempt) == (answered.command_id, 1)
            under_way = IN_HAND[Priority.INTERACTIVE] * ITEMS_PER_MESSAGE
            await until(lambda: asked(peers, unanswered) >= under_way - 1, PATIENCE_S, "lookups to be under way")
            first_worker.send(signal.SIGTERM)
            assert await first_worker.ended() == 0

        async with reading(transport, QUEUE) as (successor, inbox):
            deliveries = await taken(inbox, len(unanswered))
            assert {delivery.delivery_count for delivery in deliveries} == {1}
            handed_back = [LookUp.model_validate_json(line) for delivery in deliveries for line in lines(delivery)]
            assert sorted(handed_back, key=_by_id) == sorted(unanswered, key=_by_id)
            await give_back(successor, inbox, deliveries)

        peers.dns.muted = set()
        async with worker("second", tmp_path, environment):
            brought = await told(outcomes, len(unanswered))
        assert {outcome.command_id for outcome in brought} == {command.command_id for command in unanswered}
        assert all(isinstance(outcome.ending, Succeeded) and outcome.attempt == 1 for outcome in brought)
        assert {outcome.worker for outcome in brought}.isdisjoint({outcome.worker})


def command(address: str) -> LookUp:
    return LookUp(
        job_id=uuid7(),
        command_id=uuid7(),
        service=Service.REVERSE_DNS,
        attempt=1,
        target=Target(raw=address, canonical=address, type=TargetType.IP_ADDRESS),
        sensitivity=Sensitivity.NORMAL,
        timeout_s=60.0,
        max_age_s=0,
        expires_at=datetime.now(UTC) + timedelta(minutes=5),
    )


def pointer(command: LookUp) -> str:
    return dns.reversename.from_address(command.target.canonical).to_text()


def asked(peers: Served, commands: Iterable[LookUp]) -> int:
    """How many of the commands have led to a question so far."""
    names = {name for name, _ in peers.dns.asked}
    return sum(pointer(command) in names for command in commands)


def lines(delivery: Delivery) -> list[bytes]:
    return delivery.body.split(b"\n")


async def told(inbox: Inbox, count: int) -> list[TaskOutcome]:
    deliveries = await taken(inbox, count)
    await inbox.ack(deliveries)
    return [TaskOutcome.model_validate_json(line) for delivery in deliveries for line in lines(delivery)]


async def taken(inbox: Inbox, items: int) -> list[Delivery]:
    """Deliveries with so many items together, none of them acknowledged."""
    found: list[Delivery] = []
    async with asyncio.timeout(PATIENCE_S):
        while sum(len(lines(delivery)) for delivery in found) < items:
            found += await inbox.take(100)
    return found


async def give_back(bus: Bus, inbox: Inbox, deliveries: list[Delivery]) -> None:
    await inbox.close()
    for delivery in deliveries:
        await bus.publish(QUEUE, delivery.body)
    await inbox.ack(deliveries)


@asynccontextmanager
async def reading(transport: Transport, queue: Queue) -> AsyncIterator[tuple[Bus, Inbox]]:
    bus = transport.open_bus()
    inbox = bus.subscribe(queue, in_hand_max=200)
    await bus.start()
    try:
        yield bus, inbox
    finally:
        await bus.stop()


@asynccontextmanager
async def worker(name: str, folder: Path, environment: dict[str, str]) -> AsyncIterator[LookupProcess]:
    process = LookupProcess("worker", "ReverseDNS", folder=folder, env=environment, name=name)
    process.launch()
    try:
        yield process
    finally:
        await process.stop()


def _by_id(command: LookUp) -> str:
    return str(command.command_id)
