"""The servers that come in the wheel: `lookup up` without a database or Redis of your own starts them below its data folder."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from app.embedded.child import living_in
from app.embedded.failure import EmbeddedError
from app.embedded.files import give_to_owner_of, new_log, write_private
from app.embedded.postgres import SOCKET_NAME, Postgres
from app.embedded.programs import programs_for
from app.embedded.valkey import Valkey

CACHE_DIR = Path("/var/cache/distributed-lookup")
"""Where a copy of the programs goes when root starts them and their user may not enter the virtual environment."""

_SOCKET_PATH_BYTES_MAX = 107
_LOCK_WAIT_S = 0.5
_LAST_RUN_WAIT_S = 30.0


@dataclass(frozen=True)
class EmbeddedServers:
    """Where the servers are reached; empty for one that was not asked for.

    `database_owner_url` is a libpq URL of the database `lookup` as its owner, `redis_url` a `unix://` URL. Both are as
    private as the data folder: whoever may enter it needs no password.
    """

    database_owner_url: str = ""
    redis_url: str = ""


class Embedded:
    """PostgreSQL and Valkey as children of this process, with all they keep below `data_dir`.

    They end with this process, even when it is killed; the next start recovers what was committed. One process at a time
    uses a data folder. Everything that can go wrong is an `EmbeddedError`.
    """

    def __init__(self, data_dir: Path, *, postgres: bool = True, valkey: bool = True, cache_dir: Path = CACHE_DIR) -> None:
        self._data_dir = data_dir.absolute()
        self._wanted = (Postgres,) * postgres + (Valkey,) * valkey
        self._cache_dir = cache_dir
        self._lock: int | None = None
        self._short_path: Path | None = None
        self._running: list[Postgres | Valkey] = []

    def start(self) -> EmbeddedServers:
        """Block until both are ready: about two seconds at first, half a second later, longer after a crash."""
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("The servers die with the thread that starts them: start them from the main thread.")
        try:
            return self._start()
        except OSError:
            self.stop()
            raise EmbeddedError(f"{self._data_dir} cannot be used: is it writable, and is there space left?") from None
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the servers in order: bounded, and nothing committed is lost even where the bound is reached."""
        for server in reversed(self._running):
            server.stop()
        self._running.clear()
        if self._lock is not None:
            self._note.unlink(missing_ok=True)
            self._forget_short_path()
            os.close(self._lock)
            self._lock = None

    def ended(self) -> list[str]:
        """The names of servers that ended by themselves; what is left of us cannot work then."""
        return [server.name for server in self._running if server.has_ended]

    @property
    def _note(self) -> Path:
        return self._data_dir / "servers.json"

    def _start(self) -> EmbeddedServers:
        self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _take_lock(self._data_dir)
        self._clear_after_a_crash()
        seen_from = self._reachable_path()
        for kind in self._wanted:
            server = kind(self._data_dir / kind.name, seen_from / kind.name, new_log(self._data_dir / f"{kind.name}.log"))
            _wait_for_last_run(server)
            self._running.append(server)
            server.launch(programs_for(server.account, self._cache_dir))
        for server in self._running:
            server.wait_until_ready()
        return self._told()

    def _told(self) -> EmbeddedServers:
        urls = {server.name: server.url for server in self._running}
        servers = EmbeddedServers(urls.get("postgres", ""), urls.get("valkey", ""))
        note = {
            "pid": os.getpid(),
            "database_owner_url": servers.database_owner_url,
            "redis_url": servers.redis_url,
            "short_path": str(self._short_path or ""),
        }
        write_private(self._note, json.dumps(note, indent=2) + "\n")
        return servers

    def _reachable_path(self) -> Path:
        """The data folder by a path that fits into a socket's address.

        The servers bind in their own folder by a relative name; only clients spell the whole path, and a link shortens it.
        libpq takes a comma for the start of another host.
        """
        socket = os.fsencode(self._data_dir / Postgres.name / SOCKET_NAME)
        if len(socket) <= _SOCKET_PATH_BYTES_MAX and b"," not in socket:
            return self._data_dir
        self._short_path = _short_folder()
        link = self._short_path / "data"
        link.symlink_to(self._data_dir)
        return link

    def _forget_short_path(self) -> None:
        if self._short_path is not None:
            shutil.rmtree(self._short_path, ignore_errors=True)
            self._short_path = None

    def _clear_after_a_crash(self) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            left = Path(json.loads(self._note.read_text())["short_path"])
            if left.name.startswith("lookup-") and (left / "data").readlink() == self._data_dir:
                shutil.rmtree(left)
        self._note.unlink(missing_ok=True)


def find_running(data_dir: Path) -> EmbeddedServers | None:
    """The servers that another process of ours runs on `data_dir` right now, or None."""
    try:
        lock = os.open(data_dir / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_note(data_dir / "servers.json")
    finally:
        os.close(lock)
    return None


def _read_note(note: Path) -> EmbeddedServers | None:
    try:
        told = json.loads(note.read_text())
        return EmbeddedServers(told["database_owner_url"], told["redis_url"])
    except (OSError, ValueError, KeyError):
        # Its process is still starting, or is another user's.
        return None


def _short_folder() -> Path:
    """A new folder of ours alone; not below $TMPDIR, which may be long itself, and /tmp is tidied up on some systems."""
    places = ("/run", f"/run/user/{os.geteuid()}", "/tmp")  # noqa: S108 - the name is random, the folder private
    writable = next(place for place in places if os.access(place, os.W_OK))
    return Path(tempfile.mkdtemp(prefix="lookup-", dir=writable))


def _take_lock(data_dir: Path) -> int:
    """The descriptor that holds `data_dir` for us; the kernel lets go of it when we die."""
    lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    give_to_owner_of(data_dir, lock)
    give_up_at = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up_at:
                holder = os.pread(lock, 20, 0).decode().strip()
                os.close(lock)
                raise EmbeddedError(
                    f"Another lookup (process {holder}) is using {data_dir}. Stop it, or give another --data-dir."
                ) from None
            time.sleep(0.05)
        else:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
            return lock


def _wait_for_last_run(server: Postgres | Valkey) -> None:
    """A process that was killed took its servers along, but they need a moment for it."""
    program = {"postgres": "postgres", "valkey": "valkey-server"}[server.name]
    give_up_at = time.monotonic() + _LAST_RUN_WAIT_S
    while (left := living_in(server.folder, program)) is not None:
        if time.monotonic() > give_up_at:
            raise EmbeddedError(
                f"A {server.name} of an earlier run (process {left}) still works in {server.folder}. End it first."
            )
        time.sleep(0.05)
