"""Facts on the wire: a stretch of the log as CloudEvents that everybody's parser understands, and that lose nothing."""

from collections.abc import Sequence
from uuid import UUID

import orjson
import pytest

from domain.commands import Deferred, Failed, LookUp, Skipped, TaskOutcome, TimedOut, lines_of
from events.catalog import TOPICS, UnknownFact
from events.facts import Erased, JobFact, JobSubmitted, Service, Target, TargetType
from events.record import Cause, StoredFact, hash_of, read
from events.store import AppendUnit, NewFacts, StreamHead
from events.wire import CONTENT_TYPE, cloud_events, read_batch, stretch_headers, stretch_of
from tests.builders import (
    CAUSE,
    DOMAIN,
    JOB,
    OUT_OF_TIME,
    PERMANENT,
    PING,
    RDAP,
    REFUSED,
    TRANSIENT,
    at,
    completed,
    corrected,
    counts,
    deferred,
    dispatched,
    failed,
    job_cancelled,
    job_completed,
    job_failed,
    look_up_command,
    memory_store,
    outcome,
    quota,
    skipped,
    submitted,
    timed_out,
)

SOURCE = "/lookup/test"
OTHER = UUID(int=8)
EVERY_KIND: list[JobFact] = [
    submitted(*Service, target=DOMAIN),
    dispatched(*Service),
    deferred(PING, until=at(20)),
    completed(PING),
    corrected(PING),
    failed(RDAP),
    timed_out(Service.GEOIP),
    skipped(Service.REVERSE_DNS),
    job_completed(counts(succeeded=1, failed=1, timed_out=1, skipped=1)),
    job_failed(counts(failed=1), reason="none"),
    job_cancelled(),
]


async def log_of(facts: Sequence[JobFact], cause: Cause = CAUSE, job_id: UUID = JOB) -> Sequence[StoredFact]:
    store = memory_store()
    await store.append(AppendUnit([NewFacts(job_id, StreamHead(), facts)], cause))
    return await store.read_all(0, 100)


async def test_a_batch_brings_every_kind_of_fact_just_as_the_log_has_it() -> None:
    log = await log_of(EVERY_KIND)

    assert read_batch(cloud_events(log, SOURCE)) == [read(stored) for stored in log]


async def test_a_batch_is_cloud_events_json() -> None:
    log = await log_of([submitted(PING)])

    (event,) = orjson.loads(cloud_events(log, SOURCE))

    assert event["specversion"] == "1.0"
    assert (event["source"], event["type"], event["subject"]) == (SOURCE, TOPICS[JobSubmitted], str(JOB))
    assert event["datacontenttype"] == "application/json"
    assert event["time"] == "2026-01-02T03:04:05Z"
    assert (event["sequence"], event["streamversion"]) == ("1", 1)
    assert event["facthash"] == hash_of(log[0].state).hex()
    assert event["correlationid"] == str(CAUSE.correlation_id)
    assert UUID(event["id"]).version == 7
    assert event["data"]["target"]["raw"] == " 198.51.100.7 "
    assert all(name.isalnum() and name.islower() for name in event)  # CloudEvents 1.0 section 3.1


async def test_an_erased_fact_travels_as_erased() -> None:
    (stored,) = await log_of([submitted(PING)])
    kept = b"\n".join(stored.state.split(b"\n")[:3])
    erased = StoredFact(stored.position, stored.stream_id, stored.stream_version, stored.topic, kept)

    body = cloud_events([erased], SOURCE)

    assert b"198.51.100.7" not in body
    (recorded,) = read_batch(body)
    assert isinstance(recorded.fact, JobSubmitted)
    assert recorded.fact.target == Erased()


@pytest.mark.parametrize(
    "hostile", ['"', "\\", '","subject":"00000000-0000-0000-0000-000000000008","x":"', "\n", "\u2028", "b\u00fccher"]
)
async def test_nothing_that_a_client_sends_can_change_the_shape_of_a_batch(hostile: str) -> None:
    """A trace header is the client's own text. It must not name another job, nor make the batch unreadable."""
    fact = submitted(PING, target=Target(raw=hostile, canonical="example.com", type=TargetType.DOMAIN))
    cause = Cause(actor=hostile, correlation_id=JOB, request_id=hostile, traceparent=hostile)

    body = cloud_events(await log_of([fact], cause), SOURCE)

    (recorded,) = read_batch(body)
    assert (recorded.stream_id, recorded.fact) == (JOB, fact)
    assert orjson.loads(body)[0]["traceparent"] == hostile


async def test_a_fact_that_this_program_does_not_know_stops_the_reader() -> None:
    body = cloud_events(await log_of([submitted(PING)]), SOURCE).replace(b"lookup.JobSubmitted.v1", b"lookup.JobSubmitted.v2")

    with pytest.raises(UnknownFact, match="Upgrade"):
        read_batch(body)


def test_the_headers_name_the_stretch() -> None:
    headers = stretch_headers(7, 12)

    assert stretch_of(headers) == (7, 12)
    assert headers["content-type"] == CONTENT_TYPE


def test_commands_and_outcomes_survive_the_wire_a_line_each() -> None:
    commands = [look_up_command(PING), look_up_command(RDAP, attempt=2, target=DOMAIN)]
    outcomes = [outcome(PING), outcome(RDAP, PERMANENT), outcome(RDAP, TRANSIENT, attempt=2), outcome(PING, quota(at(9)))]

    assert [LookUp.model_validate_json(line) for line in lines_of(commands).split(b"\n")] == commands
    assert [TaskOutcome.model_validate_json(line) for line in lines_of(outcomes).split(b"\n")] == outcomes


@pytest.mark.parametrize("ending", [None, PERMANENT, OUT_OF_TIME, REFUSED, quota(at(9))])
def test_a_newer_workers_outcome_may_tell_more_than_we_know(ending: Failed | TimedOut | Skipped | Deferred | None) -> None:
    """Workers and saga are never replaced in one instant."""
    told = outcome(PING, ending)
    document = orjson.loads(lines_of([told])) | {"mood": "good"}
    document["ending"]["mood"] = "good"

    assert TaskOutcome.model_validate_json(orjson.dumps(document)) == told


def test_a_command_is_understood_whole_or_not_at_all() -> None:
    """A worker that overlooks a word might ask what it must not."""
    document = orjson.loads(lines_of([look_up_command(PING)])) | {"never_ask": "registries"}

    with pytest.raises(ValueError, match="never_ask"):
        LookUp.model_validate_json(orjson.dumps(document))


def test_no_text_can_break_a_line() -> None:
    command = look_up_command(target=Target(raw='a\n"b\r\\', canonical="example.com", type=TargetType.DOMAIN))

    (line,) = lines_of([command]).split(b"\n")

    assert LookUp.model_validate_json(line) == command
