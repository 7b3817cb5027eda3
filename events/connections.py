"""Connections to PostgreSQL that give up on a server which has fallen silent.

The library waits for an answer without a bound. The kernel of a machine whose server is frozen still acknowledges every packet,
so no keepalive notices it either. A server that lives ends each statement by itself (`statement_timeout`), which is less than
the silence that is put up with here.
"""

from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.errors import _WaitTimeout
from psycopg.rows import DictRow, TupleRow
from psycopg_pool import AsyncConnectionPool

SILENCE_MAX_S = 7.0
SILENT = "The database does not answer."
ONE_TRY_S = 2
"""To connect. libpq takes no less."""
RECONNECT_S = 1.0
"""A pool tries by itself for so long, ever more seldom (its default: 5 minutes); then the next who needs one does."""
_LOOK_S = 0.1

Returned = TypeVar("Returned")


class BoundedConnection(psycopg.Connection[DictRow]):
    """Closes itself, and raises `OperationalError`, when an answer does not come within `SILENCE_MAX_S`."""

    def wait(self, gen: PQGen[Returned], interval: float = _LOOK_S, timeout: float | None = None) -> Returned:
        if timeout is not None:
            return super().wait(gen, interval, timeout)
        try:
            return super().wait(gen, interval, SILENCE_MAX_S)
        except _WaitTimeout:
            self.pgconn.finish()
            raise psycopg.OperationalError(SILENT) from None


class BoundedAsyncConnection(psycopg.AsyncConnection[TupleRow]):
    """As `BoundedConnection`."""

    async def wait(
        self,
        gen: PQGen[Returned],
        interval: float = _LOOK_S,
        timeout: float | None = None,  # noqa: ASYNC109 - the library's signature
    ) -> Returned:
        if timeout is not None:
            return await super().wait(gen, interval, timeout)
        try:
            return await super().wait(gen, interval, SILENCE_MAX_S)
        except _WaitTimeout:
            self.pgconn.finish()
            raise psycopg.OperationalError(SILENT) from None


def bounded_pool(
    database_url: str, *, settings: str, name: str, min_size: int, max_size: int, timeout_s: float
) -> AsyncConnectionPool[BoundedAsyncConnection]:
    """A pool to be opened, in which each statement is its own transaction. One waits for a connection of it for `timeout_s`."""
    parameters = {"connect_timeout": ONE_TRY_S} | parameters_of(database_url, settings)
    return AsyncConnectionPool(
        make_conninfo(**parameters),
        min_size=min_size,
        max_size=max_size,
        open=False,
        timeout=timeout_s,
        reconnect_timeout=RECONNECT_S,
        connection_class=BoundedAsyncConnection,
        kwargs={"autocommit": True},
        name=name,
    )


def parameters_of(database_url: str, settings: str) -> dict[str, Any]:
    """What a libpq URL says of the connection, with `settings` of each session (`-c name=value`) behind those that it has."""
    parameters: dict[str, Any] = dict(conninfo_to_dict(database_url))
    of_session = " ".join(filter(None, (parameters.pop("options", ""), settings)))
    return parameters | ({"options": of_session} if of_session else {})
