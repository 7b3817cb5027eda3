"""The embedded Valkey: views, limits and the embedded transport. Append-only file on, Unix socket only."""

import signal
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

import redis

from app.embedded.child import account_for, check_owner, end, launch, make_folder
from app.embedded.failure import EmbeddedError
from app.embedded.files import write_private
from app.embedded.programs import Programs, major_version

SOCKET_NAME = "valkey.sock"
_READY_TIMEOUT_S = 120.0
_STOP = ((signal.SIGTERM, 15.0),)
_SETTINGS = {
    "port": "0",
    "unixsocket": SOCKET_NAME,
    "unixsocketperm": "700",
    "databases": "16",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": "",
    "maxmemory-policy": "noeviction",
    "loglevel": "warning",
    "daemonize": "no",
}


class Valkey:
    """One server in `folder`; clients reach its socket through `seen_from` (the same folder by a short enough path)."""

    name = "valkey"

    def __init__(self, folder: Path, seen_from: Path, log: Path) -> None:
        self.folder = folder
        self.account = account_for(folder, folder.parent)
        self._seen_from = seen_from
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self._seen_from / SOCKET_NAME))}?db=0"

    def launch(self, programs: Programs) -> None:
        """Start the server. It is not ready when this returns."""
        if not self.folder.exists():
            make_folder(self.folder, self.account)
        check_owner(self.folder, self.account)
        self._check_version(major_version(programs.valkey, self.account))
        settings = [argument for name, value in _SETTINGS.items() for argument in (f"--{name}", value)]
        self._process = launch(
            [programs.valkey, *settings], folder=self.folder, account=self.account, log=self._log, if_we_die=signal.SIGTERM
        )

    def wait_until_ready(self) -> None:
        """Return when commands are served, the append-only file being loaded. Raises `EmbeddedError`."""
        give_up_at = time.monotonic() + _READY_TIMEOUT_S
        with redis.Redis.from_url(self.url, socket_timeout=5) as client:
            while not _answers(client):
                if self.has_ended:
                    raise EmbeddedError("Valkey ended while it was starting.", self._log)
                if time.monotonic() > give_up_at:
                    raise EmbeddedError(f"Valkey was not ready after {_READY_TIMEOUT_S:.0f} s.", self._log)
                time.sleep(0.02)

    @property
    def has_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def stop(self) -> None:
        """SIGTERM is Valkey's SHUTDOWN: the append-only file is written out and synced."""
        if self._process is not None:
            end(self._process, _STOP)
            self._process = None

    def _check_version(self, ours: int) -> None:
        """A newer Valkey reads what an older one wrote; the other way round it does not."""
        # Beside the folder, not in it: root must not write where the server may.
        note = self.folder.with_suffix(".version")
        found = int(note.read_text()) if note.exists() else ours
        if found > ours:
            raise EmbeddedError(
                f"The data in {self.folder} is Valkey {found}'s, and this release brings Valkey {ours}. "
                "Start the release that wrote it, or give another --data-dir."
            )
        if not note.exists() or found < ours:
            write_private(note, f"{ours}\n")


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except (redis.ConnectionError, redis.TimeoutError):
        return False
