"""Result documents, wherever they lie: those of sealed jobs are in the segment with the job's facts."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Protocol
from uuid import UUID

from events.facts import ResultReference
from events.store import StoreUnavailable
from results.documents import ResultDocuments, ResultsUnavailable


class SealedDocuments(Protocol):
    """The segments, as far as documents are concerned (`events.segments.ArchivedLog`)."""

    async def documents(self, keys: Sequence[str]) -> Mapping[str, bytes]: ...


class ArchivedDocuments:
    """`ResultDocuments` over the store of today and the segments. What is put goes to the store."""

    def __init__(self, store: ResultDocuments, sealed: SealedDocuments) -> None:
        self._store = store
        self._sealed = sealed

    async def put(self, job_id: UUID, document: bytes, *, shown: bool = True) -> ResultReference:
        return await self._store.put(job_id, document, shown=shown)

    async def get(self, references: Sequence[ResultReference]) -> Mapping[str, bytes]:
        """The store first: a document is in a segment before it leaves the store."""
        found = dict(await self._store.get(references))
        missing = {r.location.key: r.sha256 for r in references if r.location.key not in found}
        if not missing:
            return found
        try:
            sealed = await self._sealed.documents(list(missing))
        except StoreUnavailable as error:
            raise ResultsUnavailable("The sealed results could not be read.") from error
        return found | {key: body for key, body in sealed.items() if sha256(body).hexdigest() == missing[key]}
