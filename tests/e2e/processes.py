"""The `lookup` command as a user starts it: a process of its own, in an environment of its own."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.compose_harness import REPOSITORY, program

START_S = 60.0
STOP_S = 15.0
COMMAND_S = 60.0
POLL_S = 0.02
_WELCOME = re.compile(r"curl -i (http://\S+?)/api/lookup")
_LISTENING = re.compile(r"Listening on (http://\S+)")


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str


async def lookup(*words: str, cwd: Path, env: Mapping[str, str] | None = None) -> Finished:
    """Runs `lookup WORDS` to its end."""
    process = await asyncio.create_subprocess_exec(
        *_command(words),
        env=surroundings(env or {}),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), COMMAND_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Finished(process.returncode, out.decode(), err.decode())


class LookupProcess:
    """A `lookup` command that stays: `lookup up`, or parts. Its output goes to `folder/NAME.out` and `.err`.

    `folder` is also where it works. The kernel kills it when the tests die.
    """

    def __init__(self, *words: str, folder: Path, env: Mapping[str, str] | None = None, name: str = "lookup") -> None:
        self._words = words
        self.folder = folder
        self._env = surroundings(env or {})
        self._out = folder / f"{name}.out"
        self._err = folder / f"{name}.err"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def out(self) -> str:
        """What this start has written to standard output."""
        return self._out.read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8")

    @property
    def url(self) -> str:
        found = _WELCOME.search(self.out) or _LISTENING.search(self.err)
        assert found is not None, f"It does not say where it listens.\n{self.out}\n{self.err}"
        return found[1]

    @property
    def code(self) -> int | None:
        """How it ended, None while it runs."""
        return None if self._process is None else self._process.poll()

    def launch(self) -> None:
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                _command(self._words), env=self._env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )

    async def start(self) -> str:
        """Launches it and waits until it says where it listens; gives the URL."""
        self.launch()
        return await self.listens()

    async def listens(self) -> str:
        """Waits until it says where it listens; gives the URL."""
        await until(lambda: self._listens() or self.has_ended, START_S, "lookup to listen")
        assert not self.has_ended, f"It ended while starting.\n{self.out}\n{self.err}"
        return self.url

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    @property
    def has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    async def ended(self, within_s: float = STOP_S) -> int:
        """Waits for its end; gives the exit code, negative for the signal that killed it."""
        assert self._process is not None
        await until(lambda: self.has_ended, within_s, "lookup to end")
        return int(self._process.returncode)

    async def stop(self) -> None:
        """Whatever state it is in: asked to end, and killed if it does not."""
        if self.has_ended:
            return
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        try:
            await self.ended()
        except AssertionError:
            self.send(signal.SIGKILL)
            await self.ended()
            raise

    def _listens(self) -> bool:
        return bool(_WELCOME.search(self.out) or _LISTENING.search(self.err))


async def until(happens: Callable[[], bool], within_s: float, what: str) -> None:
    """Waits for what nobody tells us of."""
    clock = asyncio.get_running_loop().time
    give_up_at = clock() + within_s
    while not happens():
        assert clock() < give_up_at, f"waited {within_s:g} s for {what}"
        await asyncio.sleep(POLL_S)


def database_of(data_dir: Path) -> str:
    """The owner's URL of the PostgreSQL that a running `lookup up` has below its data folder."""
    note = json.loads((data_dir / "servers.json").read_text(encoding="utf-8"))
    return str(note["database_owner_url"])


def descendants(pid: int) -> dict[str, set[int]]:
    """The processes below a process, all generations, by the name of their program."""
    below: dict[str, set[int]] = {}
    for task in Path(f"/proc/{pid}/task").glob("*"):
        for child in _children(task):
            below.setdefault(_program_of(child), set()).add(child)
            for name, pids in descendants(child).items():
                below.setdefault(name, set()).update(pids)
    return below


def lives(pid: int) -> bool:
    """Whether a process is there and no zombie: in a container without an init, nobody buries it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _children(task: Path) -> list[int]:
    try:
        return [int(child) for child in (task / "children").read_text(encoding="ascii").split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _program_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _command(words: tuple[str, ...]) -> list[str]:
    setpriv = program("setpriv")
    dying_with_us = [setpriv, "--pdeathsig", "KILL"] if setpriv else []
    return [*dying_with_us, sys.executable, "-m", "app.cli", *words]


def surroundings(own: Mapping[str, str]) -> dict[str, str]:
    """Nothing of the test's environment leaks in. Wide, so that no sentence is broken into lines."""
    return {
        "PATH": f"{os.defpath}:/usr/local/bin:/usr/local/sbin:/usr/sbin:/sbin",
        "LANG": "C.UTF-8",
        "COLUMNS": "200",
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONUNBUFFERED": "1",
        **own,
    }
