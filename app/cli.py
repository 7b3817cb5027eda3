"""The `lookup` command. Exit codes: 0 well, 1 not well, 2 wrong usage, 3 unreachable, 4 not in time, 130 interrupted."""

import asyncio
import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import uvloop
from cyclopts import App, Parameter
from psycopg.conninfo import make_conninfo
from rich.console import Console

from app.embedded.failure import EmbeddedError
from app.embedded.servers import Embedded
from app.heartbeat import heartbeats
from app.logs import set_up_logs
from app.migrate import APP_ROLE, READER_ROLE, RETENTION_ROLE, MigrationFailed, migrate
from app.parts import PartNames, Process, UnknownPart, parse_parts
from app.settings import Settings
from app.status import print_status, status_of
from app.wiring import Wiring, new_id

DEFAULT_URL = "http://127.0.0.1:8080"

app = App(name="lookup", help="Gathers what the network knows about an IP address or a domain.", version_flags=["--version"])


def main() -> None:
    """The console script. Messages for people go to standard error, and no trace is shown for what they can mend."""
    try:
        sys.exit(app(result_action="return_value") or 0)
    except (MigrationFailed, EmbeddedError, UnknownPart) as error:
        print(f"lookup: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UnknownPart) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


# --- running it -------------------------------------------------------------------------------------------------------


@app.command
def up(
    *,
    host: str | None = None,
    port: int | None = None,
    data_dir: Path | None = None,
    demo: bool = False,
) -> int:
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
    given = {"host": host, "port": port, "data_dir": data_dir}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    set_up_logs(settings.log_format, settings.log_level)
    embedded = Embedded(settings.data_dir, postgres=settings.database_url is None, valkey=settings.redis_url is None)
    _stop_like_ctrl_c()
    try:
        servers = embedded.start()
        settings = with_embedded(settings, servers.database_owner_url, servers.redis_url)
        if settings.database_owner_url:
            _migrate(settings)
        return _run(_serve(settings, PartNames.all(), demo=demo, welcome=True))
    finally:
        embedded.stop()


@app.command(name="migrate")
def migrate_command() -> int:
    """Make the tables and roles in the database that LOOKUP_DATABASE_OWNER_URL names. Safe to repeat."""
    settings = Settings()
    set_up_logs(settings.log_format, settings.log_level)
    if settings.database_owner_url is None:
        return _complain("LOOKUP_DATABASE_OWNER_URL is not set.", 2)
    _migrate(settings)
    print("The database is ready.")
    return 0


def _part_command(name: str, what: str) -> None:
    def run_parts(*more: str, host: str | None = None, port: int | None = None) -> int:
        given = {"host": host, "port": port}
        settings = Settings(**{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
        set_up_logs(settings.log_format, settings.log_level)
        missing = [
            f"LOOKUP_{variable.upper()}"
            for variable in (("redis_url",) if (name, *more) == ("read",) else ("database_url", "redis_url"))
            if getattr(settings, variable) is None
        ]
        if missing:
            return _complain(f"{' and '.join(missing)} must be set to run parts alone (`lookup up` needs neither).", 2)
        return _run(_serve(settings, parse_parts([name, *more])))

    run_parts.__doc__ = f"{what} More parts may be named after it, to run in the same process: `lookup {name} projector`."
    app.command(run_parts, name=name)


for _name, _what in {
    "write": "Take jobs on: the command side of the HTTP API.",
    "relay": "Follow the log and publish it.",
    "saga": "Gather outcomes and watch over deadlines.",
    "worker": "Look things up: `lookup worker Ping RDAP`; without a service, all four.",
    "projector": "Fold the log into views.",
    "read": "Answer pollers: the query side of the HTTP API, and the page.",
}.items():
    _part_command(_name, _what)


# --- using it ---------------------------------------------------------------------------------------------------------


@app.command(name="run")
def run_command(
    target: str,
    *,
    service: Annotated[list[str] | None, Parameter(negative=())] = None,
    url: str = DEFAULT_URL,
    timeout: float = 120.0,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
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
    as_json
        Print the answer's JSON document and nothing else.

    """
    from app import client  # noqa: PLC0415 - rich and httpx are not needed to run a part

    return asyncio.run(client.run(target, service or [], base_url=url, as_json=as_json, timeout_s=timeout))


@app.command(name="status")
def status_command(
    *, data_dir: Path | None = None, as_json: Annotated[bool, Parameter(name="--json", negative=())] = False
) -> int:
    """Show parts, positions and lag; exit code 1 when something cannot be reached or no part runs."""
    wiring = Wiring(_settings_of_running(data_dir))
    if wiring.settings.database_url is None or wiring.settings.redis_url is None:
        return _complain("nothing runs on this data folder, and LOOKUP_DATABASE_URL and LOOKUP_REDIS_URL are not set.", 3)

    async def show() -> int:
        try:
            status = await status_of(wiring)
        finally:
            await wiring.aclose()
        if as_json:
            print(json.dumps(status.as_json(), indent=2))
        else:
            print_status(status, Console())
        return 1 if status.problems or not status.parts else 0

    return asyncio.run(show())


@app.command
def health(*part: str) -> int:
    """Exit 0 if a part of this host lives and runs, else 1: `lookup health relay`, `lookup health worker Ping`.

    For container health checks.
    """
    wiring = Wiring(Settings())
    wanted = ".".join(part)

    async def look() -> int:
        try:
            beats = [beat for beat in await heartbeats(wiring.redis) if beat.host == socket.gethostname()]
        finally:
            await wiring.aclose()
        ours = [beat for beat in beats if f"{beat.part}.".lower().startswith(f"{wanted}.".lower())]
        return 0 if ours and all(beat.state == "running" for beat in ours) else 1

    return asyncio.run(look())


# --- how ----------------------------------------------------------------------------------------------------------------


def with_embedded(settings: Settings, database_owner_url: str, redis_url: str) -> Settings:
    """The settings, completed by the embedded servers that were started."""
    found: dict[str, str] = {}
    if database_owner_url:
        found["database_owner_url"] = database_owner_url
        found["database_url"] = _as_role(database_owner_url, APP_ROLE)
        found["database_read_url"] = _as_role(database_owner_url, READER_ROLE)
    if redis_url:
        found["redis_url"] = redis_url
    return settings.model_copy(update=found)


def _settings_of_running(data_dir: Path | None) -> Settings:
    """The settings of the instance that runs on a data folder, or of the environment."""
    settings = Settings()
    note = (data_dir or settings.data_dir) / "servers.json"
    with suppress(OSError, ValueError):
        urls = json.loads(note.read_text(encoding="utf-8"))
        return with_embedded(settings, urls["database_owner_url"], urls["redis_url"])
    return settings


def _as_role(url: str, role: str) -> str:
    return make_conninfo(url, user=role)


def _complain(message: str, code: int) -> int:
    print(f"lookup: {message}", file=sys.stderr)
    return code


def _migrate(settings: Settings) -> None:
    assert settings.database_owner_url is not None
    passwords = {
        APP_ROLE: settings.app_password,
        READER_ROLE: settings.reader_password,
        RETENTION_ROLE: settings.retention_password,
    }
    migrate(settings.database_owner_url, new_id(), passwords)


async def _serve(settings: Settings, parts: PartNames, *, demo: bool = False, welcome: bool = False) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    wiring = Wiring(settings)
    peers = None
    if demo:
        from app.demo.peers import start_demo_peers  # noqa: PLC0415 - the demo alone needs it

        peers = await start_demo_peers(settings.data_dir / "demo")
        wiring.network_settings = peers.settings
    try:
        on_ready: Callable[[str], None] = _welcome if welcome else lambda url: print(f"Listening on {url}", file=sys.stderr)
        await Process(wiring, parts, settings.host, settings.port, on_ready).run(stop)
    except OSError as error:
        return _complain(f"{settings.host}:{settings.port} cannot be listened on ({os.strerror(error.errno or 0)}).", 1)
    finally:
        if peers is not None:
            await peers.stop()
    return 0


def _welcome(url: str) -> None:
    print(
        f"""
Distributed Lookup runs. Try:

  in a browser    {url}/
  in a terminal   .venv/bin/lookup run example.com{"" if url == DEFAULT_URL else f" --url {url}"}
  with curl       curl -i {url}/api/lookup -H 'Content-Type: application/json' -d '{{"target": "example.com"}}'
                  and then GET the address in its Location header

Ctrl-C stops everything; what was accepted is kept.
""",
        flush=True,
    )


def _run(work: Coroutine[Any, Any, int]) -> int:
    """Run on uvloop. Facts and views are many small objects that live long: collect them seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    return uvloop.run(work)


def _stop_like_ctrl_c() -> None:
    """Before the event loop runs, SIGTERM must unwind like Ctrl-C, so that no embedded server is left behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


if __name__ == "__main__":
    main()
