"""Result documents in PostgreSQL: durable, so that a replay finds them, zstd-compressed, written in groups."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import LiteralString
from uuid import UUID

import psycopg
import zstandard

from events.arrays import Byteas, Texts
from events.batching import Batcher, Overloaded
from events.connections import bounded_pool
from events.facts import ResultReference, Service
from results.documents import DOCUMENT_BYTES_MAX, ResultsUnavailable, reference_to

GROUP_MAX = 100
LINGER_S = 0.004
"""RabbitMQ hands a job's commands out one after the other, and a busy machine takes milliseconds to read them. A result that
went ahead would make a write, a message, a decision, a stretch and a commit of the views more."""
CONNECT_TIMEOUT_S = 2.0
LIMITS = "-c statement_timeout=5000"
JUST_STORED_BYTES_MAX = 8 * 1_048_576

# The digest is not stored beside the body: the fact has it, and only the fact is believed.
CREATE_TABLE: LiteralString = """
CREATE TABLE IF NOT EXISTS result_documents (
    key text PRIMARY KEY,
    body bytea NOT NULL,
    stored_at timestamptz NOT NULL DEFAULT now()
)
"""
_INSERT: LiteralString = (
    "INSERT INTO result_documents (key, body) SELECT * FROM unnest(%b::text[], %b::bytea[]) ON CONFLICT (key) DO NOTHING"
)
_SELECT: LiteralString = "SELECT key, body FROM result_documents WHERE key = ANY(%s)"


class PostgresDocuments:
    """`ResultDocuments` on PostgreSQL. `open` before use, `close` after it."""

    def __init__(self, database_url: str) -> None:
        self._pool = bounded_pool(
            database_url, settings=LIMITS, name="results", min_size=0, max_size=2, timeout_s=CONNECT_TIMEOUT_S
        )
        self._puts: Batcher[tuple[str, bytes], None] = Batcher(
            self._put_group, batch_max=GROUP_MAX, linger_s=LINGER_S, enough=len(Service)
        )
        self._compressor = zstandard.ZstdCompressor(level=3)
        self._decompressor = zstandard.ZstdDecompressor()
        self._just_stored = _JustStored(JUST_STORED_BYTES_MAX)

    async def open(self) -> None:
        await self._pool.open()

    async def close(self) -> None:
        await self._puts.drain()
        await self._pool.close(timeout=CONNECT_TIMEOUT_S)

    async def put(self, job_id: UUID, document: bytes, *, shown: bool = True) -> ResultReference:
        reference = reference_to(job_id, document)
        try:
            await self._puts.add((reference.location.key, self._compressor.compress(document)))
        except (psycopg.Error, Overloaded) as error:
            raise ResultsUnavailable("The result could not be stored.") from error
        if shown:
            self._just_stored.keep(reference.location.key, document)
        return reference

    async def get(self, references: Sequence[ResultReference]) -> Mapping[str, bytes]:
        documents = self._just_stored.take([reference.location.key for reference in references])
        wanted = {r.location.key: r.sha256 for r in references if r.location.key not in documents}
        if wanted:
            documents |= await self._select(wanted)
        return documents

    async def _select(self, wanted: Mapping[str, str]) -> dict[str, bytes]:
        """Documents by their key; `wanted` has the SHA-256 that each must have."""
        try:
            async with self._pool.connection() as conn, conn.cursor(binary=True) as curs:
                rows = await (await curs.execute(_SELECT, (list(wanted),))).fetchall()
        except psycopg.Error as error:
            raise ResultsUnavailable("The results could not be read.") from error
        return sound_documents(rows, wanted, self._decompressor)

    async def _put_group(self, documents: Sequence[tuple[str, bytes]]) -> Sequence[None]:
        keys, bodies = zip(*documents, strict=True)
        async with self._pool.connection() as conn:
            await conn.execute(_INSERT, (Texts.of(keys), Byteas(bodies)), prepare=True)
        return [None] * len(documents)


def sound_documents(
    rows: Iterable[tuple[str, bytes]], wanted: Mapping[str, str], decompressor: zstandard.ZstdDecompressor
) -> dict[str, bytes]:
    """Documents by their key, of rows as they lie in the table; without those that are not what `wanted` (SHA-256) says."""
    documents = ((key, _decompressed(body, decompressor)) for key, body in rows)
    return {
        key: document for key, document in documents if document is not None and sha256(document).hexdigest() == wanted[key]
    }


def _decompressed(body: bytes, decompressor: zstandard.ZstdDecompressor) -> bytes | None:
    try:
        return decompressor.decompress(body, max_output_size=DOCUMENT_BYTES_MAX)
    except zstandard.ZstdError:
        return None


class _JustStored:
    """Documents that this process has stored and nobody has read yet. A projector beside the workers asks for each once."""

    def __init__(self, bytes_max: int) -> None:
        self._documents: OrderedDict[str, bytes] = OrderedDict()
        self._room = bytes_max

    def keep(self, key: str, document: bytes) -> None:
        self.take([key])
        self._documents[key] = document
        self._room -= len(document)
        while self._room < 0:
            _, oldest = self._documents.popitem(last=False)
            self._room += len(oldest)

    def take(self, keys: Sequence[str]) -> dict[str, bytes]:
        taken = {key: self._documents.pop(key) for key in keys if key in self._documents}
        self._room += sum(map(len, taken.values()))
        return taken
