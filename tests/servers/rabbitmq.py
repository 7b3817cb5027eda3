"""RabbitMQ for tests: one that is given, a container, or a node of our own that touches nothing of the system's."""

import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit
from uuid import uuid4

import httpx
import pytest

from app.embedded.child import Account, end, launch
from tests.servers.installation import need_program

IMAGE = "rabbitmq:4-management"
START_TIMEOUT_S = 90.0
STOP = ((signal.SIGTERM, 10.0),)
# Debian's command on the PATH changes to the user rabbitmq and its folders; the program behind it does not.
SERVER_FOLDERS = ("/usr/lib/rabbitmq/bin", "/usr/sbin")


@dataclass(frozen=True)
class RabbitMQ:
    """A running broker: `url` (amqp, virtual host /) and the root of its management API, credentials included in both."""

    url: str
    api_url: str

    @contextmanager
    def fresh_vhost(self) -> Iterator[str]:
        """The URL of a new virtual host, 30 ms to make; gone afterwards with its queues and connections."""
        name = f"test-{uuid4().hex}"
        with httpx.Client(base_url=self.api_url, timeout=30) as api:
            api.put(f"/api/vhosts/{name}").raise_for_status()
            api.put(
                f"/api/permissions/{name}/{self._user}", json=dict.fromkeys(("configure", "write", "read"), ".*")
            ).raise_for_status()
            try:
                yield urlsplit(self.url)._replace(path=f"/{name}").geturl()
            finally:
                # A broker that the test killed has nothing left to give back.
                with ExitStack() as ignored:
                    ignored.push(lambda kind, *_: kind is not None and issubclass(kind, httpx.TransportError))
                    api.delete(f"/api/vhosts/{name}")

    def wait_until_ready(self, wait_s: float = START_TIMEOUT_S) -> bool:
        """The management API answers a moment before the node listens for clients."""
        give_up_at = time.monotonic() + wait_s
        with httpx.Client(base_url=self.api_url, timeout=5) as api:
            while time.monotonic() < give_up_at:
                try:
                    if api.get("/api/health/checks/virtual-hosts").is_success and self._listens():
                        return True
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
        return False

    def _listens(self) -> bool:
        parts = urlsplit(self.url)
        try:
            socket.create_connection((parts.hostname, parts.port or 5672), timeout=5).close()
        except OSError:
            return False
        return True

    @property
    def _user(self) -> str:
        return urlsplit(self.url).username or "guest"


class RabbitMQNode:
    """A node of our own below `folder`: own name, ports, cookie, name server (epmd), data and logs.

    It may be stopped, killed and started again, on the same ports and data.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = f"lookup-test-{uuid4().hex[:8]}@localhost"
        self._amqp, self._api, self._distribution, self._epmd_port = _free_ports(4)
        self._server: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None
        self.broker = RabbitMQ(f"amqp://guest:guest@127.0.0.1:{self._amqp}/", f"http://guest:guest@127.0.0.1:{self._api}")

    def start(self) -> None:
        self.launch()
        self.wait_until_ready()

    def launch(self) -> None:
        """Start it. It is not ready when this returns."""
        program = need_rabbitmq()
        self._write_files()
        # Erlang starts a name server that stays for ever unless it finds one.
        if self._epmd is None:
            self._epmd = self._launch([_epmd(), "-port", str(self._epmd_port), "-address", "127.0.0.1"])
        self._server = self._launch([program])

    def wait_until_ready(self) -> None:
        if not self.broker.wait_until_ready():
            log = (self._folder / "output").read_text(errors="replace")[-4000:]
            self.stop()
            pytest.fail(f"RabbitMQ did not start within {START_TIMEOUT_S:.0f} s. It said:\n{log}", pytrace=False)

    def kill(self) -> None:
        """As a power cut would."""
        assert self._server is not None
        self._server.kill()
        self._server.wait()
        self._server = None

    def stop(self) -> None:
        if self._server is not None:
            end(self._server, STOP)
            self._server = None
        if self._epmd is not None:
            end(self._epmd, STOP)
            self._epmd = None

    def command(self, *words: str) -> str:
        """What `rabbitmqctl WORDS` printed. Takes a second or two: it is an Erlang machine of its own."""
        program = need_program(["rabbitmqctl"], "rabbitmq-server", SERVER_FOLDERS)
        done = subprocess.run(
            [program, "-q", *words],
            env=self._environment(),
            cwd=self._folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return done.stdout

    def _launch(self, command: list[str | Path]) -> subprocess.Popen[bytes]:
        return launch(
            command,
            folder=self._folder,
            account=Account(),
            log=self._folder / "output",
            if_we_die=signal.SIGKILL,
            environment=self._environment(),
        )

    def _environment(self) -> dict[str, str]:
        folder = self._folder
        return {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "HOME": str(folder),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self._name,
            "RABBITMQ_DIST_PORT": str(self._distribution),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "environment"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(folder / "generated"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            # With input allowed the script becomes the Erlang machine instead of watching it: our child is the server itself.
            "RABBITMQ_ALLOW_INPUT": "1",
            # Schedulers that spin while idle take the time of what is tested.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-noinput +sbwt none +sbwtdcpu none +sbwtdio none",
        }

    def _write_files(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "environment").touch()
        (self._folder / "enabled_plugins").write_text("[rabbitmq_management].\n")
        (self._folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self._amqp}\n"
            f"management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {self._api}\n"
            "disk_free_limit.absolute = 100MB\n"
        )


def need_rabbitmq() -> Path:
    """The program of a node; installed if that is possible, else the run ends and says what to type."""
    return need_program(
        ["rabbitmq-server"], "rabbitmq-server", SERVER_FOLDERS, " (or start a Docker engine, or give LOOKUP_TEST_RABBITMQ_URL)"
    )


def docker_runs() -> bool:
    return _docker("info") is not None


@contextmanager
def rabbitmq_server(given_url: str | None, given_api_url: str | None, folder: Path) -> Iterator[RabbitMQ]:
    """The broker of a test run: `given_url` if there is one, else from a Docker engine if one runs, else a node in `folder`."""
    if given_url:
        yield _given(given_url, given_api_url)
    elif docker_runs():
        with _container() as broker:
            yield broker
    else:
        node = RabbitMQNode(folder)
        node.start()
        try:
            yield node.broker
        finally:
            node.stop()


def _given(url: str, api_url: str | None) -> RabbitMQ:
    parts = urlsplit(url)
    credentials = f"{quote(parts.username or 'guest')}:{quote(parts.password or 'guest')}"
    broker = RabbitMQ(url, api_url or f"http://{credentials}@{parts.hostname}:15672")
    if not broker.wait_until_ready(wait_s=10):
        pytest.fail(
            "The tests make a virtual host each through RabbitMQ's management API, and it does not answer beside "
            "LOOKUP_TEST_RABBITMQ_URL on port 15672. Give LOOKUP_TEST_RABBITMQ_API_URL=http://user:password@host:port",
            pytrace=False,
        )
    return broker


@contextmanager
def _container() -> Iterator[RabbitMQ]:
    name = f"lookup-test-{uuid4().hex[:8]}"
    ports = [word for port in (5672, 15672) for word in ("--publish", f"127.0.0.1::{port}")]
    started = _docker("run", "--detach", "--rm", "--name", name, *ports, IMAGE)
    if started is None:
        pytest.fail(f"The Docker engine could not run {IMAGE}. Type: docker run --rm {IMAGE}", pytrace=False)
    try:
        amqp, api = (_published(name, port) for port in (5672, 15672))
        broker = RabbitMQ(f"amqp://guest:guest@127.0.0.1:{amqp}/", f"http://guest:guest@127.0.0.1:{api}")
        assert broker.wait_until_ready(), "RabbitMQ's container did not become ready"
        yield broker
    finally:
        _docker("rm", "--force", name)


def _published(name: str, port: int) -> int:
    said = re.search(r":(\d+)\s*$", _docker("port", name, f"{port}/tcp") or "", re.MULTILINE)
    assert said is not None
    return int(said[1])


def _docker(*words: str) -> str | None:
    """What the command printed, or None when it failed or there is no Docker."""
    if shutil.which("docker") is None:
        return None
    done = subprocess.run(["docker", *words], capture_output=True, text=True, check=False, timeout=600)
    return done.stdout if done.returncode == 0 else None


def _epmd() -> Path:
    return need_program(["epmd"], "erlang-base")


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago; all are held until all are found, so that none comes twice."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
