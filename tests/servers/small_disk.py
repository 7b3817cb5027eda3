"""A part of PostgreSQL's data on a disk of its own, so small that it can be filled up."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import LiteralString, Protocol

import psycopg

from tests.servers.breakable import BreakablePostgres

ROOM_BYTES = 40 * 1024 * 1024
"""Enough for two more files of PostgreSQL's log, which it needs to start again."""
BALLAST = "ballast"


class Disk(Protocol):
    """`fill` leaves no room at all; `empty` gives all of it back."""

    def fill(self) -> None: ...

    def empty(self) -> None: ...


@dataclass(frozen=True)
class SmallDisk:
    """Filled with a file of ours."""

    folder: Path

    def fill(self) -> None:
        with (self.folder / BALLAST).open("wb", buffering=0) as ballast:
            for size in (1 << 20, 1 << 12):
                try:
                    while True:
                        ballast.write(bytes(size))
                except OSError:
                    continue

    def empty(self) -> None:
        (self.folder / BALLAST).unlink()


@dataclass(frozen=True)
class RefusingTable:
    """Where we may mount nothing: the server says of each insert into the log what it says when its disk is full."""

    database_url: str

    def fill(self) -> None:
        self._execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'No space left on device' USING ERRCODE = 'disk_full'; END $$",
            "CREATE TRIGGER refuse BEFORE INSERT ON stored_events EXECUTE FUNCTION refuse()",
        )

    def empty(self) -> None:
        self._execute("DROP FUNCTION refuse CASCADE")

    def _execute(self, *statements: LiteralString) -> None:
        with psycopg.connect(self.database_url, autocommit=True) as database:
            for statement in statements:
                database.execute(statement)


@contextmanager
def small_disk(postgres: BreakablePostgres, name: str) -> Iterator[Disk]:
    """Moves `base` (the tables) or `pg_wal` of a stopped server to a small disk, and back at the end."""
    folder = postgres.folder / name
    away = postgres.folder.with_name(f"{name}.away")
    folder.rename(away)
    try:
        if not _mount(folder, away):
            away.rename(folder)
            yield RefusingTable(postgres.url)
            folder.rename(away)
            return
        try:
            yield SmallDisk(folder)
            _copy(folder, away)
        finally:
            subprocess.run(["umount", folder], check=True)
            folder.rmdir()
    finally:
        away.rename(folder)


def _mount(folder: Path, like: Path) -> bool:
    """False where we may not."""
    size = sum(file.stat().st_size for file in like.rglob("*") if file.is_file()) + ROOM_BYTES
    owner = like.stat()
    folder.mkdir(mode=0o700)
    options = f"size={size},mode=0700,uid={owner.st_uid},gid={owner.st_gid}"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "lookup-test", folder], check=False, capture_output=True)
    if done.returncode != 0:
        folder.rmdir()
        return False
    _copy(like, folder)
    return True


def _copy(source: Path, target: Path) -> None:
    for old in target.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    subprocess.run(["cp", "-a", f"{source}/.", target], check=True)
