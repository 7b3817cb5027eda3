"""Corrections: what was said is read again, and what comes out differently is appended as a fact; nothing else is touched."""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import orjson
import pytest

from app.reparse import READERS, changes_of
from domain.saga import replay
from events.facts import Erased, Fact, JobFact, RawAbsence, ResultCorrected
from events.memory import MemoryStore
from events.record import StoredFact, envelope_of, fact_of
from events.store import AppendUnit, NewFacts, StreamHead
from results.documents import MemoryDocuments, reference_to
from tests.builders import (
    CAUSE,
    GEOIP,
    NOW,
    PING,
    RDAP,
    Clock,
    at,
    completed,
    corrected,
    counts,
    dispatched,
    failed,
    job_completed,
    memory_store,
    submitted,
)
from workers.lookup import RawAnswer
from workers.parsers import PARSERS
from write_side.corrections import Correcting, NoAnswer, Reader, Reparse, Tally, Verdict, parsed_label

BY_ALICE = Correcting("reparse:alice", "the registrar was wrong")
RAW = b'{"asked":"example.com"}\nRegistrar: Example'
OLD = b'{"registrar":null}'
NEW = b'{"registrar":"Example"}'


def read_better(raw: bytes) -> bytes:
    return orjson.dumps({"registrar": raw.decode().rpartition(": ")[2]})


def refuse(_: bytes) -> bytes:
    raise NoAnswer("It is about something else.")


def reader(version: int = 2) -> Reader:
    return Reader("rdap", version, read_better)


@dataclass
class Archive:
    """A log with the documents that its facts tell of."""

    store: MemoryStore = field(default_factory=lambda: memory_store(Clock()))
    documents: MemoryDocuments = field(default_factory=MemoryDocuments)

    async def job(self, number: int = 1, *, parser: str | None = "rdap/1", raw: bytes | None = RAW, **changes: Any) -> UUID:
        """A job that ended, whose RDAP answer was read by `parser` from `raw`."""
        job_id = UUID(int=number)
        result = await self.documents.put(job_id, OLD)
        kept = None if raw is None else await self.documents.put(job_id, raw)
        told = completed(RDAP, job_id=job_id).model_copy(update={"result": result, "parser": parser, "raw": kept, **changes})
        ended = job_completed(counts(succeeded=1, failed=1), job_id=job_id)
        await self.happened(
            submitted(RDAP, PING, job_id=job_id),
            dispatched(RDAP, PING, job_id=job_id),
            failed(PING, job_id=job_id),
            told,
            ended,
        )
        return job_id

    async def happened(self, *facts: JobFact) -> None:
        await self.store.append(AppendUnit([NewFacts(facts[0].job_id, StreamHead(), facts)], CAUSE))

    def lose(self, job_id: UUID, document: bytes) -> None:
        del self.documents._documents[reference_to(job_id, document).location.key]

    async def reparse(self, reader: Reader | None = None, correcting: Correcting | None = None, **options: Any) -> Tally:
        readers = {} if reader is None else {reader.name: reader}
        work = Reparse(self.store, self.store, self.documents, readers, RDAP, lambda: at(60), **options)
        return await work.run(correcting)

    async def facts(self, job_id: UUID) -> list[Fact]:
        return [fact_of(stored.topic, stored.state) for stored in (await self.store.read([job_id]))[job_id]]


async def test_an_answer_that_comes_out_differently_is_corrected_by_a_fact() -> None:
    archive = Archive()
    job_id = await archive.job()
    before = await archive.facts(job_id)

    tally = await archive.reparse(reader(), BY_ALICE)

    assert (tally.jobs, tally.corrected, tally.counts[Verdict.CHANGED]) == (1, 1, 1)
    *first, last = await archive.facts(job_id)
    assert first == before
    assert last == ResultCorrected(
        job_id=job_id,
        service=RDAP,
        attempt=1,
        result=reference_to(job_id, NEW),
        replaces=reference_to(job_id, OLD).sha256,
        parser="rdap/2",
        reason="the registrar was wrong",
        corrected_at=at(60),
    )
    assert len(await archive.documents.get([reference_to(job_id, body) for body in (OLD, NEW, RAW)])) == 3
    assert replay(await archive.facts(job_id)) == replay(before)


async def test_a_correction_tells_who_and_why_and_of_which_fact() -> None:
    archive = Archive()
    job_id = await archive.job()

    await archive.reparse(reader(), BY_ALICE)

    stream = (await archive.store.read([job_id]))[job_id]
    envelope, answer = envelope_of(stream[-1].state), envelope_of(stream[3].state)
    assert (envelope["actor"], envelope["reason"]) == ("reparse:alice", "the registrar was wrong")
    assert (envelope["causation_id"], envelope["correlation_id"]) == (answer["event_id"], answer["correlation_id"])


async def test_a_dry_run_writes_nothing_and_tells_the_same() -> None:
    archive = Archive()
    job_id = await archive.job()
    head = await archive.store.head()

    tally = await archive.reparse(reader())

    assert (tally.counts, tally.corrected) == (Counter({Verdict.CHANGED: 1}), 0)
    assert await archive.store.head() == head
    assert await archive.documents.get([reference_to(job_id, NEW)]) == {}
    (sample,) = tally.samples
    assert sample.document == NEW


async def test_what_was_corrected_is_not_corrected_again() -> None:
    archive = Archive()
    await archive.job()
    await archive.reparse(reader(), BY_ALICE)
    head = await archive.store.head()

    assert (await archive.reparse(reader(), BY_ALICE)).counts == Counter({Verdict.CURRENT: 1})
    assert (await archive.reparse(reader(), BY_ALICE, every=True)).counts == Counter({Verdict.SAME: 1})
    assert await archive.store.head() == head


async def test_a_later_parser_corrects_the_correction() -> None:
    archive = Archive()
    job_id = await archive.job()
    await archive.reparse(reader(), BY_ALICE)

    await archive.reparse(Reader("rdap", 3, lambda _: b"{}"), BY_ALICE)

    last = (await archive.facts(job_id))[-1]
    assert isinstance(last, ResultCorrected)
    assert (last.replaces, last.parser) == (reference_to(job_id, NEW).sha256, "rdap/3")


@pytest.mark.parametrize(
    ("job", "reader", "verdict"),
    [
        ({}, Reader("rdap", 2, lambda _: OLD), Verdict.SAME),
        ({"parser": "rdap/2"}, reader(), Verdict.CURRENT),
        ({"parser": "rdap/3"}, reader(), Verdict.NEWER),
        ({"parser": None, "raw": None}, reader(), Verdict.NEVER_SAID),
        ({"raw": None, "raw_absent": RawAbsence.TOO_LARGE}, reader(), Verdict.TOO_LARGE),
        ({"raw": None, "raw_absent": RawAbsence.SWITCHED_OFF}, reader(), Verdict.SWITCHED_OFF),
        ({"parser": "whois/1"}, reader(), Verdict.NO_PARSER),
        ({"parser": "rdap/\u0663"}, reader(), Verdict.NO_PARSER),
        ({}, Reader("rdap", 2, refuse), Verdict.REFUSED),
        ({}, Reader("rdap", 2, lambda _: b"x" * 1_048_577), Verdict.REFUSED),
    ],
)
async def test_what_cannot_or_need_not_be_corrected_is_told_and_left_alone(
    job: Mapping[str, Any], reader: Reader, verdict: Verdict
) -> None:
    archive = Archive()
    await archive.job(**job)
    head = await archive.store.head()

    tally = await archive.reparse(reader, BY_ALICE)

    assert tally.counts == Counter({verdict: 1})
    assert await archive.store.head() == head


async def test_a_raw_answer_that_is_gone_is_told() -> None:
    archive = Archive()
    archive.lose(await archive.job(), RAW)

    assert (await archive.reparse(reader(), BY_ALICE)).counts == Counter({Verdict.GONE: 1})


async def test_only_the_service_that_was_named_is_read_again() -> None:
    archive = Archive()
    await archive.job()
    work = Reparse(archive.store, archive.store, archive.documents, {"rdap": reader()}, GEOIP, lambda: NOW)

    assert (await work.run(BY_ALICE)).counts == Counter()


async def test_a_job_whose_target_was_erased_is_not_touched() -> None:
    archive = Archive()
    stream = archive.store._streams[await archive.job()]
    stream[0] = stream[0]._replace(state=b"\n".join(stream[0].state.split(b"\n")[:3]))
    assert getattr(fact_of(stream[0].topic, stream[0].state), "target") == Erased()  # noqa: B009 - any fact

    assert (await archive.reparse(reader(), BY_ALICE)).counts == Counter()


class Sealed:
    """A store whose table no longer has a job's facts, though the history has them."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    async def read(self, stream_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[StoredFact]]:
        return {stream_id: stream[-1:] for stream_id, stream in (await self._store.read(stream_ids)).items()}


async def test_a_sealed_job_is_told_and_left_alone() -> None:
    """Its facts are not in the table to go on from, and whoever reads only the table would find a story without a beginning."""
    archive = Archive()
    await archive.job()
    sealed: Any = Sealed(archive.store)
    work = Reparse(archive.store, sealed, archive.documents, {"rdap": reader()}, RDAP, lambda: NOW)

    assert (await work.run(BY_ALICE)).counts == Counter({Verdict.SEALED: 1})


async def test_two_who_correct_at_once_correct_once() -> None:
    archive = Archive()
    job_id = await archive.job()

    tallies = await asyncio.gather(*(archive.reparse(reader(), BY_ALICE) for _ in range(5)))

    assert sum(tally.corrected for tally in tallies) == 1
    assert sum(isinstance(fact, ResultCorrected) for fact in await archive.facts(job_id)) == 1


async def test_many_jobs_are_walked_in_pages_and_samples_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("write_side.corrections.STREAMS_PAGE", 7)
    monkeypatch.setattr("write_side.corrections.ANSWERS_PAGE", 3)
    archive = Archive()
    for number in range(1, 31):
        await archive.job(number)

    tally = await archive.reparse(reader(), BY_ALICE, samples_max=4)

    assert (tally.jobs, tally.answers, tally.corrected, len(tally.samples)) == (30, 30, 30, 4)


# --- The parsers that there are -------------------------------------------------------------------------------------------


def test_every_parser_reads_again_what_lies_in_the_store() -> None:
    """And whatever lies there instead is refused in our words."""
    for name, read_again in READERS.items():
        assert read_again.label == str(PARSERS[name])
        with pytest.raises(NoAnswer, match=r"not in (the|its documented) form|cannot be read|not JSON"):
            read_again.read(RawAnswer({"address": "192.0.2.1", "asked": "x", "kind": "domain"}, b"\xff").stored())


@pytest.mark.parametrize(
    ("label", "parsed"), [("rdap/2", ("rdap", 2)), ("rdap", ("", 0)), (None, ("", 0)), ("rdap/x", ("", 0)), ("a/b/2", ("", 0))]
)
def test_a_label_names_a_parser_and_a_version(label: str | None, parsed: tuple[str, int]) -> None:
    assert parsed_label(label) == parsed


def test_changes_are_told_by_their_places() -> None:
    before, after = b'{"a":{"b/c":1,"d":[1]},"e":2}', b'{"a":{"b/c":2,"d":[1,2]},"f":3}'

    assert changes_of(before, after) == [("/a/b~1c", 1, 2), ("/a/d", [1], [1, 2]), ("/e", 2, None), ("/f", None, 3)]


def test_the_builders_correction_is_of_the_builders_answer() -> None:
    assert corrected(PING).replaces == completed(PING).result.sha256
