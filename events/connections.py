"""Connections to PostgreSQL that give up on a server which has fallen silent.

The library waits for an answer without a bound. The kernel of a machine whose server is frozen still acknowledges every packet,
so no keepalive notices it either. A server that lives ends each statement by itself (`statement_timeout`), which is less than
the silence that is put up with here.
"""

from typing import TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.errors import _WaitTimeout
from psycopg.rows import DictRow, TupleRow

SILENCE_MAX_S = 7.0
SILENT = "The database does not answer."
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
