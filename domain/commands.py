"""What somebody wants done: the commands to the saga, to the workers, and the outcomes that come back.

Commands to workers and outcomes travel over the bus, one JSON object a line (`application/x-ndjson`): a message is split
without being parsed, and each item is read on its own, so that a bad one never takes its neighbours with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Literal
from uuid import UUID

from pydantic import Field

from events.facts import (
    DeferReason,
    Priority,
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
    """Ask `services` about `target`. `refusals` are services that policy keeps from this target, with the sentence why."""

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


class Succeeded(Value):
    kind: Literal["succeeded"] = "succeeded"
    result: ResultReference
    source: Source
    observed_at: datetime


class Failed(Value):
    """`transient` says that another attempt may end better."""

    kind: Literal["failed"] = "failed"
    error: TaskError
    transient: bool


class Skipped(Value):
    kind: Literal["skipped"] = "skipped"
    reason: SkipReason
    message: str


class Deferred(Value):
    kind: Literal["deferred"] = "deferred"
    until: datetime
    reason: DeferReason


class TimedOut(Value):
    """The attempt's own time ran out; another attempt may end better."""

    kind: Literal["timed_out"] = "timed_out"


class TaskOutcome(Value):
    """From a worker: how one attempt ended. Never the document itself: that lies where `result` says."""

    job_id: UUID
    command_id: UUID
    service: Service
    attempt: int
    worker: str
    duration_ms: int
    ended_at: datetime
    ending: Annotated[Succeeded | Failed | TimedOut | Skipped | Deferred, Field(discriminator="kind")]


def lines_of(items: Sequence[Value]) -> bytes:
    """The message that carries these commands or outcomes."""
    return b"\n".join(item.__pydantic_serializer__.to_json(item, exclude_none=True) for item in items)
