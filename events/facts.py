"""What happened: the facts, and the plain values that they are made of.

Facts outlive rules. What is written today must still load in ten years, so a fact depends on plain values only, is frozen,
and is only ever extended by optional fields (a changed meaning is a new version in `events/catalog.py`).
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field


class Service(StrEnum):
    """One kind of question that a worker can ask about a target. The order is the public one."""

    GEOIP = "GeoIP"
    PING = "Ping"
    RDAP = "RDAP"
    REVERSE_DNS = "ReverseDNS"


class TargetType(StrEnum):
    IP_ADDRESS = "IPAddress"
    DOMAIN = "Domain"


class Priority(StrEnum):
    INTERACTIVE = "interactive"
    BULK = "bulk"


class Sensitivity(StrEnum):
    """How far a target may be told to third parties."""

    NORMAL = "normal"
    RESTRICTED = "restricted"


class Source(StrEnum):
    """Where a result came from: asked for now, remembered, or shared with another job's question under way."""

    LIVE = "live"
    CACHE = "cache"
    COALESCED = "coalesced"


class SkipReason(StrEnum):
    NOT_APPLICABLE = "not_applicable"
    POLICY = "policy"
    CANCELLED = "cancelled"


class RawAbsence(StrEnum):
    """Why the raw answer behind a result was not kept."""

    TOO_LARGE = "too_large"
    SWITCHED_OFF = "switched_off"


class DeferReason(StrEnum):
    QUOTA = "quota"
    BREAKER = "breaker"


class Value(BaseModel):
    """A plain, frozen value."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Target(Value):
    """What a job asks about: as typed, and in the one form that everything is decided on."""

    raw: str
    canonical: str
    type: TargetType


class Erased(Value):
    """Stands where an erasable field's value was before it was erased."""

    erased: Literal[True] = True


class TaskError(Value):
    """Why a task failed: a stable code for programs, a sentence of our own for people."""

    code: str
    message: str


class PostgresLocation(Value):
    """A document in the `result_documents` table."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True)

    type: Literal["postgres"] = Field(default="postgres", alias="$type")
    key: str


ResultLocation = PostgresLocation
"""Tagged by `$type`: becomes a union when a second kind of store comes; what is written today stays readable."""


class ResultReference(Value):
    """Where a result document lies and how to know that it is the right one.

    `sha256` (hex) and `size_bytes` are of the document itself, not of its compressed form.
    """

    location: ResultLocation
    sha256: str
    size_bytes: int


class Task(Value):
    """One service's part of a job as it is dispatched."""

    service: Service
    command_id: UUID
    attempt: int
    timeout_s: float
    max_age_s: int = 0


_ERASABLE = "erasable"
ErasableTarget = Annotated[Target | Erased, Field(json_schema_extra={_ERASABLE: True})]
ErasableText = Annotated[str | Erased | None, Field(json_schema_extra={_ERASABLE: True})]


class Fact(BaseModel):
    """Something that happened. Never changed, never taken back."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    erasable_fields: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.erasable_fields = tuple(
            name
            for name, field in cls.model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get(_ERASABLE)
        )


class JobSubmitted(Fact):
    """Somebody asked, and we promised an answer by `expires_at`."""

    job_id: UUID
    tenant: str
    target: ErasableTarget
    target_type: TargetType
    services: tuple[Service, ...]
    options: dict[str, str] = Field(default_factory=dict)
    priority: Priority
    sensitivity: Sensitivity
    requested_by: ErasableText = None
    expires_at: datetime
    batch_id: UUID | None = None
    retry_of: UUID | None = None
    watch_id: UUID | None = None
    callback: str | None = None
    submitted_at: datetime


class TasksDispatched(Fact):
    """Tasks were handed to the workers: the first time, or again."""

    job_id: UUID
    target: ErasableTarget
    target_type: TargetType
    priority: Priority
    sensitivity: Sensitivity
    expires_at: datetime
    tasks: tuple[Task, ...]
    dispatched_at: datetime


class TaskCompleted(Fact):
    """A worker brought an answer.

    `provider` is who answered ("rdap.db.ripe.net", "ip-api.com", "icmp", a name server), `parser` what made the result of it
    ("rdap/1"), and `raw` what the provider said, as it was received. `raw_absent` says why a raw answer that there was is not
    kept; without it and without `raw` there was none, or the fact is of version 1, which did not know of these four.
    """

    job_id: UUID
    service: Service
    attempt: int
    result: ResultReference
    duration_ms: int
    source: Source
    observed_at: datetime
    completed_at: datetime
    worker: str | None = None
    provider: str | None = None
    parser: str | None = None
    raw: ResultReference | None = None
    raw_absent: RawAbsence | None = None


class ResultCorrected(Fact):
    """An answer was read again, from the raw answer that was kept, by a parser that reads it differently.

    The first result stays in the log and in the store; `replaces` is the SHA-256 of the one that this one stands in for.
    May come after the job has ended: it changes what the job found, never how it ended.
    """

    job_id: UUID
    service: Service
    attempt: int
    result: ResultReference
    replaces: str
    parser: str
    reason: str
    corrected_at: datetime


class TaskFailed(Fact):
    """A worker gave up. The job goes on without it. `worker` is None in what was version 1."""

    job_id: UUID
    service: Service
    attempt: int
    error: TaskError
    duration_ms: int
    failed_at: datetime
    worker: str | None = None


class TaskTimedOut(Fact):
    """No outcome came in time."""

    job_id: UUID
    service: Service
    attempt: int
    timed_out_at: datetime


class TaskSkipped(Fact):
    """A service was not asked, for a reason that was known beforehand."""

    job_id: UUID
    service: Service
    reason: SkipReason
    message: str
    skipped_at: datetime


class TaskDeferred(Fact):
    """A worker may not ask right now. The attempt is not used up; the task is dispatched again at `until`."""

    job_id: UUID
    service: Service
    attempt: int
    until: datetime
    reason: DeferReason
    deferred_at: datetime


class OutcomeCounts(Value):
    """How the tasks of a closed job ended. The four numbers add up to the number of requested services."""

    succeeded: int
    failed: int
    timed_out: int
    skipped: int


class JobCompleted(Fact):
    """All tasks ended, at least one of them with an answer."""

    job_id: UUID
    counts: OutcomeCounts
    completed_at: datetime


class JobFailed(Fact):
    """All tasks ended, none of them with an answer."""

    job_id: UUID
    counts: OutcomeCounts
    reason: str
    failed_at: datetime


class JobCancelled(Fact):
    """Somebody called the job off."""

    job_id: UUID
    by: str
    reason: str
    cancelled_at: datetime


class IdempotencyKeyClaimed(Fact):
    """A client's key now names this job (own stream: UUIDv5 of tenant and key)."""

    job_id: UUID
    request_sha256: str
    claimed_at: datetime


class DeadLetterRetried(Fact):
    """Somebody had a message that could not be handled published again (own stream, one per letter)."""

    letter_id: int
    queue: str
    job_id: UUID | None = None
    by: str
    reason: str | None = None
    retried_at: datetime


class DeadLetterDiscarded(Fact):
    """Somebody decided that a message that could not be handled never will be (own stream, one per letter)."""

    letter_id: int
    queue: str
    job_id: UUID | None = None
    by: str
    reason: str
    discarded_at: datetime


class CanarySent(Fact):
    """Nothing had happened for a while: this shows that what happens still reaches the views (own streams, one an hour)."""

    sent_at: datetime


class JobsSealed(Fact):
    """The streams of jobs that ended long ago were moved from the table into a segment file (own stream, one for the log).

    `sha256` is over what is never erased of them (`events/segment_files.py`), `size_bytes` the file's when it was sealed.
    """

    segment: str
    sha256: str
    first_position: int
    last_position: int
    jobs: int
    facts: int
    documents: int
    size_bytes: int
    closed_before: datetime
    log_retention_days: float
    sealed_at: datetime


class LogRestored(Fact):
    """A backup of another log became this one (own stream, named by the new log's id): all before this fact was written there.

    `position` and `log_head` are where the backup ended, hex for the head.
    """

    from_log_id: UUID
    position: int
    log_head: str
    backup_taken_at: datetime
    by: str
    restored_at: datetime


class ErasureStarted(Fact):
    """Somebody wants everything about a target gone (own stream, one for each erasure).

    The target is not told: `target_sha256` is of a salt and its canonical form, and the salt is in the receipt only.
    """

    erasure_id: UUID
    target_sha256: str
    by: str
    reason: str
    started_at: datetime


class TargetErased(Fact):
    """An erasure has come to its end: so much of each kind was erased. `from_list`: again, from a restored backup."""

    erasure_id: UUID
    target_sha256: str
    by: str
    reason: str
    jobs: int
    facts: int
    documents: int
    views: int
    letters: int
    messages: int
    segments: int
    told_facts: int
    from_list: bool = False
    erased_at: datetime


JobFact = (
    JobSubmitted
    | TasksDispatched
    | TaskCompleted
    | ResultCorrected
    | TaskFailed
    | TaskTimedOut
    | TaskSkipped
    | TaskDeferred
    | JobCompleted
    | JobFailed
    | JobCancelled
)
