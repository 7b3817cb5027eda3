"""Every way on which facts are read brings old ones up to date: shown with rows of an older release in a real log.

The older release called a job's id `job`. Since then the facts have a new version, in which it is `job_id`; so a path that
forgets its upcaster cannot read them at all, and one that compares topics finds nothing if it knows only the newest.
"""

import ast
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from uuid_utils.compat import uuid7

from app import what_if
from app.audit.evidence import _fact
from app.audit.timeline import timeline_of
from app.doctor import stories
from app.migrate import migrate
from app.what_if_view import compare
from domain.saga import Ending
from domain.what_if import Changes, Comparison
from events import catalog
from events.catalog import FACTS, TOPICS, UPCASTERS, VERSIONS, topics_of
from events.chain import GENESIS, chained_hash
from events.facts import (
    DeadLetterRetried,
    Fact,
    JobsSealed,
    TargetErased,
    TasksDispatched,
)
from events.postgres import PostgresStore
from events.record import Place, StoredFact, read, write
from events.segments import Segments
from events.store import Scribe
from events.wire import cloud_events, read_batch
from projections import job_status
from projections.folding import Folder, fold_stream
from projections.job_views import Terms
from read_side.history import JobHistory
from results.documents import MemoryDocuments
from tests.builders import (
    CAUSE,
    GEOIP,
    JOB,
    NOW,
    PING,
    RDAP,
    RULES,
    Clock,
    at,
    completed,
    corrected,
    counts,
    deferred,
    dispatched,
    failed,
    job_completed,
    look_up_command,
    numbered_ids,
    skipped,
    submitted,
    timed_out,
)
from tests.servers.postgres import fresh_database
from tests.source import parsed
from workers.standing import LogStanding
from write_side import corrections, erasure, redelivery, relay, retention
from write_side.deadlines import Deadlines
from write_side.sagas import Sagas

OPEN = UUID("019b7c8a-0000-7000-8000-00000000000f")
LETTER, SEALS = UUID(int=71), UUID(int=72)
ROOT = Path(__file__).parents[2]
PACKAGES = ("app", "domain", "events", "projections", "read_side", "results", "workers", "write_side")
READING = {"read", "fact_of", "whole_fact", "read_batch", "cloud_events", "fact_type", "topics_of", "TOPICS", "FACTS"}
"""Who imports one of these from `events` reads facts, or compares topics."""

ENDED: list[Fact] = [
    submitted(PING, RDAP, GEOIP),
    dispatched(PING, RDAP),
    skipped(GEOIP),
    deferred(PING, until=at(1)),
    dispatched(PING, dispatch=2),
    completed(RDAP),
    failed(PING),
    job_completed(counts(succeeded=1, failed=1, skipped=1)),
    corrected(RDAP),
]
STILL_OPEN: list[Fact] = [submitted(PING, RDAP, job_id=OPEN), dispatched(PING, RDAP, job_id=OPEN), timed_out(PING, job_id=OPEN)]
RETRIED = DeadLetterRetried(letter_id=1, queue="q", job_id=JOB, by="alice", retried_at=NOW)
SEALED = JobsSealed(
    segment="s",
    sha256="00",
    first_position=1,
    last_position=2,
    jobs=1,
    facts=2,
    documents=0,
    size_bytes=9,
    closed_before=NOW,
    log_retention_days=1.0,
    sealed_at=NOW,
)


# --- A log that an older release wrote ------------------------------------------------------------------------------------


def as_then(stream_id: UUID, facts: Sequence[Fact]) -> Iterator[tuple[UUID, int, str, bytes]]:
    """The rows of a stream as version 1 of each fact laid them out, the chain over what was written then."""
    previous = GENESIS
    for version, fact in enumerate(facts, start=1):
        row = write(fact, Place(stream_id, version, previous), CAUSE, event_id=uuid7(), recorded_at=NOW, salt=lambda: bytes(16))
        envelope, chained, _, *erasable = row.state.split(b"\n")
        chained = chained.replace(b'"job_id":', b'"job":')
        topic = f"lookup.{type(fact).__name__}.v1"
        previous = chained_hash(previous, stream_id, version, topic, envelope, chained)
        yield stream_id, version, topic, b"\n".join([envelope, chained, previous.hex().encode(), *erasable])


@pytest.fixture(scope="module")
def old_log_url(postgres: str) -> Iterator[str]:
    with fresh_database(postgres) as url:
        migrate(url, uuid7(), {})
        with psycopg.connect(url) as conn:
            for stream_id, facts in ((JOB, ENDED), (OPEN, STILL_OPEN), (LETTER, [RETRIED]), (SEALS, [SEALED])):
                conn.cursor().executemany(
                    "INSERT INTO stored_events (originator_id, originator_version, topic, state) VALUES (%s, %s, %s, %s)",
                    list(as_then(stream_id, facts)),
                )
        yield url


@pytest.fixture
def a_release_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fact has a new version, in which a job's id is called what it is called in the code."""
    topics: Any = TOPICS
    for kind, version in VERSIONS.items():
        old, new = (f"lookup.{kind.__name__}.v{number}" for number in (version, version + 1))
        monkeypatch.delitem(FACTS, old)
        monkeypatch.setitem(FACTS, new, kind)
        monkeypatch.setitem(topics, kind, new)
        monkeypatch.setitem(UPCASTERS, old, _with_the_jobs_new_name)


def _with_the_jobs_new_name(old: dict[str, Any]) -> dict[str, Any]:
    return {"job_id" if name == "job" else name: value for name, value in old.items()}


@dataclass
class OldLog:
    store: PostgresStore

    async def stream(self, stream_id: UUID) -> Sequence[StoredFact]:
        return (await self.store.read([stream_id]))[stream_id]

    async def rows(self) -> Sequence[StoredFact]:
        return await self.store.read_all(0, 100)


@pytest.fixture
async def old_log(old_log_url: str, a_release_later: None) -> AsyncIterator[OldLog]:
    store = PostgresStore(old_log_url, Scribe(Clock(), uuid7, lambda: bytes(16)))
    yield OldLog(store)
    await store.close()


# --- The ways -------------------------------------------------------------------------------------------------------------


async def fold_of_the_saga(old: OldLog) -> None:
    loaded = await Sagas(old.store).load([JOB, OPEN])

    assert loaded[JOB].saga.closed
    assert loaded[JOB].saga.endings[RDAP] is Ending.SUCCEEDED
    assert loaded[OPEN].saga.open_tasks.keys() == {RDAP}


async def a_workers_late_item(old: OldLog) -> None:
    standing = LogStanding(old.store)

    assert await standing.is_wanted(look_up_command(RDAP, job_id=OPEN))
    assert not await standing.is_wanted(look_up_command(PING, job_id=OPEN))


async def relays_facts_and_commands(old: OldLog) -> None:
    rows = await old.rows()

    told = read_batch(cloud_events(rows, "/lookup/test"))
    assert [recorded.fact for recorded in told] == [*ENDED, *STILL_OPEN, RETRIED, SEALED]
    assert b'.v1"' not in cloud_events(rows, "/lookup/test")
    commands = [command for of_queue in relay.commands_of(rows, NOW).values() for command in of_queue]
    assert len(commands) == sum(len(fact.tasks) for fact in [*ENDED, *STILL_OPEN] if isinstance(fact, TasksDispatched))
    open_ids = await old.store.open_streams(relay.OPENING_TOPICS, relay.CLOSING_TOPICS, None, 10)
    assert open_ids == [OPEN]
    assert [command.service for _, command in relay._open_commands(await old.stream(OPEN))] == [RDAP]


async def an_older_relays_batch(old: OldLog) -> None:
    """It was written before the relay was replaced, and is read after we were."""
    with pytest.MonkeyPatch.context() as then:
        topics: Any = catalog.FACTS
        for kind in VERSIONS:
            then.setitem(topics, f"lookup.{kind.__name__}.v1", kind)
        body = cloud_events(await old.rows(), "/lookup/test")
    assert b'"type":"lookup.TaskCompleted.v1"' in body

    assert [recorded.fact for recorded in read_batch(body)] == [*ENDED, *STILL_OPEN, RETRIED, SEALED]


async def what_is_due_by_the_log(old: OldLog) -> None:
    async def nothing(*_: Any) -> None:
        return None

    async def relayed() -> int:
        return 100

    work = Deadlines(Sagas(old.store), old.store, nothing, relayed, RULES, Clock(at(3600)), numbered_ids())

    assert await work._due_by_the_log(at(3600)) == [OPEN]


async def projection_and_replay(old: OldLog) -> None:
    terms = Terms(RULES, timedelta(hours=1))
    facts = [read(row) for row in await old.rows()]
    folder = Folder(old.store, [job_status.VIEW], terms)

    await folder.prepare(facts[8:], _no_documents)
    folded = folder.fold(facts[8:])

    assert len(folded.writes["job_status"]) == 2
    status = fold_stream([recorded for recorded in facts if recorded.stream_id == JOB], terms).status
    assert (status.status, status.tasks[RDAP].status) == ("Completed", "Succeeded")


async def _no_documents(_: object) -> Mapping[str, bytes]:
    return {}


async def history(old: OldLog) -> None:
    async def nobody(_: UUID) -> Sequence[UUID]:
        return [LETTER]

    asked = JobHistory(old.store, MemoryDocuments(), job_status.fold, 2, nobody, Clock())

    assert [entry.fact for entry in await asked.entries(JOB)] == [*ENDED, RETRIED]


async def the_doctors_look(old: OldLog) -> None:
    stream = stories.stream_of(JOB, await old.stream(JOB))

    assert not stream.unreadable
    checks = (stories.broken_links, stories.out_of_order, stories.facts_after_the_end, stories.false_endings)
    assert [problem for check in checks for problem in check(stream)] == []


async def the_audit_trail(old: OldLog) -> None:
    """Shown in today's words; the export has the stored bytes, which were hashed, as they lie there."""
    lines = timeline_of(await old.stream(JOB))

    assert [line.fact for line in lines] == [type(fact).__name__ for fact in ENDED]
    evidence = _fact((await old.stream(JOB))[5], None)
    assert evidence["topic"] == "lookup.TaskCompleted.v1"
    assert '"job":' in str(evidence)


async def deciding_again(old: OldLog) -> None:
    tally = await what_if.look(old.store, RULES, Changes(attempts_max={PING: 2}))

    assert (tally.jobs, tally.undecided, tally.comparisons[Comparison.SAME]) == (2, 1, 1)


async def another_version_of_a_view(old: OldLog) -> None:
    terms = Terms(RULES, timedelta(hours=1))

    then = await compare(old.store, MemoryDocuments(), terms, job_status.VIEW, job_status.VIEW)

    assert (then.same, then.changed, then.added, then.gone) == (2, [], [], [])


async def reading_answers_again(old: OldLog) -> None:
    answered = corrections.answer_of(await old.stream(JOB), RDAP)

    assert answered is not None
    assert (answered.completed, answered.parser) == (completed(RDAP), "rdap/2")
    assert {(await old.stream(JOB))[0].topic} <= corrections.SUBMITTED


async def decisions_about_dead_letters(old: OldLog) -> None:
    (row,) = await old.stream(LETTER)

    assert redelivery._decision_of(row).by == "alice"


async def seals_and_what_may_be_sealed(old: OldLog) -> None:
    segments = Segments(ROOT)
    segments.learn(await old.stream(SEALS))

    assert [seal.fact for seal in segments.seals] == [SEALED]
    topics = [row.topic for row in await old.stream(JOB)]
    assert topics[0] in retention.OPENING
    assert topics[-2] in retention.CLOSING


async def erasures(_: OldLog) -> None:
    assert frozenset(topics_of(TargetErased)) == erasure.ENDS


Way = Callable[[OldLog], Awaitable[None]]
WAYS: dict[str, Sequence[Way]] = {
    "app/audit/timeline.py": [the_audit_trail],
    "app/doctor/stories.py": [the_doctors_look],
    "app/erasing.py": [projection_and_replay],
    "app/what_if.py": [deciding_again],
    "app/what_if_view.py": [projection_and_replay, another_version_of_a_view],
    "events/segments.py": [seals_and_what_may_be_sealed],
    "events/wire.py": [relays_facts_and_commands, an_older_relays_batch],
    "projections/folding.py": [projection_and_replay],
    "projections/projector.py": [projection_and_replay, an_older_relays_batch],
    "projections/replay.py": [projection_and_replay],
    "read_side/history.py": [history],
    "workers/standing.py": [a_workers_late_item],
    "write_side/corrections.py": [reading_answers_again],
    "write_side/deadlines.py": [what_is_due_by_the_log],
    "write_side/erasure.py": [erasures],
    "write_side/redelivery.py": [decisions_about_dead_letters],
    "write_side/relay.py": [relays_facts_and_commands],
    "write_side/retention.py": [seals_and_what_may_be_sealed],
    "write_side/sagas.py": [fold_of_the_saga],
}
"""Who reads facts, and the ways on which old ones go through it. Who prints or hashes stored bytes has no need of upcasters."""


@pytest.mark.parametrize("way", dict.fromkeys(way for ways in WAYS.values() for way in ways), ids=lambda way: way.__name__)
async def test_facts_of_an_older_release_go_all_the_way(way: Way, old_log: OldLog) -> None:
    await way(old_log)


def test_whoever_reads_facts_is_in_the_table() -> None:
    """A new way has to be added, with old facts going all the way through it."""
    reading = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py") if reads(path)}

    unlisted = reading - WAYS.keys() - {"events/record.py", "events/catalog.py"}
    assert not unlisted, f"{', '.join(sorted(unlisted))} read facts: show in WAYS that old ones go all the way through."


def reads(path: Path) -> bool:
    imports = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if node.module in {"events.record", "events.wire", "events.catalog"}]
    return any(alias.name in READING for node in ours for alias in node.names)
