"""The embedded PostgreSQL: the durable half of the store. It listens on a Unix socket in its own folder and nowhere else."""

import shutil
import signal
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

import psycopg

from app.embedded.child import HERE, Account, account_for, check_owner, end, launch, make_folder
from app.embedded.failure import EmbeddedError
from app.embedded.programs import Programs, major_version

SOCKET_NAME = ".s.PGSQL.5432"
_OWNER = "lookup_owner"
_DATABASE = "lookup"
_INITDB_TIMEOUT_S = 120.0
# A crash leaves at most `max_wal_size` to be replayed.
_READY_TIMEOUT_S = 120.0
_FREE_BYTES_MIN = 256 * 1024 * 1024
_STOP = ((signal.SIGINT, 20.0), (signal.SIGQUIT, 5.0))
SETTINGS = {
    "listen_addresses": "",
    "unix_socket_directories": ".",
    "unix_socket_permissions": "0700",
    "port": "5432",
    "cluster_name": "lookup",
    "max_connections": "100",
    "shared_buffers": "128MB",
    "fsync": "on",
    "wal_compression": "on",
    "min_wal_size": "80MB",
    "max_wal_size": "1GB",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    # The log is renewed at each start and stays small in between: an error of a statement is its client's to report.
    "log_min_messages": "log",
    "log_checkpoints": "off",
    "log_autovacuum_min_duration": "-1",
    "checkpoint_warning": "0",
}


class Postgres:
    """One cluster in `folder`; clients reach its socket through `seen_from` (the same folder by a short enough path)."""

    name = "postgres"

    def __init__(self, folder: Path, seen_from: Path, log: Path) -> None:
        self.folder = folder
        self.account = account_for(folder, folder.parent)
        self._seen_from = seen_from
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return self._url_of(_DATABASE)

    def launch(self, programs: Programs) -> None:
        """Start the server, on a new cluster if there is none yet. It is not ready when this returns."""
        if not self.folder.exists():
            self._create(programs)
        self._check_version(programs)
        check_owner(self.folder, self.account)
        self._forget_a_stranger()
        settings = [argument for name, value in SETTINGS.items() for argument in ("-c", f"{name}={value}")]
        # SIGQUIT ends every part of it at once and leaves the rest to the next start's recovery, as a crash would.
        self._process = launch(
            [programs.postgres, "-D", HERE, *settings],
            folder=self.folder,
            account=self.account,
            log=self._log,
            if_we_die=signal.SIGQUIT,
        )

    def wait_until_ready(self) -> None:
        """Return when the database can be used. Raises `EmbeddedError` when the server ends or takes too long."""
        give_up_at = time.monotonic() + _READY_TIMEOUT_S
        while not self._has_database():
            if self.has_ended:
                raise EmbeddedError(f"PostgreSQL ended while it was starting{_reason(self._log)}.", self._log)
            if time.monotonic() > give_up_at:
                raise EmbeddedError(f"PostgreSQL was not ready after {_READY_TIMEOUT_S:.0f} s.", self._log)
            time.sleep(0.02)

    @property
    def has_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def stop(self) -> None:
        if self._process is not None:
            end(self._process, _STOP)
            self._process = None

    def _create(self, programs: Programs) -> None:
        if shutil.disk_usage(self.folder.parent).free < _FREE_BYTES_MIN:
            raise EmbeddedError(
                f"PostgreSQL needs {_FREE_BYTES_MIN >> 20} MB to start with; {self.folder.parent} has less left."
            )
        # Made under another name, so that a start which was interrupted here is not taken for a cluster.
        draft = self.folder.with_suffix(".new")
        shutil.rmtree(draft, ignore_errors=True)
        make_folder(draft, self.account)
        if not _initialise(draft, programs, self.account, self._log):
            shutil.rmtree(draft, ignore_errors=True)
            raise EmbeddedError(f"PostgreSQL's first files could not be made{_reason(self._log)}.", self._log)
        draft.rename(self.folder)

    def _check_version(self, programs: Programs) -> None:
        ours = major_version(programs.postgres, self.account)
        found = (self.folder / "PG_VERSION").read_text().strip()
        if found != str(ours):
            raise EmbeddedError(
                f"The data in {self.folder} is PostgreSQL {found}'s, and this release brings PostgreSQL {ours}. "
                "Start the release that wrote it and dump it there, or give another --data-dir."
            )

    def _forget_a_stranger(self) -> None:
        """Remove a lock file of a server that is gone and whose process id another program has now.

        PostgreSQL checks that the id is alive, not whose it is; where ids are few (a container), it would refuse to start.
        The caller holds our own lock and has seen that no server works in this folder.
        """
        lock = self.folder / "postmaster.pid"
        if lock.exists() and Path("/proc", lock.read_text().split("\n", 1)[0].strip()).exists():
            lock.unlink()

    def _has_database(self) -> bool:
        """Make the database if it is missing; false while the server does not answer yet."""
        try:
            with psycopg.connect(self._url_of("postgres"), autocommit=True, connect_timeout=5) as connection:
                if connection.execute("SELECT FROM pg_database WHERE datname = %s", [_DATABASE]).fetchone() is None:
                    connection.execute("CREATE DATABASE lookup")
        except psycopg.errors.DiskFull:
            raise EmbeddedError("PostgreSQL could not make the database: the disk is full.", self._log) from None
        except psycopg.OperationalError:
            return False
        return True

    def _url_of(self, database: str) -> str:
        return f"postgresql://{_OWNER}@/{database}?host={quote(str(self._seen_from))}&port=5432"


def _initialise(folder: Path, programs: Programs, account: Account, log: Path) -> bool:
    # `trust` asks for no password: who may enter the folder (mode 0700) is who may connect.
    process = launch(
        [
            *(programs.initdb, "-D", HERE, f"--username={_OWNER}", "--auth=trust", "--encoding=UTF8"),
            *("--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
        ],
        folder=folder,
        account=account,
        log=log,
        if_we_die=signal.SIGKILL,
    )
    try:
        return process.wait(_INITDB_TIMEOUT_S) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        process.kill()
        process.wait()


def _reason(log: Path) -> str:
    """The causes that a user can mend, told apart by what the server wrote."""
    text = log.read_text(errors="replace")[-16_000:]
    if "No space left on device" in text:
        return ": the disk is full"
    if "could not look up effective user ID" in text:
        return ": the user that it runs as has no entry in /etc/passwd"
    return ""
