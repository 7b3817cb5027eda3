"""Writes the golden files that are missing: `python -m tests.golden.write`. One that exists is never touched.

A golden file is one fact as it lay in the log on the day its version was born. It must load for ever. Beside it, `schemas/` has
what the JSON of each version may look like: the values and enumerations that it is made of included.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson

from events.catalog import FACTS, VERSIONS
from events.facts import (
    CanarySent,
    DeadLetterDiscarded,
    DeadLetterRetried,
    DeferReason,
    ErasureStarted,
    Fact,
    IdempotencyKeyClaimed,
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobsSealed,
    JobSubmitted,
    LogRestored,
    OutcomeCounts,
    PostgresLocation,
    Priority,
    RawAbsence,
    ResultCorrected,
    ResultReference,
    Sensitivity,
    Service,
    SkipReason,
    Source,
    Target,
    TargetErased,
    TargetType,
    Task,
    TaskCompleted,
    TaskDeferred,
    TaskError,
    TaskFailed,
    TasksDispatched,
    TaskSkipped,
    TaskTimedOut,
)
from events.record import SALT_BYTES, Cause, Place, write

FOLDER = Path(__file__).parent
SCHEMAS = FOLDER / "schemas"
PROSE = frozenset({"title", "description"})

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
STREAM = UUID("019b7c8a-0000-7000-8000-000000000001")
TARGET = Target(raw=" B\u00fccher.example ", canonical="xn--bcher-kva.example", type=TargetType.DOMAIN)
COUNTS = OutcomeCounts(succeeded=1, failed=1, timed_out=1, skipped=1)
SHA256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
RESULT = ResultReference(location=PostgresLocation(key=f"{STREAM}/{SHA256}"), sha256=SHA256, size_bytes=6)
RAW_SHA256 = sha256(b"raw").hexdigest()
RAW = ResultReference(location=PostgresLocation(key=f"{STREAM}/{RAW_SHA256}"), sha256=RAW_SHA256, size_bytes=3)

# Names of files that are not `<fact>.v<version>` are further examples of the same version.
EXAMPLES: dict[str, Fact] = {
    "JobSubmitted.v1": JobSubmitted(
        job_id=STREAM,
        tenant="default",
        target=TARGET,
        target_type=TARGET.type,
        services=tuple(Service),
        options={"lang": "de"},
        priority=Priority.INTERACTIVE,
        sensitivity=Sensitivity.NORMAL,
        requested_by="192.0.2.7",
        expires_at=NOW + timedelta(seconds=90),
        batch_id=UUID(int=11),
        retry_of=UUID(int=12),
        watch_id=UUID(int=13),
        callback="https://client.example/hook",
        submitted_at=NOW,
    ),
    "JobSubmitted.v1.least": JobSubmitted(
        job_id=STREAM,
        tenant="default",
        target=Target(raw="2001:db8::1", canonical="2001:db8::1", type=TargetType.IP_ADDRESS),
        target_type=TargetType.IP_ADDRESS,
        services=(Service.PING,),
        priority=Priority.BULK,
        sensitivity=Sensitivity.RESTRICTED,
        expires_at=NOW + timedelta(hours=1),
        submitted_at=NOW,
    ),
    "TasksDispatched.v1": TasksDispatched(
        job_id=STREAM,
        target=TARGET,
        target_type=TARGET.type,
        priority=Priority.INTERACTIVE,
        sensitivity=Sensitivity.NORMAL,
        expires_at=NOW + timedelta(seconds=90),
        tasks=(
            Task(service=Service.GEOIP, command_id=UUID(int=21), attempt=1, timeout_s=5.0),
            Task(service=Service.RDAP, command_id=UUID(int=22), attempt=2, timeout_s=12.5, max_age_s=3600),
        ),
        dispatched_at=NOW,
    ),
    "TaskCompleted.v2": TaskCompleted(
        job_id=STREAM,
        service=Service.RDAP,
        attempt=2,
        result=RESULT,
        duration_ms=432,
        source=Source.LIVE,
        observed_at=NOW,
        completed_at=NOW + timedelta(milliseconds=3),
        worker="RDAP@host:7",
        provider="rdap.example.net",
        parser="rdap/1",
        raw=RAW,
    ),
    "TaskCompleted.v2.least": TaskCompleted(
        job_id=STREAM,
        service=Service.GEOIP,
        attempt=1,
        result=RESULT,
        duration_ms=1,
        source=Source.CACHE,
        observed_at=NOW,
        completed_at=NOW,
    ),
    "TaskCompleted.v2.too-large": TaskCompleted(
        job_id=STREAM,
        service=Service.RDAP,
        attempt=1,
        result=RESULT,
        duration_ms=432,
        source=Source.LIVE,
        observed_at=NOW,
        completed_at=NOW,
        worker="RDAP@host:7",
        provider="rdap.example.net",
        parser="rdap/1",
        raw_absent=RawAbsence.TOO_LARGE,
    ),
    "ResultCorrected.v1": ResultCorrected(
        job_id=STREAM,
        service=Service.RDAP,
        attempt=2,
        result=RESULT,
        replaces=RAW.sha256,
        parser="rdap/2",
        reason="the registrar was read from the wrong entity",
        corrected_at=NOW + timedelta(days=3),
    ),
    "TaskFailed.v2": TaskFailed(
        job_id=STREAM,
        service=Service.PING,
        attempt=2,
        error=TaskError(code="unreachable", message="The host cannot be reached."),
        duration_ms=4000,
        failed_at=NOW,
        worker="Ping@host:7",
    ),
    "TaskFailed.v2.least": TaskFailed(
        job_id=STREAM,
        service=Service.PING,
        attempt=1,
        error=TaskError(code="worker_crashed", message="The lookup did not end, however often it was tried."),
        duration_ms=0,
        failed_at=NOW,
    ),
    "TaskTimedOut.v1": TaskTimedOut(job_id=STREAM, service=Service.GEOIP, attempt=2, timed_out_at=NOW),
    "TaskSkipped.v1": TaskSkipped(
        job_id=STREAM,
        service=Service.REVERSE_DNS,
        reason=SkipReason.NOT_APPLICABLE,
        message="Reverse DNS lookup requires an IP address target.",
        skipped_at=NOW,
    ),
    "TaskDeferred.v1": TaskDeferred(
        job_id=STREAM,
        service=Service.GEOIP,
        attempt=1,
        until=NOW + timedelta(seconds=60),
        reason=DeferReason.QUOTA,
        deferred_at=NOW,
    ),
    "JobCompleted.v1": JobCompleted(job_id=STREAM, counts=COUNTS, completed_at=NOW),
    "JobFailed.v1": JobFailed(
        job_id=STREAM, counts=COUNTS, reason="None of the requested services brought an answer.", failed_at=NOW
    ),
    "JobCancelled.v1": JobCancelled(job_id=STREAM, by="operator", reason="not needed any more", cancelled_at=NOW),
    "IdempotencyKeyClaimed.v1": IdempotencyKeyClaimed(job_id=STREAM, request_sha256=SHA256, claimed_at=NOW),
    "DeadLetterRetried.v1": DeadLetterRetried(
        letter_id=17,
        queue="lookup.commands.Ping.interactive",
        job_id=UUID(int=14),
        by="alice",
        reason="the worker was mended",
        retried_at=NOW,
    ),
    "DeadLetterRetried.v1.least": DeadLetterRetried(letter_id=18, queue="lookup.outcomes", by="alice", retried_at=NOW),
    "DeadLetterDiscarded.v1": DeadLetterDiscarded(
        letter_id=17,
        queue="lookup.commands.Ping.interactive",
        job_id=UUID(int=14),
        by="alice",
        reason="nobody waits for it any more",
        discarded_at=NOW,
    ),
    "DeadLetterDiscarded.v1.least": DeadLetterDiscarded(
        letter_id=18, queue="lookup.outcomes", by="alice", reason="noise", discarded_at=NOW
    ),
    "LogRestored.v1": LogRestored(
        from_log_id=UUID(int=15), position=123, log_head=SHA256, backup_taken_at=NOW, by="alice", restored_at=NOW
    ),
    "CanarySent.v1": CanarySent(sent_at=NOW),
    "ErasureStarted.v1": ErasureStarted(
        erasure_id=STREAM, target_sha256=SHA256, by="alice", reason="asked for by the person concerned", started_at=NOW
    ),
    "TargetErased.v1": TargetErased(
        erasure_id=STREAM,
        target_sha256=SHA256,
        by="alice",
        reason="asked for by the person concerned",
        jobs=2,
        facts=5,
        documents=7,
        views=2,
        letters=1,
        messages=3,
        segments=1,
        told_facts=5,
        from_list=True,
        erased_at=NOW,
    ),
    "JobsSealed.v1": JobsSealed(
        segment="00000000000000000001-00000000000000000042-5891b5b522d5df08.segment",
        sha256=SHA256,
        first_position=1,
        last_position=42,
        jobs=5,
        facts=40,
        documents=12,
        size_bytes=8192,
        closed_before=NOW - timedelta(days=30),
        log_retention_days=30.0,
        sealed_at=NOW,
    ),
}


@dataclass(frozen=True)
class Golden:
    """A golden file: a row of the log, what it was chained to, and what must be made of it."""

    topic: str
    stream_id: str
    stream_version: int
    previous_hash: str
    lines: list[str]
    hash: str
    fact: dict[str, Any]
    schema_sha256: str

    @property
    def state(self) -> bytes:
        return "\n".join(self.lines).encode()


def schema_of(fact: type[Fact]) -> dict[str, Any]:
    """What a fact's JSON may look like. How it is described is not part of it."""
    schema: dict[str, Any] = _without_prose(fact.model_json_schema())
    return schema


def sha256_of(schema: dict[str, Any]) -> str:
    return sha256(orjson.dumps(schema, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _without_prose(schema: Any, *, names_fields: bool = False) -> Any:
    """`properties` and `$defs` map names of ours, among which `title` would be a field like any other."""
    if isinstance(schema, list):
        return [_without_prose(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: _without_prose(value, names_fields=name in {"properties", "$defs"} and not names_fields)
        for name, value in schema.items()
        if names_fields or name not in PROSE
    }


def golden_of(fact: Fact) -> Golden:
    cause = Cause(
        actor="anonymous",
        correlation_id=UUID(int=1),
        causation_id=UUID(int=2),
        request_id="req-1",
        key_id="key-1",
        reason="because",
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )
    place = Place(STREAM, 3, bytes(range(32)))
    row = write(
        fact, place, cause, event_id=UUID(int=3), recorded_at=NOW + timedelta(seconds=1), salt=lambda: bytes(range(SALT_BYTES))
    )
    return Golden(
        topic=row.topic,
        stream_id=str(row.stream_id),
        stream_version=row.stream_version,
        previous_hash=place.previous_hash.hex(),
        lines=row.state.decode().split("\n"),
        hash=row.hash.hex(),
        fact=fact.model_dump(mode="json"),
        schema_sha256=sha256_of(schema_of(type(fact))),
    )


def write_missing(folder: Path) -> list[str]:
    """Write what is missing, of current versions only; gives the names written."""
    written: list[str] = []
    for name, fact in EXAMPLES.items():
        path = folder / f"{name}.json"
        if path.exists() or f".v{VERSIONS[type(fact)]}" not in name:
            continue
        _write(path, golden_of(fact), 0)
        written.append(name)
    return written


def write_missing_schemas(folder: Path) -> list[str]:
    """Write the schemas of current versions that are missing; gives the names written."""
    missing = {topic.removeprefix("lookup."): fact for topic, fact in FACTS.items()}
    written = [name for name in missing if not (folder / f"{name}.json").exists()]
    for name in written:
        _write(folder / f"{name}.json", schema_of(missing[name]), orjson.OPT_SORT_KEYS)
    return written


def _write(path: Path, content: Any, option: int) -> None:
    with path.open("xb") as file:
        file.write(orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | option))


if __name__ == "__main__":
    for name in [*write_missing(FOLDER), *(f"schemas/{name}" for name in write_missing_schemas(SCHEMAS))]:
        print(f"wrote {name}")  # noqa: T201 - a command prints
