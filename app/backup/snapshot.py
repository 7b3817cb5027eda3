"""One moment of a database: log and result documents as one transaction sees them, however much is written meanwhile."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import LiteralString
from uuid import UUID

import psycopg
import zstandard
from psycopg.rows import TupleRow

from events.facts import ResultReference
from events.record import StoredFact
from events.store import StoreUnavailable
from results.postgres import sound_documents

Connection = psycopg.Connection[TupleRow]

_FACT: LiteralString = "SELECT notification_id, originator_id, originator_version, topic, state FROM stored_events"
_BEFORE_ALL = UUID(int=0)
_FACTS_OF_A_STREAM = 10


@contextmanager
def snapshot_of(database_url: str) -> Iterator[Connection]:
    """A connection that sees one moment and changes nothing. It takes no lock that a writer or VACUUM would wait for.

    Raises `psycopg.Error`.
    """
    with psycopg.connect(database_url, connect_timeout=5, application_name="lookup backup") as conn:
        conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        conn.read_only = True
        take_all_the_time_it_takes(conn)
        yield conn
        conn.rollback()


def take_all_the_time_it_takes(conn: Connection) -> None:
    """Limits that are set for those who serve requests are not for who reads or writes everything."""
    for limit in ("statement_timeout", "idle_in_transaction_session_timeout", "transaction_timeout"):
        # The last one is of PostgreSQL 17.
        conn.execute("SELECT set_config(name, '0', true) FROM pg_settings WHERE name = %s", (limit,))


class SnapshotLog:
    """The `HistoryReader` on one connection. It blocks while it asks: nothing else goes on in a process that copies."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn

    async def read(self, stream_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[StoredFact]]:
        streams: dict[UUID, list[StoredFact]] = {}
        order: LiteralString = f"{_FACT} WHERE originator_id = ANY(%s) ORDER BY originator_id, originator_version"
        for stored in self._facts(order, list(stream_ids)):
            streams.setdefault(stored.stream_id, []).append(stored)
        return streams

    async def read_all(self, after: int, limit: int) -> Sequence[StoredFact]:
        return self._facts(f"{_FACT} WHERE notification_id > %s ORDER BY notification_id LIMIT %s", after, limit)

    async def read_behind(self, stream_id: UUID, version: int) -> Sequence[StoredFact]:
        order: LiteralString = f"{_FACT} WHERE originator_id = %s AND originator_version > %s ORDER BY originator_version"
        return self._facts(order, stream_id, version)

    async def head(self) -> int:
        row = self._conn.execute("SELECT coalesce(max(notification_id), 0) FROM stored_events").fetchone()
        return int(row[0]) if row else 0

    async def stream_ids(self, after: UUID | None, limit: int) -> Sequence[UUID]:
        """As the event store does it: by the index, whatever the planner believes of a table that has just been filled."""
        rows = self._conn.execute(
            "SELECT DISTINCT originator_id FROM (SELECT originator_id FROM stored_events WHERE originator_id > %s"
            " ORDER BY originator_id LIMIT %s) AS facts ORDER BY originator_id LIMIT %s",
            (after or _BEFORE_ALL, _FACTS_OF_A_STREAM * limit, limit),
        ).fetchall()
        return [row[0] for row in rows]

    async def log_id(self) -> UUID:
        row = self._conn.execute("SELECT log_id FROM log_identity").fetchone()
        if row is None:
            raise StoreUnavailable("The database has no log yet. Run `lookup migrate` first.")
        log_id: UUID = row[0]
        return log_id

    def _facts(self, query: LiteralString, *values: object) -> list[StoredFact]:
        with self._conn.cursor(binary=True) as curs:
            return [StoredFact(*row) for row in curs.execute(query, values, prepare=True).fetchall()]


class SnapshotDocuments:
    """The `ResultDocuments` on one connection, as `results/postgres.py` gives them."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._decompressor = zstandard.ZstdDecompressor()

    async def put(self, job_id: UUID, document: bytes, *, shown: bool = True) -> ResultReference:
        raise NotImplementedError("Nothing is put into what was.")

    async def get(self, references: Sequence[ResultReference]) -> Mapping[str, bytes]:
        wanted = {reference.location.key: reference.sha256 for reference in references}
        if not wanted:
            return {}
        with self._conn.cursor(binary=True) as curs:
            rows = curs.execute("SELECT key, body FROM result_documents WHERE key = ANY(%s)", (list(wanted),)).fetchall()
        return sound_documents(rows, wanted, self._decompressor)
