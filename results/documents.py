"""Result documents: what lookups brought, kept apart from the facts that tell of them.

A document is content-addressed within its job: the key is job id and SHA-256. Never shared between jobs, so that erasing one
job's documents can take nothing from another.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Protocol
from uuid import UUID

from events.facts import PostgresLocation, ResultReference

DOCUMENT_BYTES_MAX = 1_048_576


class ResultsUnavailable(Exception):  # noqa: N818 - a state, in the field's words
    """The document store cannot be reached now. Nothing is known about any document."""


class ResultDocuments(Protocol):
    """Stores and finds documents. Both methods may raise `ResultsUnavailable`."""

    async def put(self, job_id: UUID, document: bytes, *, shown: bool = True) -> ResultReference:
        """Store a document of at most `DOCUMENT_BYTES_MAX` bytes; durable when this returns. Twice is the same as once.

        `shown` says that a view will show it, and a projector ask for it soon.
        """

    async def get(self, references: Sequence[ResultReference]) -> Mapping[str, bytes]:
        """The documents by their key, each checked against its SHA-256. One that is missing or damaged is not in the answer."""


def reference_to(job_id: UUID, document: bytes) -> ResultReference:
    digest = sha256(document).hexdigest()
    return ResultReference(location=PostgresLocation(key=f"{job_id}/{digest}"), sha256=digest, size_bytes=len(document))


class MemoryDocuments:
    """The in-memory twin, for tests and simulations."""

    def __init__(self) -> None:
        self._documents: dict[str, bytes] = {}

    async def put(self, job_id: UUID, document: bytes, *, shown: bool = True) -> ResultReference:  # noqa: ARG002 - all are at hand
        reference = reference_to(job_id, document)
        self._documents[reference.location.key] = document
        return reference

    async def get(self, references: Sequence[ResultReference]) -> Mapping[str, bytes]:
        keys = (reference.location.key for reference in references)
        return {key: self._documents[key] for key in keys if key in self._documents}
