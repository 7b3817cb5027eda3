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
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast
from uuid import UUID

import psycopg
from eventsourcing.persistence import IntegrityError, PersistenceError
from eventsourcing.persistence import StoredEvent as LibraryEvent
from eventsourcing.postgres import PostgresApplicationRecorder, PostgresDatastore
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import tuple_row
from psycopg.sql import SQL, Identifier, Literal

from events.batching import Batcher, Overloaded
from events.connections import BoundedConnection
from events.record import StoredFact, Written
from events.store import AppendUnit, OutcomeUnknown, Scribe, StoreUnavailable, StreamHead, VersionConflict, heads_of

EVENTS_TABLE = "stored_events"
APPEND_LOCK = 0x6C6F6F6B7570  # "lookup": the advisory lock that every writer of the log takes
LOCK_TIMEOUT_MS = 1_500
STATEMENT_TIMEOUT_MS = 5_000
LIMITS = f"-c lock_timeout={LOCK_TIMEOUT_MS} -c statement_timeout={STATEMENT_TIMEOUT_MS}"
CONNECT_TIMEOUT_S = 0.5
"""Short, because those who come meanwhile wait behind it, and have to be answered as well."""
RECONNECT_S = 1.0
"""The pool tries by itself for so long, ever more seldom (its default: 5 minutes); then the next who needs one does."""
GROUP_MAX = 200
TAIL_MAX = 2_000
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
    """The library's tables and reading side; our lock, our way to write rows, and no silent retry.

    The library retries an append after a lost connection. If that connection was lost during the commit, its retry meets
    its own rows and looks like a version conflict; here the doubt is resolved instead (`committed_positions`).
    """

    def __init__(self, datastore: PostgresDatastore) -> None:
        super().__init__(datastore, events_table_name=EVENTS_TABLE)
        table = {"schema": Identifier(datastore.schema), "table": Identifier(EVENTS_TABLE)}
        lock = SQL("pg_advisory_xact_lock({})").format(APPEND_LOCK)
        self.lock_table_statements = [SQL("SELECT {}").format(lock)]
        # The lock is had before the first row comes out of the join, and a row gets its position after that. One parameter
        # per column: the library's array of composites costs a fifth of the processor in dumping it.
        self._append = SQL(
            "WITH locked AS MATERIALIZED (SELECT {lock}, pg_notify({channel}, ''))"
            " INSERT INTO {schema}.{table} (originator_id, originator_version, topic, state)"
            " SELECT facts.* FROM locked, unnest(%b::uuid[], %b::bigint[], %s::text[], %b::bytea[]) AS facts"
            " RETURNING notification_id"
        ).format(lock=lock, channel=Literal(self.channel_name), **table)
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
        self._select_positions = SQL(
            "SELECT notification_id, state FROM {schema}.{table} WHERE originator_id = %b AND originator_version = ANY(%b)"
            " ORDER BY originator_version"
        ).format(**table)

    def insert_events(self, stored_events: Sequence[LibraryEvent], **_: Any) -> Sequence[int]:
        """Append rows in one statement, which is its own transaction; gives their positions, in order. Never retries.

        So the lock is never held while we are not looking: a writer that is frozen or slow keeps nobody waiting.
        """
        with ExitStack() as stack:
            try:
                conn = stack.enter_context(self.datastore.get_connection())
            except PersistenceError as unreached:
                raise StoreUnavailable("The database cannot be reached.") from unreached
            curs = stack.enter_context(conn.cursor(binary=True, row_factory=tuple_row))
            columns = (
                [event.originator_id for event in stored_events],
                [event.originator_version for event in stored_events],
                [event.topic for event in stored_events],
                [event.state for event in stored_events],
            )
            curs.execute(self._append, columns, prepare=True)
            return [position for (position,) in curs.fetchall()]

    def committed_positions(self, rows: Sequence[Written]) -> Sequence[int] | None:
        """The positions of one stream's rows if exactly these rows are in the log, else None.

        Takes the append lock first: a transaction that is still committing holds it, so the answer is final.
        """
        with self.datastore.transaction(commit=False) as curs:
            self._lock_table(curs)
            curs.execute(self._select_positions, (rows[0].stream_id, [row.stream_version for row in rows]))
            found = curs.fetchall()
        if [bytes(row["state"]) for row in found] != [row.state for row in rows]:
            return None
        return [row["notification_id"] for row in found]

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


class LogTail:
    """The last facts that this process appended, without a gap: a relay beside the writer need not ask the database for them.

    Positions are handed out in commit order, so nothing can lie between a position and the next one. One thread appends,
    another reads: the list is replaced, never changed.
    """

    def __init__(self) -> None:
        self._facts: list[StoredFact] = []

    def append(self, positions: Sequence[int], rows: Sequence[Written]) -> None:
        facts = [
            StoredFact(position, row.stream_id, row.stream_version, row.topic, row.state)
            for position, row in zip(positions, rows, strict=True)
        ]
        gapless = positions[-1] - positions[0] == len(positions) - 1
        follows = bool(self._facts) and self._facts[-1].position + 1 == positions[0]
        self._facts = [*(self._facts[-TAIL_MAX:] if follows else ()), *facts] if gapless else []

    def behind(self, after: int, limit: int) -> list[StoredFact]:
        """The facts right behind a position, at most `limit`; nothing when the database must be asked."""
        facts = self._facts
        first = after + 1 - facts[0].position if facts else -1
        return facts[first : first + limit] if first >= 0 else []


class PostgresHistory:
    """The `HistoryReader` on PostgreSQL, for a role that may do no more than select. `close` after use.

    Each session is read-only whatever its role may do, and each statement ends within `STATEMENT_TIMEOUT_MS`.
    """

    _limits = f"{LIMITS} -c default_transaction_read_only=on"

    def __init__(self, database_url: str) -> None:
        self._url = database_url
        self._reader_threads = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")
        self._recorders: dict[str, LogRecorder] = {}
        self._log_id: UUID | None = None

    async def close(self) -> None:
        for recorder in self._recorders.values():
            await asyncio.to_thread(recorder.datastore.close)
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
                return query(self._recorder("reader", READERS))

        return await asyncio.get_running_loop().run_in_executor(self._reader_threads, run)

    def _recorder(self, purpose: str, pool_size: int) -> LogRecorder:
        """The recorder for writing or reading, made when first needed: making one asks the database."""
        recorder = self._recorders.get(purpose)
        if recorder is None:
            with _as_unavailable():
                recorder = LogRecorder(open_datastore(self._url, pool_size=pool_size, limits=self._limits))
            self._recorders[purpose] = recorder
        return recorder


class PostgresStore(PostgresHistory):
    """The `EventStore` on PostgreSQL. `close` after use."""

    _limits = LIMITS

    def __init__(self, database_url: str, scribe: Scribe) -> None:
        super().__init__(database_url)
        self._scribe = scribe
        self._writer_thread = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        self._tail = LogTail()
        self._appends: Batcher[AppendUnit, Sequence[StreamHead]] = Batcher(self._append_group, batch_max=GROUP_MAX)

    async def close(self) -> None:
        await self._appends.drain()
        await super().close()
        self._writer_thread.shutdown(wait=False)

    async def append(self, unit: AppendUnit) -> Sequence[StreamHead]:
        try:
            return await self._appends.add(unit, within_s=unit.within_s)
        except Overloaded:
            raise StoreUnavailable("More appends wait already than may wait, or for longer than they may.") from None
        except TimeoutError:
            raise OutcomeUnknown from None

    async def read_all(self, after: int, limit: int) -> Sequence[StoredFact]:
        if just_appended := self._tail.behind(after, limit):
            return just_appended
        return await super().read_all(after, limit)

    async def open_streams(
        self, opening: Sequence[str], closing: Sequence[str], after: UUID | None, limit: int
    ) -> Sequence[UUID]:
        return await self._on_reader(lambda recorder: recorder.select_open(opening, closing, after, limit))

    async def _append_group(self, units: Sequence[AppendUnit]) -> Sequence[Sequence[StreamHead] | Exception]:
        await self.log_id()  # A database in which a restore was not finished has none, and takes nothing.
        loop = asyncio.get_running_loop()
        rows = [self._scribe.write(unit) for unit in units]
        return await loop.run_in_executor(self._writer_thread, self._append_rows, rows)

    # Everything below runs on the writer's own thread.

    def _append_rows(self, units: Sequence[Rows]) -> list[Sequence[StreamHead] | Exception]:
        answers: Answers = {}
        for group in _without_shared_streams(units):
            answers.update(self._append_or_split(units, group))
        return [answers[index] for index in range(len(units))]

    def _append_or_split(self, units: Sequence[Rows], group: Sequence[int]) -> Answers:
        try:
            return self._append_once(units, group)
        except IntegrityError:
            if len(group) == 1:
                return {group[0]: VersionConflict()}
            half = len(group) // 2
            return self._append_or_split(units, group[:half]) | self._append_or_split(units, group[half:])
        except StoreUnavailable as unavailable:
            return dict.fromkeys(group, unavailable)
        except (PersistenceError, psycopg.Error) as error:
            if _answered_by_server(error):
                # No room, a read-only server, a lock that was not had in time: the transaction was rolled back.
                return dict.fromkeys(group, _unavailable(error))
            return self._resolve_doubt(units, group)

    def _append_once(self, units: Sequence[Rows], group: Sequence[int]) -> Answers:
        rows = [row for index in group for stream in units[index] for row in stream]
        positions = self._recorder("writer", 1).insert_events([_library_event(row) for row in rows])
        self._tail.append(positions, rows)
        answers: Answers = {}
        taken = 0
        for index in group:
            count = sum(len(stream) for stream in units[index])
            answers[index] = heads_of(units[index], positions[taken : taken + count])
            taken += count
        return answers

    def _resolve_doubt(self, units: Sequence[Rows], group: Sequence[int]) -> Answers:
        """After a lost connection: one transaction carried the group, so one unit's rows speak for all of them."""
        try:
            recorder = self._recorder("writer", 1)
            if recorder.committed_positions(units[group[0]][0]) is None:
                return dict.fromkeys(group, StoreUnavailable("The database cannot be reached."))
            return {
                index: heads_of(units[index], [p for s in units[index] for p in recorder.committed_positions(s) or ()])
                for index in group
            }
        except Exception:  # noqa: BLE001 - whatever it is, nobody can tell what became of the group
            return dict.fromkeys(group, OutcomeUnknown())


def open_datastore(
    database_url: str, *, pool_size: int, limits: str = "", connect_timeout_s: float = CONNECT_TIMEOUT_S
) -> PostgresDatastore:
    """The library's datastore for a libpq URL, unix sockets and TLS options included. `limits` are settings of each session."""
    options = cast("dict[str, Any]", conninfo_to_dict(database_url))
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
    settings = " ".join(filter(None, (options.pop("options", ""), limits)))
    # Of one try, in whole seconds: libpq takes no less than two.
    one_try: dict[str, Any] = {"connect_timeout": max(2, round(connect_timeout_s))}
    datastore.pool.kwargs = kwargs | one_try | ({"options": settings} if settings else {}) | options
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


def _library_event(row: Written) -> LibraryEvent:
    return LibraryEvent(row.stream_id, row.stream_version, row.topic, row.state)


def _answered_by_server(error: BaseException) -> bool:
    """Whether the server itself refused (then nothing went down), rather than the connection breaking (then nobody knows)."""
    cause = error if isinstance(error, psycopg.Error) else error.__cause__
    state = cause.sqlstate if isinstance(cause, psycopg.Error) else None
    return state is not None and not state.startswith(("08", "57P"))


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
