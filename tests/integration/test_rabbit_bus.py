"""What only a broker that is killed or robbed of its queues can show."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from aio_pika.robust_connection import RobustConnection

from events import acknowledging
from events.bus import ALL_QUEUES, COMMANDS, DEAD_LETTERS, DELIVERY_LIMIT, OUTCOMES, BusUnavailable, Delivery, Inbox, Queue
from events.facts import Priority, Service
from events.rabbit_bus import RabbitBus
from tests.builders import eventually
from tests.servers.rabbitmq import RabbitMQNode

PATIENCE_S = 25.0


@pytest.fixture
def folder(servers_folder: Path) -> Path:
    return servers_folder / "killed-rabbitmq"


async def test_without_a_broker_publishing_says_so_and_stopping_ends(folder: Path) -> None:
    """A part must be able to stop, and to say that it cannot publish, whatever became of the broker."""
    node = RabbitMQNode(folder)
    await asyncio.to_thread(node.start)
    bus = RabbitBus(node.broker.url)
    bus.subscribe(OUTCOMES, in_hand_max=4)
    await bus.start()
    try:
        await asyncio.to_thread(node.kill)

        with pytest.raises(BusUnavailable):
            async with asyncio.timeout(PATIENCE_S):
                await bus.publish(OUTCOMES, b"lost")
    finally:
        started_at = time.monotonic()
        async with asyncio.timeout(PATIENCE_S):
            await bus.stop()
        await asyncio.to_thread(node.stop)

    assert time.monotonic() - started_at < PATIENCE_S


async def test_a_queue_deleted_by_hand_is_made_and_read_again(rabbitmq_vhost_url: str) -> None:
    bus = RabbitBus(rabbitmq_vhost_url)
    inbox = bus.subscribe(OUTCOMES, in_hand_max=4)
    await bus.start()
    try:
        connection = await aio_pika.connect(rabbitmq_vhost_url)
        async with connection, connection.channel() as channel:
            await channel.queue_delete(OUTCOMES.name)

        await bus.publish(OUTCOMES, b"after the deletion")

        async with asyncio.timeout(PATIENCE_S):
            (delivery,) = await inbox.take(1)
        assert delivery.body == b"after the deletion"
        await inbox.ack([delivery])
    finally:
        await bus.stop()


async def test_a_queue_that_was_deleted_and_made_again_takes_the_epoch_along(rabbitmq_vhost_url: str) -> None:
    """Its reader consumes again at once, and what was in it is gone: only the mark, which nobody restores, can tell."""
    reader, relay = RabbitBus(rabbitmq_vhost_url), RabbitBus(rabbitmq_vhost_url)
    inbox = reader.subscribe(OUTCOMES, in_hand_max=4)
    await reader.start()
    await relay.start()
    try:
        assert await relay.read_epoch() is None
        await relay.write_epoch("log-1")
        assert await relay.read_epoch() == "log-1"

        connection = await aio_pika.connect(rabbitmq_vhost_url)
        async with connection, connection.channel() as channel:
            await channel.queue_delete(OUTCOMES.name)
        await reader.publish(OUTCOMES, b"after the deletion")
        async with asyncio.timeout(PATIENCE_S):
            await inbox.ack(await inbox.take(1))

        assert await relay.read_epoch() is None
        await relay.write_epoch("log-1")
        assert await relay.read_epoch() == "log-1"
    finally:
        await reader.stop()
        await relay.stop()


async def test_reading_the_epoch_makes_missing_queues_again_while_nobody_publishes(rabbitmq_vhost_url: str) -> None:
    relay = RabbitBus(rabbitmq_vhost_url)
    await relay.start()
    try:
        await relay.read_epoch()
        await relay.write_epoch("log-1")
        connection = await aio_pika.connect(rabbitmq_vhost_url)
        async with connection, connection.channel() as channel:
            for queue in ALL_QUEUES:
                await channel.queue_delete(queue.name)

            assert await relay.read_epoch() is None

            for queue in ALL_QUEUES:
                await channel.declare_queue(queue.name, passive=True)
    finally:
        await relay.stop()


def command_queues() -> list[Queue]:
    return [COMMANDS[service, Priority.INTERACTIVE] for service in (Service.GEOIP, Service.RDAP, Service.PING)]


async def one(inbox: Inbox) -> Delivery:
    async with asyncio.timeout(PATIENCE_S):
        (delivery,) = await inbox.take(1)
    return delivery


@asynccontextmanager
async def reading(rabbitmq_url: str, queue: Queue) -> AsyncIterator[tuple[RabbitBus, Inbox]]:
    bus = RabbitBus(rabbitmq_url)
    inbox = bus.subscribe(queue, in_hand_max=4)
    await bus.start()
    try:
        yield bus, inbox
    finally:
        await bus.stop()


async def test_a_broker_that_comes_back_is_read_and_published_to_again(folder: Path) -> None:
    node = RabbitMQNode(folder)
    await asyncio.to_thread(node.start)
    try:
        async with reading(node.broker.url, OUTCOMES) as (bus, inbox):
            await asyncio.to_thread(node.kill)
            with pytest.raises(BusUnavailable):
                await bus.publish(OUTCOMES, b"lost")
            await asyncio.to_thread(node.start)

            async with asyncio.timeout(PATIENCE_S):
                while not await published(bus, b"after"):  # noqa: ASYNC110 - nobody tells when a connection is restored
                    await asyncio.sleep(0.1)
            assert (await one(inbox)).body == b"after"
    finally:
        await asyncio.to_thread(node.stop)


async def test_who_is_stopped_while_it_connects_leaves_nobody_behind_who_tries_for_ever() -> None:
    others = asyncio.all_tasks()
    asked = asyncio.Event()
    ends: list[asyncio.StreamWriter] = []

    async def say_nothing(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends.append(writer)
        asked.set()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        bus = RabbitBus(f"amqp://guest:guest@127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        starting = asyncio.create_task(bus.start())
        async with asyncio.timeout(PATIENCE_S):
            await asked.wait()
            starting.cancel()
            await asyncio.sleep(0)
            for end in ends:
                end.close()
            with pytest.raises(asyncio.CancelledError):
                await starting
            await bus.stop()

        await eventually(lambda: not [task for task in asyncio.all_tasks() - others if "__connection_factory" in repr(task)])


async def test_a_start_that_fails_closes_its_connection() -> None:
    """Else it is closed when it is forgotten, in whatever thread that is, or cannot be any more."""
    others = open_connections()
    bus = RabbitBus("amqp://guest:guest@127.0.0.1:1/")

    with pytest.raises(BusUnavailable):
        await bus.start()

    assert [made for made in open_connections() if made not in others] == []


def open_connections() -> list[RobustConnection]:
    return [made for made in gc.get_objects() if issubclass(type(made), RobustConnection) and not made.is_closed]


async def test_what_is_acknowledged_twice_takes_nothing_else_from_its_reader(rabbitmq_vhost_url: str) -> None:
    """RabbitMQ closes a channel that acknowledges what it has not in hand, and gives the rest of it back."""
    async with reading(rabbitmq_vhost_url, OUTCOMES) as (bus, inbox):
        for body in (b"first", b"second"):
            await bus.publish(OUTCOMES, body)
        first, _ = await one(inbox), await one(inbox)
        for _ in range(2):
            await inbox.ack([first])
            await inbox.drain()
        await bus.publish(OUTCOMES, b"third")

        third = await one(inbox)

    assert (third.body, third.delivery_count) == (b"third", 1)


async def published(bus: RabbitBus, body: bytes) -> bool:
    try:
        await bus.publish(OUTCOMES, body)
    except BusUnavailable:
        return False
    return True


@pytest.mark.parametrize("count", ["many", "-1", None, 3.5])
async def test_what_others_say_of_earlier_deliveries_is_no_matter(count: object, rabbitmq_vhost_url: str) -> None:
    async with reading(rabbitmq_vhost_url, OUTCOMES) as (_, inbox):
        connection = await aio_pika.connect(rabbitmq_vhost_url)
        async with connection, connection.channel() as channel:
            headers: Any = {"x-delivery-count": count}
            await channel.default_exchange.publish(aio_pika.Message(b"theirs", headers=headers), OUTCOMES.name)

            delivery = await one(inbox)

    assert (delivery.body, delivery.delivery_count) == (b"theirs", 1)


async def test_what_was_drained_does_not_come_again_though_we_die(
    rabbitmq_vhost_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acknowledging, "PAUSE_S", 0.5)
    async with reading(rabbitmq_vhost_url, OUTCOMES) as (bus, inbox):
        await bus.publish(OUTCOMES, b"done")
        await inbox.ack([await one(inbox)])

        await inbox.drain()
        assert bus._connection is not None
        await bus._connection.close()

    async with reading(rabbitmq_vhost_url, OUTCOMES) as (bus, inbox):
        await bus.publish(OUTCOMES, b"new")
        assert (await one(inbox)).body == b"new"


async def test_of_a_message_for_several_queues_the_share_that_died_is_a_dead_letter(rabbitmq_vhost_url: str) -> None:
    geoip, rdap, ping = command_queues()
    async with reading(rabbitmq_vhost_url, DEAD_LETTERS) as (bus, letters):
        await bus.publish_each({geoip: b"for geoip", rdap: b"for rdap", ping: b"for ping"})
        connection = await aio_pika.connect(rabbitmq_vhost_url)
        async with connection, connection.channel() as channel:
            queue = await channel.get_queue(rdap.name)
            for _ in range(DELIVERY_LIMIT + 1):
                async with asyncio.timeout(PATIENCE_S):
                    while (message := await queue.get(fail=False)) is None:  # noqa: ASYNC110 - what is given back comes by itself
                        await asyncio.sleep(0.01)
                await message.nack(requeue=True)

        letter = await one(letters)

        assert (letter.body, letter.headers["x-first-death-queue"]) == (b"for rdap", rdap.name)


@pytest.mark.parametrize("shares", ["", "lookup.outcomes", "lookup.outcomes=x", "=", "elsewhere=3", "lookup.outcomes=-1"])
async def test_shares_that_nobody_of_ours_wrote_hide_nothing(shares: str, rabbitmq_vhost_url: str) -> None:
    async with reading(rabbitmq_vhost_url, OUTCOMES) as (bus, inbox):
        await bus.publish(OUTCOMES, b"by a stranger", {"shares": shares})

        assert (await one(inbox)).body == b"by a stranger"


async def test_one_queue_of_several_that_is_missing_is_told_by_the_epoch(rabbitmq_vhost_url: str) -> None:
    """The broker says nothing of it, as the others took the message."""
    geoip, rdap, ping = command_queues()
    async with reading(rabbitmq_vhost_url, ping) as (bus, inbox):
        await bus.read_epoch()
        await bus.write_epoch("log-1")
        connection = await aio_pika.connect(rabbitmq_vhost_url)
        async with connection, connection.channel() as channel:
            await channel.queue_delete(rdap.name)

        await bus.publish_each({geoip: b"for geoip", rdap: b"for rdap", ping: b"for ping"})

        assert (await one(inbox)).body == b"for ping"
        assert await bus.read_epoch() is None
