"""One journey, two deployments: everything in one process on Redis streams, and each part alone on PostgreSQL and RabbitMQ."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.e2e import independent_check
from tests.e2e.compose_harness import ComposeParts
from tests.e2e.journey import client_of, journey
from tests.e2e.processes import LookupProcess, database_of, until
from tests.e2e.served import Served
from tests.servers.postgres import fresh_database
from tests.servers.rabbitmq import RabbitMQ
from tests.servers.valkey import RedisDatabases

RELAYED_S = 10.0


@asynccontextmanager
async def everything_in_one_process(folder: Path, peers: Served) -> AsyncIterator[tuple[str, str, str]]:
    """`lookup up` with its embedded servers; gives write URL, read URL and the database's."""
    up = LookupProcess("up", "--port", "0", "--data-dir", "data", folder=folder, env=peers.environment())
    try:
        url = await up.start()
        yield url, url, database_of(folder / "data")
    finally:
        await up.stop()


@asynccontextmanager
async def each_part_alone(
    folder: Path, peers: Served, database_url: str, redis_url: str, broker_url: str
) -> AsyncIterator[tuple[str, str, str]]:
    """The parts of compose.yaml, each a process of its own."""
    parts = ComposeParts(
        database_owner_url=database_url,
        redis_url=redis_url,
        broker_url=broker_url,
        work_dir=folder,
        env=peers.environment(),
    )
    await parts.start()
    try:
        yield parts.write_url, parts.read_url, database_url
    finally:
        stubborn = await parts.stop()
    assert stubborn == []


async def test_journey_in_one_process_on_redis_streams(tmp_path: Path, peers: Served) -> None:
    async with everything_in_one_process(tmp_path, peers) as (write_url, read_url, database_url):
        await travel(write_url, read_url, database_url, peers)


async def test_journey_through_separate_parts_on_rabbitmq(
    tmp_path: Path, peers: Served, postgres: str, valkey: RedisDatabases, rabbitmq: RabbitMQ
) -> None:
    with fresh_database(postgres) as database, valkey.fresh() as redis, rabbitmq.fresh_vhost() as broker:
        async with each_part_alone(tmp_path, peers, database, redis, broker) as (write_url, read_url, database_url):
            await travel(write_url, read_url, database_url, peers)


async def travel(write_url: str, read_url: str, database_url: str, peers: Served) -> None:
    """The journey, then the auditor: each document that was polled is the fold of its facts and what the peers served."""
    async with client_of(write_url, read_url) as client:
        await journey(client)

    log = independent_check.check(database_url, client.finished, peers)
    assert len(client.finished) == len(log.jobs)
    await until(lambda: _relayed_to_the_end(database_url), RELAYED_S, "the relay to publish the whole log")


def _relayed_to_the_end(database_url: str) -> bool:
    """One look, since the next one may already see a canary that is on its way."""
    log = independent_check.read_log(database_url)
    if not log.relayed["facts"][0] == log.relayed["commands"][0] == log.head:
        return False
    independent_check.check_relayed_to_the_end(log)
    return True
