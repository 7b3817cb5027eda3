"""Commands for Redis, packed in C.

redis-py packs what its asynchronous connections send in Python, argument by argument, though it has a packer in C for the
others. A commit of views has some 150 arguments.
"""

from typing import Any

from redis.asyncio import Redis
from redis.connection import HiredisRespSerializer

_PACKER = HiredisRespSerializer()


class _PackedInC:
    """Goes before any of redis-py's connections: over TCP, TLS or a Unix socket."""

    def pack_command(self, *args: Any) -> list[bytes]:
        """As redis-py's own, in RESP. Raises `redis.DataError` for what is neither bytes nor text nor a number."""
        packed: list[bytes] = _PACKER.pack(*args)
        return packed


def pack_in_c(client: Redis) -> Redis:
    """The same client; each connection that it makes from now on packs its commands in C."""
    pool = client.connection_pool
    if not issubclass(pool.connection_class, _PackedInC):
        pool.connection_class = type("PackedInC", (_PackedInC, pool.connection_class), {})
    return client
