"""What a broker loses after it confirmed: nothing waits for a deadline that need not.

The deadlines are set so far away that a job which needs one is a job that does not end.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aio_pika
import psycopg
import pytest
import redis

from events.bus import ALL_QUEUES
from events.redis_bus import PREFIX
from tests.e2e import independent_check
from tests.e2e.deployment import EACH_ALONE, Deployment
from tests.e2e.journey import Client, client_of
from tests.e2e.processes import until
from tests.e2e.served import Served
from tests.e2e.traffic import Traffic, assert_nothing_was_lost_on_its_way
from write_side.checkpoints import SELECT

JOBS = 30
END_S = 60.0
RELAYED_S = 30.0
TIMES = {
    "LOOKUP_INTERACTIVE_LIFETIME_S": "900",
    "LOOKUP_REDISPATCH_AFTER_S": "600",
    "LOOKUP_TIMEOUT_S": '{"GeoIP": 4, "Ping": 4, "RDAP": 4, "ReverseDNS": 4}',
}

Wipe = Callable[[Deployment], Awaitable[None]]

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(params=["rabbitmq", "redis"], scope="module")
async def started(request: pytest.FixtureRequest, servers_folder: Path, peers: Served) -> AsyncIterator[Deployment]:
    """Without saga and worker: no consumer of theirs ever existed."""
    env = {**peers.environment(), **TIMES}
    folder = servers_folder / f"loss-{request.param}"
    deployment = Deployment(folder, env, EACH_ALONE, with_rabbitmq=request.param == "rabbitmq")
    try:
        await deployment.start("write", "read", "relay", "projector")
        yield deployment
    finally:
        await deployment.stop()


async def test_a_broker_that_loses_what_it_confirmed_costs_no_deadline(started: Deployment, peers: Served) -> None:
    async with client_of(started.write_url, started.read_url) as client:
        # Published before any consumer existed.
        await jobs_end(client, started, then_launch=("saga", "worker"))

        # In the queues, and confirmed, when these are deleted by hand.
        await started.parts["worker"].stop()
        await jobs_end(client, started, wipe=delete_queues, then_launch=("worker",))

        if started.rabbitmq is None:
            await started.parts["worker"].stop()
            await jobs_end(client, started, wipe=flush, then_launch=("worker",))

        assert_nothing_was_lost_on_its_way(client.finished)
        independent_check.check(started.database_url, client.finished, peers)


async def jobs_end(client: Client, started: Deployment, *, then_launch: tuple[str, ...], wipe: Wipe | None = None) -> None:
    traffic = Traffic(client)
    await traffic.submit(JOBS, 0.0)
    await until(lambda: all_relayed(started.database_url), RELAYED_S, "the relay to publish")
    if wipe is not None:
        await wipe(started)
    for name in then_launch:
        started.launch(name)
    await traffic.follow_all(END_S)


def all_relayed(database_url: str) -> bool:
    with psycopg.connect(database_url) as database:
        (head,) = database.execute("SELECT max(notification_id) FROM stored_events").fetchone() or (0,)
        return all(position == head for _, position, _ in database.execute(SELECT))


async def delete_queues(started: Deployment) -> None:
    if started.rabbitmq is None:
        with redis.Redis.from_url(started.valkey.url) as client:
            client.delete(*(PREFIX + queue.name for queue in ALL_QUEUES))
        return
    connection = await aio_pika.connect(started.rabbitmq.url)
    async with connection, connection.channel() as channel:
        for queue in ALL_QUEUES:
            await channel.queue_delete(queue.name)


async def flush(started: Deployment) -> None:
    with redis.Redis.from_url(started.valkey.url) as client:
        client.flushall()
