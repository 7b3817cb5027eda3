"""`lookup migrate`: the tables, and the roles with just the rights that their part needs. Run by the owner; safe to repeat."""

import contextlib
from collections.abc import Mapping
from uuid import UUID

import psycopg
from psycopg import sql

from events.postgres import EVENTS_TABLE, LogRecorder, open_datastore
from results.postgres import CREATE_TABLE as CREATE_DOCUMENTS
from write_side.checkpoints import CREATE_TABLE as CREATE_CHECKPOINTS
from write_side.dead_letters import CREATE_TABLE as CREATE_DEAD_LETTERS
from write_side.erasure_table import CREATE_TABLES as CREATE_ERASURES
from write_side.heads import CREATE_TABLE as CREATE_HEADS

APP_ROLE = "lookup_app"
READER_ROLE = "lookup_reader"
RETENTION_ROLE = "lookup_retention"
MIGRATE_LOCK = 0x6D6967726174
CONNECT_TIMEOUT_S = 10
"""Nobody waits behind a migration as behind an append: it may take its time."""
UNFINISHED_RESTORE = "unfinished_restore"
"""A table that is there while a backup is being restored (`app/backup/restoring.py`)."""

CREATE_LOG_IDENTITY = """
CREATE TABLE IF NOT EXISTS log_identity (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    log_id uuid NOT NULL,
    made_at timestamptz NOT NULL DEFAULT now()
)
"""

# Facts are appended and read; nobody who serves requests may change or delete one.
RIGHTS: Mapping[str, tuple[str, ...]] = {
    APP_ROLE: (
        f"GRANT SELECT, INSERT ON {EVENTS_TABLE} TO {{role}}",
        f"GRANT USAGE ON SEQUENCE {EVENTS_TABLE}_notification_id_seq TO {{role}}",
        "GRANT SELECT, INSERT ON result_documents TO {role}",
        "GRANT SELECT, UPDATE ON relay_checkpoints TO {role}",
        "GRANT SELECT, INSERT, UPDATE (state, decided_at, decided_by, why) ON dead_letters TO {role}",
        "GRANT SELECT ON log_identity TO {role}",
        "GRANT SELECT, INSERT ON log_heads TO {role}",
    ),
    READER_ROLE: (
        f"GRANT SELECT ON {EVENTS_TABLE} TO {{role}}",
        "GRANT SELECT ON result_documents TO {role}",
        "GRANT SELECT ON relay_checkpoints TO {role}",
        "GRANT SELECT ON dead_letters TO {role}",
        "GRANT SELECT ON log_identity TO {role}",
        "GRANT SELECT ON log_heads TO {role}",
    ),
    RETENTION_ROLE: (
        f"GRANT SELECT, UPDATE (state), DELETE ON {EVENTS_TABLE} TO {{role}}",
        "GRANT SELECT, DELETE ON result_documents TO {role}",
        "GRANT SELECT, DELETE ON dead_letters TO {role}",
        "GRANT SELECT, INSERT, UPDATE, DELETE ON erasures, erasure_jobs TO {role}",
        "GRANT SELECT ON relay_checkpoints TO {role}",
        "GRANT SELECT ON log_identity TO {role}",
    ),
}


class MigrationFailed(Exception):  # noqa: N818 - an outcome, in the field's words
    """The database could not be made ready; the message says why, in our words."""


def migrate(owner_url: str, log_id: UUID | None, passwords: Mapping[str, str | None]) -> None:
    """Make tables and roles where they are missing. `log_id` names the log if it is new; None leaves a new one without a name,
    so that nothing serves it. Raises `MigrationFailed`.
    """
    try:
        _create_events_table(owner_url)
        with psycopg.connect(owner_url, connect_timeout=CONNECT_TIMEOUT_S) as conn:
            conn.execute("SELECT pg_advisory_xact_lock(%s)", (MIGRATE_LOCK,))
            conn.execute(CREATE_DOCUMENTS)
            conn.execute(CREATE_CHECKPOINTS)
            conn.execute(CREATE_DEAD_LETTERS)
            conn.execute(CREATE_HEADS)
            conn.execute(CREATE_ERASURES)
            conn.execute(CREATE_LOG_IDENTITY)
            if log_id is not None:
                _name_the_log(conn, log_id)
            for role, rights in RIGHTS.items():
                _make_role(conn, role, passwords.get(role))
                for right in rights:
                    conn.execute(sql.SQL(right).format(role=sql.Identifier(role)))
    except psycopg.errors.InsufficientPrivilege as error:
        raise MigrationFailed("This role may not make tables and roles. Give LOOKUP_DATABASE_OWNER_URL an owner's.") from error
    except (psycopg.Error, ConnectionError) as error:
        raise MigrationFailed("The database cannot be reached, or it refused. Is LOOKUP_DATABASE_OWNER_URL right?") from error


def _name_the_log(conn: psycopg.Connection, log_id: UUID) -> None:
    """Not while a backup is half restored into it: it would begin anew as an empty log."""
    if conn.execute("SELECT to_regclass(%s)", (UNFINISHED_RESTORE,)).fetchone() != (None,):
        raise MigrationFailed("A restore into this database was not finished. Run `lookup restore` again.")
    conn.execute("INSERT INTO log_identity (log_id) VALUES (%s) ON CONFLICT DO NOTHING", (log_id,))


def _create_events_table(owner_url: str) -> None:
    from eventsourcing.persistence import PersistenceError  # noqa: PLC0415 - only to translate it

    with contextlib.closing(open_datastore(owner_url, pool_size=1, connect_timeout_s=CONNECT_TIMEOUT_S)) as datastore:
        try:
            recorder = LogRecorder(datastore)
            # The library's own insert function takes no lock (events/postgres.py says why that matters): leave it out.
            del recorder.sql_create_statements[recorder.create_insert_function_statement_index]
            recorder.create_table()
        except PersistenceError as error:
            cause = error.__cause__
            if isinstance(cause, psycopg.Error):
                raise cause from error
            raise ConnectionError from error


def _make_role(conn: psycopg.Connection, role: str, password: str | None) -> None:
    """Roles belong to the whole cluster: another database of it may have made this one."""
    name = sql.Identifier(role)
    found = conn.execute("SELECT FROM pg_roles WHERE rolname = %s", (role,)).fetchone()
    if found is None:
        with contextlib.suppress(psycopg.errors.DuplicateObject), conn.transaction():
            conn.execute(sql.SQL("CREATE ROLE {} LOGIN").format(name))
    if password is not None:
        conn.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(name, sql.Literal(password)))
