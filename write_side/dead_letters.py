"""Dead letters: messages that nobody could handle, kept in a table until somebody decides about them.

Promises:

- **Once.** A letter that is drained twice is one row, by the id of the message that it was.
- **In order.** Letters are given in the order in which they died, so those of one job in the order in which they came.
- **Exact.** Counts are counted, never estimated. Whatever is many is read in pages, so that memory does not grow with it.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, LiteralString
from uuid import UUID, uuid5

from psycopg import AsyncConnection
from psycopg.rows import class_row, tuple_row

from events.connections import BoundedAsyncConnection

CONNECT_TIMEOUT_S = 2
PAGE = 200
DECIDE_LOCK = 0x6C6574746572
"""The advisory lock of who retries or discards: two at once would mix up the order of a job's letters."""
LETTERS = UUID("5f3a3e0e-5d0b-5d53-9b6a-6c6f6f6b7570")
"""The namespace of the streams that tell what was decided about a letter."""

_FIRST = ("-infinity", 0)
_ID_MAX = 2**63 - 1


class LetterState(StrEnum):
    WAITING = "waiting"
    RETRIED = "retried"
    DISCARDED = "discarded"


# One table for all: `message` tells letters apart, (died_at, id) is their order. Only who decided, when and why ever changes.
CREATE_TABLE: LiteralString = """
CREATE TABLE IF NOT EXISTS dead_letters (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    message text NOT NULL UNIQUE,
    queue text NOT NULL,
    reason text NOT NULL,
    body bytea NOT NULL,
    headers json NOT NULL,
    job_id uuid,
    command_id uuid,
    service text,
    attempt integer,
    deliveries integer,
    died_at timestamptz NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(),
    state text NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'retried', 'discarded')),
    decided_at timestamptz,
    decided_by text,
    why text
);
CREATE INDEX IF NOT EXISTS dead_letters_order ON dead_letters (state, died_at, id);
CREATE INDEX IF NOT EXISTS dead_letters_job ON dead_letters (job_id)
"""

_INSERT: LiteralString = """
INSERT INTO dead_letters (message, queue, reason, body, headers, job_id, command_id, service, attempt, deliveries, died_at)
VALUES (%s, %s, %s, %b, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT (message) DO NOTHING
"""
_COUNT: LiteralString = "SELECT state, reason, queue, count(*) FROM dead_letters GROUP BY state, reason, queue ORDER BY 1, 2, 3"
_OLDEST: LiteralString = "SELECT min(died_at) FROM dead_letters WHERE state = 'waiting'"
_LAST: LiteralString = "SELECT coalesce(max(id), 0) FROM dead_letters"
_HEADS: LiteralString = """
SELECT id, message, queue, reason, octet_length(body) AS body_bytes, job_id, command_id, service, attempt, deliveries,
       died_at, received_at, state, decided_at, decided_by, why
FROM dead_letters
"""
_WHOLE: LiteralString = _HEADS.replace("FROM", ", body, headers FROM")
_READ: LiteralString = _WHOLE + " WHERE id = %s"
_BEHIND: LiteralString = " WHERE state = %s AND (died_at, id) > (%s, %s) AND id <= %s ORDER BY died_at, id LIMIT %s"
_LIST: LiteralString = _HEADS + _BEHIND
_PAGE: LiteralString = _WHOLE + _BEHIND
_ABOUT: LiteralString = "SELECT message FROM dead_letters WHERE job_id = %s ORDER BY died_at, id LIMIT %s"
_PLACE: LiteralString = "SELECT died_at, id FROM dead_letters WHERE id = %s"
_DECIDE: LiteralString = (
    "UPDATE dead_letters SET state = %s, decided_at = %s, decided_by = %s, why = %s WHERE id = ANY(%s) AND state = 'waiting'"
)


@dataclass(frozen=True, slots=True)
class Keep:
    """A letter to be kept. `message` is the same for the same message, however often it is drained."""

    message: str
    queue: str
    reason: str
    body: bytes
    headers: Mapping[str, str]
    job_id: UUID | None
    command_id: UUID | None
    service: str | None
    attempt: int | None
    deliveries: int | None
    died_at: datetime


@dataclass(frozen=True, slots=True)
class LetterHead:
    """A kept letter without its body. Times are aware; `deliveries` is None where nobody counted."""

    id: int
    message: str
    queue: str
    reason: str
    body_bytes: int
    job_id: UUID | None
    command_id: UUID | None
    service: str | None
    attempt: int | None
    deliveries: int | None
    died_at: datetime
    received_at: datetime
    state: str
    decided_at: datetime | None
    decided_by: str | None
    why: str | None

    @property
    def stream_id(self) -> UUID:
        """Where the log tells what was decided about this letter."""
        return stream_of(self.message)


@dataclass(frozen=True, slots=True)
class Letter(LetterHead):
    """A kept letter, whole."""

    body: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class LetterCount:
    """So many letters are in one state, for one reason, from one queue."""

    state: LetterState
    reason: str
    queue: str
    count: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided about letters, by whom, when and why."""

    state: LetterState
    at: datetime
    by: str
    why: str | None


def stream_of(message: str) -> UUID:
    """Where the log tells what was decided about the letter that a message became."""
    return uuid5(LETTERS, message)


class DeadLetters:
    """The table, over one connection that commits each statement. All methods may raise `psycopg.Error`."""

    def __init__(self, conn: AsyncConnection) -> None:
        self._conn = conn

    async def keep(self, letters: Sequence[Keep]) -> int:
        """Keep all of them, or none; gives how many were new. Committed when it returns."""
        async with self._conn.transaction(), self._conn.cursor() as curs:
            await curs.executemany(_INSERT, [_row(letter) for letter in letters])
            return curs.rowcount

    async def counts(self) -> list[LetterCount]:
        """How many there are, by state, reason and queue."""
        async with self._conn.cursor(row_factory=tuple_row) as curs:
            rows = await (await curs.execute(_COUNT)).fetchall()
        return [LetterCount(LetterState(state), reason, queue, count) for state, reason, queue, count in rows]

    async def oldest_waiting(self) -> datetime | None:
        """When the oldest letter died that nobody has decided about."""
        async with self._conn.cursor(row_factory=tuple_row) as curs:
            row = await (await curs.execute(_OLDEST)).fetchone()
        return row[0] if row else None

    async def last_id(self) -> int:
        """The highest id so far, 0 in an empty table."""
        async with self._conn.cursor(row_factory=tuple_row) as curs:
            row = await (await curs.execute(_LAST)).fetchone()
        return int(row[0]) if row else 0

    async def list(self, state: LetterState, *, after: int, limit: int) -> list[LetterHead]:
        """Letters in order, without bodies, behind the one with the id `after` (0: from the first)."""
        place = await self._conn.execute(_PLACE, (after,))
        last = await place.fetchone() or _FIRST
        async with self._conn.cursor(row_factory=class_row(LetterHead)) as curs:
            return await (await curs.execute(_LIST, (state, *last, _ID_MAX, limit))).fetchall()

    async def read(self, letter_id: int) -> Letter | None:
        """One letter, whole."""
        async with self._conn.cursor(row_factory=class_row(Letter)) as curs:
            return await (await curs.execute(_READ, (letter_id,))).fetchone()

    async def streams_about(self, job_id: UUID) -> Sequence[UUID]:
        """Where the log tells what was decided about a job's letters: of the first `PAGE` of them."""
        rows = await (await self._conn.execute(_ABOUT, (job_id, PAGE))).fetchall()
        return [stream_of(message) for (message,) in rows]

    async def pages(self, *, up_to: int) -> AsyncIterator[Sequence[Letter]]:
        """All waiting letters with an id up to `up_to`, whole and in order, at most `PAGE` at a time."""
        last: tuple[Any, ...] = _FIRST
        while True:
            async with self._conn.cursor(row_factory=class_row(Letter)) as curs:
                page = await (await curs.execute(_PAGE, (LetterState.WAITING, *last, up_to, PAGE))).fetchall()
            if not page:
                return
            yield page
            last = (page[-1].died_at, page[-1].id)

    async def decide(self, letter_ids: Sequence[int], decision: Decision) -> int:
        """Write a decision down at those that still wait; gives how many did."""
        curs = await self._conn.execute(_DECIDE, (decision.state, decision.at, decision.by, decision.why, list(letter_ids)))
        return curs.rowcount

    async def become_decider(self) -> bool:
        """Whether nobody else decides right now. Holds until the connection ends."""
        curs = await self._conn.execute("SELECT pg_try_advisory_lock(%s)", (DECIDE_LOCK,))
        return await curs.fetchone() == (True,)


@asynccontextmanager
async def open_letters(database_url: str) -> AsyncIterator[DeadLetters]:
    """The table of a database, on a connection of its own. Raises `psycopg.Error`."""
    connecting = BoundedAsyncConnection.connect(database_url, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S)
    async with await connecting as conn:
        yield DeadLetters(conn)


async def counts(database_url: str) -> list[LetterCount]:
    """How many dead letters there are, by state, reason and queue. Raises `psycopg.Error`."""
    async with open_letters(database_url) as letters:
        return await letters.counts()


async def oldest_waiting(database_url: str) -> datetime | None:
    """When the oldest dead letter died that nobody has decided about. Raises `psycopg.Error`."""
    async with open_letters(database_url) as letters:
        return await letters.oldest_waiting()


def _row(letter: Keep) -> tuple[Any, ...]:
    return (
        letter.message,
        letter.queue,
        letter.reason,
        letter.body,
        # Written by strangers: spelled in ASCII, whatever is in it, and of a type that takes any escape.
        json.dumps(dict(letter.headers)),
        letter.job_id,
        letter.command_id,
        letter.service,
        letter.attempt,
        letter.deliveries,
        letter.died_at,
    )
