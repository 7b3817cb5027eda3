"""Both ways to make job documents of a log: ours, and the `eventsourcing` library's `ProjectionRunner` as its docs show it.

Each runs in a process of its own, one after the other, on the same servers, and tells how many facts it folded in how long.
Both read rows into facts with the same function (`events.record.read`), and fold them with the same one.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import zstandard
from eventsourcing.application import Application
from eventsourcing.persistence import Mapper, Notification, Tracking
from eventsourcing.postgres import PostgresDatastore, PostgresTrackingRecorder
from eventsourcing.projection import Projection, ProjectionRunner
from psycopg.conninfo import conninfo_to_dict
from psycopg.sql import SQL, Identifier, Literal
from redis.asyncio import Redis

from app.running import run_loop
from app.settings import Settings
from bench.children import tell
from events.facts import JobFact
from events.postgres import PostgresHistory
from events.record import Recorded, StoredFact, read
from projections import job_status
from projections.folding import fold
from projections.generations import RedisGenerations
from projections.job_status import value_of
from projections.job_views import JobViews, Terms
from projections.replay import Rebuild, leading
from projections.table import PROJECTIONS
from projections.views import Keys
from results.postgres import PostgresDocuments

TERMS = Terms(Settings(_env_file=None).rules, timedelta(days=36_500))
"""Nothing expires while it is measured: what is gone at once need not be kept."""
DONE_WITHIN_S = 3_600.0


@dataclass(frozen=True, slots=True)
class Replayed:
    """What one contender did: facts, wall-clock and processor seconds (its own process only), and the most memory it had."""

    facts: int
    seconds: float
    processor_s: float
    peak_mb: float

    @property
    def per_s(self) -> float:
        return self.facts / self.seconds


@contextmanager
def _told(facts: int) -> Iterator[None]:
    began, used = time.monotonic(), time.process_time()
    yield
    seconds, processor_s = time.monotonic() - began, time.process_time() - used
    tell(asdict(Replayed(facts, seconds, processor_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)))


# --- Ours -------------------------------------------------------------------------------------------------------------


def ours(options: dict[str, Any]) -> None:
    """What `lookup replay` runs, from an empty generation to the end of the log; of one view (like for like) or of all."""
    run_loop(_ours(options))


async def _ours(options: dict[str, Any]) -> None:
    views = PROJECTIONS if options["views"] == "all" else [job_status.VIEW]
    log = PostgresHistory(options["database_url"])
    documents = PostgresDocuments(options["database_url"])
    await documents.open()
    async with Redis.from_url(options["redis_url"]) as redis:
        generations = RedisGenerations(redis, Keys())
        async with leading(generations) as fence:
            rebuild = Rebuild(fence, generations, log, documents.get, views, TERMS, lambda: datetime.now(UTC))
            await rebuild.open()
            with _told(options["facts"]):
                await rebuild.build_up_to(options["facts"])
    await documents.close()
    await log.close()


# --- The library ------------------------------------------------------------------------------------------------------


class FactMapper(Mapper[UUID]):
    """Rows of our log as our facts, instead of the library's own JSON."""

    def to_domain_event(self, stored_event: Any) -> Any:
        assert isinstance(stored_event, Notification)
        assert isinstance(stored_event.originator_id, UUID)
        stored = StoredFact(
            stored_event.id, stored_event.originator_id, stored_event.originator_version, stored_event.topic, stored_event.state
        )
        return read(stored)


class Log(Application[UUID]):
    """The upstream application: its table of events is our log."""

    name = "stored"

    def construct_mapper(self) -> Mapper[UUID]:
        return FactMapper(self.construct_transcoder())


class JobDocuments(PostgresTrackingRecorder):
    """The materialised view: a document and the tracking record in one transaction, as the library's docs show it."""

    def __init__(self, datastore: PostgresDatastore, **kwargs: Any) -> None:
        super().__init__(datastore, **kwargs)
        self.sql_create_statements.append(
            SQL("CREATE TABLE IF NOT EXISTS job_documents (job_id uuid PRIMARY KEY, document bytea NOT NULL)").format()
        )

    def show(self, job_id: UUID, document: bytes, tracking: Tracking) -> None:
        with self.datastore.transaction(commit=True) as curs:
            self._insert_tracking(curs, tracking)
            curs.execute(_UPSERT, (job_id, document), prepare=True)

    def results(self, keys: Sequence[str]) -> dict[str, bytes]:
        with self.datastore.transaction(commit=False) as curs:
            rows = curs.execute(_RESULTS, (list(keys),), prepare=True).fetchall()
        return {row["key"]: row["body"] for row in rows}


_UPSERT = SQL(
    "INSERT INTO job_documents (job_id, document) VALUES (%b, %b)"
    " ON CONFLICT (job_id) DO UPDATE SET document = EXCLUDED.document"
)
_RESULTS = SQL("SELECT key, body FROM result_documents WHERE key = ANY(%s)")


class JobDocumentsProjection(Projection[JobDocuments]):
    """The same fold as ours. Open jobs are kept in memory, as ours does it: reading them back would cost it another query."""

    name = "jobs"
    topics = ()

    def __init__(self, view: JobDocuments) -> None:
        super().__init__(view)
        self._jobs: dict[UUID, JobViews] = {}
        self._decompressor = zstandard.ZstdDecompressor()

    def process_event(self, domain_event: Any, tracking: Tracking) -> None:
        recorded: Recorded = domain_event
        assert isinstance(recorded.fact, JobFact)
        job = fold(self._jobs.get(recorded.stream_id), recorded, TERMS)
        if job.missing:
            found = self.view.results([reference.location.key for reference in job.missing])
            job.find({key: self._decompressor.decompress(body) for key, body in found.items()})
        self._jobs[recorded.stream_id] = job
        self.view.show(recorded.stream_id, value_of(job), tracking)
        if job.saga.closed:
            del self._jobs[recorded.stream_id]


def library(options: dict[str, Any]) -> None:
    """Up to the fact `options["facts"]`. `commit` is PostgreSQL's `synchronous_commit` for the view."""
    with psycopg.connect(options["database_url"], autocommit=True) as conn:
        conn.execute("DROP TABLE IF EXISTS job_documents, jobs_tracking")
        conn.execute(
            SQL("ALTER DATABASE {} SET synchronous_commit = {}").format(
                Identifier(conn.info.dbname), Literal(options["commit"])
            )
        )
    environment = _environment(options["database_url"])
    with (
        _told(options["facts"]),
        ProjectionRunner(
            application_class=Log, projection_class=JobDocumentsProjection, view_class=JobDocuments, env=environment
        ) as runner,
    ):
        runner.wait(options["facts"], timeout=DONE_WITHIN_S)


def _environment(database_url: str) -> dict[str, str]:
    where = conninfo_to_dict(database_url)
    return {
        "PERSISTENCE_MODULE": "eventsourcing.postgres",
        "POSTGRES_DBNAME": str(where["dbname"]),
        "POSTGRES_HOST": str(where.get("host", "")),
        "POSTGRES_PORT": str(where.get("port", "5432")),
        "POSTGRES_USER": str(where["user"]),
        "POSTGRES_PASSWORD": str(where.get("password", "none")),
        "POSTGRES_SINGLE_ROW_TRACKING": "true",
        "STORED_CREATE_TABLE": "false",
    }


if __name__ == "__main__":
    {"ours": ours, "library": library}[sys.argv[1]](json.loads(sys.argv[3]))
