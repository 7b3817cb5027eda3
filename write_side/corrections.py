"""Corrections: answers are read again from what was said and kept, and what comes out differently is appended as a fact.

Promises:

- **Nobody is asked.** All that is needed lies in the store; a parser is handed in as a pure function.
- **Nothing is taken back.** The first result stays in log and store. A correction never turns an answer into a failure: what a
  parser refuses to read now is told, and left as it is.
- **Once.** The expected version guards each append, and a result that is not what was compared any more is left alone: killed
  in between, or run twice, it comes to the same.
- **Whole streams only.** A job that was sealed into a segment is left alone: its facts are not in the table to go on from.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from uuid import UUID

from events.catalog import topics_of
from events.facts import Erased, Fact, JobSubmitted, ResultCorrected, ResultReference, Service, TaskCompleted
from events.record import Cause, StoredFact, envelope_of, fact_of, hash_of
from events.store import AppendUnit, EventStore, HistoryReader, NewFacts, StreamHead, VersionConflict
from results.documents import DOCUMENT_BYTES_MAX, ResultDocuments

STREAMS_PAGE = 200
ANSWERS_PAGE = 20
"""Documents of so many answers are in memory at once."""
TRIES = 10
SUBMITTED = frozenset(topics_of(JobSubmitted))
TELLING = frozenset(topics_of(JobSubmitted, TaskCompleted, ResultCorrected))


class Verdict(StrEnum):
    """What comes of reading one answer again."""

    CHANGED = "changed"
    SAME = "same"
    CURRENT = "current"
    NEWER = "newer"
    NEVER_SAID = "never_said"
    TOO_LARGE = "too_large"
    SWITCHED_OFF = "switched_off"
    GONE = "gone"
    NO_PARSER = "no_parser"
    REFUSED = "refused"
    SEALED = "sealed"
    OVERTAKEN = "overtaken"


SENTENCES: Mapping[Verdict, str] = {
    Verdict.CHANGED: "come out differently",
    Verdict.SAME: "come out the same",
    Verdict.CURRENT: "were read by this version of the parser already",
    Verdict.NEWER: "were read by a newer version than this program has",
    Verdict.NEVER_SAID: "have no raw answer: there was none, or the fact is older than raw answers are",
    Verdict.TOO_LARGE: "have no raw answer: it was too large to keep",
    Verdict.SWITCHED_OFF: "have no raw answer: keeping them was switched off",
    Verdict.GONE: "have lost their raw answer: it was erased, or is damaged",
    Verdict.NO_PARSER: "are of a kind that no parser reads any more",
    Verdict.REFUSED: "cannot be read by this version of the parser, and are left as they are",
    Verdict.SEALED: "come out differently, but their jobs are sealed: left as they are",
    Verdict.OVERTAKEN: "were corrected by somebody else meanwhile",
}


class NoAnswer(Exception):  # noqa: N818 - an outcome, in our words
    """A parser makes no result of this; the message says why."""


@dataclass(frozen=True, slots=True)
class Reader:
    """A parser as it is now: from a raw answer, as stored, to a result document. `read` raises `NoAnswer`."""

    name: str
    version: int
    read: Callable[[bytes], bytes]

    @property
    def label(self) -> str:
        return f"{self.name}/{self.version}"


@dataclass(frozen=True, slots=True)
class Answered:
    """How the answer of one task stands: the fact that brought it, and what it was corrected to since."""

    completed: TaskCompleted
    result: ResultReference
    parser: str | None
    event_id: UUID
    correlation_id: UUID


@dataclass(frozen=True, slots=True)
class Finding:
    """One answer that was read again. `document` is what came out, if that is something else; `refusal` why nothing did."""

    answered: Answered
    verdict: Verdict
    parser: str | None = None
    document: bytes | None = None
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class Correcting:
    """Who has answers corrected, and why."""

    actor: str
    reason: str


@dataclass
class Tally:
    """What was found so far. `samples` are the first few of those that changed or were refused."""

    jobs: int = 0
    counts: Counter[Verdict] = field(default_factory=Counter)
    corrected: int = 0
    samples: list[Finding] = field(default_factory=list)

    @property
    def answers(self) -> int:
        return self.counts.total()


@dataclass
class Reparse:
    """Reads every answer of a service again that an older parser read, or with `every` all of them.

    May raise `StoreUnavailable`, `OutcomeUnknown`, `ResultsUnavailable` or `UnknownFact`; what was appended until then stays.
    """

    history: HistoryReader
    store: EventStore
    documents: ResultDocuments
    readers: Mapping[str, Reader]
    service: Service
    now: Callable[[], datetime]
    every: bool = False
    samples_max: int = 5
    tally: Tally = field(default_factory=Tally)

    async def run(self, correcting: Correcting | None = None) -> Tally:
        """Look through the whole log, and append corrections if `correcting`."""
        after: UUID | None = None
        while stream_ids := await self.history.stream_ids(after, STREAMS_PAGE):
            streams = await self.history.read(stream_ids)
            answers = [answer for stream in streams.values() for answer in self._answers_of(stream)]
            for first in range(0, len(answers), ANSWERS_PAGE):
                await self._take_in(answers[first : first + ANSWERS_PAGE], correcting)
            after = stream_ids[-1]
        return self.tally

    def _answers_of(self, stream: Sequence[StoredFact]) -> Iterator[Answered]:
        if stream[0].topic in SUBMITTED:
            self.tally.jobs += 1
            answered = answer_of(stream, self.service)
            if answered is not None:
                yield answered

    async def _take_in(self, answers: Sequence[Answered], correcting: Correcting | None) -> None:
        findings = await self._settled(await self._read_again(answers))
        if correcting is not None:
            changed = [finding for finding in findings if finding.verdict is Verdict.CHANGED]
            overtaken = await asyncio.gather(*(self._correct(finding, correcting) for finding in changed))
            self.tally.corrected += overtaken.count(False)
            self.tally.counts[Verdict.OVERTAKEN] += overtaken.count(True)
            self.tally.counts[Verdict.CHANGED] -= overtaken.count(True)
        for finding in findings:
            self.tally.counts[finding.verdict] += 1
            if finding.verdict in {Verdict.CHANGED, Verdict.REFUSED} and len(self.tally.samples) < self.samples_max:
                self.tally.samples.append(finding)

    async def _read_again(self, answers: Sequence[Answered]) -> list[Finding]:
        findings = [Finding(answered, verdict) for answered in answers if (verdict := self._without_reading(answered))]
        to_read = [answered for answered in answers if self._without_reading(answered) is None]
        raws = await self.documents.get([answered.completed.raw for answered in to_read if answered.completed.raw])
        return findings + [self._compared(answered, raws) for answered in to_read]

    def _without_reading(self, answered: Answered) -> Verdict | None:
        """What can be said of an answer before what was said is looked at; None = look at it."""
        completed = answered.completed
        if completed.raw is None:
            return Verdict.NEVER_SAID if completed.raw_absent is None else Verdict(completed.raw_absent)
        name, version = parsed_label(answered.parser)
        if name not in self.readers:
            return Verdict.NO_PARSER
        if version > self.readers[name].version:
            return Verdict.NEWER
        return Verdict.CURRENT if version == self.readers[name].version and not self.every else None

    def _compared(self, answered: Answered, raws: Mapping[str, bytes]) -> Finding:
        reader = self.readers[parsed_label(answered.parser)[0]]
        raw = raws.get(answered.completed.raw.location.key) if answered.completed.raw else None
        if raw is None:
            return Finding(answered, Verdict.GONE)
        try:
            document = reader.read(raw)
        except NoAnswer as refused:
            return Finding(answered, Verdict.REFUSED, reader.label, refusal=str(refused))
        if len(document) > DOCUMENT_BYTES_MAX:
            return Finding(answered, Verdict.REFUSED, reader.label, refusal="The result is larger than this service keeps.")
        if sha256(document).hexdigest() == answered.result.sha256:
            return Finding(answered, Verdict.SAME, reader.label)
        return Finding(answered, Verdict.CHANGED, reader.label, document)

    async def _settled(self, findings: Sequence[Finding]) -> list[Finding]:
        """The findings; jobs of which the table has not all facts are told as sealed."""
        changed = [finding.answered.completed.job_id for finding in findings if finding.verdict is Verdict.CHANGED]
        live = await self.store.read(changed) if changed else {}
        whole = {job_id for job_id, stream in live.items() if stream[0].stream_version == 1}
        return [
            Finding(finding.answered, Verdict.SEALED)
            if finding.verdict is Verdict.CHANGED and finding.answered.completed.job_id not in whole
            else finding
            for finding in findings
        ]

    async def _correct(self, finding: Finding, correcting: Correcting) -> bool:
        """Store what came out, then append that it stands from now on. True when somebody else was quicker."""
        answered, document = finding.answered, finding.document
        assert document is not None
        job_id = answered.completed.job_id
        result = await self.documents.put(job_id, document)
        corrected = ResultCorrected(
            job_id=job_id,
            service=answered.completed.service,
            attempt=answered.completed.attempt,
            result=result,
            replaces=answered.result.sha256,
            parser=finding.parser or "",
            reason=correcting.reason,
            corrected_at=self.now(),
        )
        cause = Cause(correcting.actor, answered.correlation_id, causation_id=answered.event_id, reason=correcting.reason)
        for _ in range(TRIES):
            stream = (await self.store.read([job_id])).get(job_id, ())
            stands = answer_of(stream, self.service) if stream and stream[0].stream_version == 1 else None
            if stands is None or stands.result.sha256 != answered.result.sha256:
                return True
            last = stream[-1]
            head = StreamHead(last.stream_version, hash_of(last.state), last.position)
            try:
                await self.store.append(AppendUnit([NewFacts(job_id, head, [corrected])], cause))
            except VersionConflict:
                continue
            return False
        return True


def answer_of(stream: Sequence[StoredFact], service: Service) -> Answered | None:
    """How the answer of this service stands in a job's stream; None when there is none, or its target was erased."""
    answered: Answered | None = None
    for stored in stream:
        if stored.topic not in TELLING:
            continue
        fact = fact_of(stored.topic, stored.state)
        if isinstance(fact, JobSubmitted) and isinstance(fact.target, Erased):
            return None
        answered = _with(answered, fact, stored, service)
    return answered


def _with(answered: Answered | None, fact: Fact, stored: StoredFact, service: Service) -> Answered | None:
    match fact:
        case TaskCompleted() if fact.service is service and answered is None:
            envelope = envelope_of(stored.state)
            ids = UUID(envelope["event_id"]), UUID(envelope["correlation_id"])
            return Answered(fact, fact.result, fact.parser, *ids)
        case ResultCorrected() if fact.service is service and answered is not None:
            return Answered(answered.completed, fact.result, fact.parser, answered.event_id, answered.correlation_id)
        case _:
            return answered


def parsed_label(label: str | None) -> tuple[str, int]:
    """`rdap/2` -> ("rdap", 2); of anything else a name that no parser has."""
    name, _, version = (label or "").partition("/")
    return (name, int(version)) if version.isascii() and version.isdigit() else ("", 0)
