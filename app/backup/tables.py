"""The tables of a database, copied out of it and into another in PostgreSQL's own COPY text, whatever they are.

They are not listed by name: what a release after this one keeps in another table is in its backups too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import LiteralString, Protocol

from psycopg import sql

from app.backup.snapshot import Connection
from app.migrate import UNFINISHED_RESTORE

IDENTITY = "log_identity"
"""Not copied: a restored log is another log, and gets a name of its own."""
EVENTS = "stored_events"

_TABLES = """
SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = current_schema() AND c.relkind = 'r' ORDER BY c.relname
"""
_REFERENCES = """
SELECT c.relname, f.relname FROM pg_constraint r JOIN pg_class c ON c.oid = r.conrelid JOIN pg_class f ON f.oid = r.confrelid
WHERE r.contype = 'f' AND r.conrelid <> r.confrelid AND r.connamespace = current_schema()::regnamespace
"""
_COLUMNS = """
SELECT a.attname, format_type(a.atttypid, a.atttypmod),
    pg_get_serial_sequence(quote_ident(current_schema()) || '.' || quote_ident(%(table)s), a.attname)
FROM pg_attribute a
WHERE a.attrelid = to_regclass(quote_ident(current_schema()) || '.' || quote_ident(%(table)s))
    AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
ORDER BY a.attnum
"""


class Sink(Protocol):
    """Where the bytes of a table go."""

    def write(self, data: bytes, /) -> int: ...


@dataclass(frozen=True, slots=True)
class Column:
    """A column, its type as PostgreSQL spells it, and the sequence that numbers it, if one does."""

    name: str
    type: str
    sequence: str | None


@dataclass(frozen=True, slots=True)
class Table:
    name: str
    columns: tuple[Column, ...]

    @property
    def described(self) -> tuple[tuple[str, str], ...]:
        return tuple((column.name, column.type) for column in self.columns)


def tables_of(conn: Connection) -> list[Table]:
    """All that is copied, each behind those that its rows refer to. Raises `psycopg.Error`."""
    names = {name for (name,) in conn.execute(_TABLES).fetchall()} - {IDENTITY, UNFINISHED_RESTORE}
    order = TopologicalSorter({name: set[str]() for name in sorted(names)})
    for name, referred_to in conn.execute(_REFERENCES).fetchall():
        order.add(name, referred_to)
    return [_table(conn, name) for name in order.static_order() if name in names]


def _table(conn: Connection, name: str) -> Table:
    return Table(name, tuple(Column(*row) for row in conn.execute(_COLUMNS, {"table": name}).fetchall()))


def copy_out(conn: Connection, table: Table, sink: Sink) -> int:
    """Write a table's rows to the sink, one after the other; gives how many there were. Raises `psycopg.Error` or `OSError`."""
    rows = 0
    with conn.cursor() as curs, curs.copy(_copy(table.name, table.described, "TO STDOUT")) as copy:
        for row in copy:
            sink.write(bytes(row))
            rows += 1
    return rows


def copy_in(conn: Connection, name: str, columns: Iterable[tuple[str, str]], chunks: Iterable[bytes]) -> int:
    """Fill a table; gives how many rows it took. Raises `psycopg.Error`."""
    with conn.cursor() as curs:
        with curs.copy(_copy(name, columns, "FROM STDIN")) as copy:
            for chunk in chunks:
                copy.write(chunk)
        return curs.rowcount


def _copy(name: str, columns: Iterable[tuple[str, str]], direction: LiteralString) -> sql.Composed:
    listed = sql.SQL(", ").join(sql.Identifier(column) for column, _ in columns)
    return sql.SQL("COPY {} ({}) {}").format(sql.Identifier(name), listed, sql.SQL(direction))


def is_empty(conn: Connection, name: str) -> bool:
    """Whether a table has no row, or is not there."""
    if conn.execute("SELECT to_regclass(quote_ident(%s))", (name,)).fetchone() == (None,):
        return True
    row = conn.execute(sql.SQL("SELECT EXISTS (SELECT FROM {})").format(sql.Identifier(name))).fetchone()
    return row == (False,)


def number_on(conn: Connection, table: Table, skipped: int = 0) -> None:
    """Let what numbers a table's rows go on behind the highest number that was copied in, and so many further."""
    for column in table.columns:
        if column.sequence is not None:
            highest = sql.SQL("SELECT setval(%s, greatest(coalesce(max({}), 0) + %s, 1)) FROM {}")
            query = highest.format(sql.Identifier(column.name), sql.Identifier(table.name))
            conn.execute(query, (column.sequence, skipped))
