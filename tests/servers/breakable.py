"""Servers of a test's own, each of which may be stopped, killed, frozen and started again on its data.

`start` is called from the main thread: a server dies with the thread that starts it.
"""

import asyncio
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from app.embedded.child import living_in
from app.embedded.postgres import Postgres
from app.embedded.programs import programs_for
from app.embedded.servers import CACHE_DIR
from app.embedded.valkey import Valkey
from tests.servers.rabbitmq import RabbitMQNode

GONE_S = 30.0


class Breakable(Protocol):
    """A server and what may be done to it. After `launch` it is on its way up, after `ready` it serves."""

    name: str

    def launch(self) -> None: ...

    async def ready(self) -> None: ...

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""

    def stop(self) -> None:
        """In order, whatever state it is in."""

    def freeze(self) -> None:
        """SIGSTOP to all its processes: its sockets stay open, and nobody answers."""

    def thaw(self) -> None: ...


class _Embedded:
    """The half that PostgreSQL and Valkey share."""

    def __init__(self, server: Postgres | Valkey) -> None:
        self._server = server
        self.name = server.name
        self.url = server.url
        self.folder = server.folder

    def launch(self) -> None:
        self._server.launch(programs_for(self._server.account, CACHE_DIR))

    async def ready(self) -> None:
        await asyncio.to_thread(self._server.wait_until_ready)

    @property
    def has_ended(self) -> bool:
        return self._server.has_ended

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._wait_until_gone()

    def stop(self) -> None:
        self.thaw()
        self._server.stop()
        self._wait_until_gone()

    def freeze(self) -> None:
        self._tell_all(signal.SIGSTOP)

    def thaw(self) -> None:
        if self._server._process is not None:
            self._tell_all(signal.SIGCONT)

    def _tell_all(self, number: signal.Signals) -> None:
        """The server first: frozen, it makes no more children."""
        os.kill(self._process.pid, number)
        for pid in _below(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    @property
    def _process(self) -> subprocess.Popen[bytes]:
        process = self._server._process
        assert process is not None
        return process

    def _wait_until_gone(self) -> None:
        """PostgreSQL's backends outlive their postmaster by a moment, and hold the data meanwhile."""
        program = {"postgres": "postgres", "valkey": "valkey-server"}[self.name]
        give_up_at = time.monotonic() + GONE_S
        while living_in(self.folder, program) is not None:
            assert time.monotonic() < give_up_at, f"{self.name} is still there"
            time.sleep(0.02)


class BreakablePostgres(_Embedded):
    """A cluster below `folder`, which must have a short path: clients use its Unix socket."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(Postgres(folder / "postgres", folder / "postgres", folder / "postgres.log"))


class BreakableValkey(_Embedded):
    """A server below `folder`, likewise; its append-only file is on."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(Valkey(folder / "valkey", folder / "valkey", folder / "valkey.log"))


class BreakableRabbitMQ:
    """A node below `folder`, on ports of its own that stay the same."""

    name = "rabbitmq"

    def __init__(self, folder: Path) -> None:
        self._node = RabbitMQNode(folder)
        self.broker = self._node.broker
        self.url = self.broker.url

    def launch(self) -> None:
        self._node.launch()

    async def ready(self) -> None:
        await asyncio.to_thread(self._node.wait_until_ready)

    def kill(self) -> None:
        self._node.kill()

    def stop(self) -> None:
        self.thaw()
        self._node.stop()

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    async def command(self, *words: str) -> str:
        """What `rabbitmqctl WORDS` printed."""
        return await asyncio.to_thread(self._node.command, *words)

    def _signal(self, number: signal.Signals) -> None:
        if self._node._server is not None:
            os.kill(self._node._server.pid, number)


def _below(pid: int) -> list[int]:
    below: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            for child in (task / "children").read_text(encoding="ascii").split():
                below += [int(child), *_below(int(child))]
    return below
