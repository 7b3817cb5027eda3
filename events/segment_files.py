"""Segment files: the streams of jobs that ended long ago, with their result documents, outside of the database.

A segment is a row of zstd frames, so `zstd -dc` shows all of it:

    header      one JSON line: format, log_id, positions, first and last stream id, counts, sha256
    facts       JSON lines in the order of positions, the `state` as it lay in the log; a frame for each `BLOCK_FACTS` of them
    documents   JSON lines: key and document (base64 what is no text); a frame for about each `BLOCK_BYTES` of them
    index       one JSON line: where each frame lies, and which streams and documents are in it
    trailer     a skippable frame that says where the index lies

The digest is over what is never erased: position, stream, version, topic, envelope, chained part and hash of each fact. So a
segment from which erasable lines or documents were taken out later still has the digest that the log tells (`JobsSealed`).
A file is written under another name, synced and renamed: one that has its name is whole.
"""

import os
import struct
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID

import orjson
import zstandard

from events.durable import sync_folder
from events.record import StoredFact
from events.store import StoreUnavailable

FORMAT = "lookup-segment/1"
SUFFIX = ".segment"
DRAFT_SUFFIX = ".draft"
BLOCK_FACTS = 500
BLOCK_BYTES = 1_048_576
LEVEL = 9
_SKIPPABLE = 0x184D2A50  # RFC 8878 section 3.1.2: decoders pass over it.
_TRAILER = struct.Struct("<IIQQ")
_FRAME_BYTES_MAX = 64 * BLOCK_BYTES
_HEADER_BYTES_MAX = 4096

Span = tuple[int, int]
"""Offset and length of a frame in the file."""


class SegmentUnreadable(StoreUnavailable):
    """A segment file is missing, or is not what was written."""


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What a segment says of itself. `sha256` is hex; stream ids are the lowest and the highest."""

    log_id: UUID
    first_position: int
    last_position: int
    first_stream: UUID
    last_stream: UUID
    jobs: int
    facts: int
    documents: int
    sha256: str

    @property
    def name(self) -> str:
        """The same facts always give the same name."""
        return f"{self.first_position:020}-{self.last_position:020}-{self.sha256[:16]}{SUFFIX}"


@dataclass(frozen=True, slots=True)
class Document:
    """A result document, by the key that facts name it by."""

    key: str
    body: bytes


@dataclass(frozen=True, slots=True)
class _Block:
    span: Span
    last_position: int


@dataclass(frozen=True, slots=True)
class _Index:
    """Where everything lies: blocks of facts in order, the blocks of each stream, the frame of each document."""

    file: tuple[int, int]
    blocks: Sequence[_Block]
    streams: Mapping[UUID, Sequence[int]]
    documents: Mapping[str, Span]


def digest_of(rows: Iterable[StoredFact]) -> str:
    """Hex SHA-256 over what is never erased of these facts, in their order."""
    hasher = sha256()
    for row in rows:
        hasher.update(row.position.to_bytes(8, "big") + row.stream_id.bytes + row.stream_version.to_bytes(8, "big"))
        for part in (row.topic.encode(), *row.state.split(b"\n")[:3]):
            hasher.update(len(part).to_bytes(8, "big") + part)
    return hasher.hexdigest()


# --- Writing ----------------------------------------------------------------------------------------------------------


def write_segment(folder: Path, log_id: UUID, rows: Sequence[StoredFact], documents: Sequence[Document]) -> SegmentHeader:
    """Write a segment of whole streams, durable under its name when this returns. `rows` are in the order of positions.

    Raises `OSError`; then there is no segment of this name.
    """
    streams = sorted({row.stream_id for row in rows})
    header = SegmentHeader(
        log_id=log_id,
        first_position=rows[0].position,
        last_position=rows[-1].position,
        first_stream=streams[0],
        last_stream=streams[-1],
        jobs=len(streams),
        facts=len(rows),
        documents=len(documents),
        sha256=digest_of(rows),
    )
    _make_folder(folder)
    _write(folder / header.name, header, rows, documents)
    return header


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _write(path: Path, header: SegmentHeader, rows: Iterable[StoredFact], documents: Iterable[Document]) -> None:
    draft = path.with_name(path.name + DRAFT_SUFFIX)
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        _write_frames(file, header, rows, documents)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_folder(path.parent)


def _write_frames(file: BinaryIO, header: SegmentHeader, rows: Iterable[StoredFact], documents: Iterable[Document]) -> None:
    _write_frame(file, [orjson.dumps({"format": FORMAT, **_as_json(header)})])
    blocks: list[dict[str, Any]] = []
    streams: dict[str, list[int]] = {}
    for block in _blocks_of(rows):
        for row in block:
            of_stream = streams.setdefault(row.stream_id.hex, [])
            if not of_stream or of_stream[-1] != len(blocks):
                of_stream.append(len(blocks))
        span = _write_frame(file, [_line_of(row) for row in block])
        blocks.append({"span": span, "last_position": block[-1].position})
    stored = [{"span": _write_frame(file, lines), "keys": keys} for keys, lines in _frames_of(documents)]
    at, length = _write_frame(file, [orjson.dumps({"blocks": blocks, "streams": streams, "documents": stored})])
    file.write(_TRAILER.pack(_SKIPPABLE, _TRAILER.size - 8, at, length))


def _write_frame(file: BinaryIO, lines: Sequence[bytes]) -> Span:
    at = file.tell()
    frame = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compress(b"\n".join(lines) + b"\n")
    file.write(frame)
    return at, len(frame)


def _blocks_of(rows: Iterable[StoredFact]) -> Iterator[list[StoredFact]]:
    block: list[StoredFact] = []
    for row in rows:
        block.append(row)
        if len(block) == BLOCK_FACTS:
            yield block
            block = []
    if block:
        yield block


def _frames_of(documents: Iterable[Document]) -> Iterator[tuple[list[str], list[bytes]]]:
    keys: list[str] = []
    lines: list[bytes] = []
    size = 0
    for document in documents:
        keys.append(document.key)
        lines.append(orjson.dumps({"key": document.key, **_spelled(document.body)}))
        size += len(lines[-1])
        if size >= BLOCK_BYTES:
            yield keys, lines
            keys, lines, size = [], [], 0
    if keys:
        yield keys, lines


def _spelled(body: bytes) -> dict[str, str]:
    """As text where it is text, so that it can be read."""
    try:
        return {"document": body.decode()}
    except UnicodeDecodeError:
        return {"base64": b64encode(body).decode()}


def _line_of(row: StoredFact) -> bytes:
    return orjson.dumps(
        {
            "position": row.position,
            "stream_id": row.stream_id,
            "stream_version": row.stream_version,
            "topic": row.topic,
            "state": row.state.decode(),
        }
    )


def _as_json(header: SegmentHeader) -> dict[str, Any]:
    return {name: getattr(header, name) for name in SegmentHeader.__slots__}


# --- Reading ----------------------------------------------------------------------------------------------------------


class Segment:
    """One segment file. Every read opens it anew, so that one that was rewritten meanwhile is read as it is now.

    All methods block on the disk and may raise `SegmentUnreadable`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            self.header = self._read_header(file)
        self._index: _Index | None = None

    def rows(self, after: int = 0, limit: int | None = None) -> Iterator[StoredFact]:
        """The facts behind a position, in order, at most `limit`."""
        left = self.header.facts if limit is None else limit
        with self._open() as file:
            for block in self._index_of(file).blocks:
                if left <= 0:
                    return
                if block.last_position > after:
                    wanted = [row for row in self._facts_in(file, block.span) if row.position > after][:left]
                    left -= len(wanted)
                    yield from wanted

    def streams(self, stream_ids: Iterable[UUID]) -> dict[UUID, list[StoredFact]]:
        """Those of these streams that are here, whole and in version order."""
        with self._open() as file:
            index = self._index_of(file)
            wanted = {stream_id for stream_id in stream_ids if stream_id in index.streams}
            numbers = sorted({number for stream_id in wanted for number in index.streams[stream_id]})
            found: dict[UUID, list[StoredFact]] = {}
            for number in numbers:
                for row in self._facts_in(file, index.blocks[number].span):
                    if row.stream_id in wanted:
                        found.setdefault(row.stream_id, []).append(row)
        return found

    def stream_ids(self) -> Sequence[UUID]:
        """All of them, in their order."""
        with self._open() as file:
            return sorted(self._index_of(file).streams)

    def document_keys(self) -> Sequence[str]:
        with self._open() as file:
            return list(self._index_of(file).documents)

    def documents(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Those of these documents that are here."""
        with self._open() as file:
            index = self._index_of(file)
            wanted = {key for key in keys if key in index.documents}
            spans = sorted({index.documents[key] for key in wanted})
            return {
                document.key: document.body
                for span in spans
                for document in self._documents_in(file, span)
                if document.key in wanted
            }

    def all_documents(self) -> Iterator[Document]:
        with self._open() as file:
            for span in sorted(set(self._index_of(file).documents.values())):
                yield from self._documents_in(file, span)

    def forget_index(self) -> None:
        """It takes some hundred kilobytes; the next read loads it again."""
        self._index = None

    def _open(self) -> BufferedReader:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise SegmentUnreadable(f"The segment {self.path.name} cannot be opened.") from error

    def _read_header(self, file: BinaryIO) -> SegmentHeader:
        try:
            line = zstandard.ZstdDecompressor().decompressobj().decompress(file.read(_HEADER_BYTES_MAX))
            told = orjson.loads(line)
            if told.pop("format") != FORMAT:
                raise SegmentUnreadable(f"{self.path.name} is a segment of a kind that this program does not know.")
            for name in ("log_id", "first_stream", "last_stream"):
                told[name] = UUID(told[name])
            return SegmentHeader(**told)
        except (OSError, zstandard.ZstdError, ValueError, KeyError, TypeError) as error:
            raise self._damaged() from error

    def _index_of(self, file: BinaryIO) -> _Index:
        """Kept while the file is the same one."""
        found = os.fstat(file.fileno())
        identity = (found.st_ino, found.st_mtime_ns)
        if self._index is None or self._index.file != identity:
            self._index = self._read_index(file, identity)
        return self._index

    def _read_index(self, file: BinaryIO, identity: tuple[int, int]) -> _Index:
        try:
            file.seek(-_TRAILER.size, os.SEEK_END)
            magic, _, at, length = _TRAILER.unpack(file.read(_TRAILER.size))
            if magic != _SKIPPABLE:
                raise self._damaged()
            told = orjson.loads(self._frame(file, (at, length)))
            return _Index(
                file=identity,
                blocks=[_Block(_span(block["span"]), block["last_position"]) for block in told["blocks"]],
                streams={UUID(hex=name): numbers for name, numbers in told["streams"].items()},
                documents={key: _span(frame["span"]) for frame in told["documents"] for key in frame["keys"]},
            )
        except (OSError, struct.error, ValueError, KeyError, TypeError) as error:
            raise self._damaged() from error

    def _facts_in(self, file: BinaryIO, span: Span) -> Iterator[StoredFact]:
        try:
            for told in map(orjson.loads, self._frame(file, span).splitlines()):
                yield StoredFact(
                    told["position"],
                    UUID(told["stream_id"]),
                    told["stream_version"],
                    told["topic"],
                    told["state"].encode(),
                )
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged() from error

    def _documents_in(self, file: BinaryIO, span: Span) -> Iterator[Document]:
        try:
            for told in map(orjson.loads, self._frame(file, span).splitlines()):
                body = b64decode(told["base64"]) if "base64" in told else told["document"].encode()
                yield Document(told["key"], body)
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged() from error

    def _frame(self, file: BinaryIO, span: Span) -> bytes:
        offset, length = span
        try:
            file.seek(offset)
            return zstandard.ZstdDecompressor().decompress(file.read(length), max_output_size=_FRAME_BYTES_MAX)
        except (OSError, zstandard.ZstdError, ValueError, OverflowError) as error:
            raise self._damaged() from error

    def _damaged(self) -> SegmentUnreadable:
        return SegmentUnreadable(f"The segment {self.path.name} is damaged.")


def _span(told: Sequence[int]) -> Span:
    offset, length = told
    return offset, length


# --- Taking out -------------------------------------------------------------------------------------------------------


def rewrite_segment(
    segment: Segment, fact: Callable[[StoredFact], StoredFact], keeps: Callable[[Document], bool]
) -> SegmentHeader:
    """The segment with each fact as `fact` gives it, and the documents that it `keeps`, in place of the old one.

    Digest and name stay: `fact` takes out nothing but erasable lines. Raises `ValueError` if it did, and `OSError`.
    """
    kept = [document.key for document in segment.all_documents() if keeps(document)]
    header = replace(segment.header, documents=len(kept))
    if digest_of(map(fact, segment.rows())) != header.sha256:
        raise ValueError(f"The segment {segment.path.name} would lose what is never erased.")
    _write(segment.path, header, map(fact, segment.rows()), filter(keeps, segment.all_documents()))
    return header


def segment_files(folder: Path) -> list[Path]:
    """The segments of a folder, in the order of their names; drafts are none."""
    return sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []
