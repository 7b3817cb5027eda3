"""The manifest: what a backup is, in one small file that is written last. A folder without it is no backup."""

from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Literal
from uuid import UUID

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from app.backup.failure import BackupDamaged
from app.backup.files import FileEntry, is_as_written, put_durably
from app.backup.survey import Survey

NAME = "manifest.json"
FORMAT = "lookup-backup/1"
_BYTES_MAX = 64 * 1_048_576


class TableEntry(BaseModel):
    """One table: its columns by name and type, and how many rows of it lie in which file (PostgreSQL's COPY text, zstd)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    columns: tuple[tuple[str, str], ...]
    rows: int
    path: str


class Manifest(BaseModel):
    """All that is known of a backup. `views` are the versions of the views whose digest the survey has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["lookup-backup/1"] = "lookup-backup/1"
    log_id: UUID
    taken_at: datetime
    tables: tuple[TableEntry, ...]
    files: tuple[FileEntry, ...]
    views: dict[str, int]
    survey: Survey

    @property
    def segments(self) -> tuple[FileEntry, ...]:
        """The segment files that old jobs were sealed into."""
        return tuple(entry for entry in self.files if entry.path.startswith("segments/"))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Makes a backup of the folder. Raises `OSError`."""
    told = orjson.loads(manifest.model_dump_json())
    whole = {"sha256": _digest(told), "manifest": told}
    put_durably(folder / NAME, orjson.dumps(whole, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def read_manifest(folder: Path) -> Manifest:
    """Raises `BackupDamaged`."""
    path = folder / NAME
    try:
        if path.stat().st_size > _BYTES_MAX:
            raise BackupDamaged(f"{path} is no manifest of a backup.")
        whole = orjson.loads(path.read_bytes())
        told, expected = whole["manifest"], whole["sha256"]
    except FileNotFoundError:
        raise BackupDamaged(f"{folder} has no {NAME}: it is no backup, or one that was never finished.") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise BackupDamaged(f"{path} cannot be read.") from None
    if _digest(told) != expected:
        raise BackupDamaged(f"{path} is not what was written.")
    if told.get("format") != FORMAT:
        raise BackupDamaged(f"{path} is of another format than {FORMAT}: restore it with the release that made it.")
    try:
        return Manifest.model_validate_json(orjson.dumps(told))
    except ValidationError:
        raise BackupDamaged(f"{path} cannot be read by this release.") from None


def check_files(folder: Path, manifest: Manifest) -> None:
    """Every file is there, and is what was written. Raises `BackupDamaged` with the names of those that are not."""
    bad = [entry.path for entry in manifest.files if not is_as_written(folder, entry)]
    if bad:
        raise BackupDamaged(f"Damaged or missing in {folder}: {', '.join(bad[:10])}. Nothing was restored.")


def _digest(told: object) -> str:
    return sha256(orjson.dumps(told, option=orjson.OPT_SORT_KEYS)).hexdigest()
