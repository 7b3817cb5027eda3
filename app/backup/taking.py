"""Takes a backup of a running system: everything that the database held at one moment, and what is kept beside it.

Nobody waits for it: it reads in one snapshot, which takes no lock that writers or VACUUM care about. It is a backup when its
manifest is written, which is last: one that was killed on the way is none, and nothing takes it for one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psycopg

from app.backup.failure import BackupFailed
from app.backup.files import Folder
from app.backup.manifest import Manifest, TableEntry, write_manifest
from app.backup.snapshot import Connection, SnapshotDocuments, SnapshotLog, snapshot_of
from app.backup.survey import VIEW_VERSIONS, survey
from app.backup.tables import copy_out, tables_of
from events.durable import sync_folder
from events.segment_files import SegmentUnreadable
from events.segments import ArchivedLog
from results.archived import ArchivedDocuments

SEGMENTS = "segments"


@dataclass(frozen=True, slots=True)
class Beside:
    """A file that is kept outside of the database and belongs to the log: its place, and its path in a backup.

    It need not be there. A restore puts it back where it is missing, and leaves one that is there alone: it is newer.
    """

    place: Path
    path: str


async def take_backup(folder: Path, database_url: str, segments: Path, beside: Sequence[Beside], now: datetime) -> Manifest:
    """Make a backup in `folder`, which must be new or empty; `segments` is where segment files lie.

    Raises `BackupFailed`; then there is no backup.
    """
    _make(folder)
    with _explained(), snapshot_of(database_url) as conn:
        log = SnapshotLog(conn)
        # The snapshot is taken by the first query.
        log_id = await log.log_id()
        made = Folder(folder)
        tables = _copy_tables(conn, made)
        for seal in await ArchivedLog(log, segments).seals():
            made.copy(segments / seal.fact.segment, f"{SEGMENTS}/{seal.fact.segment}")
        for one in beside:
            if one.place.exists():
                made.copy(one.place, one.path)
        whole = ArchivedLog(log, folder / SEGMENTS)
        manifest = Manifest(
            log_id=log_id,
            taken_at=now,
            tables=tuple(tables),
            files=tuple(made.entries),
            views=VIEW_VERSIONS,
            survey=await survey(whole, ArchivedDocuments(SnapshotDocuments(conn), whole)),
        )
        write_manifest(folder, manifest)
    return manifest


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise BackupFailed(f"{folder} is not empty. A backup wants a folder of its own.")
        sync_folder(folder.parent)
    except OSError:
        raise BackupFailed(f"{folder} cannot be made or written to.") from None


def _copy_tables(conn: Connection, made: Folder) -> list[TableEntry]:
    entries: list[TableEntry] = []
    for table in tables_of(conn):
        path = f"{table.name}.copy.zst"
        with made.compressed(path) as compressor:
            rows = copy_out(conn, table, compressor)
        entries.append(TableEntry(name=table.name, columns=table.described, rows=rows, path=path))
    return entries


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except psycopg.errors.InsufficientPrivilege:
        raise BackupFailed("This role may not read all tables. Give LOOKUP_DATABASE_OWNER_URL an owner's.") from None
    except psycopg.errors.UndefinedTable:
        raise BackupFailed("The database has no log yet. Run `lookup migrate` first.") from None
    except psycopg.OperationalError:
        raise BackupFailed("The database cannot be reached, or ended the connection.") from None
    except (FileNotFoundError, SegmentUnreadable):
        raise BackupFailed(
            "A segment file that the log tells of is missing or damaged: is LOOKUP_SEGMENTS_DIR right?"
        ) from None
    except OSError:
        raise BackupFailed("A file could not be read or written: is there space left?") from None
