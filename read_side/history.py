"""What became of a job, told from the log: its document as of any position or time, each fact as a sentence, and why.

Nothing here is on a poller's way. The log is read under a role that can only select; without it, this has no answer and
polling goes on.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

from events.catalog import UnknownFact
from events.facts import Fact, JobFact, JobSubmitted
from events.record import StoredFact, envelope_of, fact_of, hash_of
from events.store import HistoryReader, StoreUnavailable
from projections.views import JobStatus, document_of
from read_side.moments import Moment
from read_side.queries import Answer
from read_side.sentences import instant
from results.documents import ResultDocuments, ResultsUnavailable

ANSWER_MAX_S = 5.0
ASKERS_MAX = 32

Fold = Callable[[JobStatus | None, JobFact], JobStatus]
"""The poller's view of a job after one more of its facts: a projection, filled in by `app/wiring.py`."""
RelatedStreams = Callable[[UUID], Awaitable[Sequence[UUID]]]
"""Ids of other streams that tell of a job. Raises `StoreUnavailable`."""


@dataclass(eq=False)
class Unanswered(Exception):  # noqa: N818 - an outcome, in the field's words
    """The log has no answer to this: a stable code, and a sentence of our own."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One fact with everything that was written down about it."""

    stored: StoredFact
    fact: Fact
    envelope: Mapping[str, Any]

    @property
    def position(self) -> int:
        return self.stored.position

    @property
    def recorded_at(self) -> datetime:
        return datetime.fromisoformat(self.envelope["recorded_at"])

    @property
    def hash(self) -> str:
        return hash_of(self.stored.state).hex()


@dataclass(frozen=True, slots=True)
class Story:
    """A job's own facts up to a moment, the state that they lead to, and the result documents that it shows."""

    entries: Sequence[Entry]
    status: JobStatus
    documents: Mapping[str, bytes]

    @property
    def document(self) -> bytes:
        """What a poller could have seen."""
        return document_of(self.status, self.documents)


@dataclass
class JobHistory:
    """Reads the log for who asks about the past, `ASKERS_MAX` at a time and none for longer than `ANSWER_MAX_S`.

    All methods raise `Unanswered`, with the code `history_unavailable` when the log cannot be read now.
    """

    log: HistoryReader
    documents: ResultDocuments
    fold: Fold
    view_version: int
    related: RelatedStreams
    now: Callable[[], datetime]
    _askers: int = 0

    async def as_of(self, job_id: UUID, moment: Moment) -> Answer:
        """The document that a poller could have seen then, byte for byte, with the ETag that it had."""
        story = await self.story(job_id, moment)
        return Answer(story.document, f'"{self.view_version}-{story.entries[-1].position}"')

    async def story(self, job_id: UUID, moment: Moment | None = None) -> Story:
        """The job as it stood at a moment; as it stands in the log, without one."""
        async with self._bounded():
            if moment is not None:
                # First: what is appended after this is behind the end that is seen here.
                await self._refuse_the_future(moment)
            entries = await self._own_entries(job_id)
            told = entries if moment is None else _until(entries, moment)
            if not told:
                raise _not_yet(entries[0], cast("Moment", moment))
            status = fold_all(self.fold, told)
            return Story(told, status, await self._documents_of(status))

    async def entries(self, job_id: UUID) -> Sequence[Entry]:
        """All that the log tells of a job, in its order: its own facts, and those of other streams that are about it."""
        async with self._bounded():
            own = await self._streams([job_id])
            _refuse_unless_job(own)
            others = await self._streams(await self.related(job_id))
            about = [entry for entry in others if getattr(entry.fact, "job_id", job_id) == job_id]
            return sorted([*own, *about], key=lambda entry: entry.position)

    async def _own_entries(self, job_id: UUID) -> list[Entry]:
        entries = await self._streams([job_id])
        _refuse_unless_job(entries)
        return [entry for entry in entries if isinstance(entry.fact, JobFact)]

    async def _streams(self, stream_ids: Sequence[UUID]) -> list[Entry]:
        streams = await self.log.read(stream_ids) if stream_ids else {}
        return [_entry(stored) for stream in streams.values() for stored in stream]

    async def _documents_of(self, status: JobStatus) -> Mapping[str, bytes]:
        references = [task.result for task in status.tasks.values() if task.result is not None]
        return await self.documents.get(references) if references else {}

    async def _refuse_the_future(self, moment: Moment) -> None:
        if isinstance(moment, datetime):
            if moment > self.now():
                message = f"{instant(moment)} has not come yet: what a poller will see then is not known."
                raise Unanswered("as_of_ahead", message)
        elif moment > (head := await self.log.head()):
            message = f"The log has not reached position {moment} yet: it ends at position {head}."
            raise Unanswered("as_of_ahead", message)

    @asynccontextmanager
    async def _bounded(self) -> AsyncIterator[None]:
        if self._askers >= ASKERS_MAX:
            raise Unanswered("history_unavailable", "Too many ask for history right now. Try again shortly.")
        self._askers += 1
        try:
            async with asyncio.timeout(ANSWER_MAX_S):
                yield
        except (StoreUnavailable, ResultsUnavailable, TimeoutError) as error:
            raise Unanswered("history_unavailable", "The log cannot be read right now. Try again shortly.") from error
        except UnknownFact as error:
            message = "The log holds what only a newer version of this program can read. Try again after its upgrade."
            raise Unanswered("history_unavailable", message) from error
        finally:
            self._askers -= 1


def fold_all(fold: Fold, entries: Sequence[Entry]) -> JobStatus:
    """A job's view after all of these facts of its own."""
    status: JobStatus | None = None
    for entry in entries:
        status = fold(status, cast("JobFact", entry.fact))
    assert status is not None
    return status


def _entry(stored: StoredFact) -> Entry:
    return Entry(stored, fact_of(stored.topic, stored.state), envelope_of(stored.state))


def _refuse_unless_job(entries: Sequence[Entry]) -> None:
    if not entries or not isinstance(entries[0].fact, JobSubmitted):
        raise Unanswered("job_not_found", "Job not found")


def _until(entries: Sequence[Entry], moment: Moment) -> list[Entry]:
    """The facts up to a moment. Clocks of machines may disagree: the first later time ends it, so that none is left out."""
    told: list[Entry] = []
    for entry in entries:
        if (entry.recorded_at if isinstance(moment, datetime) else entry.position) > moment:  # type: ignore[operator]
            break
        told.append(entry)
    return told


def _not_yet(first: Entry, moment: Moment) -> Unanswered:
    if isinstance(moment, datetime):
        submitted, asked = instant(first.recorded_at), f"at {instant(moment.astimezone(UTC))}"
        return Unanswered("job_not_yet", f"The job was taken on at {submitted}: {asked} it did not exist yet.")
    message = f"The job was taken on at position {first.position}: at position {moment} it did not exist yet."
    return Unanswered("job_not_yet", message)
