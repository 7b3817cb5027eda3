"""Where heads are kept: a table beside the log, and files outside of the database.

Promises:

- **Added to, never changed.** Each line is on disk when `append` returns; a file is only ever written at its end.
- **The table first.** What a file misses is added from the table, so a file that was away comes up to date by itself.
"""

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import LiteralString

from psycopg import AsyncConnection

from events.connections import BoundedAsyncConnection
from events.durable import sync_folder
from events.heads import LINE_BYTES_MAX, Head, UnreadableHead, read_head

HEADS_LOCK = 0x6865616473  # "heads"
PAGE = 50
CONNECT_TIMEOUT_S = 2

CREATE_TABLE: LiteralString = """
CREATE TABLE IF NOT EXISTS log_heads (
    number bigint PRIMARY KEY,
    position bigint NOT NULL,
    line text NOT NULL,
    written_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS log_heads_position ON log_heads (position)
"""
_INSERT: LiteralString = "INSERT INTO log_heads (number, position, line) VALUES (%s, %s, %s)"
_LAST: LiteralString = "SELECT line FROM log_heads ORDER BY number DESC LIMIT 1"
_BEHIND: LiteralString = "SELECT number, line FROM log_heads WHERE number > %s ORDER BY number LIMIT %s"
_COVERING: LiteralString = "SELECT line FROM log_heads WHERE position >= %s ORDER BY position, number LIMIT 1"
_BEFORE: LiteralString = "SELECT line FROM log_heads WHERE number < %s ORDER BY number DESC LIMIT 1"


class HeadTable:
    """The heads in the database, over one connection that commits each statement. All methods may raise `psycopg.Error`."""

    def __init__(self, conn: AsyncConnection) -> None:
        self._conn = conn

    async def become_keeper(self) -> bool:
        """Whether nobody else signs heads of this log right now. Holds until the connection ends."""
        row = await (await self._conn.execute("SELECT pg_try_advisory_lock(%s)", (HEADS_LOCK,))).fetchone()
        return row == (True,)

    async def append(self, head: Head) -> None:
        """Raises `psycopg.errors.UniqueViolation` if there is one with this number."""
        await self._conn.execute(_INSERT, (head.number, head.state.position, head.line))

    async def last(self) -> Head | None:
        """Raises `UnreadableHead`."""
        return await self._one(_LAST)

    async def covering(self, position: int) -> Head | None:
        """The first head that vouches for a position. Raises `UnreadableHead`."""
        return await self._one(_COVERING, position)

    async def before(self, head: Head) -> Head | None:
        """The head that came before one. Raises `UnreadableHead`."""
        return await self._one(_BEFORE, head.number)

    async def lines(self, after: int = 0) -> AsyncIterator[str]:
        """The lines behind a number, in order."""
        while page := await (await self._conn.execute(_BEHIND, (after, PAGE))).fetchall():
            for number, line in page:
                after = number
                yield line

    async def _one(self, query: LiteralString, *values: int) -> Head | None:
        row = await (await self._conn.execute(query, values)).fetchone()
        return None if row is None else read_head(row[0])


@asynccontextmanager
async def open_heads(database_url: str) -> AsyncIterator[HeadTable]:
    """The table of a database, on a connection of its own. Raises `psycopg.Error`."""
    connecting = BoundedAsyncConnection.connect(database_url, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S)
    async with await connecting as conn:
        yield HeadTable(conn)


@dataclass(frozen=True, slots=True)
class HeadFile:
    """Heads on some file system. All methods may raise `OSError`."""

    path: Path

    def lines(self) -> Iterator[str]:
        """Every whole line, in order; nothing if there is no file. One that is longer than any head comes in pieces."""
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            while line := file.readline(LINE_BYTES_MAX):
                if stripped := line.strip():
                    yield stripped.decode(errors="replace")

    def last(self) -> Head | None:
        """The last line that is a head: what a crash left half written is none."""
        for line in reversed(self._last_lines()):
            with suppress(UnreadableHead):
                return read_head(line)
        return None

    def append(self, heads: Sequence[Head]) -> None:
        """On disk when this returns, or nothing of it is there."""
        made = not self.path.exists()
        if made:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._append(file, b"".join(head.line.encode() + b"\n" for head in heads))
        finally:
            os.close(file)
        if made:
            sync_folder(self.path.parent)

    def _append(self, file: int, lines: bytes) -> None:
        size = os.fstat(file).st_size
        whole = size == 0 or os.pread(file, 1, size - 1) == b"\n"
        try:
            _write(file, lines if whole else b"\n" + lines)
            os.fsync(file)
        except OSError:
            # A disk that is full: half a line would be taken for damage. Where it may not be cut off, readers pass it over.
            with suppress(OSError):
                os.ftruncate(file, size)
            raise

    def _last_lines(self) -> list[bytes]:
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2 * LINE_BYTES_MAX))
            return [line for line in file.read().split(b"\n") if line]
        return []


def _write(file: int, content: bytes) -> None:
    while content:
        content = content[os.write(file, content) :]
