"""A log to replay: jobs of ten facts each with answers as real providers give them, the same for the same seed, in a database.

Jobs overlap as they do under load: at any time `OPEN_AT_ONCE` are under way. What is written is what the product would have
written, chained and salted; only that it goes down by COPY.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID

import orjson
import psycopg
import zstandard

from app.demo.rdap_documents import network_document
from events.facts import (
    DeferReason,
    JobCompleted,
    JobFact,
    JobSubmitted,
    OutcomeCounts,
    Priority,
    Sensitivity,
    Service,
    Source,
    Target,
    TargetType,
    Task,
    TaskCompleted,
    TaskDeferred,
    TasksDispatched,
)
from events.record import SALT_BYTES, Cause, Place, Written, shared_envelope, write_caused
from results.documents import reference_to

FACTS_OF_A_JOB = 10
OPEN_AT_ONCE = 50
BEGINNING = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
APART = timedelta(milliseconds=10)
_COPY_FACTS = "COPY stored_events (originator_id, originator_version, topic, state) FROM STDIN (FORMAT BINARY)"
_COPY_DOCUMENTS = "COPY result_documents (key, body) FROM STDIN (FORMAT BINARY)"
_WORKERS = {service: f"{service}@worker-1:42" for service in Service}
_PROVIDERS = {
    Service.GEOIP: "ip-api.com",
    Service.PING: "icmp",
    Service.RDAP: "rdap.registry.example",
    Service.REVERSE_DNS: "192.0.2.53",
}


@dataclass
class Job:
    """A job that is being written: what is left to happen, and what its next fact is chained to."""

    stream_id: UUID
    left: list[tuple[JobFact, datetime]]
    previous: bytes = bytes(32)
    version: int = 0


@dataclass
class LogWriter:
    """Writes one log. `documents` are those of the jobs that were begun, by key, until they are taken."""

    seed: int = 1
    documents: list[tuple[str, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._compressor = zstandard.ZstdCompressor(level=3)
        self._begun = 0

    def rows(self, events: int) -> Iterator[Written]:
        """So many facts (a multiple of ten), in the order of their positions."""
        jobs = events // FACTS_OF_A_JOB
        under_way: list[Job] = []
        while under_way or self._begun < jobs:
            while self._begun < jobs and len(under_way) < OPEN_AT_ONCE:
                under_way.append(self._begin())
            at = self._random.randrange(len(under_way))
            yield self._next_fact(under_way[at])
            if not under_way[at].left:
                under_way[at] = under_way[-1]
                under_way.pop()

    def _begin(self) -> Job:
        number, begun_at = self._begun, BEGINNING + self._begun * APART
        self._begun += 1
        job_id = UUID(int=int(begun_at.timestamp() * 1000) << 80 | 7 << 76 | 2 << 62 | self._random.getrandbits(61))
        address = f"198.{18 + number // 65_536 % 2}.{number // 256 % 256}.{number % 256}"
        return Job(job_id, self._story(job_id, address, begun_at))

    def _next_fact(self, job: Job) -> Written:
        fact, at = job.left.pop(0)
        job.version += 1
        cause = Cause(actor=_actor(fact), correlation_id=job.stream_id, request_id=f"req-{job.stream_id.hex[:12]}")
        place = Place(job.stream_id, job.version, job.previous)
        event_id = UUID(int=self._random.getrandbits(128))
        row = write_caused(fact, place, shared_envelope(cause, at), event_id=event_id, salt=self._salt)
        job.previous = row.hash
        return row

    def _salt(self) -> bytes:
        return self._random.randbytes(SALT_BYTES)

    def _story(self, job_id: UUID, address: str, at: datetime) -> list[tuple[JobFact, datetime]]:
        """Four services; RDAP is deferred once, and the ping is asked for a second time."""
        target = Target(raw=address, canonical=address, type=TargetType.IP_ADDRESS)
        expires_at = at + timedelta(seconds=90)
        submitted = JobSubmitted(
            job_id=job_id,
            tenant="default",
            target=target,
            target_type=target.type,
            services=tuple(Service),
            priority=Priority.INTERACTIVE,
            sensitivity=Sensitivity.NORMAL,
            requested_by="203.0.113.9",
            expires_at=expires_at,
            submitted_at=at,
        )

        def dispatched(after_s: float, attempt: int, *services: Service) -> TasksDispatched:
            return TasksDispatched(
                job_id=job_id,
                target=target,
                target_type=target.type,
                priority=Priority.INTERACTIVE,
                sensitivity=Sensitivity.NORMAL,
                expires_at=expires_at,
                tasks=tuple(
                    Task(service=one, command_id=UUID(int=self._random.getrandbits(128)), attempt=attempt, timeout_s=15.0)
                    for one in services
                ),
                dispatched_at=at + timedelta(seconds=after_s),
            )

        def completed(after_s: float, attempt: int, service: Service) -> TaskCompleted:
            document = orjson.dumps(self._answer(service, address))
            reference = reference_to(job_id, document)
            self.documents.append((reference.location.key, self._compressor.compress(document)))
            ended_at = at + timedelta(seconds=after_s)
            return TaskCompleted(
                job_id=job_id,
                service=service,
                attempt=attempt,
                result=reference,
                duration_ms=self._random.randrange(5, 2_000),
                source=Source.LIVE,
                observed_at=ended_at,
                completed_at=ended_at,
                worker=_WORKERS[service],
                provider=_PROVIDERS[service],
                parser=f"{service.lower()}/1",
            )

        deferred = TaskDeferred(
            job_id=job_id,
            service=Service.RDAP,
            attempt=1,
            until=at + timedelta(seconds=1),
            reason=DeferReason.QUOTA,
            deferred_at=at + timedelta(seconds=0.1),
        )
        ended = JobCompleted(
            job_id=job_id,
            counts=OutcomeCounts(succeeded=4, failed=0, timed_out=0, skipped=0),
            completed_at=at + timedelta(seconds=3),
        )
        facts: Sequence[tuple[JobFact, float]] = (
            (submitted, 0.0),
            (dispatched(0.0, 1, *Service), 0.0),
            (deferred, 0.1),
            (completed(0.2, 1, Service.GEOIP), 0.2),
            (completed(0.3, 1, Service.REVERSE_DNS), 0.3),
            (dispatched(1.0, 1, Service.RDAP), 1.0),
            (dispatched(1.1, 2, Service.PING), 1.1),
            (completed(2.0, 2, Service.PING), 2.0),
            (completed(3.0, 1, Service.RDAP), 3.0),
            (ended, 3.0),
        )
        return [(fact, at + timedelta(seconds=after_s)) for fact, after_s in facts]

    def _answer(self, service: Service, address: str) -> dict[str, object]:
        match service:
            case Service.GEOIP:
                return _PLACE | {"query": address, "lat": round(self._random.uniform(-60, 60), 4)}
            case Service.PING:
                return {"address": address, "sent": 4, "received": 4, "rttMs": [self._random.uniform(1, 90) for _ in range(4)]}
            case Service.RDAP:
                return network_document(address)
            case Service.REVERSE_DNS:
                return {"found": True, "names": [f"host-{address.replace('.', '-')}.customers.isp.example"]}


_PLACE: dict[str, object] = {
    "country": "Netherlands",
    "countryCode": "NL",
    "regionName": "North Holland",
    "city": "Amsterdam",
    "timezone": "Europe/Amsterdam",
    "isp": "Demo Network Operations B.V.",
    "org": "Demo",
    "as": "AS64500 Demo Network Operations B.V.",
}


def _actor(fact: JobFact) -> str:
    return "anonymous" if isinstance(fact, JobSubmitted) else "saga"


def fill(database_url: str, events: int, seed: int) -> None:
    """Put a log of so many facts into a migrated, empty database."""
    writer = LogWriter(seed)
    with psycopg.connect(database_url) as facts_of, psycopg.connect(database_url) as documents_of:
        facts_of.execute("SET synchronous_commit = off")
        with (
            facts_of.cursor().copy(_COPY_FACTS) as facts,
            documents_of.cursor().copy(_COPY_DOCUMENTS) as documents,
        ):
            facts.set_types(["uuid", "int8", "text", "bytea"])
            documents.set_types(["text", "bytea"])
            for row in writer.rows(events):
                facts.write_row((row.stream_id, row.stream_version, row.topic, row.state))
                while writer.documents:
                    documents.write_row(writer.documents.pop())
    with psycopg.connect(database_url, autocommit=True) as conn:
        # As a log that has been there for a while: its pages are settled, and the planner knows them.
        conn.execute("VACUUM (ANALYZE) stored_events")
        conn.execute("VACUUM (ANALYZE) result_documents")
