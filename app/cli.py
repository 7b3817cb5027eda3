"""The `lookup` command. Exit codes: 0 well, 1 not well, 2 wrong usage, 3 unreachable, 4 not in time, 130 interrupted."""

import asyncio
import json
import os
import socket
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from app import backup_commands, listing_commands, past_commands, reparse_commands, replay_commands
from app.audit_commands import audit
from app.erase_commands import erase, retention
from app.letter_commands import letters
from app.target_commands import diff, target_history

DEFAULT_URL = "http://127.0.0.1:8080"
PARTS = {
    "write": "Take jobs on: the command side of the HTTP API.",
    "relay": "Follow the log and publish it.",
    "saga": "Gather outcomes and watch over deadlines.",
    "worker": "Look things up: `lookup worker Ping RDAP`; without a service, all four.",
    "projector": "Fold the log into views.",
    "keeper": "Look after log and views: raise the alarm when the views stand still.",
    "read": "Answer pollers: the query side of the HTTP API, and the page.",
}
NOTHING_RUNS = "lookup: nothing runs here, and LOOKUP_DATABASE_URL and LOOKUP_REDIS_URL are not set."

Json = Annotated[bool, Parameter(name="--json", negative=())]

app = App(name="lookup", help="Gathers what the network knows about an IP address or a domain.", version_flags=["--version"])


def main() -> None:
    """The console script. Messages for people go to standard error, and no trace is shown for what they can mend."""
    try:
        sys.exit(app(result_action="return_value") or 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        code = _code_of(error)
        if code is None:
            raise
        print(f"lookup: {error}", file=sys.stderr)
        sys.exit(code)


def _code_of(error: Exception) -> int | None:
    """The exit code of an error whose message is for people, None for a fault of ours."""
    from app.embedded.failure import EmbeddedError
    from app.migrate import MigrationFailed
    from app.parts import UnknownPart
    from app.running import CannotRun, SettingMissing
    from app.settings import SettingUnreadable

    if isinstance(error, UnknownPart | SettingMissing | SettingUnreadable):
        return 2
    return 1 if isinstance(error, CannotRun | EmbeddedError | MigrationFailed) else None


# --- running it -------------------------------------------------------------------------------------------------------


@app.command
def up(*, host: str | None = None, port: int | None = None, data_dir: Path | None = None, demo: bool = False) -> int:
    """Run everything in one process, with embedded PostgreSQL and Valkey unless URLs are given.

    Parameters
    ----------
    host
        Address to listen on (127.0.0.1).
    port
        Port to listen on (8080).
    data_dir
        Where the embedded servers keep their data (.data).
    demo
        Ask local stand-ins instead of the internet, so that all four answers can be seen anywhere.

    """
    from app.running import run_everything

    return run_everything(_settings(host=host, port=port, data_dir=data_dir), demo=demo)


@app.command
def migrate() -> int:
    """Make the tables and roles in the database that LOOKUP_DATABASE_OWNER_URL names. Safe to repeat."""
    from app.running import migrate_database

    migrate_database(_settings())
    print("The database is ready.")
    return 0


def _part_command(name: str, what: str) -> None:
    def run(*more: str, host: str | None = None, port: int | None = None) -> int:
        from app.running import run_parts

        return run_parts(_settings(host=host, port=port), [name, *more])

    run.__doc__ = f"{what} Other parts may be named after it, to run in the same process."
    app.command(run, name=name)


for _name, _what in PARTS.items():
    _part_command(_name, _what)


# --- using it ---------------------------------------------------------------------------------------------------------


@app.command(name="run")
def run_lookup(
    target: str,
    *,
    service: Annotated[list[str] | None, Parameter(negative=())] = None,
    url: str = DEFAULT_URL,
    timeout: float = 120.0,
    timeout_seconds: float | None = None,
    as_json: Json = False,
) -> int:
    """Look TARGET up and print what was found.

    Parameters
    ----------
    target
        An IP address or a domain.
    service
        GeoIP, Ping, RDAP or ReverseDNS; may be repeated. All four if not given.
    url
        Where the service is.
    timeout
        Seconds to wait for the whole answer.
    timeout_seconds
        Seconds that one attempt of a service may take. Only ever shortens what the service's settings say.
    as_json
        Print the answer's JSON document and nothing else.

    """
    from rich.console import Console

    from app import client

    out, err = Console(), Console(stderr=True)
    work = client.run(
        target, service or [], base_url=url, as_json=as_json, timeout_s=timeout, out=out, err=err, attempt_s=timeout_seconds
    )
    return int(asyncio.run(work))


@app.command
def status(*, data_dir: Path | None = None, as_json: Json = False) -> int:
    """Show parts, positions and lag; exit code 1 when something cannot be reached or no part runs."""
    from rich.console import Console

    from app.running import settings_of_running
    from app.status import print_status, status_of
    from app.wiring import Wiring

    wiring = Wiring(settings_of_running(_settings(data_dir=data_dir)))
    if wiring.settings.database_url is None or wiring.settings.redis_url is None:
        print(NOTHING_RUNS, file=sys.stderr)
        return 3

    async def show() -> int:
        try:
            found = await status_of(wiring)
        finally:
            await wiring.aclose()
        if as_json:
            print(json.dumps(found.as_json(), indent=2))
        else:
            print_status(found, Console())
        return 1 if found.problems or not found.parts else 0

    return asyncio.run(show())


@app.command
def doctor(
    *,
    fix: Annotated[bool, Parameter(negative=())] = False,
    reason: str | None = None,
    actor: str | None = None,
    dead_letter_hours: float = 1.0,
    data_dir: Path | None = None,
    as_json: Json = False,
) -> int:
    """Hold log, results and views against each other, and name every broken promise. Stops nobody.

    Exit code 0 when nothing is broken (or everything was mended), 1 when something is, 3 when something cannot be examined.

    Parameters
    ----------
    fix
        Put right what can be: facts that are due are appended, wrong views rewritten, orphan keys removed.
    reason
        Why, for the envelopes of the facts that --fix appends.
    actor
        Who, as well; the user of this machine if not given.
    dead_letter_hours
        A dead letter that nobody has decided about for so long is a finding.
    data_dir
        The folder of a running `lookup up` (.data); LOOKUP_DATABASE_URL and LOOKUP_REDIS_URL otherwise.
    as_json
        Print the report as JSON and nothing else.

    """
    from datetime import timedelta

    from rich.console import Console

    from app.doctor.consultation import Fix, consult
    from app.doctor.printing import print_report
    from app.running import settings_of_running, user_name
    from app.wiring import Wiring

    if not fix and (reason is not None or actor is not None):
        print("lookup: --reason and --actor are for --fix.", file=sys.stderr)
        return 2
    wiring = Wiring(settings_of_running(_settings(data_dir=data_dir)))
    if wiring.settings.database_url is None or wiring.settings.redis_url is None:
        print(NOTHING_RUNS, file=sys.stderr)
        return 3

    async def examine() -> int:
        try:
            mend = Fix(f"doctor:{actor or user_name()}", reason) if fix else None
            report = await consult(wiring, mend, dead_letter_max_age=timedelta(hours=dead_letter_hours))
        finally:
            await wiring.aclose()
        if as_json:
            print(json.dumps(report.as_json(), indent=2))
        else:
            print_report(report, Console())
        return report.exit_code

    return asyncio.run(examine())


app.command(audit)
app.command(letters)
app.command(diff)
app.command(target_history)
past_commands.register(app)
listing_commands.register(app)
app.command(retention)
app.command(erase)
backup_commands.register(app)
reparse_commands.register(app)
replay_commands.register(app)


@app.command(name="self-check")
def self_check(*, data_dir: Path | None = None, as_json: Json = False) -> int:
    """Make all views again from the log, beside those that are shown, and compare. Exit code 1 if they differ.

    Parameters
    ----------
    data_dir
        The folder of a running `lookup up` (.data); LOOKUP_DATABASE_URL and LOOKUP_REDIS_URL otherwise.
    as_json
        Print what was found as JSON and nothing else.

    """
    from app.running import settings_of_running
    from app.self_check import check_now
    from app.wiring import Wiring

    wiring = Wiring(settings_of_running(_settings(data_dir=data_dir)))
    if wiring.settings.database_url is None or wiring.settings.redis_url is None:
        print(NOTHING_RUNS, file=sys.stderr)
        return 3

    async def check() -> int:
        try:
            return await check_now(await wiring.self_checker(), as_json=as_json)
        finally:
            await wiring.aclose()

    return asyncio.run(check())


@app.command
def health(*part: str) -> int:
    """Exit 0 if a part of this host lives and does its work, or waits for its turn to lead; else 1.

    For container health checks: `lookup health relay`, `lookup health worker Ping`.
    """
    from redis.asyncio import Redis
    from redis.exceptions import RedisError

    from app.heartbeat import HEALTHY, heartbeats

    url = _settings().redis_url
    if url is None:
        print("lookup: LOOKUP_REDIS_URL is not set.", file=sys.stderr)
        return 2
    wanted = ".".join(part).lower()

    async def look() -> int:
        async with Redis.from_url(url, socket_connect_timeout=2.0, socket_timeout=2.0) as redis:
            beats = [beat for beat in await heartbeats(redis) if beat.host == socket.gethostname() and _lives(beat.pid)]
        ours = [beat for beat in beats if f"{beat.part}.".lower().startswith(f"{wanted}.")]
        return 0 if ours and all(beat.state in HEALTHY for beat in ours) else 1

    try:
        return asyncio.run(look())
    except (RedisError, OSError):
        print("lookup: Redis cannot be reached.", file=sys.stderr)
        return 1


def _lives(pid: int) -> bool:
    """A note outlives a killed part by some seconds."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _settings(**given: Any) -> Any:
    """The settings: what was given on the command line before the environment."""
    from app.logs import set_up_logs
    from app.settings import Settings

    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    set_up_logs(settings.log_format, settings.log_level)
    return settings


if __name__ == "__main__":
    main()
