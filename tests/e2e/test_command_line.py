"""The `lookup` command from outside: its words, its exit codes, and what a script gets from it."""

import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import psycopg
import pytest

from tests.e2e.compose_harness import THROW_AWAY
from tests.e2e.journey import check_document, client_of
from tests.e2e.processes import Finished, LookupProcess, database_of, lookup
from tests.e2e.served import Served
from tests.servers.valkey import RedisDatabases

COMMANDS = [
    "up",
    "migrate",
    "write",
    "relay",
    "saga",
    "worker",
    "projector",
    "keeper",
    "read",
    "run",
    "show",
    "history",
    "why",
    "jobs",
    "stats",
    "status",
    "doctor",
    "self-check",
    "backup",
    "restore",
    "dead-letters",
    "health",
]
EVERY_PART = {
    "read",
    "write",
    "relay",
    "saga.gather",
    "saga.deadlines",
    "saga.dead-letters",
    "projector",
    "keeper.heads",
    "keeper.self-check",
    "keeper.retention",
    "keeper.watch",
    "worker.GeoIP",
    "worker.Ping",
    "worker.RDAP",
    "worker.ReverseDNS",
}


@pytest.fixture(scope="module")
async def up(tmp_path_factory: pytest.TempPathFactory, peers: Served) -> AsyncIterator[LookupProcess]:
    """A running `lookup up`, for the commands that use one; works in a folder with its data in `data`."""
    process = LookupProcess(
        "up", "--port", "0", "--data-dir", "data", folder=tmp_path_factory.mktemp("up"), env=peers.environment()
    )
    try:
        await process.start()
        yield process
    finally:
        await process.stop()


# --- words and exit codes -----------------------------------------------------------------------------------------------


async def test_help_names_every_command(tmp_path: Path) -> None:
    told = await lookup("--help", cwd=tmp_path)

    assert (told.code, told.err) == (0, "")
    assert [command for command in COMMANDS if f" {command} " not in told.out] == []


@pytest.mark.parametrize("command", COMMANDS)
async def test_each_command_explains_itself(command: str, tmp_path: Path) -> None:
    told = await lookup(command, "--help", cwd=tmp_path)

    assert (told.code, told.err) == (0, "")
    assert told.out.startswith(f"Usage: lookup {command}")


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["relay", "teapot"], 2, "'teapot' is no part."),
        (["worker", "Whois"], 2, "'Whois' is no part."),
        (["relay"], 2, "LOOKUP_REDIS_URL and LOOKUP_DATABASE_URL must be set"),
        (["read"], 2, "LOOKUP_REDIS_URL must be set"),
        (["migrate"], 2, "LOOKUP_DATABASE_OWNER_URL is not set."),
        (["health", "relay"], 2, "LOOKUP_REDIS_URL is not set."),
        (["status"], 3, "nothing runs here"),
        (["doctor"], 3, "nothing runs here"),
        (["self-check"], 3, "nothing runs here"),
        (["doctor", "--reason", "for fun"], 2, "--reason and --actor are for --fix."),
        (["backup", "folder"], 3, "nothing runs here"),
        (["restore", "folder", "--into", "postgresql://127.0.0.1:9/x"], 2, "LOOKUP_REDIS_URL is not set."),
        (["restore", "folder", "--into", "postgresql://127.0.0.1:9/x", "--database-only"], 1, "is no backup"),
        (["dead-letters", "list"], 3, "nothing runs here"),
        (["dead-letters", "list", "--state", "lost"], 2, "A state is one of waiting, retried, discarded"),
        (["dead-letters", "retry"], 2, "Say which letters"),
        (["dead-letters", "retry", "1", "--all"], 2, "Say which letters"),
        (["dead-letters", "retry", "--all", "--rate", "0"], 2, "A rate is a number above 0."),
        (["dead-letters", "discard", "1", "--reason", " "], 2, "printable text"),
        (["run", "127.0.0.1", "--url", "http://127.0.0.1:9"], 3, "Nothing answers at http://127.0.0.1:9."),
        (["history", "1", "--url", "http://127.0.0.1:9"], 3, "Nothing answers at http://127.0.0.1:9."),
        (["why", "1", "/status", "--url", "nonsense"], 2, "Not the address of a service: nonsense."),
        (["run", "127.0.0.1", "--url", "nonsense"], 2, "Not the address of a service: nonsense."),
        (["teapot"], 2, "teapot"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
async def test_wrong_usage_is_said_in_a_sentence(words: list[str], code: int, sentence: str, tmp_path: Path) -> None:
    refused = await lookup(*words, cwd=tmp_path)

    assert (refused.code, refused.out) == (code, "")
    assert sentence in refused.err
    assert "Traceback" not in refused.err


async def test_a_setting_that_cannot_be_read_is_said_in_a_sentence(tmp_path: Path) -> None:
    refused = await lookup("up", cwd=tmp_path, env={"LOOKUP_PORT": "teapot"})

    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith("lookup: LOOKUP_PORT: ")
    assert refused.err.count("\n") == 1


async def test_a_database_that_is_not_there_is_said_without_its_password(tmp_path: Path) -> None:
    url = "postgresql://owner:wonderland@127.0.0.1:9/lookup"

    refused = await lookup("migrate", cwd=tmp_path, env={"LOOKUP_DATABASE_OWNER_URL": url})

    assert refused.code == 1
    assert "LOOKUP_DATABASE_OWNER_URL" in refused.err
    assert "wonderland" not in refused.err
    assert "Traceback" not in refused.err


# --- against a running service --------------------------------------------------------------------------------------------


async def test_run_prints_the_answer_for_a_script(up: LookupProcess, tmp_path: Path) -> None:
    ran = await lookup("run", "127.0.0.1", "--json", "--url", up.url, cwd=tmp_path)

    job = json.loads(ran.out)
    check_document(job)
    assert (ran.code, ran.err) == (0, "")
    assert (job["target"], job["status"]) == ("127.0.0.1", "Completed")
    assert [result["success"] for result in job["results"]] == [True] * 4


async def test_run_prints_the_answer_for_a_person(up: LookupProcess, tmp_path: Path) -> None:
    ran = await lookup("run", "example.com", "--service", "rdap", "--service", "ReverseDNS", "--url", up.url, cwd=tmp_path)

    assert ran.code == 0
    for shown in ("example.com", "Made-up Registrar B.V.", "Reverse DNS lookup requires an IP address target."):
        assert shown in ran.out


async def test_run_tells_a_script_that_nothing_was_found(up: LookupProcess, tmp_path: Path) -> None:
    ran = await lookup("run", "missing.org", "--service", "RDAP", "--json", "--url", up.url, cwd=tmp_path)

    assert ran.code == 1
    assert json.loads(ran.out)["status"] == "Failed"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["256.1.1.1"], "Invalid IP address format: '256.1.1.1'. IPv4 must have exactly 4 octets (0-255 each)."),
        (["127.0.0.1", "--service", "Whois"], "Invalid service type specified"),
    ],
)
async def test_run_passes_a_refusal_on(words: list[str], sentence: str, up: LookupProcess, tmp_path: Path) -> None:
    refused = await lookup("run", *words, "--url", up.url, cwd=tmp_path)

    assert (refused.code, refused.out) == (2, "")
    assert sentence in refused.err


async def test_status_of_a_running_instance(up: LookupProcess) -> None:
    async with client_of(up.url, up.url) as client:
        await client.look_up("127.0.0.1", ["GeoIP"])

    told = await lookup("status", "--json", "--data-dir", "data", cwd=up.folder)

    status = json.loads(told.out)
    assert (told.code, told.err) == (0, "")
    assert status["problems"] == []
    assert {part["part"] for part in status["parts"]} == EVERY_PART
    assert {(part["state"], part["pid"], part["host"]) for part in status["parts"]} == {
        ("running", up.pid, socket.gethostname())
    }
    assert status["log_head"] > 0
    assert status["projected"] <= status["log_head"]
    assert status["projection_lag_ms"] < 10_000


async def test_jobs_are_listed_and_services_told_of(up: LookupProcess) -> None:
    ran = await lookup("run", "127.0.0.1", "--service", "ReverseDNS", "--json", "--url", up.url, cwd=up.folder)
    job_id = json.loads(ran.out)["jobId"]

    page = await lookup("jobs", "--target", " 127.0.0.1 ", "--limit", "1", "--json", "--url", up.url, cwd=up.folder)
    shown = await lookup("jobs", "--status", "Completed", "--url", up.url, cwd=up.folder)
    wrong = await lookup("jobs", "--status", "Done", "--url", up.url, cwd=up.folder)
    numbers = await lookup("stats", "--hours", "1", "--json", "--url", up.url, cwd=up.folder)
    table = await lookup("stats", "--url", up.url, cwd=up.folder)

    assert (page.code, [job["jobId"] for job in json.loads(page.out)["jobs"]]) == (0, [job_id])
    assert (shown.code, job_id in shown.out) == (0, True)
    assert (wrong.code, "status must be one of" in wrong.err) == (2, True)
    answered = {service["service"]: service["succeeded"] for service in json.loads(numbers.out)["services"]}
    assert (numbers.code, answered["ReverseDNS"] >= 1) == (0, True)
    assert (table.code, "ReverseDNS" in table.out) == (0, True)


async def test_status_for_a_person_names_parts_and_positions(up: LookupProcess) -> None:
    told = await lookup("status", "--data-dir", "data", cwd=up.folder)

    assert told.code == 0
    assert [part for part in EVERY_PART if part not in told.out] == []
    assert [name for name in ("log", "relay: commands", "relay: facts", "projector") if name not in told.out] == []


async def test_dead_letters_of_a_running_instance(up: LookupProcess) -> None:
    async def say(*words: str) -> Finished:
        return await lookup("dead-letters", *words, "--data-dir", "data", cwd=up.folder)

    none = await say("list")
    with psycopg.connect(database_of(up.folder / "data")) as database:
        database.execute(
            "INSERT INTO dead_letters (message, queue, reason, body, headers, died_at)"
            " VALUES ('m', 'lookup.outcomes', 'unparsable', %s, '{}', now())",
            (b"\xff \x1b[31m red",),
        )
    listed, shown = await say("list"), await say("show", "1")
    dry, missing = await say("retry", "--all", "--dry-run"), await say("retry", "9")
    unreasonable = await say("discard", "1")
    no_broker = {"LOOKUP_DATABASE_URL": database_of(up.folder / "data")}
    elsewhere = await lookup("dead-letters", "discard", "1", "--reason", "x", "--dry-run", cwd=up.folder, env=no_broker)
    discarded, again = await say("discard", "1", "--reason", "noise"), await say("discard", "1", "--reason", "noise")

    assert (none.code, none.out) == (0, "There are no dead letters.\n")
    assert listed.code == 0
    assert [word for word in ("unparsable", "lookup.outcomes", "1 wait") if word not in listed.out] == []
    assert (shown.code, "It is no JSON." in shown.out, "\x1b" in shown.out) == (0, True, False)
    assert (dry.code, dry.out) == (0, "Would be retried: 1\n")
    assert (missing.code, missing.err) == (1, "lookup: There is no dead letter 9.\n")
    assert (unreasonable.code, "--reason" in unreasonable.out + unreasonable.err) == (2, True)
    assert (elsewhere.code, elsewhere.out) == (0, "Would be discarded: 1\n")
    assert (discarded.code, discarded.out) == (0, "discarded: 1\n")
    assert (again.code, again.out) == (1, "discarded: 0\nleft alone: 1 (it was decided about already)\n")


# --- parts without `up` ---------------------------------------------------------------------------------------------------


async def test_parts_may_share_a_process(tmp_path: Path, peers: Served, database_url: str, valkey: RedisDatabases) -> None:
    """A small machine needs few processes: here the six parts are two of them."""
    with valkey.fresh() as redis_url:
        owner = {"LOOKUP_DATABASE_OWNER_URL": database_url, "LOOKUP_APP_PASSWORD": THROW_AWAY["POSTGRES_APP_PASSWORD"]}
        servers = {"LOOKUP_DATABASE_URL": _as_app(database_url), "LOOKUP_REDIS_URL": redis_url, **peers.environment()}
        assert (await lookup("migrate", cwd=tmp_path, env=owner)).code == 0
        first = LookupProcess(
            "write", "relay", "saga", "projector", "read", "--port", "0", folder=tmp_path, env=servers, name="first"
        )
        second = LookupProcess("worker", "Ping", "worker", "rdap", folder=tmp_path, env=servers, name="second")
        try:
            url = await first.start()
            second.launch()
            async with client_of(url, url) as client:
                job = await client.look_up("127.0.0.1", ["RDAP", "Ping"])
            healthy = await lookup("health", "worker", "Ping", cwd=tmp_path, env=servers)
            absent = await lookup("health", "worker", "GeoIP", cwd=tmp_path, env=servers)
        finally:
            await second.stop()
            await first.stop()
        gone = await lookup("health", "relay", cwd=tmp_path, env=servers)

    assert [result["status"] for result in job["results"]] == ["Succeeded", "Succeeded"]
    assert (healthy.code, absent.code, gone.code) == (0, 1, 1)


async def test_a_migration_may_be_repeated(tmp_path: Path, database_url: str) -> None:
    env = {"LOOKUP_DATABASE_OWNER_URL": database_url}

    first = await lookup("migrate", cwd=tmp_path, env=env)
    log_id = _log_id(database_url)
    second = await lookup("migrate", cwd=tmp_path, env=env)

    assert (first.code, first.out, first.err) == (second.code, second.out, second.err) == (0, "The database is ready.\n", "")
    assert _log_id(database_url) == log_id


def _log_id(database_url: str) -> object:
    with psycopg.connect(database_url) as database:
        return database.execute("SELECT log_id FROM log_identity").fetchone()


def _as_app(database_url: str) -> str:
    return psycopg.conninfo.make_conninfo(database_url, user="lookup_app", password=THROW_AWAY["POSTGRES_APP_PASSWORD"])
