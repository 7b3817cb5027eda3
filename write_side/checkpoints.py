"""How far the relay has come: two checkpoints in the database, each moved only forward, and only after the broker confirmed."""

from typing import LiteralString

from psycopg import AsyncConnection

COMMANDS = "commands"
FACTS = "facts"

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

MOVE: LiteralString = "UPDATE relay_checkpoints SET position = %s, log_head = %s WHERE name = %s AND position < %s"
"""Parameters: new position, new log head, name, new position again: a woken old leader moves nothing back."""


async def relayed_positions(database_url: str) -> dict[str, int]:
    """How far each checkpoint has come, by its name. Raises `psycopg.Error`."""
    async with await AsyncConnection.connect(database_url, autocommit=True, connect_timeout=2) as conn:
        rows = await (await conn.execute(SELECT)).fetchall()
    return {name: position for name, position, _ in rows}
