"""A fresh logical database per test on one Valkey or Redis server, which is a test server: its databases are emptied."""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import redis

DATABASES = 16


class RedisDatabases:
    """Lends the server's numbered databases. Channels of PUBLISH are the server's, and so shared by all of them."""

    def __init__(self, server_url: str) -> None:
        self._server_url = server_url
        self._free = list(range(DATABASES))

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """The URL of an empty database that nobody else has until the end of the block."""
        assert self._free, f"only {DATABASES} databases at a time"
        number = self._free.pop(0)
        url = self._url_of(number)
        try:
            with redis.Redis.from_url(url) as client:
                client.flushdb()
                yield url
                client.flushdb()
        finally:
            # At the end of the queue: what a part left behind that still shuts down meets nobody.
            self._free.append(number)

    def _url_of(self, number: int) -> str:
        parts = urlsplit(self._server_url)
        if parts.scheme == "unix":
            return f"unix://{parts.path}?db={number}"
        return parts._replace(path=f"/{number}").geturl()
