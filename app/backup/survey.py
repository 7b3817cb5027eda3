"""What a log comes to: its chains, its head, its results, and all that its facts are folded into, in a few numbers and digests.

A backup has the survey of what went into it; a restore makes it again of what came out. The same survey means the same log,
the same answers and the same views, whatever lay in between.
"""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from itertools import chain
from typing import Protocol
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from app.audit.rows import told_hash
from app.doctor.jobs import folded_to, references_of
from app.doctor.stories import Stream, broken_links, missing_versions, stream_of
from domain.commands import Rules
from events.batching import groups_within
from events.chain import GENESIS, next_head
from events.facts import JobFact, ResultReference, TaskCompleted
from events.record import StoredFact
from events.store import HistoryReader
from projections import job_status
from projections.job_status import value_of
from projections.job_views import Terms

STREAMS_PAGE = 200
LOG_PAGE = 2_000
DOCUMENT_BYTES_AT_ONCE = 8 * 1_048_576
NAMED_MAX = 20
VIEW_VERSIONS = {job_status.VIEW.name: job_status.VIEW.version}
"""Of the views that a survey's digest is over."""
_ANY_TERMS = Terms(Rules(timeout_s={}, attempts_max={}, lifetime={}, redispatch_after=timedelta()), timedelta())
"""What pollers get of a job does not depend on them: a backup verifies under any settings."""


class Documents(Protocol):
    """Finds result documents by their key; one that is missing or damaged is not in the answer."""

    async def get(self, references: Sequence[ResultReference]) -> Mapping[str, bytes]: ...


class Survey(BaseModel):
    """The state of a log up to `position`. Digests are hex SHA-256.

    `log_head` is the running hash of `events/chain.py`. `views` is over the view of each job as pollers get it, in the order of
    job ids. `missing_results` are answers that facts tell of and nobody has: erased ones, mostly. `broken` names the first
    streams whose chain does not verify.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    position: int
    log_head: str
    facts: int
    streams: int
    jobs: int
    results: int
    missing_results: int
    broken_streams: int
    broken: tuple[str, ...]
    views: str

    def differences(self, other: "Survey", *, same_views: bool) -> list[str]:
        """What is otherwise in the other, in words. Views of another version give other bytes, and are not compared."""
        ignored = {"broken"} if same_views else {"broken", "views"}
        mine, others = self.model_dump(exclude=ignored), other.model_dump(exclude=ignored)
        return [f"{_NAMES[name]}: {others[name]} instead of {value}" for name, value in mine.items() if others[name] != value]


_NAMES = {
    "position": "position of the last fact",
    "log_head": "head of the log",
    "facts": "facts",
    "streams": "streams",
    "jobs": "jobs",
    "results": "results that facts tell of",
    "missing_results": "missing results",
    "broken_streams": "streams with a broken chain",
    "views": "digest of the views",
}


@dataclass
class _Tally:
    facts: int = 0
    streams: int = 0
    jobs: int = 0
    results: int = 0
    missing_results: int = 0
    broken_streams: int = 0
    broken: list[str] = field(default_factory=list)


async def survey(log: HistoryReader, documents: Documents, position: int | None = None) -> Survey:
    """Reads the whole log twice, once by streams and once by positions, in constant memory.

    Facts behind `position` (None: the end) are left out. May raise `StoreUnavailable` or what the documents raise.
    """
    position = await log.head() if position is None else position
    tally, digest = _Tally(), sha256()
    async for streams in _streams(log, position):
        for group in _groups(streams):
            found = await documents.get([reference for stream in group for reference in _references(stream)])
            for stream in group:
                _count(tally, stream, found)
                digest.update(_digest(stream, found))
    return Survey(
        position=position,
        log_head=(await _log_head(log, position)).hex(),
        facts=tally.facts,
        streams=tally.streams,
        jobs=tally.jobs,
        results=tally.results,
        missing_results=tally.missing_results,
        broken_streams=tally.broken_streams,
        broken=tuple(tally.broken),
        views=digest.hexdigest(),
    )


async def _streams(log: HistoryReader, position: int) -> AsyncIterator[list[Stream]]:
    after: UUID | None = None
    while page := await log.stream_ids(after, STREAMS_PAGE):
        rows = await log.read(page)
        upto = {stream_id: [stored for stored in rows.get(stream_id, ()) if stored.position <= position] for stream_id in page}
        yield [stream_of(stream_id, facts) for stream_id, facts in upto.items() if facts]
        after = page[-1]


def _groups(streams: Sequence[Stream]) -> Iterator[list[Stream]]:
    """Streams whose documents fit into memory together."""

    def size_of(stream: Stream) -> int:
        return sum(reference.size_bytes for reference in _references(stream))

    return groups_within(streams, size_of, DOCUMENT_BYTES_AT_ONCE)


def _references(stream: Stream) -> list[ResultReference]:
    """All documents that its facts tell of: results, and the raw answers that they were read from."""
    raw = (recorded.fact.raw for recorded in stream.facts if isinstance(recorded.fact, TaskCompleted))
    return [*references_of(stream), *(reference for reference in raw if reference is not None)]


def _count(tally: _Tally, stream: Stream, found: Mapping[str, bytes]) -> None:
    keys = [reference.location.key for reference in _references(stream)]
    tally.streams += 1
    tally.facts += len(stream.rows)
    tally.jobs += _is_a_job(stream)
    tally.results += len(keys)
    tally.missing_results += sum(key not in found for key in keys)
    problem = next(chain(missing_versions(stream), broken_links(stream), stream.unreadable), None)
    if problem is not None:
        tally.broken_streams += 1
        if len(tally.broken) < NAMED_MAX:
            tally.broken.append(f"stream {stream.stream_id}, position {problem.position}: {problem.sentence}")


def _is_a_job(stream: Stream) -> bool:
    return bool(stream.facts) and isinstance(stream.facts[0].fact, JobFact)


def _digest(stream: Stream, found: Mapping[str, bytes]) -> bytes:
    """What pollers get of a job; nothing for any other stream, and for one whose facts make no job."""
    if not _is_a_job(stream):
        return b""
    try:
        job = folded_to(stream, stream.rows[-1].position, found, _ANY_TERMS)
    except (ValueError, LookupError, AttributeError):
        return b""
    assert job is not None
    return stream.stream_id.bytes + sha256(value_of(job)).digest()


async def _log_head(log: HistoryReader, position: int) -> bytes:
    head, at = GENESIS, 0
    while at < position and (page := await log.read_all(at, LOG_PAGE)):
        for stored in page:
            head = _next(head, stored) if stored.position <= position else head
        at = page[-1].position
    return head


def _next(head: bytes, stored: StoredFact) -> bytes:
    return next_head(head, stored.position, told_hash(stored))
