"""The deployment of compose.yaml without an engine: its commands and environments, as plain processes on loopback.

What a container name stands for is replaced by the servers that the test has (`postgres:5432` by its PostgreSQL, and so on);
everything else is taken from the file, so that a part that boots here has what it needs there.
"""

import asyncio
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGE = "distributed-lookup"
ONE_SHOT = "migrate"
GATEWAY = "gateway"

# Ten Python processes start at once, perhaps on two cores.
START_S = 90.0
MIGRATION_S = 60.0
CHECK_S = 20.0
STOP_S = 20.0
POLL_S = 0.4
TAIL_LINES = 25
# A check of a part that is no HTTP server starts a Python of its own: with more at once, they only slow the parts down.
CHECKS_AT_ONCE = 2

# A test machine's own servers: these passwords guard nothing. They are fixed because roles belong to the whole cluster,
# so two deployments on one cluster have to agree on them.
THROW_AWAY: Mapping[str, str] = {
    "POSTGRES_SUPERUSER_PASSWORD": "throwaway",
    "POSTGRES_OWNER_PASSWORD": "throwaway",
    "POSTGRES_APP_PASSWORD": "throwaway",
    "POSTGRES_READER_PASSWORD": "throwaway",
    "POSTGRES_RETENTION_PASSWORD": "throwaway",
    "RABBITMQ_PASSWORD": "throwaway",
    "REDIS_PASSWORD": "throwaway",
}

# Debian keeps servers where an ordinary user's PATH does not look.
_PROGRAM_FOLDERS = f"{os.defpath}:/usr/local/bin:/usr/local/sbin:/usr/sbin:/sbin"

_REFERENCE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<name>\w+)(?:(?P<rule>:?[-?])(?P<word>[^}]*))?\})")


class PartFailed(AssertionError):  # noqa: N818 - what happened, in the words of the deployment
    """A part died, or did not become healthy in time. The message ends with the last lines of its log."""


class VariableMissing(KeyError):  # noqa: N818 - likewise
    """compose.yaml requires a variable (`${NAME:?why}`) that was not given."""


def services(variables: Mapping[str, str], file: Path = REPOSITORY / "compose.yaml") -> dict[str, dict[str, Any]]:
    """The services of a compose file, anchors resolved and variables filled in.

    Raises `VariableMissing` for a required variable that is absent or empty.
    """
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {name: _filled_in(service, variables) for name, service in document["services"].items()}


def _filled_in(node: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(node, str):
        return _REFERENCE.sub(lambda found: _value_of(found, variables), node)
    if isinstance(node, dict):
        return {key: _filled_in(value, variables) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled_in(item, variables) for item in node]
    return node


def _value_of(reference: re.Match[str], variables: Mapping[str, str]) -> str:
    if reference["dollar"]:
        return "$"
    value = variables.get(reference["name"], "")
    rule = reference["rule"] or ""
    if value or (reference["name"] in variables and not rule.startswith(":")):
        return value
    if rule.endswith("?"):
        raise VariableMissing(reference["name"])
    return reference["word"] or ""


def is_part(service: Mapping[str, Any]) -> bool:
    """Whether a service is one of ours and not a server or the gateway."""
    return str(service.get("image", "")).startswith(f"{IMAGE}:")


def program(name: str) -> str | None:
    """Where a server's program is on this machine, if it is."""
    return shutil.which(name, path=_PROGRAM_FOLDERS)


def free_port() -> int:
    """A loopback port that nothing uses right now, below those that systems hand out: nothing takes it before it is used."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass(frozen=True)
class Launch:
    """How one part is started and asked for its health on this machine."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    health: tuple[str, ...] = ()


@dataclass(frozen=True)
class Servers:
    """What the container names of compose.yaml stand for here."""

    database_owner_url: str
    redis_url: str
    broker_url: str
    ports: Mapping[str, int]
    data_dir: Path

    def environment_of(self, name: str, declared: Mapping[str, Any]) -> dict[str, str]:
        # Containers have a port 9100 each; here all parts share one machine.
        own = {
            "LOOKUP_HOST": "127.0.0.1",
            "LOOKUP_PORT": str(self.ports.get(name, 0)),
            "LOOKUP_METRICS_PORT": "0",
            "LOOKUP_DATA_DIR": str(self.data_dir),
            "LOOKUP_SEGMENTS_DIR": str(self.data_dir / "segments"),
        }
        return {key: own[key] if key in own else self._on_loopback(str(value)) for key, value in declared.items()}

    def _on_loopback(self, value: str) -> str:
        url = urlsplit(value)
        match url.hostname:
            case "postgres" if url.username == "lookup_owner":
                return self.database_owner_url
            case "postgres":
                return _same_user_at(value, self.database_owner_url)
            case "redis":
                return self.redis_url
            case "rabbitmq":
                # Empty is the product's word for "no RabbitMQ: Redis streams".
                return self.broker_url if self.broker_url.startswith("amqp") else ""
            case _:
                return value


def _same_user_at(url: str, server_url: str) -> str:
    credentials = urlsplit(url).netloc.rpartition("@")[0]
    there = urlsplit(server_url)
    host = there.netloc.rpartition("@")[2]
    return urlunsplit((urlsplit(url).scheme, f"{credentials}@{host}", there.path, there.query, ""))


class ComposeParts:
    """The parts of compose.yaml, each a process of its own.

    `broker_url` is an `amqp://` one; anything else stands for no RabbitMQ, and the parts use Redis streams on `redis_url`.
    `env` is laid over every part's environment; it may also give the passwords of compose.yaml's roles
    (`POSTGRES_APP_PASSWORD`, ...). `parts` names the services to start (default: all of ours, and the gateway where HAProxy
    is installed); `migrate` always runs first. Each part writes to `work_dir/<part>.log`.
    """

    def __init__(
        self,
        *,
        database_owner_url: str,
        redis_url: str,
        broker_url: str,
        work_dir: Path,
        env: Mapping[str, str] | None = None,
        parts: Sequence[str] | None = None,
    ) -> None:
        self.env = dict(env or {})
        self.work_dir = work_dir
        self.parts: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = {"write": free_port(), "read": free_port(), GATEWAY: free_port()}
        self._servers = Servers(database_owner_url, redis_url, broker_url, self._ports, work_dir / "data")
        self._launches = self._planned(services({**THROW_AWAY, **self.env}), parts)
        self._checking = asyncio.Semaphore(CHECKS_AT_ONCE)

    @property
    def write_url(self) -> str:
        return f"http://127.0.0.1:{self._ports['write']}"

    @property
    def read_url(self) -> str:
        return f"http://127.0.0.1:{self._ports['read']}"

    @property
    def gateway_url(self) -> str | None:
        """None where the gateway is not started: HAProxy is not installed, or it was not asked for."""
        return f"http://127.0.0.1:{self._ports[GATEWAY]}" if GATEWAY in self._launches else None

    async def start(self) -> None:
        """Migrates, starts every part and waits until each says that it is healthy.

        Raises `PartFailed`; then nothing is left running.
        """
        self.work_dir.mkdir(parents=True, exist_ok=True)
        try:
            await self._migrate()
            first = [name for name in self._launches if name not in {ONE_SHOT, GATEWAY}]
            for name in first:
                self.start_part(name)
            await self._all_healthy(first)
            if GATEWAY in self._launches:
                self.start_part(GATEWAY)
                await self.healthy(GATEWAY)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> list[str]:
        """Asks every part to end and returns the names of those that had to be killed after `STOP_S` seconds."""
        running = {name: process for name, process in self.parts.items() if process.poll() is None}
        for process in running.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        stubborn = [name for name in running if not await self._ends_within(name, STOP_S)]
        for name in stubborn:
            self.kill(name)
        return stubborn

    def start_part(self, part: str) -> None:
        """Starts a part that does not run. It is up when `healthy` returns."""
        if part in self.parts and self.parts[part].poll() is None:
            raise PartFailed(f"{part} is running already")
        launch = self._launches[part]
        with self.log_path(part).open("ab") as log:
            self.parts[part] = subprocess.Popen(
                [*_dying_with_the_tests(), *launch.command],
                env=dict(launch.environment),
                cwd=self.work_dir,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def kill(self, part: str, sig: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to a part. After SIGKILL it is gone when this returns; otherwise see `ended`."""
        process = self.parts[part]
        process.send_signal(sig)
        if sig == signal.SIGKILL:
            process.wait(timeout=STOP_S)

    async def restart(self, part: str, sig: signal.Signals = signal.SIGKILL) -> None:
        """Ends a part with a signal, starts it again and waits until it is healthy."""
        if self.parts[part].poll() is None:
            self.kill(part, sig)
        await self.ended(part)
        self.start_part(part)
        await self.healthy(part)

    async def ended(self, part: str, within_s: float = STOP_S) -> int:
        """Waits until a part has ended and returns its exit code (negative: the signal that ended it)."""
        if not await self._ends_within(part, within_s):
            raise PartFailed(f"{part} did not end within {within_s:g} s; its last lines:\n{self.log_tail(part)}")
        return int(self.parts[part].returncode)

    async def healthy(self, part: str, within_s: float = START_S) -> None:
        """Waits until a part's own health check of compose.yaml passes. Raises `PartFailed` when it dies first or is late."""
        try:
            async with asyncio.timeout(within_s):
                while not await self._check_passes(part):
                    self._assert_alive(part)
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise PartFailed(f"{part} was not healthy after {within_s:g} s; its last lines:\n{self.log_tail(part)}") from None
        self._assert_alive(part)

    def log_path(self, part: str) -> Path:
        return self.work_dir / f"{part}.log"

    def log_tail(self, part: str) -> str:
        lines = self.log_path(part).read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:]) or "(it wrote nothing)"

    async def _migrate(self) -> None:
        self.start_part(ONE_SHOT)
        code = await self.ended(ONE_SHOT, MIGRATION_S)
        if code != 0:
            raise PartFailed(f"{ONE_SHOT} ended with {code}; its last lines:\n{self.log_tail(ONE_SHOT)}")

    async def _all_healthy(self, names: Sequence[str]) -> None:
        try:
            async with asyncio.TaskGroup() as together:
                for name in names:
                    together.create_task(self.healthy(name))
        except BaseExceptionGroup as failed:
            # One story at a time: the others are usually the echo of the first.
            told = failed.subgroup(PartFailed)
            if told is None:
                raise
            raise told.exceptions[0] from None

    async def _check_passes(self, part: str) -> bool:
        launch = self._launches[part]
        async with self._checking:
            check = await asyncio.create_subprocess_exec(
                *launch.health,
                env=dict(launch.environment),
                cwd=self.work_dir,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                return await asyncio.wait_for(check.wait(), CHECK_S) == 0
            except TimeoutError:
                return False
            finally:
                if check.returncode is None:
                    check.kill()
                    await check.wait()

    async def _ends_within(self, part: str, within_s: float) -> bool:
        deadline = asyncio.get_running_loop().time() + within_s
        while self.parts[part].poll() is None:
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(POLL_S / 8)
        return True

    def _assert_alive(self, part: str) -> None:
        code = self.parts[part].poll()
        if code is not None:
            raise PartFailed(f"{part} died with {code}; its last lines:\n{self.log_tail(part)}")

    def _planned(self, declared: Mapping[str, Mapping[str, Any]], wanted: Sequence[str] | None) -> dict[str, Launch]:
        ours = [name for name, service in declared.items() if is_part(service)]
        names = {ONE_SHOT, *(ours + [GATEWAY] * (program("haproxy") is not None) if wanted is None else wanted)}
        launches = {name: self._launch_of(name, declared[name]) for name in ours if name in names}
        if GATEWAY in names:
            launches[GATEWAY] = self._launch_of_gateway()
        unknown = names - launches.keys()
        if unknown:
            raise PartFailed(f"compose.yaml has no part named {', '.join(sorted(unknown))}")
        return launches

    def _launch_of(self, name: str, service: Mapping[str, Any]) -> Launch:
        own_words = self._servers.environment_of(name, service["environment"])
        health = service["healthcheck"].get("test", ["CMD"])[1:]
        return Launch(
            command=_with_this_python(service["command"]),
            environment={**_surroundings(), **own_words, **self.env},
            health=tuple(self._own_port(name, word) for word in _with_this_python(health)),
        )

    def _own_port(self, name: str, word: str) -> str:
        return re.sub(r"(?<=http://127\.0\.0\.1:)\d+", str(self._ports.get(name, 0)), word)

    def _launch_of_gateway(self) -> Launch:
        haproxy = program("haproxy")
        if haproxy is None:
            raise PartFailed("The gateway needs HAProxy on this machine: apt-get install haproxy")
        here = {name: f"127.0.0.1:{port}" for name, port in self._ports.items()}
        return Launch(
            command=(haproxy, "-db", "-f", str(REPOSITORY / "deploy" / "gateway" / "haproxy.cfg")),
            environment={
                **_surroundings(),
                "GATEWAY_LISTEN": here[GATEWAY],
                "GATEWAY_DNS": "127.0.0.11:53",
                "WRITE_SERVER": here["write"],
                "READ_SERVER": here["read"],
            },
            health=(
                sys.executable,
                "-c",
                f"import urllib.request as u; u.urlopen('http://{here[GATEWAY]}/gateway/health', timeout=5)",
            ),
        )


def _with_this_python(words: Sequence[str]) -> tuple[str, ...]:
    """A container's words with the image's programs replaced by this interpreter and this working tree."""
    match list(words):
        case ["lookup", *rest]:
            return (sys.executable, "-m", "app.cli", *rest)
        case ["python", *rest]:
            return (sys.executable, *rest)
        case other:
            return tuple(other)


def _surroundings() -> dict[str, str]:
    """All that a part finds besides its own variables: nothing of the test's environment leaks in."""
    return {"PATH": _PROGRAM_FOLDERS, "LANG": "C.UTF-8", "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}


def _dying_with_the_tests() -> tuple[str, ...]:
    """Where the system can, a part is killed by the kernel when the test process dies without stopping it."""
    setpriv = program("setpriv")
    return (setpriv, "--pdeathsig", "KILL") if setpriv else ()
