"""The harness that boots compose.yaml as processes, tried on a product of twenty lines."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.e2e.compose_harness import REPOSITORY, ComposeParts, PartFailed

SMALL_PRODUCT = """
import http.server, os, signal, sys

class Live(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health/live" else 404)
        self.end_headers()

match sys.argv[1:]:
    case ["migrate"]:
        print("migrating", os.environ["LOOKUP_DATABASE_OWNER_URL"])
        sys.exit(int(os.environ.get("MIGRATION_ENDS_WITH", "0")))
    case ["health", *part]:
        listening = part != ["saga"] or os.path.exists("saga-is-listening")
        sys.exit(not listening or " ".join(part) == os.environ.get("UNHEALTHY"))
    case ["write" | "read"]:
        http.server.HTTPServer((os.environ["LOOKUP_HOST"], int(os.environ["LOOKUP_PORT"])), Live).serve_forever()
    case ["saga"]:
        # A handler and pause() would sleep on a signal that comes between two of their steps.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        open("saga-is-listening", "w").close()
        signal.sigwait({signal.SIGTERM})
        sys.exit(7)
    case ["relay"] if "RELAY_DIES" in os.environ:
        sys.exit("the relay's last words")
signal.pause()
"""


@pytest.fixture
def product(tmp_path: Path) -> Path:
    folder = tmp_path / "product"
    (folder / "app").mkdir(parents=True)
    (folder / "app" / "cli.py").write_text(SMALL_PRODUCT)
    return folder


def deployment(product: Path, *parts: str, **env: str) -> ComposeParts:
    return ComposeParts(
        database_owner_url="postgresql://owner@127.0.0.1:1/lookup",
        redis_url="redis://127.0.0.1:1/0",
        broker_url="redis://127.0.0.1:1/0",
        work_dir=product.parent / "run",
        env={"PYTHONPATH": str(product), **env},
        parts=parts or None,
    )


@asynccontextmanager
async def running(parts: ComposeParts) -> AsyncIterator[ComposeParts]:
    await parts.start()
    try:
        yield parts
    finally:
        await parts.stop()


async def test_every_part_of_the_file_is_started_and_stopped(product: Path) -> None:
    async with running(deployment(product)) as parts:
        started = dict(parts.parts)
        async with aiohttp.ClientSession() as client:
            for url in (parts.write_url, parts.read_url):
                async with client.get(f"{url}/health/live") as response:
                    assert response.status == 200

    workers = {"worker-geoip", "worker-ping", "worker-rdap", "worker-reverse-dns"}
    assert started.keys() - {"gateway"} == {"migrate", "write", "relay", "saga", "projector", "keeper", "read", *workers}
    assert [name for name, process in started.items() if process.poll() is None] == []
    assert "migrating postgresql://owner@127.0.0.1:1/lookup" in parts.log_tail("migrate")


async def test_a_part_that_dies_is_named_with_its_last_words(product: Path) -> None:
    parts = deployment(product, "relay", "saga", RELAY_DIES="yes", UNHEALTHY="relay")

    with pytest.raises(PartFailed, match=r"^relay died with 1; its last lines:\nthe relay's last words$"):
        await parts.start()

    assert [name for name, process in parts.parts.items() if process.poll() is None] == []


async def test_nothing_starts_after_a_failed_migration(product: Path) -> None:
    parts = deployment(product, "saga", MIGRATION_ENDS_WITH="3")

    with pytest.raises(PartFailed, match=r"^migrate ended with 3"):
        await parts.start()

    assert parts.parts.keys() == {"migrate"}


async def test_a_part_that_never_gets_healthy_is_given_up(product: Path) -> None:
    parts = deployment(product, "saga", UNHEALTHY="saga")
    parts.work_dir.mkdir()
    parts.start_part("saga")
    try:
        with pytest.raises(PartFailed, match=r"^saga was not healthy after 0\.5 s"):
            await parts.healthy("saga", within_s=0.5)
    finally:
        await parts.stop()


async def test_a_dead_part_is_not_healthy_whatever_its_check_says(product: Path) -> None:
    async with running(deployment(product, "saga")) as parts:
        parts.kill("saga")

        with pytest.raises(PartFailed, match=r"^saga died with -9"):
            await parts.healthy("saga")


def test_a_part_that_the_file_does_not_have_is_refused(product: Path) -> None:
    with pytest.raises(PartFailed, match=r"^compose\.yaml has no part named ghost$"):
        deployment(product, "ghost")


async def test_a_killed_part_comes_back_under_another_process(product: Path) -> None:
    async with running(deployment(product, "saga")) as parts:
        first = parts.parts["saga"]
        parts.kill("saga")
        assert first.poll() == -signal.SIGKILL

        await parts.restart("saga")

        assert parts.parts["saga"].pid != first.pid
        assert parts.parts["saga"].poll() is None


async def test_a_part_can_be_asked_to_end(product: Path) -> None:
    async with running(deployment(product, "saga")) as parts:
        parts.kill("saga", signal.SIGTERM)

        assert await parts.ended("saga") == 7


async def test_a_frozen_part_can_still_be_stopped(product: Path) -> None:
    parts = deployment(product, "saga")
    await parts.start()
    parts.kill("saga", signal.SIGSTOP)

    assert await parts.stop() == []
    assert parts.parts["saga"].returncode == 7


async def test_nothing_of_the_callers_environment_reaches_a_part(product: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_DIES", "yes")
    monkeypatch.setenv("LOOKUP_DATABASE_URL", "postgresql://wrong@192.0.2.1/lookup")

    async with running(deployment(product, "relay")) as parts:
        environment = _environment(parts.parts["relay"].pid)

    assert "LOOKUP_DATABASE_URL=postgresql://lookup_app:throwaway@127.0.0.1:1/lookup" in environment


async def test_parts_die_with_the_process_that_started_them(product: Path) -> None:
    """Also after kill -9 of the tests themselves, where no clean-up runs."""
    script = (
        "import asyncio, os, signal, sys; from pathlib import Path\n"
        "from tests.integration.test_compose_harness import deployment\n"
        "async def main():\n"
        "    parts = deployment(Path(sys.argv[1]), 'saga')\n"
        "    await parts.start()\n"
        "    print(parts.parts['saga'].pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    tests = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(product), cwd=REPOSITORY, stdout=asyncio.subprocess.PIPE
    )
    written, _ = await asyncio.wait_for(tests.communicate(), 60)

    assert tests.returncode == -signal.SIGKILL
    async with asyncio.timeout(10):
        while _runs(int(written)):  # noqa: ASYNC110 - nobody tells us of a stranger's end
            await asyncio.sleep(0.05)


def _environment(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text(encoding="utf-8").split("\0")


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie: in a container without an init, nobody buries it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
