"""The event store on PostgreSQL: a small subclass of the `eventsourcing` library's recorder behind one async facade.

**Order.** A reader that follows positions skips whatever commits late, so position order must be commit order. Every writer
takes one advisory lock before its first insert and holds it until its transaction ends. That gives what the library's
`LOCK TABLE … IN EXCLUSIVE MODE` gives, but needs no right on the table beyond INSERT, and VACUUM runs beside it. An append is
one statement, so the lock is never held by a writer that we wait for.

**Group commit.** Units that wait together go down in one transaction, with one fsync.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar
from uuid import UUID

import psycopg
from eventsourcing.persistence import PersistenceError
from eventsourcing.postgres import PostgresApplicationRecorder, PostgresDatastore
from psycopg.rows import tuple_row
from psycopg.sql import SQL, Identifier, Literal

from events.arrays import Bigints, Byteas, Texts, Uuids
from events.batching import Batcher, Overloaded, happens_within
from events.connections import ONE_TRY_S, RECONNECT_S, BoundedConnection, bounded_pool, parameters_of
from events.log_tail import LogTail
from events.record import StoredFact, Written
from events.store import AppendUnit, OutcomeUnknown, Scribe, StoreUnavailable, StreamHead, VersionConflict, heads_of

EVENTS_TABLE = "stored_events"
APPEND_LOCK = 0x6C6F6F6B7570  # "lookup": the advisory lock that every writer of the log takes
LOCK_TIMEOUT_MS = 1_500
STATEMENT_TIMEOUT_MS = 5_000
LIMITS = f"-c lock_timeout={LOCK_TIMEOUT_MS} -c statement_timeout={STATEMENT_TIMEOUT_MS}"
CONNECT_TIMEOUT_S = 0.5
"""Short, because those who come meanwhile wait behind it, and have to be answered as well."""
GROUP_MAX = 200
ANSWER_WITHIN_S = 0.05
"""So long a reader who has read all that we appended waits for what we are appending, before it asks the database."""
READERS = 3
FACTS_OF_A_STREAM = 10
"""About so many; it decides how full a page of stream ids is, and nothing else."""
_BEFORE_ALL = UUID(int=0)

Found = TypeVar("Found")
Rows = list[list[Written]]
"""A unit laid out: the rows of each of its streams."""
Answers = dict[int, Sequence[StreamHead] | Exception]
"""What became of the units of a group, by their index."""


class LogRecorder(PostgresApplicationRecorder):
    """The library's tables and reading side, with our lock. Rows are written by `LogWriter`, with the statements from here."""

    def __init__(self, datastore: PostgresDatastore) -> None:
        super().__init__(datastore, events_table_name=EVENTS_TABLE)
        table = {"schema": Identifier(datastore.schema), "table": Identifier(EVENTS_TABLE)}
        lock = SQL("pg_advisory_xact_lock({})").format(APPEND_LOCK)
        self.lock_statement = SQL("SELECT {}").format(lock)
        self.lock_table_statements = [self.lock_statement]
        # The lock is had before the first row comes out of the join, and a row gets its position after that. One parameter
        # per column: the library's array of composites costs a fifth of the processor in dumping it.
        self.append_statement = (
            SQL(
                "WITH locked AS MATERIALIZED (SELECT {lock}, pg_notify({channel}, ''))"
                " INSERT INTO {schema}.{table} (originator_id, originator_version, topic, state)"
                " SELECT facts.* FROM locked, unnest(%b::uuid[], %b::bigint[], %b::text[], %b::bytea[]) AS facts"
                " RETURNING notification_id"
            )
            .format(lock=lock, channel=Literal(self.channel_name), **table)
            .as_bytes(None)
        )
        self._select_streams = SQL(
            "SELECT notification_id, originator_id, originator_version, topic, state FROM {schema}.{table}"
            " WHERE originator_id = ANY(%b) ORDER BY originator_id, originator_version"
        ).format(**table)
        self._select_behind = SQL(
            "SELECT notification_id, originator_id, originator_version, topic, state FROM {schema}.{table}"
            " WHERE originator_id = %b AND originator_version > %b ORDER BY originator_version"
        ).format(**table)
        self._select_log = SQL(
            "SELECT notification_id, originator_id, originator_version, topic, state FROM {schema}.{table}"
            " WHERE notification_id > %b ORDER BY notification_id LIMIT %b"
        ).format(**table)
        self._select_open = SQL(
            "SELECT o.originator_id FROM {schema}.{table} o"
            " WHERE o.originator_version = 1 AND o.topic = ANY(%s) AND (%b::uuid IS NULL OR o.originator_id > %b)"
            " AND NOT EXISTS (SELECT FROM {schema}.{table} c WHERE c.originator_id = o.originator_id AND c.topic = ANY(%s))"
            " ORDER BY o.originator_id LIMIT %b"
        ).format(**table)
        # Rows first, so that the index is followed whatever the planner believes of the table: one that has just been filled
        # would be read and sorted whole for each page.
        self._select_ids = SQL(
            "SELECT DISTINCT originator_id FROM (SELECT originator_id FROM {schema}.{table} WHERE originator_id > %b"
            " ORDER BY originator_id LIMIT %b) AS facts ORDER BY originator_id LIMIT %b"
        ).format(**table)
        self.positions_statement = SQL(
            "SELECT notification_id, state FROM {schema}.{table} WHERE originator_id = %b AND originator_version = ANY(%b)"
            " ORDER BY originator_version"
        ).format(**table)

    def select_streams(self, stream_ids: Sequence[UUID]) -> dict[UUID, list[StoredFact]]:
        streams: dict[UUID, list[StoredFact]] = {}
        for stored in self._stored_facts(self._select_streams, (list(stream_ids),)):
            streams.setdefault(stored.stream_id, []).append(stored)
        return streams

    def select_behind(self, stream_id: UUID, version: int) -> list[StoredFact]:
        return self._stored_facts(self._select_behind, (stream_id, version))

    def select_log(self, after: int, limit: int) -> list[StoredFact]:
        return self._stored_facts(self._select_log, (after, limit))

    def select_open(self, opening: Sequence[str], closing: Sequence[str], after: UUID | None, limit: int) -> list[UUID]:
        with self.datastore.get_connection() as conn, conn.cursor(row_factory=tuple_row) as curs:
            curs.execute(self._select_open, (list(opening), after, after, list(closing), limit))
            return [row[0] for row in curs.fetchall()]

    def select_ids(self, after: UUID | None, limit: int) -> list[UUID]:
        with self.datastore.get_connection() as conn, conn.cursor(row_factory=tuple_row) as curs:
            curs.execute(self._select_ids, (after or _BEFORE_ALL, FACTS_OF_A_STREAM * limit, limit))
            return [row[0] for row in curs.fetchall()]

    def _stored_facts(self, query: Any, params: Sequence[Any]) -> list[StoredFact]:
        with self.datastore.get_connection() as conn, conn.cursor(binary=True, row_factory=tuple_row) as curs:
            curs.execute(query, params, prepare=True)
            return [StoredFact._make(row) for row in curs.fetchall()]


class LogWriter:
    """Appends rows to the log in one statement, which is its own transaction, on a connection of its own.

    So the lock is never held while we are not looking: a writer that is frozen or slow keeps nobody waiting. Nor is anything
    tried twice. (The library retries after a lost connection. If that was lost during the commit, the retry meets its own rows
    and looks like a version conflict; here the doubt is resolved instead, `committed_positions`.)
    """

    def __init__(self, database_url: str, recorder: LogRecorder) -> None:
        self._recorder = recorder
        self._pool = bounded_pool(
            database_url, settings=LIMITS, name="store-writer", min_size=1, max_size=1, timeout_s=CONNECT_TIMEOUT_S
        )

    async def open(self) -> None:
        await self._pool.open()

    async def close(self) -> None:
        await self._pool.close(timeout=CONNECT_TIMEOUT_S)

    async def append(self, rows: Sequence[Written]) -> Sequence[int]:
        """The positions of the rows, in order. Raises `StoreUnavailable` when nothing was sent, else what the driver raises."""
        columns = (
            Uuids.of(row.stream_id for row in rows),
            Bigints.of(row.stream_version for row in rows),
            Texts.of(row.topic for row in rows),
            Byteas(row.state for row in rows),
        )
        try:
            conn = await self._pool.getconn()
        except psycopg.Error as unreached:
            raise StoreUnavailable("The database cannot be reached.") from unreached
        try:
            curs = await conn.execute(self._recorder.append_statement, columns, prepare=True, binary=True)
            return [position for (position,) in await curs.fetchall()]
        finally:
            await self._pool.putconn(conn)

    async def committed_positions(self, rows: Sequence[Written]) -> Sequence[int] | None:
        """The positions of one stream's rows if exactly these rows are in the log, else None.

        Takes the append lock first: a transaction that is still committing holds it, so the answer is final. Of the connection
        that was lost the pool knows, so this has a new one; others that wait in a pool may be lost as well.
        """
        asked = (rows[0].stream_id, [row.stream_version for row in rows])
        async with self._pool.connection() as conn, conn.transaction():
            await conn.execute(self._recorder.lock_statement)
            found = await (await conn.execute(self._recorder.positions_statement, asked, binary=True)).fetchall()
        if [state for _, state in found] != [row.state for row in rows]:
            return None
        return [position for position, _ in found]


class PostgresHistory:
    """The `HistoryReader` on PostgreSQL, for a role that may do no more than select. `close` after use.

    Each session is read-only whatever its role may do, and each statement ends within `STATEMENT_TIMEOUT_MS`.
    """

    _limits = f"{LIMITS} -c default_transaction_read_only=on"

    def __init__(self, database_url: str) -> None:
        self._url = database_url
        # One for good: whoever gives up waiting for a connection leaves it on its way, for whoever comes later.
        self._datastore = open_datastore(database_url, pool_size=READERS, limits=self._limits)
        self._reader_threads = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")
        self._made: LogRecorder | None = None
        self._log_id: UUID | None = None

    async def close(self) -> None:
        await asyncio.to_thread(self._datastore.close)
        self._reader_threads.shutdown(wait=False)

    async def read(self, stream_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[StoredFact]]:
        return await self._on_reader(lambda recorder: recorder.select_streams(stream_ids))

    async def read_behind(self, stream_id: UUID, version: int) -> Sequence[StoredFact]:
        """The facts of one stream behind a version, in order."""
        return await self._on_reader(lambda recorder: recorder.select_behind(stream_id, version))

    async def read_all(self, after: int, limit: int) -> Sequence[StoredFact]:
        return await self._on_reader(lambda recorder: recorder.select_log(after, limit))

    async def head(self) -> int:
        return await self._on_reader(lambda recorder: recorder.max_notification_id.__wrapped__(recorder)) or 0

    async def stream_ids(self, after: UUID | None, limit: int) -> Sequence[UUID]:
        return await self._on_reader(lambda recorder: recorder.select_ids(after, limit))

    async def log_id(self) -> UUID:
        if self._log_id is None:
            self._log_id = await self._on_reader(_select_log_id)
        return self._log_id

    async def _on_reader(self, query: Callable[[LogRecorder], Found]) -> Found:
        def run() -> Found:
            with _as_unavailable():
                return query(self._recorder())

        return await asyncio.get_running_loop().run_in_executor(self._reader_threads, run)

    def _recorder(self) -> LogRecorder:
        """Made when first needed: making one asks the database."""
        if self._made is None:
            self._made = LogRecorder(self._datastore)
        return self._made


class PostgresStore(PostgresHistory):
    """The `EventStore` on PostgreSQL. `close` after use. `tail` is what it appended last, for its neighbours."""

    _limits = LIMITS

    def __init__(self, database_url: str, scribe: Scribe) -> None:
        super().__init__(database_url)
        self._scribe = scribe
        self._writer: LogWriter | None = None
        self.tail = LogTail()
        self._answered = asyncio.Event()
        self._answered.set()
        self._appends: Batcher[AppendUnit, Sequence[StreamHead]] = Batcher(self._append_group, batch_max=GROUP_MAX)

    async def close(self) -> None:
        await self._appends.drain()
        if self._writer is not None:
            await self._writer.close()
        await super().close()

    async def append(self, unit: AppendUnit) -> Sequence[StreamHead]:
        try:
            return await self._appends.add(unit, within_s=unit.within_s)
        except Overloaded:
            raise StoreUnavailable("More appends wait already than may wait, or for longer than they may.") from None
        except TimeoutError:
            raise OutcomeUnknown from None

    async def read_all(self, after: int, limit: int) -> Sequence[StoredFact]:
        if self.tail.ends_at(after) and not self._answered.is_set():
            # A commit is told to those who listen before its answer is here: what they were told of is what we wait for.
            await happens_within(self._answered, ANSWER_WITHIN_S)
        if just_appended := self.tail.behind(after, limit):
            return just_appended
        return await super().read_all(after, limit)

    async def open_streams(
        self, opening: Sequence[str], closing: Sequence[str], after: UUID | None, limit: int
    ) -> Sequence[UUID]:
        return await self._on_reader(lambda recorder: recorder.select_open(opening, closing, after, limit))

    async def _append_group(self, units: Sequence[AppendUnit]) -> Sequence[Sequence[StreamHead] | Exception]:
        await self.log_id()  # A database in which a restore was not finished has none, and takes nothing.
        rows = [self._scribe.write(unit) for unit in units]
        answers: Answers = {}
        for group in _without_shared_streams(rows):
            answers.update(await self._append_or_split(rows, group))
        return [answers[index] for index in range(len(units))]

    async def _append_or_split(self, units: Sequence[Rows], group: Sequence[int]) -> Answers:
        try:
            return await self._append_once(units, group)
        except psycopg.IntegrityError:
            if len(group) == 1:
                return {group[0]: VersionConflict()}
            half = len(group) // 2
            answers = await self._append_or_split(units, group[:half])
            return answers | await self._append_or_split(units, group[half:])
        except StoreUnavailable as unavailable:
            return dict.fromkeys(group, unavailable)
        except psycopg.Error as error:
            if _answered_by_server(error):
                # No room, a read-only server, a lock that was not had in time: the transaction was rolled back.
                return dict.fromkeys(group, _unavailable(error))
            return await self._resolve_doubt(units, group)

    async def _append_once(self, units: Sequence[Rows], group: Sequence[int]) -> Answers:
        rows = [row for index in group for stream in units[index] for row in stream]
        writer = await self._opened_writer()
        self._answered.clear()
        try:
            positions = await writer.append(rows)
            stored = [row.at(position) for position, row in zip(positions, rows, strict=True)]
            self.tail.append(stored, [row.fact for row in rows])
        finally:
            self._answered.set()
        answers: Answers = {}
        taken = 0
        for index in group:
            count = sum(len(stream) for stream in units[index])
            answers[index] = heads_of(units[index], positions[taken : taken + count])
            taken += count
        return answers

    async def _opened_writer(self) -> LogWriter:
        if self._writer is None:
            self._writer = LogWriter(self._url, await self._on_reader(lambda recorder: recorder))
            await self._writer.open()
        return self._writer

    async def _resolve_doubt(self, units: Sequence[Rows], group: Sequence[int]) -> Answers:
        """After a lost connection: whatever hinders us from asking, nobody can tell then what became of the group."""
        try:
            return await self._what_was_committed(units, group)
        except Exception:  # noqa: BLE001 - it is the lost connection that is to be answered for
            return dict.fromkeys(group, OutcomeUnknown())

    async def _what_was_committed(self, units: Sequence[Rows], group: Sequence[int]) -> Answers:
        """One transaction carried the group, so one unit's rows speak for all of them."""
        writer = await self._opened_writer()
        if await writer.committed_positions(units[group[0]][0]) is None:
            return dict.fromkeys(group, StoreUnavailable("The database cannot be reached."))
        answers: Answers = {}
        for index in group:
            positions = [p for stream in units[index] for p in await writer.committed_positions(stream) or ()]
            answers[index] = heads_of(units[index], positions)
        return answers


def open_datastore(
    database_url: str, *, pool_size: int, limits: str = "", connect_timeout_s: float = CONNECT_TIMEOUT_S
) -> PostgresDatastore:
    """The library's datastore for a libpq URL, unix sockets and TLS options included. `limits` are settings of each session."""
    options = parameters_of(database_url, limits)
    datastore = PostgresDatastore(
        dbname=options.pop("dbname", ""),
        host=options.pop("host", ""),
        port=options.pop("port", ""),
        user=options.pop("user", ""),
        password=options.pop("password", ""),
        connect_timeout=connect_timeout_s,
        pool_size=pool_size,
    )
    datastore.pool.connection_class = BoundedConnection
    assert isinstance(datastore.pool.kwargs, dict)
    kwargs = {name: value for name, value in datastore.pool.kwargs.items() if value != ""}
    one_try: dict[str, Any] = {"connect_timeout": max(ONE_TRY_S, round(connect_timeout_s))}
    datastore.pool.kwargs = kwargs | one_try | options
    datastore.pool.reconnect_timeout = RECONNECT_S
    return datastore


def _select_log_id(recorder: LogRecorder) -> UUID:
    with recorder.datastore.get_connection() as conn, conn.cursor(row_factory=tuple_row) as curs:
        row = curs.execute("SELECT log_id FROM log_identity").fetchone()
    if row is None:
        raise StoreUnavailable("The database has no log yet. Run `lookup migrate` first.")
    log_id: UUID = row[0]
    return log_id


def _without_shared_streams(units: Sequence[Rows]) -> Iterator[list[int]]:
    """Indexes of units in groups in which no two write the same stream: the second of them would undo the first."""
    left = list(range(len(units)))
    while left:
        group: list[int] = []
        later: list[int] = []
        taken: set[UUID] = set()
        for index in left:
            streams = {stream[0].stream_id for stream in units[index]}
            if taken.isdisjoint(streams):
                taken |= streams
                group.append(index)
            else:
                later.append(index)
        yield group
        left = later


def _answered_by_server(error: psycopg.Error) -> bool:
    """Whether the server itself refused (then nothing went down), rather than the connection breaking (then nobody knows)."""
    return error.sqlstate is not None and not error.sqlstate.startswith(("08", "57P"))


def _unavailable(error: Exception) -> StoreUnavailable:
    unavailable = StoreUnavailable("The database did not take the facts.")
    unavailable.__cause__ = error
    return unavailable


@contextmanager
def _as_unavailable() -> Iterator[None]:
    try:
        yield
    except (PersistenceError, psycopg.Error) as error:
        raise StoreUnavailable("The database cannot be read.") from error
