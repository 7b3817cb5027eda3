"""Puts a backup into an empty database, where it becomes another log with the same past.

Promises:

- **Nothing is touched for a backup that is damaged**, nor in a database that has facts or that somebody is connected to.
- **All or nothing.** Everything goes down in one transaction, which ends only when what came out was surveyed and is what went
  in. Until then the database has no log, and nothing serves it; a restore that was killed is simply done again.
- **Another log.** It gets an id of its own and tells where it comes from (`LogRestored`), so no checkpoint, view or message of
  the log that was lost is taken for its own. Its facts are the same, byte for byte.
- **No position twice.** The lost log may have gone on behind the backup, and a poller may hold an ETag or a cursor from there.
  The restored one goes on `POSITIONS_SKIPPED` further; holes are legal.
"""

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from uuid import UUID

import psycopg
from psycopg import sql

from app.backup.failure import RestoreRefused
from app.backup.files import copy_durably, decompressed
from app.backup.manifest import Manifest, TableEntry, check_files, read_manifest
from app.backup.snapshot import Connection, SnapshotDocuments, SnapshotLog, take_all_the_time_it_takes
from app.backup.survey import VIEW_VERSIONS, Survey, survey
from app.backup.tables import EVENTS, IDENTITY, Table, copy_in, is_empty, number_on, tables_of
from app.backup.taking import SEGMENTS, Beside
from app.migrate import UNFINISHED_RESTORE, MigrationFailed, migrate
from events.facts import LogRestored
from events.record import SALT_BYTES, Cause
from events.segments import ArchivedLog
from events.store import AppendUnit, NewFacts, Scribe, StreamHead
from results.archived import ArchivedDocuments

POSITIONS_SKIPPED = 1_000_000
SEEDED = frozenset({"relay_checkpoints"})
"""Tables that have rows in a database that nothing has happened in yet: what they hold is replaced."""
LOCK_TIMEOUT_MS = 3_000
_NO_LOG = "DELETE FROM log_identity"
_NAME = "INSERT INTO log_identity (log_id, made_at) VALUES (%s, %s)"
_APPEND = "INSERT INTO stored_events (originator_id, originator_version, topic, state) VALUES (%s, %s, %s, %s)"


@dataclass(frozen=True, slots=True)
class Restored:
    """What was restored. `surveyed` is what came out of the database again, None where that was not asked for."""

    manifest: Manifest
    log_id: UUID
    surveyed: Survey | None


@dataclass(frozen=True)
class Restore:
    """One restore. `segments` is where segment files go, `beside` where other files are kept; the roles get `passwords`, as
    with `lookup migrate`. `forget` makes everything outside of the database forget the log that was lost; it runs last before
    the commit.
    """

    folder: Path
    owner_url: str
    segments: Path
    beside: Sequence[Beside]
    passwords: Mapping[str, str | None]
    actor: str
    now: Callable[[], datetime]
    new_id: Callable[[], UUID]
    forget: Callable[[], Awaitable[None]]
    verify: bool = False

    async def run(self) -> Restored:
        """Raises `RestoreRefused`: then the database is as it was, but for tables that were missing."""
        manifest = read_manifest(self.folder)
        check_files(self.folder, manifest)
        log_id = self.new_id()
        try:
            self._prepare(manifest)
            with self._connect() as conn:
                surveyed = await self._restore(conn, manifest, log_id)
        except MigrationFailed as error:
            raise RestoreRefused(str(error)) from None
        except psycopg.errors.LockNotAvailable:
            raise RestoreRefused("Somebody uses this database. Stop every part first.") from None
        except psycopg.OperationalError:
            raise RestoreRefused("The database cannot be reached, or it ended the connection.") from None
        except psycopg.Error:
            raise RestoreRefused("The database did not take the backup.") from None
        return Restored(manifest, log_id, surveyed)

    def _connect(self) -> Connection:
        return psycopg.connect(self.owner_url, connect_timeout=5, application_name="lookup restore")

    def _prepare(self, manifest: Manifest) -> None:
        """Let the database have tables, and no log until the restore is done. Who was killed comes by here again."""
        with self._connect() as conn:
            _refuse_unless_empty(conn)
            conn.execute(f"CREATE TABLE IF NOT EXISTS {UNFINISHED_RESTORE} (since timestamptz NOT NULL DEFAULT now())")
        migrate(self.owner_url, None, self.passwords)
        with self._connect() as conn:
            conn.execute(_NO_LOG)
            _refuse_unknown_tables(conn, manifest)

    async def _restore(self, conn: Connection, manifest: Manifest, log_id: UUID) -> Survey | None:
        take_all_the_time_it_takes(conn)
        tables = {table.name: table for table in tables_of(conn)}
        _have_it_alone(conn, list(tables.values()))
        _refuse_unless_empty(conn)
        for entry in manifest.tables:
            self._fill(conn, entry, tables[entry.name])
        _refuse_checkpoints_ahead(conn, manifest.survey.position)
        conn.execute("ANALYZE")
        surveyed = await self._survey(conn, manifest) if self.verify else None
        self._name(conn, manifest, log_id)
        self._place_files(manifest)
        await self.forget()
        return surveyed

    def _fill(self, conn: Connection, entry: TableEntry, table: Table) -> None:
        conn.execute(sql.SQL("DELETE FROM {}").format(sql.Identifier(table.name)))
        with decompressed(self.folder / entry.path) as chunks:
            rows = copy_in(conn, entry.name, entry.columns, chunks)
        if rows != entry.rows:
            raise RestoreRefused(f"The table {entry.name} took {rows} rows of {entry.rows}.")
        number_on(conn, table, POSITIONS_SKIPPED if entry.name == EVENTS else 0)

    async def _survey(self, conn: Connection, manifest: Manifest) -> Survey:
        """What came out, if it is what went in and every chain verifies."""
        whole = ArchivedLog(SnapshotLog(conn), self.folder / SEGMENTS)
        surveyed = await survey(whole, ArchivedDocuments(SnapshotDocuments(conn), whole))
        differences = manifest.survey.differences(surveyed, same_views=manifest.views == VIEW_VERSIONS)
        if differences:
            raise RestoreRefused(f"What was restored is not what was backed up: {'; '.join(differences)}.")
        if surveyed.broken_streams:
            raise RestoreRefused(
                f"The chain of {surveyed.broken_streams} streams does not verify, and did not when the backup was made: "
                f"{'; '.join(surveyed.broken)}. Without --verify it is restored as it is."
            )
        return surveyed

    def _place_files(self, manifest: Manifest) -> None:
        """One that is there already is kept. A segment's name tells its facts, and more may have been erased from it since."""
        there = {entry.path for entry in manifest.files}
        places = {entry.path: self.segments / Path(entry.path).name for entry in manifest.segments}
        places |= {one.path: one.place for one in self.beside if one.path in there}
        try:
            for path, place in places.items():
                copy_durably(self.folder / path, place)
        except OSError:
            raise RestoreRefused("The segment files and what lies beside them could not be put into their folders.") from None

    def _name(self, conn: Connection, manifest: Manifest, log_id: UUID) -> None:
        """The log's new name, and the fact that tells of its origin."""
        now = self.now()
        conn.execute(_NAME, (log_id, now))
        fact = LogRestored(
            from_log_id=manifest.log_id,
            position=manifest.survey.position,
            log_head=manifest.survey.log_head,
            backup_taken_at=manifest.taken_at,
            by=self.actor,
            restored_at=now,
        )
        scribe = Scribe(lambda: now, self.new_id, partial(os.urandom, SALT_BYTES))
        unit = AppendUnit(
            [NewFacts(log_id, StreamHead(), [fact])],
            Cause(actor=self.actor, correlation_id=self.new_id(), reason="a backup was restored"),
        )
        for row in scribe.write(unit)[0]:
            conn.execute(_APPEND, (row.stream_id, row.stream_version, row.topic, row.state))
        conn.execute(f"DROP TABLE {UNFINISHED_RESTORE}")


def _refuse_unless_empty(conn: Connection) -> None:
    full = [table.name for table in tables_of(conn) if table.name not in SEEDED and not is_empty(conn, table.name)]
    if full:
        raise RestoreRefused(f"The database is not empty: {', '.join(full)} has rows. A backup wants a database of its own.")


def _refuse_unknown_tables(conn: Connection, manifest: Manifest) -> None:
    known = {table.name: dict(table.described) for table in tables_of(conn)}
    for entry in manifest.tables:
        missing = [column for column, _ in entry.columns if column not in known.get(entry.name, {})]
        if missing:
            raise RestoreRefused(f"This release has no {entry.name} ({', '.join(missing)}): a newer one made the backup.")


def _have_it_alone(conn: Connection, tables: Sequence[Table]) -> None:
    """Nobody may write in between, and nobody who is connected may go on as if this were the log that he knew."""
    conn.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
    for name in (IDENTITY, *(table.name for table in tables)):
        conn.execute(f"LOCK TABLE {name} IN ACCESS EXCLUSIVE MODE")
    others = conn.execute(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid() AND usesysid IS NOT NULL"
    ).fetchone()
    if others != (0,):
        raise RestoreRefused("Somebody is connected to this database. Stop every part first.")


def _refuse_checkpoints_ahead(conn: Connection, position: int) -> None:
    """The relay would never tell what comes to lie below its checkpoint."""
    rows = conn.execute("SELECT name, position FROM relay_checkpoints WHERE position > %s", (position,)).fetchall()
    if rows:
        ahead = ", ".join(f"{name} at {at}" for name, at in rows)
        raise RestoreRefused(f"The backup contradicts itself: its relay has come to {ahead}, and its log ends at {position}.")
