"""A message that nobody can handle, from the worker that dies of it to the operator who decides about it."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest

from events.bus import COMMANDS
from events.facts import Priority, Service
from events.redis_bus import RedisBus
from tests.e2e.journey import client_of
from tests.e2e.processes import LookupProcess, lookup, surroundings, until
from tests.servers.valkey import RedisDatabases

BATCH = 20
DEADLY = "127.0.13.1"
CLAIM_IDLE_S = "2"
LIFETIME_S = 120
"""A worker dies five times meanwhile, and each starts anew: on a busy machine that takes a while."""
SHORT_LIFETIME_S = 6
FIRST = ("write", "saga", "projector", "read")

pytestmark = pytest.mark.timeout(180)


@dataclass
class Stage:
    """Servers of a test's own, a folder, and the parts that run on them."""

    folder: Path
    env: Mapping[str, str]
    parts: list[LookupProcess] = field(default_factory=list)

    def launch(self, *words: str) -> LookupProcess:
        part = LookupProcess(*words, folder=self.folder, env=self.env, name="-".join(word.strip("-") for word in words))
        part.launch()
        self.parts.append(part)
        return part

    async def say(self, *words: str, code: int = 0) -> dict[str, Any]:
        """`lookup dead-letters … --json`, which ends with this code; what it printed."""
        told = await lookup("dead-letters", *words, "--json", cwd=self.folder, env=self.env)
        assert told.code == code, told
        document: dict[str, Any] = json.loads(told.out) if told.out else {}
        return document


@asynccontextmanager
async def staged(folder: Path, database_url: str, servers: Mapping[str, str], lifetime_s: float) -> AsyncIterator[Stage]:
    env = {
        "LOOKUP_DATABASE_URL": psycopg.conninfo.make_conninfo(database_url, user="lookup_app"),
        "LOOKUP_CLAIM_IDLE_S": CLAIM_IDLE_S,
        "LOOKUP_INTERACTIVE_LIFETIME_S": str(lifetime_s),
        "LOOKUP_REDISPATCH_AFTER_S": str(lifetime_s),
        "LOOKUP_PROBE_ALLOW": '["127.0.0.0/8"]',
        **servers,
    }
    stage = Stage(folder, env)
    try:
        yield stage
    finally:
        await asyncio.gather(*(part.stop() for part in stage.parts))


@pytest.mark.parametrize("transport", ["redis", "rabbitmq"])
async def test_a_batch_of_twenty_with_one_that_kills_its_worker_is_19_answers_and_one_dead_letter(
    transport: str, tmp_path: Path, migrated_database_url: str, redis_url: str, request: pytest.FixtureRequest
) -> None:
    servers = {"LOOKUP_REDIS_URL": redis_url}
    if transport == "rabbitmq":
        servers["LOOKUP_BROKER_URL"] = request.getfixturevalue("rabbitmq_vhost_url")
    async with staged(tmp_path, migrated_database_url, servers, LIFETIME_S) as stage:
        url = await stage.launch(*FIRST, "--port", "0").listens()
        async with client_of(url, url) as client:
            job_ids = await asyncio.gather(*(client.submit(f"127.0.{number}.1", ["Ping"]) for number in range(1, BATCH + 1)))
            stage.launch("relay")  # Only now, so that the relay finds all twenty and makes one message of them.
            async with restarted_when_killed(stage) as deaths:
                with psycopg.connect(migrated_database_url, autocommit=True) as database:
                    await until(lambda: closed_jobs(database) == BATCH, LIFETIME_S, "all jobs to end")
                jobs = await asyncio.gather(*(client.follow(job_id) for job_id in job_ids))

        failed = [job for job in jobs if job["status"] == "Failed"]
        assert [job["target"] for job in failed] == [DEADLY]
        assert sum(job["status"] == "Completed" for job in jobs) == BATCH - 1
        (result,) = failed[0]["results"]
        assert result["errorCode"] == "worker_crashed"
        assert result["errorMessage"] == "The lookup did not end, however often it was tried."
        assert 3 <= len(deaths) <= 6
        await the_operator_decides(stage, failed[0]["jobId"])


async def the_operator_decides(stage: Stage, job_id: str) -> None:
    listed = await stage.say("list")
    assert (listed["waiting"], len(listed["letters"])) == (1, 1)
    (letter,) = listed["letters"]
    assert (letter["job_id"], letter["service"], letter["reason"]) == (job_id, "Ping", "delivered_too_often")
    number = str(letter["id"])
    shown = await stage.say("show", number)
    assert json.loads(shown["body"])["target"]["canonical"] == DEADLY

    left = await stage.say("retry", number, code=1)
    assert left == {"retried": 0, "left_alone": {"job_ended": 1}, "dry_run": False}
    done = await stage.say("discard", number, "--reason", "it kills the worker", "--actor", "alice")
    assert done == {"discarded": 1, "left_alone": {}, "dry_run": False}

    after = await stage.say("list", "--state", "discarded")
    assert after["waiting"] == 0
    assert [(one["decided_by"], one["why"]) for one in after["letters"]] == [("alice", "it kills the worker")]


async def test_a_command_that_cannot_be_read_is_kept_and_its_job_ends_by_its_deadline(
    tmp_path: Path, migrated_database_url: str, valkey: RedisDatabases
) -> None:
    with valkey.fresh() as redis_url:
        servers = {"LOOKUP_REDIS_URL": redis_url}
        async with staged(tmp_path, migrated_database_url, servers, SHORT_LIFETIME_S) as stage:
            url = await stage.launch(*FIRST, "relay", "--port", "0").listens()
            async with client_of(url, url) as client:
                job_id = await client.submit("127.0.0.1", ["Ping"])
                await spoil_the_next_command(redis_url)
                stage.launch("worker", "Ping")
                job = await client.follow(job_id)

                assert (job["status"], job["results"][0]["status"]) == ("Failed", "TimedOut")

                listed = await stage.say("list")
                assert [(one["reason"], one["job_id"]) for one in listed["letters"]] == [("unparsable", None)]
                dry = await stage.say("retry", "--all", "--dry-run")
                assert dry == {"retried": 1, "left_alone": {}, "dry_run": True}
                assert (await stage.say("list"))["waiting"] == 1

                retried = await stage.say("retry", "--all", "--reason", "once more", "--actor", "alice")
                assert retried == {"retried": 1, "left_alone": {}, "dry_run": False}
                await until(lambda: states(migrated_database_url) == {"retried": 1, "waiting": 1}, 30, "it to die again")
                assert decisions(migrated_database_url) == [("lookup.DeadLetterRetried.v1", "alice", "once more")]
                # The log has a fact that is no job's; the views go on all the same.
                assert (await client.look_up("127.0.0.1", ["Ping"]))["status"] in {"Completed", "Failed"}


def closed_jobs(database: psycopg.Connection) -> int:
    closed = database.execute(
        "SELECT count(*) FROM stored_events WHERE topic IN ('lookup.JobCompleted.v1', 'lookup.JobFailed.v1')"
    ).fetchone()
    assert closed is not None
    return int(closed[0])


def states(database_url: str) -> dict[str, int]:
    with psycopg.connect(database_url) as database:
        return dict(database.execute("SELECT state, count(*) FROM dead_letters GROUP BY state").fetchall())


def decisions(database_url: str) -> list[tuple[str, str, str]]:
    """What the log tells of decisions: which, by whom, and why."""
    with psycopg.connect(database_url) as database:
        rows = database.execute("SELECT topic, state FROM stored_events WHERE topic LIKE 'lookup.DeadLetter%'").fetchall()
    facts = [(topic, json.loads(state.split(b"\n")[1])) for topic, state in rows]
    return [(topic, fact["by"], fact["reason"]) for topic, fact in facts]


async def spoil_the_next_command(redis_url: str) -> None:
    """Takes it off its queue and puts half of it back."""
    queue = COMMANDS[Service.PING, Priority.INTERACTIVE]
    bus = RedisBus(redis_url)
    inbox = bus.subscribe(queue, in_hand_max=1)
    await bus.start()
    try:
        async with asyncio.timeout(30):
            (delivery,) = await inbox.take(1)
        await inbox.close()
        await bus.publish(queue, delivery.body[: len(delivery.body) // 2])
        await inbox.ack([delivery])
    finally:
        await bus.stop()


@asynccontextmanager
async def restarted_when_killed(stage: Stage) -> AsyncIterator[list[int]]:
    """A deadly worker, and what a container engine does: a new one whenever it dies. Gives its deaths."""
    deaths: list[int] = []
    stopping = asyncio.Event()

    async def keep_alive() -> None:
        while not stopping.is_set():
            worker = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.e2e.deadly_worker",
                DEADLY,
                env=surroundings(stage.env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            ended, told = asyncio.create_task(worker.wait()), asyncio.create_task(stopping.wait())
            await asyncio.wait({ended, told}, return_when=asyncio.FIRST_COMPLETED)
            told.cancel()
            if not ended.done():
                worker.send_signal(signal.SIGTERM)
            code = await ended
            if code == -signal.SIGKILL:
                deaths.append(worker.pid)

    keeping = asyncio.create_task(keep_alive())
    try:
        yield deaths
    finally:
        stopping.set()
        await keeping
