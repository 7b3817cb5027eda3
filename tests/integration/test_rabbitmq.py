"""A plain connection to RabbitMQ is closed at the end, whatever became of it: never by whoever collects the garbage."""

import aio_pika
import pytest

from app.backup.failure import RestoreRefused
from app.backup.surroundings import forget_views_and_messages
from app.health import rabbitmq_check
from app.rabbitmq import connected

NOBODY_LISTENS_HERE = "amqp://guest:guest@127.0.0.1:9/"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[aio_pika.Connection]:
    """All connections that anybody tried to open."""
    told: list[aio_pika.Connection] = []
    connect = aio_pika.Connection.connect

    async def noted(connection: aio_pika.Connection, timeout: float | None = None) -> None:  # noqa: ASYNC109 - aio-pika's own
        told.append(connection)
        await connect(connection, timeout)

    monkeypatch.setattr(aio_pika.Connection, "connect", noted)
    return told


async def test_it_is_open_for_so_long_and_then_closed(rabbitmq_vhost_url: str) -> None:
    async with connected(rabbitmq_vhost_url, 5.0) as connection, connection.channel() as channel:
        assert not channel.is_closed

    assert connection.is_closed


async def test_a_check_tells_of_a_broker_that_is_there(rabbitmq_vhost_url: str, made: list[aio_pika.Connection]) -> None:
    assert await rabbitmq_check(rabbitmq_vhost_url)() is None

    assert [connection.is_closed for connection in made] == [True]


async def test_a_check_without_a_broker_leaves_nothing_behind(made: list[aio_pika.Connection]) -> None:
    assert await rabbitmq_check(NOBODY_LISTENS_HERE)() == "RabbitMQ cannot be reached"

    assert [connection.is_closed for connection in made] == [True]


async def test_a_restore_without_a_broker_leaves_nothing_behind(redis_url: str, made: list[aio_pika.Connection]) -> None:
    with pytest.raises(RestoreRefused, match="RabbitMQ cannot be reached"):
        await forget_views_and_messages(redis_url, NOBODY_LISTENS_HERE)

    assert [connection.is_closed for connection in made] == [True]
