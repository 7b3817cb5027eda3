"""Result documents in PostgreSQL: durable, so that a replay finds them, zstd-compressed, written in groups."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import LiteralString
from uuid import UUID

import psycopg
import zstandard
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from events.batching import Batcher, Overloaded
from events.facts import ResultReference
from results.documents import DOCUMENT_BYTES_MAX, ResultsUnavailable, reference_to

GROUP_MAX = 100
CONNECT_TIMEOUT_S = 2.0
RECONNECT_S = 1.0
"""The pool tries by itself for so long, ever more seldom (its default: 5 minutes); then the next who needs one does."""
STATEMENT_TIMEOUT_MS = 10_000

# The digest is not stored beside the body: the fact has it, and only the fact is believed.
CREATE_TABLE: LiteralString = """
CREATE TABLE IF NOT EXISTS result_documents (
    key text PRIMARY KEY,
    body bytea NOT NULL,
    stored_at timestamptz NOT NULL DEFAULT now()
)
"""
_INSERT: LiteralString = (
    "INSERT INTO result_documents (key, body) SELECT * FROM unnest(%s::text[], %b::bytea[]) ON CONFLICT (key) DO NOTHING"
)
_SELECT: LiteralString = "SELECT key, body FROM result_documents WHERE key = ANY(%s)"


class PostgresDocuments:
    """`ResultDocuments` on PostgreSQL. `open` before use, `close` after it."""

    def __init__(self, database_url: str) -> None:
        self._pool = AsyncConnectionPool(
            database_url,
            min_size=0,
            max_size=2,
            open=False,
            timeout=CONNECT_TIMEOUT_S,
            reconnect_timeout=RECONNECT_S,
            configure=_configure,
            name="results",
        )
        self._puts: Batcher[tuple[str, bytes], None] = Batcher(self._put_group, batch_max=GROUP_MAX)
        self._compressor = zstandard.ZstdCompressor(level=3)
        self._decompressor = zstandard.ZstdDecompressor()

    async def open(self) -> None:
        await self._pool.open()

    async def close(self) -> None:
        await self._puts.drain()
        await self._pool.close(timeout=CONNECT_TIMEOUT_S)

    async def put(self, job_id: UUID, document: bytes) -> ResultReference:
        reference = reference_to(job_id, document)
        try:
            await self._puts.add((reference.location.key, self._compressor.compress(document)))
        except (psycopg.Error, Overloaded) as error:
            raise ResultsUnavailable("The result could not be stored.") from error
        return reference

    async def get(self, references: Sequence[ResultReference]) -> Mapping[str, bytes]:
        wanted = {reference.location.key: reference.sha256 for reference in references}
        try:
            async with self._pool.connection() as conn, conn.cursor(binary=True) as curs:
                rows = await (await curs.execute(_SELECT, (list(wanted),))).fetchall()
        except psycopg.Error as error:
            raise ResultsUnavailable("The results could not be read.") from error
        documents = {key: self._decompressed(body) for key, body in rows}
        return {
            key: document
            for key, document in documents.items()
            if document is not None and sha256(document).hexdigest() == wanted[key]
        }

    def _decompressed(self, body: bytes) -> bytes | None:
        try:
            return self._decompressor.decompress(body, max_output_size=DOCUMENT_BYTES_MAX)
        except zstandard.ZstdError:
            return None

    async def _put_group(self, documents: Sequence[tuple[str, bytes]]) -> Sequence[None]:
        keys, bodies = zip(*documents, strict=True)
        async with self._pool.connection() as conn:
            await conn.execute(_INSERT, (list(keys), list(bodies)), prepare=True)
        return [None] * len(documents)


async def _configure(conn: AsyncConnection) -> None:
    await conn.set_autocommit(True)
    await conn.execute(f"SET statement_timeout = {STATEMENT_TIMEOUT_MS}")
