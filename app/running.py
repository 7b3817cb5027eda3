"""Runs parts until told to stop: `lookup up` with its embedded servers, or some parts of a deployment."""

import asyncio
import gc
import ipaddress
import os
import pwd
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import uvloop
from psycopg.conninfo import make_conninfo

from app.embedded.servers import Embedded, find_running
from app.http.serving import CannotListen
from app.migrate import APP_ROLE, READER_ROLE, RETENTION_ROLE, migrate
from app.parts import PartNames, Process, parse_parts
from app.settings import Settings
from app.wiring import Wiring, new_id

DEFAULT_URL = "http://127.0.0.1:8080"
Returned = TypeVar("Returned")

WATCH_INTERVAL_S = 1.0
SWITCH_INTERVAL_S = 0.001
LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))


class CannotRun(Exception):  # noqa: N818 - what is the case, in our words
    """Nothing was started; the message says why and what to do."""


class SettingMissing(CannotRun):
    """The command was given no server to work on."""


def run_everything(settings: Settings, *, demo: bool) -> int:
    """All parts in this process, with embedded servers where no URL is given. Must be called from the main thread."""
    embedded = Embedded(settings.data_dir, postgres=settings.database_url is None, valkey=settings.redis_url is None)
    _stop_like_ctrl_c()
    try:
        servers = embedded.start()
        settings = with_embedded(settings, servers.database_owner_url, servers.redis_url)
        settings = settings.model_copy(update={"heads_key_make": True})
        if settings.database_owner_url:
            migrate_database(settings)
        _hold_against_erasures(settings, mend=True)
        return run_loop(_serve(_open_to_itself(settings), PartNames.all(), demo=demo, embedded=embedded))
    finally:
        embedded.stop()


def run_parts(settings: Settings, words: Sequence[str]) -> int:
    """The named parts in this process, on servers that run already. Raises `UnknownPart` or `CannotRun`."""
    parts = parse_parts(words)
    needed = {"LOOKUP_REDIS_URL": settings.redis_url}
    if parts != parse_parts(["read"]):
        needed["LOOKUP_DATABASE_URL"] = settings.database_url
    missing = [variable for variable, value in needed.items() if value is None]
    if missing:
        raise SettingMissing(f"{' and '.join(missing)} must be set to run parts alone (`lookup up` needs neither).")
    if settings.database_url is not None:
        _hold_against_erasures(settings, mend=False)
    return run_loop(_serve(settings, parts))


def _hold_against_erasures(settings: Settings, *, mend: bool) -> None:
    """A log that was restored from an older backup must not serve what was erased meanwhile."""
    from app.erasure import hold_against_list  # noqa: PLC0415 - it imports this module

    if settings.erasures.exists():
        hold_against_list(settings, mend=mend)


def migrate_database(settings: Settings) -> None:
    """Raises `MigrationFailed` or `SettingMissing`."""
    if settings.database_owner_url is None:
        raise SettingMissing("LOOKUP_DATABASE_OWNER_URL is not set.")
    migrate(settings.database_owner_url, new_id(), passwords_of(settings))


def passwords_of(settings: Settings) -> dict[str, str | None]:
    """Those of the roles that `lookup migrate` makes."""
    return {
        APP_ROLE: settings.app_password,
        READER_ROLE: settings.reader_password,
        RETENTION_ROLE: settings.retention_password,
    }


def with_embedded(settings: Settings, database_owner_url: str, redis_url: str) -> Settings:
    """The settings, completed by the embedded servers that were started."""
    found: dict[str, str] = {}
    if database_owner_url:
        found["database_owner_url"] = database_owner_url
        found["database_url"] = make_conninfo(database_owner_url, user=APP_ROLE)
        found["database_read_url"] = make_conninfo(database_owner_url, user=READER_ROLE)
        found["database_retention_url"] = make_conninfo(database_owner_url, user=RETENTION_ROLE)
    if redis_url:
        found["redis_url"] = redis_url
    return settings.model_copy(update=found)


def settings_of_running(settings: Settings) -> Settings:
    """The settings, completed by the instance that runs on the data folder, if one does."""
    servers = find_running(settings.data_dir)
    return with_embedded(settings, servers.database_owner_url, servers.redis_url) if servers else settings


def user_name() -> str:
    """The name that this process runs under; its number where it has none."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _open_to_itself(settings: Settings) -> Settings:
    """Who can reach a service that listens on loopback only can reach loopback without it: so it may probe it, too."""
    if settings.probe_allow or not _is_loopback(settings.host):
        return settings
    return settings.model_copy(update={"probe_allow": LOOPBACK})


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _serve(settings: Settings, parts: PartNames, *, demo: bool = False, embedded: Embedded | None = None) -> int:
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
    on_ready: Callable[[str], None] = _welcome if embedded else _say_where
    watcher = asyncio.create_task(_watch(embedded, stop)) if embedded else None
    try:
        await Process(wiring, parts, settings.host, settings.port, on_ready).run(stop)
    except CannotListen as error:
        raise CannotRun(str(error)) from error
    finally:
        if peers is not None:
            await peers.stop()
    if watcher is not None and watcher.done():
        raise CannotRun(f"Stopped, because the embedded {watcher.result()} ended by itself. Its log is in {settings.data_dir}.")
    return 0


async def _watch(embedded: Embedded, stop: asyncio.Event) -> str:
    """Without its servers nothing here can go on: stop when one of them ends by itself, and say which."""
    while not (ended := embedded.ended()):  # noqa: ASYNC110 - a process that ends sets no event
        await asyncio.sleep(WATCH_INTERVAL_S)
    stop.set()
    return " and ".join(ended)


def _say_where(url: str) -> None:
    print(f"Listening on {url}", file=sys.stderr, flush=True)  # noqa: T201 - for the person who started it


def _welcome(url: str) -> None:
    elsewhere = "" if url == DEFAULT_URL else f" --url {url}"
    print(  # noqa: T201 - for the person who started it
        f"""
Distributed Lookup runs. Try:

  in a browser    {url}/
  in a terminal   .venv/bin/lookup run example.com{elsewhere}
  with curl       curl -i {url}/api/lookup -H 'Content-Type: application/json' -d '{{"target": "example.com"}}'
                  and then GET the address in its Location header

Ctrl-C stops everything; what was accepted is kept.
""",
        flush=True,
    )


def run_loop(work: Coroutine[Any, Any, Returned]) -> Returned:
    """Run on uvloop, as `bench/` does too. Facts and views are many small objects that live long: collect them seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    # A thread that the database has answered waits at most this long for the interpreter.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    return uvloop.run(work)


def _stop_like_ctrl_c() -> None:
    """Before the event loop runs, SIGTERM must unwind like Ctrl-C, so that no embedded server is left behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
