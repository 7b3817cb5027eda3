"""What somebody wants done: the commands to the saga, to the workers, and the outcomes that come back.

Commands to workers and outcomes travel over the bus, one JSON object a line (`application/x-ndjson`): a message is split
without being parsed, and each item is read on its own, so that a bad one never takes its neighbours with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Literal
from uuid import UUID

from pydantic import ConfigDict, Field

from domain.errors import ErrorCode
from events.facts import (
    DeferReason,
    Priority,
    RawAbsence,
    ResultReference,
    Sensitivity,
    Service,
    SkipReason,
    Source,
    Target,
    TaskError,
    Value,
)


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings that decisions depend on, per service or priority. Times in seconds."""

    timeout_s: Mapping[Service, float]
    attempts_max: Mapping[Service, int]
    lifetime: Mapping[Priority, timedelta]
    redispatch_after: timedelta
    """How long a dispatched attempt may stay silent before its task is dispatched again (or given up)."""


@dataclass(frozen=True, slots=True)
class SubmitLookup:
    """Ask `services` about `target`. `refusals` are services that policy keeps from this target, with the sentence why.

    `timeout_s` is how long one attempt may take where that is less than the service's setting, None = as set.
    """

    job_id: UUID
    tenant: str
    target: Target
    services: Sequence[Service]
    refusals: Mapping[Service, tuple[SkipReason, str]]
    command_ids: Mapping[Service, UUID]
    requested_by: str | None
    now: datetime
    priority: Priority = Priority.INTERACTIVE
    sensitivity: Sensitivity = Sensitivity.NORMAL
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class ExpireTasks:
    """Look what of a job is overdue at `now`. What was dispatched after `relayed_until` may not have left us yet."""

    job_id: UUID
    now: datetime
    relayed_until: datetime


class LookUp(Value):
    """To a worker: ask your service about this target, once."""

    job_id: UUID
    command_id: UUID
    service: Service
    attempt: int
    target: Target
    sensitivity: Sensitivity
    timeout_s: float
    max_age_s: int
    expires_at: datetime
    traceparent: str | None = None


class Told(Value):
    """What a worker tells. Read with tolerance: a newer worker may tell more than this program knows of.

    Commands are not read so: a worker that overlooks a word of what it is told might ask what it must not.
    """

    model_config = ConfigDict(extra="ignore")


class Succeeded(Told):
    """`provider`, `parser`, `raw` and `raw_absent` are what `TaskCompleted` makes of them."""

    kind: Literal["succeeded"] = "succeeded"
    result: ResultReference
    source: Source
    observed_at: datetime
    provider: str | None = None
    parser: str | None = None
    raw: ResultReference | None = None
    raw_absent: RawAbsence | None = None


class Failed(Told):
    """`transient` says that another attempt may end better."""

    kind: Literal["failed"] = "failed"
    error: TaskError
    transient: bool


class Skipped(Told):
    kind: Literal["skipped"] = "skipped"
    reason: SkipReason
    message: str


class Deferred(Told):
    kind: Literal["deferred"] = "deferred"
    until: datetime
    reason: DeferReason


class TimedOut(Told):
    """The attempt's own time ran out; another attempt may end better."""

    kind: Literal["timed_out"] = "timed_out"


class TaskOutcome(Told):
    """From a worker: how one attempt ended. Never the document itself: that lies where `result` says."""

    job_id: UUID
    command_id: UUID
    service: Service
    attempt: int
    worker: str
    duration_ms: int
    ended_at: datetime
    ending: Annotated[Succeeded | Failed | TimedOut | Skipped | Deferred, Field(discriminator="kind")]


WORKER_CRASHED = TaskError(code=ErrorCode.WORKER_CRASHED, message="The lookup did not end, however often it was tried.")
"""Of an item that went to the dead letters, because its workers died of it."""


def lines_of(items: Sequence[Value]) -> bytes:
    """The message that carries these commands or outcomes."""
    return b"\n".join(item.__pydantic_serializer__.to_json(item, exclude_none=True) for item in items)
