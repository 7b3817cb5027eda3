"""The servers that all contenders share: started fresh for one bench, with an empty corner for each measurement."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from app.embedded.servers import Embedded
from app.migrate import migrate
from app.wiring import new_id
from tests.servers.postgres import fresh_database
from tests.servers.rabbitmq import RabbitMQNode
from tests.servers.valkey import RedisDatabases


class Transport(StrEnum):
    REDIS = "redis"
    RABBITMQ = "rabbitmq"


@dataclass(frozen=True, slots=True)
class Corner:
    """Empty stores for one measurement. `rabbitmq_url` is None where Redis is the transport."""

    database_owner_url: str
    redis_url: str
    rabbitmq_url: str | None


class Servers:
    """PostgreSQL (fsync on) and Valkey (append-only file on) from the wheels, and a RabbitMQ node where it is wanted."""

    def __init__(self, postgres_url: str, valkey: RedisDatabases, rabbitmq: RabbitMQNode | None) -> None:
        self._postgres_url = postgres_url
        self._valkey = valkey
        self._rabbitmq = rabbitmq

    @contextmanager
    def corner(self, transport: Transport) -> Iterator[Corner]:
        """An own database, migrated; an own Redis database; and, for RabbitMQ, an own virtual host."""
        with ExitStack() as stack:
            database_url = stack.enter_context(fresh_database(self._postgres_url))
            migrate(database_url, new_id(), {})
            redis_url = stack.enter_context(self._valkey.fresh())
            rabbitmq_url = None
            if transport is Transport.RABBITMQ:
                assert self._rabbitmq is not None
                rabbitmq_url = stack.enter_context(self._rabbitmq.broker.fresh_vhost())
            yield Corner(database_url, redis_url, rabbitmq_url)


@contextmanager
def running_servers(folder: Path, *, with_rabbitmq: bool) -> Iterator[Servers]:
    """Servers below `folder`, gone at the end. Call from the main thread: they die with the thread that starts them."""
    embedded = Embedded(folder / "embedded")
    rabbitmq = RabbitMQNode(folder / "rabbitmq") if with_rabbitmq else None
    try:
        urls = embedded.start()
        if rabbitmq is not None:
            rabbitmq.start()
        yield Servers(urls.database_owner_url, RedisDatabases(urls.redis_url), rabbitmq)
    finally:
        if rabbitmq is not None:
            rabbitmq.stop()
        embedded.stop()
