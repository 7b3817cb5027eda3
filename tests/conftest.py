"""The real servers that tests run against: started when the first test asks, once per run, with a fresh corner for each test.

`LOOKUP_TEST_DATABASE_URL` (an owner's, postgresql://…), `LOOKUP_TEST_REDIS_URL` and `LOOKUP_TEST_RABBITMQ_URL` name servers
to be used instead. They have to be test servers: databases and virtual hosts are made, emptied and dropped.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch
from uuid import uuid4

import pytest

from app.embedded.postgres import SETTINGS as POSTGRES_SETTINGS
from app.embedded.servers import Embedded, EmbeddedServers
from app.migrate import migrate
from tests.servers.chromium import find_chromium
from tests.servers.postgres import fresh_database
from tests.servers.rabbitmq import RabbitMQ, docker_runs, need_rabbitmq, rabbitmq_server
from tests.servers.valkey import RedisDatabases

# Much is asserted outside of test files: a failure there has to show its values as well.
pytest.register_assert_rewrite("tests.e2e.independent_check", "tests.e2e.journey")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Get what has to be installed before the first test, whose time limit is not made for downloads."""
    if session.config.option.collectonly:
        return
    wanted = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if "rabbitmq" in wanted and "LOOKUP_TEST_RABBITMQ_URL" not in os.environ and not docker_runs():
        need_rabbitmq()
    if "chromium" in wanted:
        find_chromium()


# A shell starts what runs in its background with SIGINT ignored, and what is ignored stays so in our children: then no
# test of Ctrl-C could pass. A handler is not handed down.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def servers_folder() -> Iterator[Path]:
    """Removed at the end, unlike pytest's own folders: clusters are large."""
    folder = Path(tempfile.mkdtemp(prefix="lookup-tests-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def embedded_servers(servers_folder: Path) -> Iterator[EmbeddedServers]:
    """Thrown away at the end, so nothing waits for the disk: that it stalls now and then would look like our failure.

    What stands after a crash is shown with servers that a test starts for itself, as they are.
    """
    embedded = Embedded(servers_folder / "embedded")
    with patch.dict(POSTGRES_SETTINGS, fsync="off"):
        servers = embedded.start()
    yield servers
    embedded.stop()


@pytest.fixture(scope="session")
def postgres(request: pytest.FixtureRequest) -> str:
    """The owner's URL of a PostgreSQL server. Tests take a database each: `database_url`, or `fresh_database(postgres)`."""
    return os.environ.get("LOOKUP_TEST_DATABASE_URL") or request.getfixturevalue("embedded_servers").database_owner_url


@pytest.fixture(scope="session")
def valkey(request: pytest.FixtureRequest) -> RedisDatabases:
    """A Valkey or Redis server that lends its databases: `redis_url`, or `valkey.fresh()` for a longer life."""
    return RedisDatabases(os.environ.get("LOOKUP_TEST_REDIS_URL") or request.getfixturevalue("embedded_servers").redis_url)


@pytest.fixture(scope="session")
def rabbitmq(servers_folder: Path) -> Iterator[RabbitMQ]:
    """A RabbitMQ broker. Tests take a virtual host of their own: `rabbitmq_vhost_url`, or `rabbitmq.fresh_vhost()`.

    A test that stops or kills the broker makes itself one: `tests.servers.rabbitmq.RabbitMQNode`.
    """
    given, given_api = os.environ.get("LOOKUP_TEST_RABBITMQ_URL"), os.environ.get("LOOKUP_TEST_RABBITMQ_API_URL")
    with rabbitmq_server(given, given_api, servers_folder / "rabbitmq") as broker:
        yield broker


@pytest.fixture(scope="session")
def chromium() -> Path:
    return find_chromium()


@pytest.fixture
def database_url(postgres: str) -> Iterator[str]:
    """An empty database, as its owner."""
    with fresh_database(postgres) as url:
        yield url


@pytest.fixture
def migrated_database_url(database_url: str) -> str:
    """A database as `lookup migrate` leaves it, as its owner."""
    migrate(database_url, uuid4(), {})
    return database_url


@pytest.fixture
def redis_url(valkey: RedisDatabases) -> Iterator[str]:
    """An empty database of the Valkey server."""
    with valkey.fresh() as url:
        yield url


@pytest.fixture
def rabbitmq_vhost_url(rabbitmq: RabbitMQ) -> Iterator[str]:
    """An empty virtual host of the broker."""
    with rabbitmq.fresh_vhost() as url:
        yield url
