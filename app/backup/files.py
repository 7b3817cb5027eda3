"""The files of a backup: written compressed, hashed on the way, durable before they are told of."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import file_digest, sha256
from pathlib import Path
from typing import IO, cast

import zstandard
from pydantic import BaseModel, ConfigDict

from events.durable import sync_folder

LEVEL = 3
CHUNK_BYTES = 1_048_576


class FileEntry(BaseModel):
    """A file of a backup by its path within the backup's folder; size and SHA-256 (hex) are of the file as it lies there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size_bytes: int
    sha256: str


class HashedFile:
    """A new file that counts and hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hasher = sha256()
        self._size = 0

    def write(self, chunk: bytes) -> int:
        self._hasher.update(chunk)
        self._size += len(chunk)
        return self._file.write(chunk)

    def flush(self) -> None:
        self._file.flush()

    def entry(self, path: str) -> FileEntry:
        return FileEntry(path=path, size_bytes=self._size, sha256=self._hasher.hexdigest())


class Folder:
    """The folder of a backup that is being made. `entries` are its files so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[FileEntry] = []

    @contextmanager
    def compressed(self, path: str) -> Iterator[zstandard.ZstdCompressionWriter]:
        """A zstd stream into a new file, which is durable and among the entries when the block ends well."""
        compressor = zstandard.ZstdCompressor(level=LEVEL)
        with self._new(path) as file, compressor.stream_writer(cast("IO[bytes]", file), closefd=False) as writer:
            yield writer

    def copy(self, source: Path, path: str) -> None:
        """A copy of a file as it is now, in constant memory. Raises `OSError`."""
        with source.open("rb") as original, self._new(path) as copy:
            while chunk := original.read(CHUNK_BYTES):
                copy.write(chunk)

    @contextmanager
    def _new(self, path: str) -> Iterator[HashedFile]:
        target = self.path / path
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with target.open("xb") as file:
            hashed = HashedFile(file)
            yield hashed
            file.flush()
            os.fsync(file.fileno())
        sync_folder(target.parent)
        self.entries.append(hashed.entry(path))


def put_durably(path: Path, content: bytes) -> None:
    """The file is there whole, or not at all."""
    draft = path.with_name(f"{path.name}.draft")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_folder(path.parent)


def copy_durably(source: Path, target: Path) -> None:
    """A copy that is there whole, or not at all. Leaves one that is there alone."""
    if target.exists():
        return
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = target.with_name(f"{target.name}.draft")
    with source.open("rb") as original, draft.open("wb") as copy:
        shutil.copyfileobj(original, copy, CHUNK_BYTES)
        copy.flush()
        os.fsync(copy.fileno())
    draft.replace(target)
    sync_folder(target.parent)


def is_as_written(folder: Path, entry: FileEntry) -> bool:
    """Whether a file is there and has the size and the digest that were told of it. Reads all of it."""
    try:
        with (folder / entry.path).open("rb") as file:
            same_size = os.fstat(file.fileno()).st_size == entry.size_bytes
            return same_size and file_digest(file, "sha256").hexdigest() == entry.sha256
    except OSError:
        return False


@contextmanager
def decompressed(path: Path) -> Iterator[Iterator[bytes]]:
    """The chunks of a compressed file, one after the other."""
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
        yield iter(lambda: reader.read(CHUNK_BYTES), b"")
