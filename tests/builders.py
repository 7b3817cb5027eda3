"""Given / when / then: the facts, commands and outcomes of one job, each with everything that a test does not care about."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import count
from uuid import UUID

from uuid_utils.compat import uuid7

from domain.commands import Deferred, Failed, LookUp, Rules, Skipped, SubmitLookup, Succeeded, TaskOutcome, TimedOut
from events.facts import (
    DeferReason,
    JobCancelled,
    JobCompleted,
    JobFact,
    JobFailed,
    JobSubmitted,
    OutcomeCounts,
    Priority,
    ResultCorrected,
    Sensitivity,
    Service,
    SkipReason,
    Source,
    Target,
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
from events.log_tail import LogTail
from events.memory import MemoryStore
from events.record import SALT_BYTES, Cause, StoredFact, read
from events.store import AppendUnit, EventStore, NewFacts, Scribe, StreamHead
from results.documents import reference_to

GEOIP, PING, RDAP, REVERSE_DNS = Service
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
JOB = UUID("019b7c8a-0000-7000-8000-000000000001")
ADDRESS = Target(raw=" 198.51.100.7 ", canonical="198.51.100.7", type=TargetType.IP_ADDRESS)
DOMAIN = Target(raw="Example.com", canonical="example.com", type=TargetType.DOMAIN)
LIFETIME = timedelta(seconds=90)
REDISPATCH_AFTER = timedelta(seconds=30)
RULES = Rules(
    timeout_s=dict.fromkeys(Service, 10.0),
    attempts_max=dict.fromkeys(Service, 2),
    lifetime={Priority.INTERACTIVE: LIFETIME, Priority.BULK: timedelta(hours=1)},
    redispatch_after=REDISPATCH_AFTER,
)
DOWN = TaskError(code="unreachable", message="The service cannot be reached.")
DOCUMENT = b'{"answer":42}'
CORRECTED = b'{"corrected":true}'


def at(seconds: float) -> datetime:
    """So many seconds after the job was submitted."""
    return NOW + timedelta(seconds=seconds)


def command_id(service: Service, dispatch: int = 1) -> UUID:
    """The id of the n-th command of a service's task."""
    return UUID(int=(tuple(Service).index(service) + 1 << 64) + dispatch)


# --- Facts ------------------------------------------------------------------------------------------------------------


def submitted(*services: Service, job_id: UUID = JOB, target: Target = ADDRESS, when: datetime = NOW) -> JobSubmitted:
    return JobSubmitted(
        job_id=job_id,
        tenant="default",
        target=target,
        target_type=target.type,
        services=services,
        priority=Priority.INTERACTIVE,
        sensitivity=Sensitivity.NORMAL,
        requested_by="203.0.113.9",
        expires_at=when + LIFETIME,
        submitted_at=when,
    )


def dispatched(
    *services: Service, attempt: int = 1, dispatch: int | None = None, job_id: UUID = JOB, when: datetime = NOW
) -> TasksDispatched:
    """`dispatch` tells the commands of a task apart where a deferral used no attempt up; usually it is the attempt."""
    number = attempt if dispatch is None else dispatch
    return TasksDispatched(
        job_id=job_id,
        target=ADDRESS,
        target_type=ADDRESS.type,
        priority=Priority.INTERACTIVE,
        sensitivity=Sensitivity.NORMAL,
        expires_at=NOW + LIFETIME,
        tasks=tuple(
            Task(service=service, command_id=command_id(service, number), attempt=attempt, timeout_s=10.0)
            for service in services
        ),
        dispatched_at=when,
    )


def completed(
    service: Service, *, attempt: int = 1, job_id: UUID = JOB, document: bytes = DOCUMENT, when: datetime = NOW
) -> TaskCompleted:
    return TaskCompleted(
        job_id=job_id,
        service=service,
        attempt=attempt,
        result=reference_to(job_id, document),
        duration_ms=12,
        source=Source.LIVE,
        observed_at=NOW,
        completed_at=when,
        worker="worker-1",
    )


def corrected(
    service: Service,
    *,
    attempt: int = 1,
    job_id: UUID = JOB,
    document: bytes = CORRECTED,
    replaces: bytes = DOCUMENT,
    when: datetime = NOW,
) -> ResultCorrected:
    return ResultCorrected(
        job_id=job_id,
        service=service,
        attempt=attempt,
        result=reference_to(job_id, document),
        replaces=reference_to(job_id, replaces).sha256,
        parser=f"{service.lower()}/2",
        reason="the old parser was wrong",
        corrected_at=when,
    )


def failed(service: Service, *, attempt: int = 1, job_id: UUID = JOB, when: datetime = NOW) -> TaskFailed:
    return TaskFailed(
        job_id=job_id, service=service, attempt=attempt, error=DOWN, duration_ms=12, failed_at=when, worker="worker-1"
    )


def timed_out(service: Service, *, attempt: int = 1, job_id: UUID = JOB, when: datetime = NOW) -> TaskTimedOut:
    return TaskTimedOut(job_id=job_id, service=service, attempt=attempt, timed_out_at=when)


def skipped(service: Service, *, job_id: UUID = JOB, when: datetime = NOW) -> TaskSkipped:
    reason, message = REFUSAL
    return TaskSkipped(job_id=job_id, service=service, reason=reason, message=message, skipped_at=when)


def deferred(service: Service, *, until: datetime, attempt: int = 1, job_id: UUID = JOB, when: datetime = NOW) -> TaskDeferred:
    return TaskDeferred(
        job_id=job_id, service=service, attempt=attempt, until=until, reason=DeferReason.QUOTA, deferred_at=when
    )


def job_completed(counts: OutcomeCounts, *, job_id: UUID = JOB, when: datetime = NOW) -> JobCompleted:
    return JobCompleted(job_id=job_id, counts=counts, completed_at=when)


def job_failed(counts: OutcomeCounts, *, job_id: UUID = JOB, reason: str, when: datetime = NOW) -> JobFailed:
    return JobFailed(job_id=job_id, counts=counts, reason=reason, failed_at=when)


def job_cancelled(*, job_id: UUID = JOB, when: datetime = NOW) -> JobCancelled:
    return JobCancelled(job_id=job_id, by="operator", reason="not needed any more", cancelled_at=when)


def counts(*, succeeded: int = 0, failed: int = 0, timed_out: int = 0, skipped: int = 0) -> OutcomeCounts:
    return OutcomeCounts(succeeded=succeeded, failed=failed, timed_out=timed_out, skipped=skipped)


# --- Commands and outcomes --------------------------------------------------------------------------------------------

REFUSAL = (SkipReason.NOT_APPLICABLE, "Reverse DNS lookup requires an IP address target.")


def submit_command(
    *services: Service,
    refused: tuple[Service, ...] = (),
    target: Target = ADDRESS,
    priority: Priority = Priority.INTERACTIVE,
    timeout_s: float | None = None,
) -> SubmitLookup:
    return SubmitLookup(
        job_id=JOB,
        tenant="default",
        target=target,
        services=services,
        refusals=dict.fromkeys(refused, REFUSAL),
        command_ids={service: command_id(service) for service in services},
        requested_by="203.0.113.9",
        now=NOW,
        priority=priority,
        timeout_s=timeout_s,
    )


def look_up_command(
    service: Service = PING,
    *,
    job_id: UUID = JOB,
    attempt: int = 1,
    target: Target = ADDRESS,
    timeout_s: float = 10.0,
    expires_at: datetime = NOW + LIFETIME,
) -> LookUp:
    return LookUp(
        job_id=job_id,
        command_id=command_id(service, attempt),
        service=service,
        attempt=attempt,
        target=target,
        sensitivity=Sensitivity.NORMAL,
        timeout_s=timeout_s,
        max_age_s=0,
        expires_at=expires_at,
    )


def success(document: bytes = DOCUMENT, *, job_id: UUID = JOB) -> Succeeded:
    return Succeeded(result=reference_to(job_id, document), source=Source.LIVE, observed_at=NOW)


PERMANENT = Failed(error=DOWN, transient=False)
TRANSIENT = Failed(error=DOWN, transient=True)
OUT_OF_TIME = TimedOut()
REFUSED = Skipped(reason=SkipReason.POLICY, message="Not from here.")


def quota(until: datetime) -> Deferred:
    return Deferred(until=until, reason=DeferReason.QUOTA)


def outcome(
    service: Service,
    ending: Succeeded | Failed | TimedOut | Skipped | Deferred | None = None,
    *,
    attempt: int = 1,
    dispatch: int | None = None,
    job_id: UUID = JOB,
) -> TaskOutcome:
    """How an attempt ended, as its worker tells it; with an answer unless said otherwise."""
    return TaskOutcome(
        job_id=job_id,
        command_id=command_id(service, attempt if dispatch is None else dispatch),
        service=service,
        attempt=attempt,
        worker="worker-1",
        duration_ms=12,
        ended_at=NOW,
        ending=success(job_id=job_id) if ending is None else ending,
    )


# --- A log ------------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self, now: datetime = NOW) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def move_to(self, now: datetime) -> None:
        self.now = now


def numbered_ids(first: int = 1) -> Callable[[], UUID]:
    """A source of ids that gives the same ones each time."""
    numbers = count(first)
    return lambda: UUID(int=next(numbers))


def memory_store(now: Callable[[], datetime] | None = None) -> MemoryStore:
    return MemoryStore(Scribe(now or Clock(), uuid7, lambda: bytes(SALT_BYTES)), uuid7())


CAUSE = Cause(actor="test", correlation_id=UUID(int=7))


async def given(store: EventStore, *facts: JobFact, job_id: UUID = JOB) -> StreamHead:
    """A log that holds these facts of a new job."""
    (head,) = await store.append(AppendUnit([NewFacts(job_id, StreamHead(), facts)], CAUSE))
    return head


def remember(tail: LogTail, stored: Sequence[StoredFact]) -> None:
    """These facts were appended by the tail's own process."""
    tail.append(stored, [read(one).fact for one in stored])


# --- Waiting ----------------------------------------------------------------------------------------------------------


async def eventually(holds: Callable[[], bool], *, patience_s: float = 10.0) -> None:
    """Wait until something holds that other coroutines bring about, within a bound."""
    clock = asyncio.get_running_loop().time
    give_up_at = clock() + patience_s
    while clock() < give_up_at:
        if holds():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("It did not come about in time.")
