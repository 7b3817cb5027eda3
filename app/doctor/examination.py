"""One run of the doctor: reads the log, the results and the views, page by page, and holds each against the others.

It stops nobody. What moves meanwhile is read in an order in which it cannot deceive: first the views of some jobs, all of one
moment, then their facts, of which those up to the views' checkpoint must give these views. What looks broken is looked at once
more a moment later, and only what is broken then as well is told.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app import heartbeat
from app.audit.rows import told_hash
from app.doctor import checks, look
from app.doctor.findings import Finding, Report, SelfChecked
from app.doctor.jobs import Job, folded_to, references_of, saga_of
from app.doctor.keyspace import Keyspace
from app.doctor.machinery import RETRYING, Looks, Machinery
from app.doctor.stories import Stream, stream_of
from domain.commands import Rules
from events.chain import GENESIS, next_head
from events.facts import JobFact
from events.heads import CHECKSUM_BYTES, UnreadableHead, checksum
from events.store import HistoryReader, StoreUnavailable
from projections.job_views import Terms
from projections.views import Keys
from results.documents import ResultDocuments, ResultsUnavailable
from write_side import checkpoints
from write_side.heads import open_heads

STREAMS_PAGE = 200
LOG_PAGE = 1_000
SUSPECTS_MAX = 1_000
SECOND_LOOK_AFTER_S = heartbeat.INTERVAL_S + 1.0
NO_DATABASE = "The database cannot be reached, or `lookup migrate` has not been run."
NO_REDIS = "Redis cannot be reached."
VIEWS = "the views"


@dataclass
class Examination:
    """One run over everything; `run` gives the report. Nothing is changed."""

    database_url: str
    store: HistoryReader
    redis: Redis
    documents: ResultDocuments
    keys: Keys
    rules: Rules
    retention: timedelta
    dead_letter_max_age: timedelta
    lag_max: timedelta
    self_check_every: timedelta
    now: Callable[[], datetime]
    second_look_after_s: float = SECOND_LOOK_AFTER_S
    report: Report = field(default_factory=Report)

    async def run(self) -> Report:
        began = time.monotonic()
        machinery = await self._machinery()
        if machinery is not None:
            self.report.examined.log_head = machinery.log_head
            if (last := machinery.self_check) is not None:
                self.report.examined.self_check = SelfChecked(last.at.isoformat(), last.compared, last.differing_total)
            with self._told_as("the log"):
                await self._examine_streams(machinery)
            with self._told_as("the log's head"):
                await self._examine_log_head()
            with self._told_as("the keys of Redis"):
                await self._examine_keys()
            await self._examine_machinery()
        self.report.examined.seconds = round(time.monotonic() - began, 3)
        return self.report

    @contextmanager
    def _told_as(self, what: str) -> Iterator[None]:
        """What cannot be reached ends this look and is told; the others go on."""
        try:
            yield
        except (StoreUnavailable, ResultsUnavailable, psycopg.Error):
            self.report.unexamined[what] = NO_DATABASE
        except (RedisError, OSError):
            self.report.unexamined[what] = NO_REDIS

    # --- streams, jobs and their views --------------------------------------------------------------------------------

    async def _examine_streams(self, machinery: Machinery) -> None:
        relayed = machinery.relayed[checkpoints.COMMANDS].position
        suspects: list[UUID] = []
        async for stream_ids in self._stream_ids():
            findings = await self._look_at(stream_ids, relayed, self._count)
            suspects += dict.fromkeys(UUID(finding.about) for finding in findings)
            if len(suspects) >= SUSPECTS_MAX:
                await self._look_again(suspects, relayed)
                suspects.clear()
        await self._look_again(suspects, relayed)

    async def _stream_ids(self) -> AsyncIterator[Sequence[UUID]]:
        """All streams. Those that begin meanwhile come last, as ids are made in the order of time, and slower than we read."""
        after: UUID | None = None
        while page := await self.store.stream_ids(after, STREAMS_PAGE):
            yield page
            after = page[-1]

    async def _look_again(self, suspects: Sequence[UUID], relayed: int) -> None:
        if not suspects:
            return
        await asyncio.sleep(self.second_look_after_s)
        for first in range(0, len(suspects), STREAMS_PAGE):
            self.report.add(await self._look_at(suspects[first : first + STREAMS_PAGE], relayed, lambda _: None))

    async def _look_at(self, stream_ids: Sequence[UUID], relayed: int, count: Callable[["Evidence"], None]) -> list[Finding]:
        evidence = await self._evidence_of(stream_ids)
        count(evidence)
        return [finding for stream in evidence.streams for finding in self._judge(stream, evidence, relayed)]

    async def _evidence_of(self, stream_ids: Sequence[UUID]) -> "Evidence":
        """The views before the facts, and the time before the facts: neither can be ahead of what the facts tell then."""
        shown = await self._shown(stream_ids)
        now = self.now()
        rows = await self.store.read(stream_ids)
        streams = [stream_of(stream_id, rows[stream_id]) for stream_id in stream_ids if stream_id in rows]
        references = [reference for stream in streams for reference in references_of(stream)]
        return Evidence(now, streams, shown, await self.documents.get(references) if references else {})

    async def _shown(self, stream_ids: Sequence[UUID]) -> look.ShownJobs | None:
        """None without views of this log that could be held against it; the checks of the machinery tell that.

        A Redis that did not answer once is not asked again: each page would wait for it.
        """
        if VIEWS in self.report.unexamined:
            return None
        try:
            shown = await look.look_at(self.redis, self.keys, stream_ids)
        except (RedisError, OSError):
            self.report.unexamined[VIEWS] = NO_REDIS
            return None
        is_ours = shown is not None and shown.log_id == str(await self.store.log_id())
        return shown if is_ours else None

    def _judge(self, stream: Stream, evidence: "Evidence", relayed: int) -> Iterator[Finding]:
        """What is wrong with a stream; of a stream that is sound, what is wrong with its story; and so on to its views."""
        findings = list(_found(checks.OF_A_STREAM, stream, stream.stream_id))
        if not findings and any(isinstance(recorded.fact, JobFact) for recorded in stream.facts):
            findings = list(_found(checks.OF_A_JOBS_STREAM, stream, stream.stream_id))
            if not findings:
                findings = list(_found(checks.OF_A_JOB, self._job(stream, evidence, relayed), stream.stream_id))
        yield from findings

    def _job(self, stream: Stream, evidence: "Evidence", relayed: int) -> Job:
        shown = evidence.shown
        return Job(
            stream=stream,
            saga=saga_of(stream),
            folded=folded_to(stream, shown.checkpoint, evidence.results, Terms(self.rules, self.retention)) if shown else None,
            shown=shown.jobs.get(stream.stream_id) if shown else None,
            results=evidence.results,
            relayed=relayed,
            now=evidence.now,
            rules=self.rules,
            retention=self.retention,
        )

    def _count(self, evidence: "Evidence") -> None:
        examined = self.report.examined
        for stream in evidence.streams:
            examined.facts += len(stream.rows)
            examined.jobs += any(isinstance(recorded.fact, JobFact) for recorded in stream.facts)
            examined.results += len(references_of(stream))
        if evidence.shown:
            examined.views += sum(shown.value is not None for shown in evidence.shown.jobs.values())

    # --- the log and Redis as a whole ---------------------------------------------------------------------------------

    async def _examine_log_head(self) -> None:
        """The relay keeps a running hash over all facts that it has told: without one of them it comes out otherwise."""
        relay = await look.look_at_relay(self.database_url)
        position, told = relay.checkpoints[checkpoints.FACTS]
        head, at = GENESIS, 0
        while at < position and (page := await self.store.read_all(at, min(LOG_PAGE, position - at))):
            for stored in page:
                head = next_head(head, stored.position, told_hash(stored)) if stored.position <= position else head
            at = page[-1].position
        if head != told:
            sentence = f"The facts up to position {position} are not those that the relay told: one is missing, or was changed."
            self.report.add([Finding(checks.WRONG_LOG_HEAD.name, "log", sentence, position)])
        await self._examine_signed_head()

    async def _examine_signed_head(self) -> None:
        """What was signed is there still, to its last fact. Whether all of it is, `lookup audit verify` says."""
        async with open_heads(self.database_url) as table:
            try:
                signed = await table.last()
            except UnreadableHead:
                self.report.add([Finding(checks.WRONG_LOG_HEAD.name, "heads", "The last signed head cannot be read.")])
                return
        if signed is None or signed.state.position == 0:
            return
        position = signed.state.position
        found = await self.store.read_all(position - 1, 1)
        known = signed.checksums[-CHECKSUM_BYTES:]
        there = bool(found) and found[0].position == position
        if not there or (known and checksum(position, told_hash(found[0])) != known):
            sentence = (
                f"The fact at position {position}, which head {signed.number} was signed over, is missing or another one."
            )
            self.report.add([Finding(checks.WRONG_LOG_HEAD.name, "heads", sentence, position)])

    async def _examine_keys(self) -> None:
        keyspace = Keyspace(self.redis, self.store, self.keys)
        self.report.add(await keyspace.orphans())
        self.report.examined.keys = keyspace.examined
        self.report.add(await keyspace.unknown_to_dos())

    # --- the machinery ------------------------------------------------------------------------------------------------

    async def _machinery(self) -> Machinery | None:
        """One look. Without the database there is nothing to hold anything against; what Redis does not tell is left out."""
        found: Machinery | None = None
        with self._told_as("the log and all that is held against it"):
            found = await look.look_at_machinery(
                self.database_url, self.store, self.dead_letter_max_age, self.lag_max, self.now()
            )
            with self._told_as("the projection and the parts"):
                found = await look.with_redis(found, self.store, self.redis, self.keys, self.self_check_every)
        return found

    async def _examine_machinery(self) -> None:
        """At once if all is well, else with a second look when every part has told of itself anew."""
        now = await self._machinery()
        if now is None or not (_found_about(Looks(now, now)) or any(beat.state == RETRYING for beat in now.parts)):
            return
        await asyncio.sleep(self.second_look_after_s)
        again = await self._machinery()
        if again is not None:
            self.report.add(_found_about(Looks(again, now)))


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was read of some streams: their views, of one moment; the time; then their facts and results."""

    now: datetime
    streams: Sequence[Stream]
    shown: look.ShownJobs | None
    results: Mapping[str, bytes]


def _found(table: Sequence[checks.Check[Any, Any]], seen: Any, about: UUID) -> Iterator[Finding]:
    for check in table:
        for problem in check.look(seen):
            yield Finding(check.name, str(about), problem.sentence, problem.position)


def _found_about(looks: Looks) -> list[Finding]:
    return [
        Finding(check.name, about, problem.sentence, problem.position)
        for check in checks.OF_THE_MACHINERY
        for about, problem in check.look(looks)
    ]
