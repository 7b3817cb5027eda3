"""The relay's ledger: who relays, and how far the relay has come, as the database has it.

Promises, held by `tests/contract/test_ledger.py` for PostgreSQL and the in-memory twin alike:

- **One leader.** It holds an advisory lock on a connection of its own, which the database ends when it falls silent
  (`idle_session_timeout`): a frozen leader loses the lock, and somebody else may take it.
- **Forward only.** Two checkpoints, for commands and for facts; a woken old leader moves nothing back.
- **Woken.** Who waits for more is woken by the next append.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import LiteralString, Protocol

import psycopg
from psycopg import AsyncConnection, sql

from events.arrays import Bigints, Byteas, Texts
from events.batching import Batcher
from events.connections import BoundedAsyncConnection

COMMANDS = "commands"
FACTS = "facts"

RELAY_LOCK = 0x72656C6179  # "relay"
LOG_CHANNEL = "stored_events"  # The eventsourcing library's NOTIFY channel is the name of its table.
HEARTBEAT_S = 1.0
SILENCE_MAX_S = 5.0

CREATE_TABLE: LiteralString = """
CREATE TABLE IF NOT EXISTS relay_checkpoints (
    name text PRIMARY KEY,
    position bigint NOT NULL,
    log_head bytea NOT NULL
);
INSERT INTO relay_checkpoints (name, position, log_head)
VALUES ('commands', 0, decode(repeat('00', 32), 'hex')), ('facts', 0, decode(repeat('00', 32), 'hex'))
ON CONFLICT (name) DO NOTHING
"""

SELECT: LiteralString = "SELECT name, position, log_head FROM relay_checkpoints"

MOVE: LiteralString = (
    "UPDATE relay_checkpoints SET position = new.position, log_head = new.log_head"
    " FROM unnest(%b::text[], %b::bigint[], %b::bytea[]) AS new (name, position, log_head)"
    " WHERE relay_checkpoints.name = new.name AND relay_checkpoints.position < new.position"
    " RETURNING relay_checkpoints.name"
)
"""Parameters: names, new positions, new log heads. Gives the names that moved: a woken old leader moves nothing back."""


class LeadershipLost(Exception):  # noqa: N818 - an outcome, in the field's words
    """Somebody else leads now, or the database ended our connection."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A position in the log, and the head of the log up to it (`events/chain.py`)."""

    position: int
    log_head: bytes


class RelayLedger(Protocol):
    """One relay's connection to the ledger. Every method may raise `LeadershipLost`."""

    async def lead(self) -> None:
        """Wait until we lead. From then on every call below but the wait tells the database that we are alive."""

    async def read(self) -> dict[str, Checkpoint]:
        """Both checkpoints by name, `COMMANDS` and `FACTS`."""

    async def move(self, name: str, checkpoint: Checkpoint) -> None:
        """Move a checkpoint forward; raises `LeadershipLost` when it stands there or further already."""

    async def wait_for_more(self, within_s: float = HEARTBEAT_S) -> bool:
        """Until something was appended since the last wait, but `within_s` at most; says whether.

        It tells the database nothing: who waits for long has to keep the lead alive.
        """

    async def keep_alive(self) -> None: ...


OpenLedger = Callable[[], AbstractAsyncContextManager[RelayLedger]]


class PostgresLedger:
    """The `RelayLedger` on one PostgreSQL connection."""

    def __init__(self, conn: AsyncConnection, silence_max_s: float) -> None:
        self._conn = conn
        self._silence_max = f"{round(silence_max_s * 1000)}ms"
        self._moves: Batcher[tuple[str, Checkpoint], None] = Batcher(self._move_all, batch_max=2)

    async def lead(self) -> None:
        with _lost_with_the_connection():
            await self._conn.execute(sql.SQL("SET idle_session_timeout = {}").format(sql.Literal(self._silence_max)))
            # A checkpoint that a crash of the database takes back costs a second publish, which is promised anyway.
            await self._conn.execute("SET synchronous_commit = off")
            while not await self._locked():  # noqa: ASYNC110 - the lock is the database's: nothing here could set an event
                await asyncio.sleep(HEARTBEAT_S)
            await self._conn.execute(sql.SQL("LISTEN {}").format(sql.Identifier(LOG_CHANNEL)))

    async def _locked(self) -> bool:
        cursor = await self._conn.execute("SELECT pg_try_advisory_lock(%s)", (RELAY_LOCK,))
        return await cursor.fetchone() == (True,)

    async def read(self) -> dict[str, Checkpoint]:
        with _lost_with_the_connection():
            rows = await (await self._conn.execute(SELECT)).fetchall()
        return {name: Checkpoint(position, log_head) for name, position, log_head in rows}

    async def move(self, name: str, checkpoint: Checkpoint) -> None:
        """Both checkpoints mostly move at the same time: then in one statement."""
        await self._moves.add((name, checkpoint))

    async def _move_all(self, moves: Sequence[tuple[str, Checkpoint]]) -> Sequence[Exception | None]:
        names = Texts.of(name for name, _ in moves)
        positions = Bigints.of(checkpoint.position for _, checkpoint in moves)
        log_heads = Byteas(checkpoint.log_head for _, checkpoint in moves)
        with _lost_with_the_connection():
            rows = await (await self._conn.execute(MOVE, (names, positions, log_heads))).fetchall()
        moved = {name for (name,) in rows}
        behind = "The checkpoint stands further than ours: somebody else leads."
        return [None if name in moved else LeadershipLost(behind) for name, _ in moves]

    async def wait_for_more(self, within_s: float = HEARTBEAT_S) -> bool:
        notified = False
        with _lost_with_the_connection():
            async for _ in self._conn.notifies(timeout=within_s, stop_after=1):
                notified = True
        return notified

    async def keep_alive(self) -> None:
        with _lost_with_the_connection():
            await self._conn.execute("SELECT 1")


@asynccontextmanager
async def open_ledger(database_url: str, *, silence_max_s: float = SILENCE_MAX_S) -> AsyncIterator[PostgresLedger]:
    """A connection of its own; the lead goes with it. Raises `psycopg.Error` when there is none to be had."""
    async with await BoundedAsyncConnection.connect(database_url, autocommit=True, connect_timeout=2) as conn:
        yield PostgresLedger(conn, silence_max_s)


@contextmanager
def _lost_with_the_connection() -> Iterator[None]:
    try:
        yield
    except psycopg.OperationalError as error:
        raise LeadershipLost("The database ended our connection.") from error


async def relayed_positions(database_url: str) -> dict[str, int]:
    """How far each checkpoint has come, by its name. Raises `psycopg.Error`."""
    return {name: checkpoint.position for name, checkpoint in (await relayed(database_url)).items()}


async def relayed(database_url: str) -> dict[str, Checkpoint]:
    """The checkpoints, by their names. Raises `psycopg.Error`."""
    async with await BoundedAsyncConnection.connect(database_url, autocommit=True, connect_timeout=2) as conn:
        rows = await (await conn.execute(SELECT)).fetchall()
    return {name: Checkpoint(position, bytes(log_head)) for name, position, log_head in rows}
