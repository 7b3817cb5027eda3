"""What every bus promises: the same suite for RabbitMQ, Redis streams and the in-memory twin."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import aio_pika
import pytest
from redis.asyncio import Redis

from events.bus import COMMANDS, FACTS, OUTCOMES, Bus, Delivery, Inbox
from events.facts import Priority, Service
from events.memory import MemoryBus, MemoryInbox
from events.redis_bus import PREFIX, RedisBus
from tests.servers.buses import TRANSPORTS, OpenBus, opening_buses

CLAIM_IDLE_S = 4.0
"""Above what a test holds a delivery in hand: below it, live work is handed out twice, and rightly so."""
PATIENCE_S = 20.0

Lose = Callable[[Bus], Awaitable[None]]


@pytest.fixture(params=TRANSPORTS)
async def open_bus(request: pytest.FixtureRequest) -> AsyncIterator[OpenBus]:
    async with opening_buses(request, claim_idle_s=CLAIM_IDLE_S) as make:
        yield make


@pytest.fixture
def lose_a_queue(request: pytest.FixtureRequest) -> Lose:
    """Deletes the queue of outcomes, with all that is in it, behind everybody's back."""

    async def lose(bus: Bus) -> None:
        if isinstance(bus, MemoryBus):
            bus.lose(OUTCOMES)
        elif isinstance(bus, RedisBus):
            async with Redis.from_url(request.getfixturevalue("redis_url")) as redis:
                await redis.delete(PREFIX + OUTCOMES.name)
        else:
            connection = await aio_pika.connect(request.getfixturevalue("rabbitmq_vhost_url"))
            async with connection, connection.channel() as channel:
                await channel.queue_delete(OUTCOMES.name)

    return lose


async def take(inbox: Inbox, count: int) -> list[Delivery]:
    taken: list[Delivery] = []
    async with asyncio.timeout(PATIENCE_S):
        while len(taken) < count:
            taken += await inbox.take(count - len(taken))
    return taken


async def test_a_message_arrives_with_body_and_headers(open_bus: OpenBus) -> None:
    bus = open_bus()
    inbox = bus.subscribe(FACTS, in_hand_max=4)
    await bus.start()

    await bus.publish(FACTS, b'[{"a":1}]', {"position": "12", "previous_position": "7"})

    (delivery,) = await take(inbox, 1)
    assert delivery.body == b'[{"a":1}]'
    assert (delivery.headers["position"], delivery.headers["previous_position"]) == ("12", "7")
    assert delivery.delivery_count == 1
    await inbox.ack([delivery])


async def test_what_was_published_before_any_reader_existed_is_delivered(open_bus: OpenBus) -> None:
    writer = open_bus()
    await writer.start()
    for queue in (FACTS, OUTCOMES):
        await writer.publish(queue, b"early")

    reader = open_bus()
    inboxes = [reader.subscribe(queue, in_hand_max=4) for queue in (FACTS, OUTCOMES)]
    await reader.start()

    for inbox in inboxes:
        (delivery,) = await take(inbox, 1)
        assert delivery.body == b"early"
        await inbox.ack([delivery])


async def test_queues_do_not_mix(open_bus: OpenBus) -> None:
    bus = open_bus()
    lanes = [(Service.PING, Priority.INTERACTIVE), (Service.PING, Priority.BULK), (Service.RDAP, Priority.INTERACTIVE)]
    inboxes = {lane: bus.subscribe(COMMANDS[lane], in_hand_max=4) for lane in lanes}
    await bus.start()

    await asyncio.gather(*(bus.publish(COMMANDS[lane], "/".join(lane).encode()) for lane in lanes))

    for lane, inbox in inboxes.items():
        (delivery,) = await take(inbox, 1)
        assert delivery.body == "/".join(lane).encode()
        await inbox.ack([delivery])


async def test_several_queues_get_a_message_each_at_once(open_bus: OpenBus) -> None:
    bus = open_bus()
    lanes = [(Service.RDAP, Priority.INTERACTIVE), (Service.PING, Priority.INTERACTIVE), (Service.RDAP, Priority.BULK)]
    inboxes = {lane: bus.subscribe(COMMANDS[lane], in_hand_max=4) for lane in lanes}
    await bus.start()

    await bus.publish_each({COMMANDS[lane]: f'{{"to":"{"/".join(lane)}"}}\n{{}}'.encode() for lane in lanes})
    await bus.publish_each({COMMANDS[lanes[1]]: b"to one alone"})

    received = {lane: [(one.body, dict(one.headers)) for one in await take(inboxes[lane], 1)] for lane in (lanes[0], lanes[2])}
    received[lanes[1]] = [(one.body, dict(one.headers)) for one in await take(inboxes[lanes[1]], 2)]
    own = {lane: f'{{"to":"{"/".join(lane)}"}}\n{{}}'.encode() for lane in lanes}
    assert {lane: [body for body, _ in messages] for lane, messages in received.items()} == {
        lanes[0]: [own[lanes[0]]],
        lanes[1]: [own[lanes[1]], b"to one alone"],
        lanes[2]: [own[lanes[2]]],
    }
    assert all("shares" not in headers for messages in received.values() for _, headers in messages)


async def test_what_was_acknowledged_at_the_last_moment_does_not_come_again(open_bus: OpenBus) -> None:
    """Acknowledgements are collected for a moment, and a stop does not forget them."""
    first = open_bus()
    inbox = first.subscribe(OUTCOMES, in_hand_max=4)
    await first.start()
    await first.publish(OUTCOMES, b"done")
    await inbox.ack(await take(inbox, 1))
    if not isinstance(first, MemoryBus):
        await first.stop()

    second = open_bus()
    inbox = second.subscribe(OUTCOMES, in_hand_max=4)
    await second.start()
    await second.publish(OUTCOMES, b"new")

    assert [delivery.body for delivery in await take(inbox, 1)] == [b"new"]


async def test_no_more_than_the_bound_is_in_hand(open_bus: OpenBus) -> None:
    bus = open_bus()
    inbox = bus.subscribe(OUTCOMES, in_hand_max=3)
    await bus.start()
    for number in range(8):
        await bus.publish(OUTCOMES, str(number).encode())

    taken = await take(inbox, 3)
    one_more = asyncio.ensure_future(inbox.take(1))
    done, _ = await asyncio.wait({one_more}, timeout=0.5)
    assert not done

    await inbox.ack(taken)
    async with asyncio.timeout(PATIENCE_S):
        taken = await one_more
        seen = {delivery.body for delivery in taken}
        while len(seen) < 5:
            await inbox.ack(taken)
            taken = await inbox.take(8)
            seen |= {delivery.body for delivery in taken}
    assert seen == {b"3", b"4", b"5", b"6", b"7"}
    await inbox.ack(taken)


async def test_what_a_reader_left_unacknowledged_comes_again_and_is_counted(open_bus: OpenBus) -> None:
    first = open_bus()
    inbox = first.subscribe(OUTCOMES, in_hand_max=4)
    await first.start()
    await first.publish(OUTCOMES, b"kept")
    await first.publish(OUTCOMES, b"done")
    taken = {delivery.body: delivery for delivery in await take(inbox, 2)}
    await inbox.ack([taken[b"done"]])

    if isinstance(first, MemoryBus):
        assert isinstance(inbox, MemoryInbox)
        await inbox.give_back()
    else:
        await first.stop()
    second = open_bus()
    inbox = second.subscribe(OUTCOMES, in_hand_max=4)
    await second.start()

    (again,) = await take(inbox, 1)
    assert again.body == b"kept"
    assert again.delivery_count > 1
    await inbox.ack([again])


async def test_what_a_closed_inbox_gives_back_comes_to_the_next_reader_as_new(open_bus: OpenBus) -> None:
    """More waits than may be in hand: without closing first, the broker hands on to whom gives back, and counts it."""
    first = open_bus()
    inbox = first.subscribe(OUTCOMES, in_hand_max=2)
    await first.start()
    bodies = {str(number).encode() for number in range(8)}
    for body in bodies:
        await first.publish(OUTCOMES, body)
    in_hand = await take(inbox, 2)

    await inbox.close()
    for delivery in (*in_hand, *inbox.waiting()):
        await first.publish(OUTCOMES, delivery.body)
        await inbox.ack([delivery])
    await first.stop()

    second = open_bus()
    inbox = second.subscribe(OUTCOMES, in_hand_max=16)
    await second.start()
    taken = await take(inbox, len(bodies))
    assert {delivery.body: delivery.delivery_count for delivery in taken} == dict.fromkeys(bodies, 1)
    await inbox.ack(taken)


async def test_a_closed_inbox_takes_nothing_more_in(open_bus: OpenBus) -> None:
    bus = open_bus()
    inbox = bus.subscribe(OUTCOMES, in_hand_max=4)
    await bus.start()

    await inbox.close()
    await bus.publish(OUTCOMES, b"late")

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await inbox.take(1)


async def test_the_epoch_is_kept_by_the_broker(open_bus: OpenBus) -> None:
    bus = open_bus()
    await bus.start()
    assert await bus.read_epoch() is None

    await bus.write_epoch("log-1")

    assert await bus.read_epoch() == "log-1"
    assert await bus.read_epoch() == "log-1"


async def test_what_is_lost_while_the_relay_repairs_is_told_by_the_next_reading(open_bus: OpenBus, lose_a_queue: Lose) -> None:
    """Published again, lost again, and only then marked as whole: nobody would look again."""
    relay = open_bus()
    await relay.start()
    assert await relay.read_epoch() is None

    await lose_a_queue(relay)
    await relay.write_epoch("log-1")

    assert await relay.read_epoch() is None
    await relay.write_epoch("log-1")
    assert await relay.read_epoch() == "log-1"
