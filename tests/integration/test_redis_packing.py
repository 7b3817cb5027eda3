"""What is packed in C is what redis-py packs itself, on each of its connections."""

from typing import Any

import pytest
from redis.asyncio import Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import DataError

from events.redis_packing import pack_in_c

COMMANDS: list[tuple[Any, ...]] = [
    ("GET", "key"),
    ("CONFIG GET", "maxmemory"),
    (b"SET", "k\u00e4y", b"\x00\r\n$3\r\n", "EX", 5),
    ("EVALSHA", "abc", 2, "a", "b", 2**63, -1, 1.5, 0.1, "", b""),
    ("SET", "large", bytes(100_000)),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_packed_as_by_redis_py(command: tuple[Any, ...]) -> None:
    client = pack_in_c(Redis())

    packed = client.connection_pool.connection_class().pack_command(*command)

    assert b"".join(packed) == b"".join(Connection().pack_command(*command))


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(DataError):
        pack_in_c(Redis()).connection_pool.connection_class().pack_command("SET", "key", None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "kind"),
    [("redis://host", Connection), ("rediss://host", SSLConnection), ("unix:///socket", UnixDomainSocketConnection)],
)
def test_the_way_to_the_server_stays_what_the_url_says(url: str, kind: type[Any]) -> None:
    client = Redis.from_url(url)
    assert client.connection_pool.connection_class is kind

    pack_in_c(pack_in_c(client))

    assert issubclass(client.connection_pool.connection_class, kind)
    assert client.connection_pool.connection_class.__mro__.count(kind) == 1
    assert client.connection_pool.connection_class.pack_command is not kind.pack_command
