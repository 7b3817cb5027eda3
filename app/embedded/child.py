"""A server as our child: it runs as an ordinary user, ignores our terminal's Ctrl-C, and never outlives us."""

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.embedded.failure import EmbeddedError

HERE = "/proc/self/cwd"
"""Names a server's own folder to itself.

We enter the folder before we give up root, so a server reaches its data even where the folders above are closed to its user
(a clone below /root, mode 0700), and nothing above has to be opened.
"""

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
_NOBODY = 65534
# The servers read nothing of ours. English messages, and a PATH for the shell that initdb calls.
_ENVIRONMENT = {"LC_ALL": "C", "TZ": "UTC", "PATH": "/usr/local/bin:/usr/bin:/bin"}


@dataclass(frozen=True)
class Account:
    """Whom a server runs as. None: as we are; only root has to become somebody else."""

    user: int | None = None
    group: int | None = None

    @property
    def extra_groups(self) -> list[int] | None:
        return None if self.user is None else []


def account_for(*folders: Path) -> Account:
    """Ourselves; for root, as which PostgreSQL refuses to run, the first owner of `folders` who is not root, else nobody."""
    if os.geteuid() != 0:
        return Account()
    for folder in folders:
        if folder.exists() and folder.stat().st_uid != 0:
            return Account(folder.stat().st_uid, folder.stat().st_gid)
    return Account(_NOBODY, _NOBODY)


def make_folder(folder: Path, account: Account) -> None:
    """An empty folder that only `account` may enter."""
    folder.mkdir(mode=0o700)
    if account.user is not None and account.group is not None:
        os.chown(folder, account.user, account.group, follow_symlinks=False)


def check_owner(folder: Path, account: Account) -> None:
    wanted = os.geteuid() if account.user is None else account.user
    if folder.is_symlink() or folder.stat().st_uid != wanted:
        raise EmbeddedError(
            f"{folder} belongs to another user (id {folder.lstat().st_uid}). Start as that user, or give another --data-dir."
        )


def launch(
    command: Sequence[str | Path],
    *,
    folder: Path,
    account: Account,
    log: Path,
    if_we_die: signal.Signals,
    environment: Mapping[str, str] = _ENVIRONMENT,
) -> subprocess.Popen[bytes]:
    """Start `command` in `folder`. Call from the main thread: `if_we_die` is sent when the *thread* that forked ends."""
    with log.open("ab") as output:
        return subprocess.Popen(  # noqa: S603 - our own programs and arguments
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            user=account.user,
            group=account.group,
            extra_groups=account.extra_groups,
            start_new_session=True,
            preexec_fn=_bound_to_us(if_we_die),  # noqa: PLW1509 - main thread, before any other thread is started
        )


def run_once(command: Sequence[str | Path], *, account: Account, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """The output of a program that ends by itself. Raises `PermissionError` where `account` may not run it."""
    return subprocess.run(  # noqa: S603 - our own programs and arguments
        command,
        cwd="/",
        env=_ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        user=account.user,
        group=account.group,
        extra_groups=account.extra_groups,
    )


def end(process: subprocess.Popen[bytes], steps: Sequence[tuple[signal.Signals, float]]) -> None:
    """Send each signal and wait its seconds; what is still alive then is killed."""
    for number, wait_s in steps:
        process.send_signal(number)
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue
        return
    process.kill()
    process.wait()


def living_in(folder: Path, name: str) -> int | None:
    """The process called `name` that works in `folder`, if there is one."""
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and (process / "cwd").samefile(folder) and _name_of(process) == name:
                return int(process.name)
        except OSError:
            # It ended while we looked, or belongs to somebody else.
            continue
    return None


def _name_of(process: Path) -> str:
    return (process / "comm").read_text(errors="replace").strip()


def _bound_to_us(if_we_die: signal.Signals) -> Callable[[], None]:
    parent = os.getpid()

    def in_the_child() -> None:
        # Last of all, since the kernel forgets the request when the user changes.
        if _LIBC.prctl(_PR_SET_PDEATHSIG, int(if_we_die), 0, 0, 0) != 0 or os.getppid() != parent:
            os._exit(127)

    return in_the_child
