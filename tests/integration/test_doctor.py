"""The doctor against real servers: each promise is broken for real, and named; nothing else is."""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, LiteralString
from uuid import UUID, uuid4

import psycopg
import pytest
from uuid_utils.compat import uuid7

from app import heartbeat
from app.audit.keys import load_public, load_signer, make_key, public_path, verifiers
from app.doctor.consultation import DEAD_LETTER_MAX_AGE, Fix, consult, examination_of
from app.doctor.examination import Examination
from app.doctor.findings import Report
from app.doctor.keyspace import Keyspace
from app.doctor.mending import Mender
from app.migrate import migrate
from app.self_check import NOTE_KEY, SelfCheck
from app.settings import Settings
from app.status import status_of
from app.wiring import Wiring
from events.chain import GENESIS, chained_hash, next_head
from events.ending import end
from events.facts import JobFact, ResultCorrected, ResultReference, TaskCompleted
from events.record import Cause, envelope_of, hash_of
from events.store import AppendUnit, NewFacts, StreamHead
from projections.views import JOB_STATUS
from results.documents import ResultDocuments
from tests.builders import (
    CORRECTED,
    DOCUMENT,
    PING,
    RDAP,
    REVERSE_DNS,
    completed,
    corrected,
    counts,
    deferred,
    dispatched,
    eventually,
    failed,
    job_cancelled,
    job_completed,
    job_failed,
    skipped,
    submitted,
)
from tests.servers.postgres import fresh_database
from write_side.dead_letters import Keep, open_letters
from write_side.head_keeper import HeadKeeper
from write_side.heads import open_heads

PATIENCE_S = 20.0
SECOND_LOOK_S = 0.2
SELECT_STATE = "SELECT state FROM stored_events WHERE originator_id = %s AND originator_version = %s"
UPDATE_STATE = "UPDATE stored_events SET state = %s WHERE originator_id = %s AND originator_version = %s"
AS_SOMEBODY = Fix("doctor:somebody", "It was stuck.")


def now() -> datetime:
    return datetime.now(UTC)


def ago(seconds: float) -> datetime:
    return now() - timedelta(seconds=seconds)


class Patient:
    """A log, results and views, with a relay and a projector at work on them."""

    def __init__(self, database_url: str, redis_url: str) -> None:
        self.database_url = database_url
        self.wiring = Wiring(Settings(database_url=database_url, redis_url=redis_url))
        self.redis = self.wiring.redis
        self.keys = self.wiring.keys
        self._at_work: dict[str, asyncio.Task[None]] = {}
        self._heads: dict[UUID, StreamHead] = {}

    async def happened(self, *facts: JobFact, stream_id: UUID | None = None) -> None:
        """Append facts as they are, whatever a saga would say, and store the results that they tell of."""
        documents = await self.wiring.documents()
        for fact in facts:
            if isinstance(fact, TaskCompleted):
                await documents.put(fact.job_id, DOCUMENT)
            if isinstance(fact, ResultCorrected):
                await documents.put(fact.job_id, CORRECTED)
            stream = stream_id or fact.job_id
            unit = AppendUnit([NewFacts(stream, self._heads.get(stream, StreamHead()), [fact])], Cause("test", fact.job_id))
            (self._heads[stream],) = await self.wiring.store.append(unit)

    async def lived(self, *facts: JobFact) -> None:
        """What happened, with all that follows of it: relayed and projected."""
        await self.happened(*facts)
        await self.settled()

    def start(self) -> None:
        for name, part in (("relay", self.wiring.relay), ("projector", self.wiring.projector)):
            self._at_work[name] = asyncio.create_task(part())

    async def stop(self, *names: str) -> None:
        await end([self._at_work.pop(name) for name in names or tuple(self._at_work)], PATIENCE_S)

    async def settled(self) -> None:
        """Wait until relay and projector have come to the end of the log."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                status = await status_of(self.wiring)
                if {status.relayed_commands, status.relayed_facts, status.projected} == {status.log_head}:
                    return
                await asyncio.sleep(0.02)

    async def examined(self, fix: Fix | None = None) -> Report:
        """As the command does it, with nothing in memory that the patient knows."""
        doctors_own = Wiring(self.wiring.settings)
        try:
            return await consult(doctors_own, fix, second_look_after_s=SECOND_LOOK_S)
        finally:
            await doctors_own.aclose()

    async def examination(self, second_look_after_s: float = SECOND_LOOK_S) -> Examination:
        return await examination_of(
            self.wiring, dead_letter_max_age=DEAD_LETTER_MAX_AGE, second_look_after_s=second_look_after_s
        )

    async def note_self_check(self, at: datetime, log_id: UUID | None = None) -> None:
        """A self-check that found nothing."""
        check = SelfCheck(str(log_id or await self.wiring.store.log_id()), at, position=1, seconds=0.1, compared=1)
        await self.redis.set(NOTE_KEY, json.dumps(asdict(check) | {"at": at.isoformat()}))

    async def is_well(self) -> bool:
        report = await self.examined()
        return (report.exit_code, dict(report.counts), report.unexamined) == (0, {}, {})

    def tamper(self, statement: LiteralString, *values: Any) -> None:
        """Write to the database as its owner, who may do everything."""
        with psycopg.connect(self.database_url) as database:
            database.execute(statement, values)

    def rewrite(self, stream_id: UUID, version: int, change: Callable[[bytes], bytes]) -> None:
        """Change what a fact says, as no role of ours may."""
        where = (stream_id, version)
        with psycopg.connect(self.database_url) as database:
            row = database.execute(SELECT_STATE, where).fetchone()
            assert row is not None
            database.execute(UPDATE_STATE, (change(bytes(row[0])), *where))

    async def generation(self) -> str:
        live: Any = await self.redis.hget(self.keys.live, JOB_STATUS)
        return str(live.decode())

    async def view_key(self, job_id: UUID) -> str:
        return self.keys.job(await self.generation(), job_id)

    async def view(self, job_id: UUID) -> bytes:
        shown: Any = await self.redis.get(await self.view_key(job_id))
        assert shown is not None
        return bytes(shown)

    async def deadlines_key(self) -> str:
        return self.keys.deadlines(await self.generation())

    async def envelopes(self, job_id: UUID) -> list[dict[str, Any]]:
        stream = (await self.wiring.store.read([job_id]))[job_id]
        return [{"topic": stored.topic, **envelope_of(stored.state)} for stored in stream]


@pytest.fixture(scope="module")
def shared_database_url(postgres: str) -> Iterator[str]:
    """Made once for all tests here: that takes longer than most of them."""
    with fresh_database(postgres) as url:
        migrate(url, uuid4(), {})
        yield url


@pytest.fixture
def empty_database_url(shared_database_url: str) -> str:
    """A database as `lookup migrate` leaves it."""
    with psycopg.connect(shared_database_url) as database:
        database.execute("TRUNCATE stored_events, result_documents, dead_letters, log_heads RESTART IDENTITY")
        database.execute("UPDATE relay_checkpoints SET position = 0, log_head = decode(repeat('00', 32), 'hex')")
    return shared_database_url


@pytest.fixture
async def patient(empty_database_url: str, redis_url: str) -> AsyncIterator[Patient]:
    """One that nothing has happened to yet, with a relay and a projector."""
    patient = Patient(empty_database_url, redis_url)
    patient.start()
    try:
        yield patient
    finally:
        await patient.stop()
        await patient.wiring.aclose()


def story(job_id: UUID, *, when: datetime | None = None) -> list[JobFact]:
    """A job from beginning to end, three of whose tasks end in three ways."""
    at = when or now()
    return [
        submitted(PING, RDAP, REVERSE_DNS, job_id=job_id, when=at),
        dispatched(PING, RDAP, job_id=job_id, when=at),
        skipped(REVERSE_DNS, job_id=job_id, when=at),
        completed(PING, job_id=job_id, when=at),
        failed(RDAP, job_id=job_id, when=at),
        job_completed(counts(succeeded=1, failed=1, skipped=1), job_id=job_id, when=at),
    ]


def opened(job_id: UUID, *, when: datetime | None = None) -> list[JobFact]:
    """A job whose one task is under way."""
    at = when or now()
    return [submitted(PING, job_id=job_id, when=at), dispatched(PING, job_id=job_id, when=at)]


def found(report: Report) -> dict[str, list[str]]:
    """What each finding is about, by check."""
    assert report.exit_code == 1
    assert report.unexamined == {}
    return {check: [finding.about for finding in kept] for check, kept in report.findings.items()}


# --- Health -----------------------------------------------------------------------------------------------------------


async def test_a_healthy_system_has_no_findings_and_everything_was_looked_at(patient: Patient) -> None:
    await patient.lived(*(fact for _ in range(3) for fact in story(uuid7())), *opened(uuid7()))

    report = await patient.examined()

    assert (report.exit_code, report.findings, report.unexamined) == (0, {}, {})
    examined = report.examined
    assert (examined.facts, examined.jobs, examined.results, examined.views, examined.log_head) == (20, 4, 3, 4, 20)
    assert examined.keys >= 4 + 4  # The views of four jobs, and live, fence, lease and meta at least.


async def test_an_answer_that_was_read_again_after_the_end_is_healthy(patient: Patient) -> None:
    job_id = uuid7()
    await patient.lived(*story(job_id))
    await patient.lived(corrected(PING, job_id=job_id, when=now()))

    assert await patient.is_well()
    view = (await patient.view(job_id)).partition(b"\n")
    assert view[0] == b"7"
    assert CORRECTED in view[2]


async def test_an_installation_that_nothing_was_ever_done_with_is_healthy(empty_database_url: str, redis_url: str) -> None:
    untouched = Patient(empty_database_url, redis_url)

    assert await untouched.is_well()

    await untouched.wiring.aclose()


async def test_parts_that_have_nothing_to_do_are_healthy(patient: Patient) -> None:
    await patient.settled()

    assert await patient.is_well()


async def test_a_view_that_is_merely_behind_does_not_differ(patient: Patient) -> None:
    half, later, fresh = uuid7(), uuid7(), uuid7()
    await patient.lived(*story(half)[:3], *opened(later))
    await patient.stop("projector")

    await patient.happened(*story(half)[3:], completed(PING, job_id=later), *story(fresh))

    assert await patient.is_well()


async def test_what_has_gone_after_its_retention_is_not_missing(patient: Patient) -> None:
    await patient.lived(*story(uuid7(), when=now() - timedelta(days=3)))

    report = await patient.examined()

    assert (report.exit_code, report.examined.views) == (0, 0)


async def test_other_peoples_keys_are_left_alone(patient: Patient) -> None:
    await patient.lived(*story(uuid7()))
    await patient.redis.set("viewsofelsewhere", "1")
    await patient.redis.set(b"\xff\xfe", "not even text")

    assert await patient.is_well()


# --- Jobs -------------------------------------------------------------------------------------------------------------


async def test_a_job_past_its_deadline_is_named_and_ended_with_a_reason(patient: Patient) -> None:
    late, in_time = uuid7(), uuid7()
    await patient.lived(*opened(late, when=ago(96)), *opened(in_time, when=ago(25)))

    report = await patient.examined()
    mended = await patient.examined(AS_SOMEBODY)

    assert found(report) == {"job past its deadline": [str(late)]}
    assert mended.exit_code == 0
    assert [(done.check, done.about, done.did) for done in mended.mended] == [
        ("job past its deadline", str(late), "Appended TaskTimedOut, JobFailed.")
    ]
    appended = (await patient.envelopes(late))[2:]
    assert [(fact["actor"], fact["reason"]) for fact in appended] == [("doctor:somebody", "It was stuck.")] * 2
    assert len(await patient.envelopes(in_time)) == 2
    assert await patient.is_well()


async def test_a_job_that_ended_or_has_five_seconds_left_to_end_is_not_late(patient: Patient) -> None:
    await patient.lived(*opened(uuid7(), when=ago(92)), *story(uuid7(), when=ago(200)))

    assert await patient.is_well()


async def test_a_task_that_was_never_answered_is_named_and_dispatched_again(patient: Patient) -> None:
    """An attempt has 10 s, and 30 s more pass before it is dispatched again."""
    silent, under_way = uuid7(), uuid7()
    await patient.lived(*opened(silent, when=ago(46)), *opened(under_way, when=ago(30)))

    report = await patient.examined()
    mended = await patient.examined(Fix("doctor:somebody"))

    assert found(report) == {"task never answered": [str(silent)]}
    assert [done.did for done in mended.mended] == ["Appended TasksDispatched."]
    again = (await patient.envelopes(silent))[2]
    assert (again["actor"], again["reason"]) == ("doctor:somebody", "lookup doctor found: task never answered.")
    await patient.settled()
    assert await patient.is_well()


async def test_a_task_that_the_relay_has_not_sent_out_is_not_called_unanswered(patient: Patient) -> None:
    """It is not the worker that is late then."""
    await patient.settled()
    await patient.stop("relay")
    await patient.happened(*opened(uuid7(), when=ago(60)))

    assert found(await patient.examined()) == {"no relay": ["relay"]}


async def test_a_deferred_task_whose_time_has_passed_is_named(patient: Patient) -> None:
    overdue, waiting = uuid7(), uuid7()
    await patient.lived(
        *opened(overdue, when=ago(20)),
        deferred(PING, until=ago(6), job_id=overdue, when=ago(19)),
        *opened(waiting, when=ago(20)),
        deferred(PING, until=now() + timedelta(seconds=30), job_id=waiting, when=ago(19)),
    )

    assert found(await patient.examined()) == {"task never answered": [str(overdue)]}
    assert (await patient.examined(AS_SOMEBODY)).exit_code == 0
    assert await patient.is_well()


async def test_a_task_that_was_never_dispatched_is_named(patient: Patient) -> None:
    job_id = uuid7()
    await patient.lived(submitted(PING, RDAP, job_id=job_id, when=now()), dispatched(PING, job_id=job_id, when=now()))

    assert found(await patient.examined()) == {"task never answered": [str(job_id)]}


@pytest.mark.parametrize(
    ("check", "spoil"),
    [
        (
            "outcome counted twice",
            lambda job_id: [*story(job_id)[:4], failed(PING, job_id=job_id, when=now()), *story(job_id)[4:]],
        ),
        ("fact after the end", lambda job_id: [*story(job_id), job_cancelled(job_id=job_id, when=now())]),
        ("fact after the end", lambda job_id: [*story(job_id), dispatched(PING, attempt=2, job_id=job_id, when=now())]),
        (
            "false ending",
            lambda job_id: [*story(job_id)[:4], job_completed(counts(succeeded=1, skipped=1), job_id=job_id, when=now())],
        ),
        ("false ending", lambda job_id: [*story(job_id)[:5], job_completed(counts(succeeded=3), job_id=job_id, when=now())]),
        (
            "false ending",
            lambda job_id: [
                *story(job_id)[:5],
                job_failed(counts(succeeded=1, failed=1, skipped=1), job_id=job_id, reason="no", when=now()),
            ],
        ),
        ("facts out of order", lambda job_id: [*opened(job_id), submitted(PING, job_id=job_id, when=now())]),
        ("facts out of order", lambda job_id: [*story(job_id), corrected(RDAP, job_id=job_id, when=now())]),
    ],
)
async def test_a_story_that_makes_no_sense_is_named(patient: Patient, check: str, spoil: Any) -> None:
    job_id = uuid7()
    await patient.lived(*spoil(job_id), *story(uuid7()))

    assert found(await patient.examined()) == {check: [str(job_id)]}
    assert (await patient.examined(AS_SOMEBODY)).exit_code == 1


# --- The log ----------------------------------------------------------------------------------------------------------


async def test_a_version_hole_is_named_with_the_versions_that_are_missing(patient: Patient) -> None:
    job_id = uuid7()
    await patient.lived(*story(uuid7()), *story(job_id))
    patient.tamper("DELETE FROM stored_events WHERE originator_id = %s AND originator_version IN (3, 4)", job_id)

    report = await patient.examined()

    assert found(report) == {"version hole": [str(job_id)], "wrong log head": ["log"]}
    (hole,) = report.findings["version hole"]
    assert (hole.problem, hole.position) == ("Versions 3 to 4 are missing.", 11)


async def test_a_last_fact_that_was_taken_out_is_missed(patient: Patient) -> None:
    """What is left is a sound stream; but the relay has told the fact, and it is shown."""
    job_id = uuid7()
    await patient.lived(*story(uuid7()), *story(job_id))
    patient.tamper("DELETE FROM stored_events WHERE originator_id = %s AND originator_version = 6", job_id)

    report = await patient.examined()

    assert found(report)["wrong log head"] == ["log"]
    assert found(report)["view differs"] == [str(job_id)]


async def test_a_last_fact_that_was_signed_and_taken_out_is_missed_even_if_the_relay_forgot_it(
    patient: Patient, tmp_path: Path
) -> None:
    await patient.lived(*story(uuid7()))
    signed_up_to = await patient.wiring.store.head()
    await sign(patient, tmp_path)
    assert await patient.is_well()
    await patient.stop("relay")
    head = GENESIS
    for stored in (await patient.wiring.store.read_all(0, 100))[:-1]:
        head = next_head(head, stored.position, hash_of(stored.state))
    patient.tamper("DELETE FROM stored_events WHERE notification_id = %s", signed_up_to)
    patient.tamper("UPDATE relay_checkpoints SET position = %s, log_head = %s", signed_up_to - 1, head)

    report = await patient.examined()

    assert found(report)["wrong log head"] == ["heads"]
    assert report.findings["wrong log head"][0].position == signed_up_to


async def sign(patient: Patient, folder: Path) -> None:
    """As the keeper does when it is time."""
    make_key(folder / "heads.key")
    signer, keys = load_signer(folder / "heads.key"), verifiers(load_public(public_path(folder / "heads.key")))
    async with open_heads(patient.database_url) as table:
        keeper = HeadKeeper(patient.wiring.store, table, [], signer, keys, 100, timedelta(0), now)
        await keeper.take_up()
        await keeper.tick()


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.replace(b'"attempt":1', b'"attempt":2'),
        lambda state: state.replace(b'"actor":"test"', b'"actor":"nobody"'),
        lambda state: state + b"\n{}",
        lambda state: state[:9],
    ],
    ids=["chained part", "envelope", "another line", "torn"],
)
async def test_a_fact_that_was_changed_is_named(patient: Patient, change: Callable[[bytes], bytes]) -> None:
    job_id = uuid7()
    await patient.lived(*story(uuid7()), *story(job_id))
    patient.rewrite(job_id, 4, change)

    report = await patient.examined()

    assert set(found(report)["broken chain"]) == {str(job_id)}
    assert report.findings["broken chain"][0].position == 10


async def test_an_erasable_value_that_was_changed_is_named_and_one_that_was_erased_is_not(patient: Patient) -> None:
    changed, erased = uuid7(), uuid7()
    await patient.lived(*story(changed), *story(erased))
    patient.rewrite(changed, 1, lambda state: state.replace(b"203.0.113.9", b"203.0.113.8"))
    for version in (1, 2):
        patient.rewrite(erased, version, lambda state: b"\n".join(state.split(b"\n")[:3]))

    assert found(await patient.examined())["broken chain"] == [str(changed)]


async def test_a_fact_of_an_unknown_kind_is_named(patient: Patient) -> None:
    stream_id, topic = uuid7(), "lookup.TeapotBoiled.v1"
    envelope, chained = b'{"event_id":"1","recorded_at":"2026-01-01T00:00:00Z"}', b"{}"
    hashed = chained_hash(GENESIS, stream_id, 1, topic, envelope, chained).hex().encode()
    await patient.settled()
    await patient.stop()
    patient.tamper(
        "INSERT INTO stored_events (originator_id, originator_version, topic, state) VALUES (%s, 1, %s, %s)",
        *(stream_id, topic, b"\n".join([envelope, chained, hashed])),
    )

    assert found(await patient.examined())["unreadable fact"] == [str(stream_id)]


# --- Results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage", ["DELETE FROM result_documents WHERE key LIKE %s", "UPDATE result_documents SET body = 'x' WHERE key LIKE %s"]
)
async def test_a_result_that_is_missing_or_damaged_is_named_and_its_last_copy_is_kept(
    patient: Patient, damage: LiteralString
) -> None:
    job_id = uuid7()
    await patient.lived(*story(uuid7()), *story(job_id))
    patient.tamper(damage, f"{job_id}/%")
    await patient.redis.zadd(await patient.deadlines_key(), {str(job_id): 1})

    report = await patient.examined(AS_SOMEBODY)

    assert found(report) == {"result missing": [str(job_id)], "wrong to-do": [str(job_id)]}
    assert [done.check for done in report.mended] == ["wrong to-do"]
    assert DOCUMENT in await patient.view(job_id)


# --- Views ------------------------------------------------------------------------------------------------------------


async def test_a_view_that_differs_is_named_and_put_right(patient: Patient) -> None:
    job_id = uuid7()
    await patient.lived(*story(uuid7()), *story(job_id))
    key = await patient.view_key(job_id)
    right = await patient.view(job_id)
    await patient.redis.set(key, right.replace(b'"Failed"', b'"Succeeded"'), keepttl=True)

    report = await patient.examined()
    mended = await patient.examined(AS_SOMEBODY)

    assert found(report) == {"view differs": [str(job_id)]}
    assert report.findings["view differs"][0].problem == "It differs in results."
    assert (mended.exit_code, await patient.view(job_id)) == (0, right)
    assert await patient.redis.ttl(key) > 0
    assert await patient.is_well()


async def test_a_view_that_missed_a_fact_is_named(patient: Patient) -> None:
    job_id = uuid7()
    await patient.lived(*story(job_id)[:3])
    key = await patient.view_key(job_id)
    stale = await patient.view(job_id)
    await patient.lived(*story(job_id)[3:])
    await patient.redis.set(key, stale, keepttl=True)

    report = await patient.examined()

    assert found(report) == {"view differs": [str(job_id)]}
    assert report.findings["view differs"][0].problem == "It is of position 3; the job's facts end at 6."


async def test_a_view_that_is_missing_is_named_and_made_again(patient: Patient) -> None:
    open_job, closed = uuid7(), uuid7()
    await patient.lived(*opened(open_job), *story(closed), *story(uuid7()))
    keys = [await patient.view_key(job_id) for job_id in (open_job, closed)]
    before = await patient.redis.mget(keys)
    await patient.redis.delete(*keys)

    report = await patient.examined()
    mended = await patient.examined(AS_SOMEBODY)

    assert {check: set(about) for check, about in found(report).items()} == {"view missing": {str(open_job), str(closed)}}
    assert (mended.exit_code, await patient.redis.mget(keys)) == (0, before)
    assert await patient.is_well()


async def test_views_of_a_wrong_age_are_named_and_put_right(patient: Patient) -> None:
    open_job, closed = uuid7(), uuid7()
    await patient.lived(*opened(open_job), *story(closed))
    await patient.redis.expire(await patient.view_key(open_job), 1_000)
    await patient.redis.persist(await patient.view_key(closed))

    report = await patient.examined()
    await patient.examined(AS_SOMEBODY)

    assert {check: set(about) for check, about in found(report).items()} == {
        "view of a wrong age": {str(open_job), str(closed)}
    }
    assert await patient.redis.ttl(await patient.view_key(open_job)) == -1
    assert await patient.redis.ttl(await patient.view_key(closed)) > 0
    assert await patient.is_well()


async def test_a_to_do_list_that_is_wrong_is_named_and_put_right(patient: Patient) -> None:
    forgotten, late, closed, unknown = uuid7(), uuid7(), uuid7(), uuid7()
    await patient.lived(*opened(forgotten), *opened(late), *story(closed))
    key = await patient.deadlines_key()
    right = await patient.redis.zrange(key, 0, -1, withscores=True)
    await patient.redis.zrem(key, str(forgotten))
    await patient.redis.zadd(key, {str(late): 10**13, str(closed): 1, str(unknown): 1, "no job": 1, str(forgotten).upper(): 1})

    report = await patient.examined()
    mended = await patient.examined(AS_SOMEBODY)

    assert {check: set(about) for check, about in found(report).items()} == {
        "wrong to-do": {str(forgotten), str(late), str(closed)},
        "unknown to-do": {str(unknown), "no job", str(forgotten).upper()},
    }
    assert (mended.exit_code, await patient.redis.zrange(key, 0, -1, withscores=True)) == (0, right)
    assert await patient.is_well()


async def test_what_heals_between_two_looks_is_not_told(patient: Patient) -> None:
    """It was on its way: whatever looks broken is looked at once more."""
    healed, broken = uuid7(), uuid7()
    await patient.lived(*story(healed), *story(broken))
    view = await patient.view(healed)
    await patient.redis.delete(await patient.view_key(healed), await patient.view_key(broken))
    examination = await patient.examination(second_look_after_s=1.5)

    at_work = asyncio.create_task(examination.run())
    await eventually(lambda: examination.report.examined.jobs == 2)
    await patient.redis.set(await patient.view_key(healed), view, ex=1_000)

    assert found(await at_work) == {"view missing": [str(broken)]}


async def test_keys_that_belong_to_nothing_are_named_and_removed(patient: Patient) -> None:
    job_id = uuid7()
    await patient.lived(*story(job_id))
    view = await patient.view(job_id)
    unknown = await patient.view_key(uuid7())
    orphans = {unknown: view, "views:{0}:what": b"1", "views:{7}:live": b"g1", "bus:lookup.teapot": b"1", "parts:odd": b"1"}
    await patient.redis.mset(orphans)
    await patient.redis.mset({"views:{0}:g1:job:1": b"1", "views:{0}:g1:meta": b"1"})

    report = await patient.examined()
    mended = await patient.examined(AS_SOMEBODY)

    assert {check: set(about) for check, about in found(report).items()} == {"orphan key": {*orphans, "views:{0}:g1:*"}}
    assert (mended.exit_code, len(mended.mended)) == (0, 6)
    assert await patient.redis.exists(*orphans, "views:{0}:g1:job:1", "views:{0}:g1:meta") == 0
    assert await patient.is_well()


class Flipped(Keyspace):
    """Other views are made live while the keys are read."""

    async def _pages(self) -> AsyncIterator[list[str]]:
        async for page in super()._pages():
            yield page
        await self._redis.hset(self._keys.live, JOB_STATUS, "g1")


async def test_views_that_became_live_while_the_keys_were_read_are_no_orphans(patient: Patient) -> None:
    await patient.lived(*story(uuid7()))
    await patient.stop("projector")
    await patient.redis.set("views:{0}:g1:meta", "the next generation")

    assert len(await Keyspace(patient.redis, patient.wiring.store, patient.keys).orphans()) == 1
    assert await Flipped(patient.redis, patient.wiring.store, patient.keys).orphans() == []


class Meanwhile:
    """Results that are asked for while something happens: the doctor has read the facts then, and not written the view yet."""

    def __init__(self, documents: ResultDocuments, happens: Callable[[], Awaitable[None]]) -> None:
        self._documents = documents
        self._happens = happens

    async def put(self, job_id: UUID, document: bytes, *, shown: bool = True) -> ResultReference:
        return await self._documents.put(job_id, document, shown=shown)

    async def get(self, references: Sequence[ResultReference]) -> Mapping[str, bytes]:
        await self._happens()
        return await self._documents.get(references)


async def test_a_view_that_the_projector_moves_while_it_is_mended_is_left_to_it(patient: Patient) -> None:
    job_id = uuid7()
    await patient.lived(*story(job_id)[:3])
    await patient.redis.set(await patient.view_key(job_id), b"2\n{}")
    examination = await patient.examination()
    report = await examination.run()
    at_once = Meanwhile(examination.documents, lambda: patient.lived(*story(job_id)[3:]))
    mender = Mender(replace(examination, documents=at_once), patient.wiring.watch(), "doctor:somebody", None)

    await mender.mend(report)

    assert found(report) == {"view differs": [str(job_id)]}
    assert report.mended == []
    assert (await patient.view(job_id)).startswith(b"6\n")
    assert await patient.is_well()


# --- What moves things on ---------------------------------------------------------------------------------------------


async def test_a_relay_and_a_projection_that_stand_still_are_named(patient: Patient) -> None:
    await patient.lived(*story(uuid7()))
    await patient.stop("relay", "projector")
    await patient.happened(*story(uuid7()))
    patient.tamper(
        "UPDATE stored_events SET state = convert_to(regexp_replace(convert_from(state, 'UTF8'),"
        ' \'"recorded_at":"[^"]*"\', \'"recorded_at":"2026-01-01T00:00:00Z"\'), \'UTF8\') WHERE notification_id > 6'
    )

    report = await patient.examined()

    assert set(found(report)["relay behind"]) == {"commands", "facts"}
    assert found(report)["projection behind"] == [await patient.generation()]
    assert report.findings["projection behind"][0].problem.startswith("It stands still at position 6 of 12;")


async def test_views_that_nobody_looks_after_are_named(patient: Patient) -> None:
    await patient.lived(*story(uuid7()))
    await patient.stop("projector")
    await patient.redis.hset(patient.keys.meta(await patient.generation()), "checked_ms", int(ago(11).timestamp() * 1000))

    assert found(await patient.examined()) == {"no projector": [await patient.generation()]}


async def test_views_that_are_gone_with_nobody_to_make_them_again_are_named(patient: Patient) -> None:
    await patient.lived(*story(uuid7()))
    await patient.stop("projector")
    await patient.redis.flushdb()

    assert found(await patient.examined()) == {"projection behind": ["views"]}


async def test_views_of_another_log_are_named(patient: Patient) -> None:
    await patient.lived(*story(uuid7()))
    await patient.stop("projector")
    generation = await patient.generation()
    await patient.redis.hset(patient.keys.meta(generation), "hash", "00" * 32)

    assert found(await patient.examined()) == {"views of another log": [generation]}


async def test_a_part_that_ends_in_errors_again_and_again_is_named(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    await patient.settled()
    monkeypatch.setattr(heartbeat, "INTERVAL_S", SECOND_LOOK_S / 4)
    fares = ("running", "")
    told = []

    def state_of() -> tuple[str, str]:
        told.append(fares[0])
        return fares

    beating = asyncio.create_task(heartbeat.beat(patient.redis, "saga.gather", state_of, now))
    try:
        assert await patient.is_well()
        fares = ("retrying", "BusUnavailable")
        await eventually(lambda: told.count("retrying") > 1)  # The first of them lies in Redis then: the doctor may look.

        report = await patient.examined()
    finally:
        await end([beating], PATIENCE_S)

    assert found(report) == {"part retrying": [f"saga.gather on {socket.gethostname()}, process {os.getpid()}"]}


async def test_a_part_that_failed_once_and_tells_nothing_newer_is_not_called_retrying(patient: Patient) -> None:
    await patient.settled()
    note = heartbeat.Heartbeat("saga.gather", "retrying", "BusUnavailable", "elsewhere", 7, now().isoformat())
    await patient.redis.set(f"{heartbeat.PREFIX}saga.gather:elsewhere:7", json.dumps(asdict(note)))

    assert await patient.is_well()


async def test_a_self_check_that_is_overdue_is_named(patient: Patient) -> None:
    await patient.lived(*story(uuid7()))
    await patient.note_self_check(ago(47 * 3600))
    assert await patient.is_well()
    await patient.note_self_check(ago(49 * 3600))

    report = await patient.examined()

    assert found(report) == {"self-check overdue": ["self-check"]}
    assert "one is due every 24 h" in report.findings["self-check overdue"][0].problem


@pytest.mark.parametrize(("hours", "named"), [(47, []), (49, ["self-check"])])
async def test_a_log_that_was_never_self_checked_is_named_once_it_is_old(
    patient: Patient, hours: int, named: list[str]
) -> None:
    """What another log came to is no self-check of this one."""
    await patient.lived(*story(uuid7()))
    await patient.note_self_check(now(), log_id=uuid4())
    later = replace(await patient.examination(), now=lambda: now() + timedelta(hours=hours))

    report = await later.run()

    assert found(report).get("self-check overdue", []) == named
    assert report.examined.self_check is None


async def test_a_self_check_that_is_switched_off_is_not_overdue(patient: Patient) -> None:
    await patient.lived(*story(uuid7()))
    await patient.note_self_check(ago(1000 * 3600))
    patient.wiring.settings = patient.wiring.settings.model_copy(update={"self_check_every_h": 0})

    assert await patient.is_well()


async def test_an_old_dead_letter_is_named_and_a_young_one_is_not(patient: Patient) -> None:
    await patient.settled()
    async with open_letters(patient.database_url) as letters:
        await letters.keep([_letter("young", now())])
        assert await patient.is_well()
        await letters.keep([_letter("old", ago(3_700))])

    assert found(await patient.examined()) == {"old dead letter": ["dead letters"]}


def _letter(message: str, died_at: datetime) -> Keep:
    return Keep(message, "lookup.outcomes", "unreadable", b"x", {}, None, None, None, None, None, died_at)


# --- What cannot be reached -------------------------------------------------------------------------------------------


async def test_without_redis_the_log_is_examined_and_the_rest_is_said(patient: Patient) -> None:
    late = uuid7()
    await patient.lived(*opened(late, when=ago(30)))
    blind = Patient(patient.database_url, "redis://127.0.0.1:9/0")

    report = await blind.examined()

    assert (report.exit_code, report.examined.facts, report.examined.views) == (3, 2, 0)
    assert set(report.unexamined) == {"the views", "the keys of Redis", "the projection and the parts"}
    await blind.wiring.aclose()


async def test_without_the_database_nothing_can_be_said(patient: Patient) -> None:
    blind = Patient("postgresql://nobody@127.0.0.1:9/lookup", "redis://127.0.0.1:9/0")

    report = await blind.examined()

    assert (report.exit_code, set(report.unexamined)) == (3, {"the log and all that is held against it"})
    await blind.wiring.aclose()
