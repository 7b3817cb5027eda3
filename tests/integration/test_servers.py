"""The harness keeps its own promises: each test's corner is empty and its own, and no server outlives the run."""

import subprocess
import sys
import time
from pathlib import Path

import aio_pika
import psycopg
import redis

from tests.servers.postgres import fresh_database
from tests.servers.rabbitmq import RabbitMQ, RabbitMQNode
from tests.servers.valkey import RedisDatabases

ROOT = Path(__file__).parents[2]

RUN = """
import sys, time
from pathlib import Path
from tests.servers.rabbitmq import RabbitMQNode

node = RabbitMQNode(Path(sys.argv[1]))
node.start()
print("started", flush=True)
time.sleep(600)
"""

# RabbitMQ says that a queue is declared, and a moment later Mnesia writes that the declaration holds. A node killed between
# the two comes back without it. A node that keeps its metadata in Khepri says so afterwards.
WRITE_DOWN = """
case whereis(mnesia_recover) of
    undefined -> ok;
    Decisions -> sys:get_state(Decisions), ok = mnesia:sync_log()
end.
"""


def test_each_test_has_an_empty_database(postgres: str) -> None:
    with fresh_database(postgres) as url, psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE said (value text)")
        connection.commit()

        with fresh_database(postgres) as other, psycopg.connect(other) as beside:
            assert beside.execute("SELECT to_regclass('said')").fetchone() == (None,)


def test_a_migrated_database_has_the_tables(migrated_database_url: str) -> None:
    with psycopg.connect(migrated_database_url) as connection:
        assert connection.execute("SELECT count(*) FROM log_identity").fetchone() == (1,)


def test_each_test_has_an_empty_redis(valkey: RedisDatabases) -> None:
    with valkey.fresh() as one, valkey.fresh() as other:
        with redis.Redis.from_url(one) as client:
            client.set("said", "one")
        with redis.Redis.from_url(other) as client:
            assert client.get("said") is None


def test_a_redis_that_comes_round_again_is_empty(valkey: RedisDatabases) -> None:
    for _ in range(20):
        with valkey.fresh() as url, redis.Redis.from_url(url) as client:
            assert client.dbsize() == 0
            client.set("said", "before")


async def test_each_test_has_an_empty_vhost(rabbitmq: RabbitMQ) -> None:
    with rabbitmq.fresh_vhost() as one, rabbitmq.fresh_vhost() as other:
        async with await aio_pika.connect(one) as connection:
            channel = await connection.channel()
            await channel.declare_queue("said", durable=True, arguments={"x-queue-type": "quorum"})

        async with await aio_pika.connect(other) as connection:
            channel = await connection.channel()
            queue = await channel.declare_queue("said", durable=True)
            assert queue.declaration_result.message_count == 0


async def test_a_killed_node_comes_back_with_its_durable_queues(tmp_path: Path) -> None:
    node = RabbitMQNode(tmp_path)
    node.start()
    try:
        async with await aio_pika.connect(node.broker.url) as connection:
            channel = await connection.channel()
            await channel.declare_queue("kept", durable=True)
        node.command("eval", WRITE_DOWN)
        node.kill()

        node.start()

        async with await aio_pika.connect(node.broker.url) as connection:
            channel = await connection.channel()
            await channel.declare_queue("kept", passive=True)
    finally:
        node.stop()


def test_a_killed_run_leaves_no_node_behind(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, tmp_path], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "started\n"
    assert working_in(tmp_path) >= {"beam.smp", "epmd"}

    run.kill()
    run.communicate()

    give_up_at = time.monotonic() + 20
    while left := working_in(tmp_path):
        assert time.monotonic() < give_up_at, f"{left} are left"
        time.sleep(0.05)


def working_in(folder: Path) -> set[str]:
    """The names of the processes below `folder`."""
    names = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink().is_relative_to(folder):
                names.add((process / "comm").read_text().strip())
        except OSError:
            continue
    return names
