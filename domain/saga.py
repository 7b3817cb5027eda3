"""The saga of one job: what may be decided about it, as pure functions from state and command to facts.

The state is rebuilt from the job's facts (`evolve`), never stored. Time and ids come in with the command; nothing is awaited,
logged or kept here, so that a decision can be made again from the log alone, and comes out the same.
"""

import re
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple
from uuid import UUID

from domain.commands import Deferred, ExpireTasks, Failed, Rules, Skipped, SubmitLookup, Succeeded, TaskOutcome, TimedOut
from domain.errors import ErrorCode
from events.facts import (
    DeferReason,
    Erased,
    Fact,
    JobCancelled,
    JobCompleted,
    JobFact,
    JobFailed,
    JobSubmitted,
    OutcomeCounts,
    Priority,
    ResultCorrected,
    Service,
    Target,
    Task,
    TaskCompleted,
    TaskDeferred,
    TaskError,
    TaskFailed,
    TasksDispatched,
    TaskSkipped,
    TaskTimedOut,
)

NO_ANSWER = "None of the requested services brought an answer."
TIMEOUT = "timeout_s"
"""The name of a job's option: seconds that an attempt may take, where the service's own setting is not lower."""

ON_THE_WAY_S = 10.0
"""What a job that is in a hurry is given beyond its attempts' own time, to wait in queues and to be told."""

TOO_LATE = {
    DeferReason.QUOTA: (ErrorCode.QUOTA_EXHAUSTED, "The source allows no more questions within this job's time."),
    DeferReason.BREAKER: (ErrorCode.UPSTREAM_DOWN, "The source keeps failing and is not asked again within this job's time."),
}
"""Code and message of a task whose turn would come after its job's end."""


class Ending(StrEnum):
    """How a task ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    SKIPPED = "skipped"


class OpenTask(NamedTuple):
    """A task without a terminal outcome. Exactly one of `dispatched_at` and `deferred_until` is set.

    `command_id` is of its last dispatch: after a deferral the next one has the same attempt, but not the same id.
    """

    attempt: int
    command_id: UUID
    dispatched_at: datetime | None = None
    deferred_until: datetime | None = None


class LookupSaga(NamedTuple):
    """What decisions about a job depend on, rebuilt from its facts."""

    submitted: JobSubmitted
    open_tasks: Mapping[Service, OpenTask] = MappingProxyType({})
    endings: Mapping[Service, Ending] = MappingProxyType({})
    closed: bool = False


# --- What happened ----------------------------------------------------------------------------------------------------


def evolve(saga: LookupSaga | None, fact: Fact) -> LookupSaga:
    """The state after one more fact."""
    if isinstance(fact, JobSubmitted):
        return LookupSaga(fact)
    if saga is None:
        raise ValueError(f"A job's stream begins with {type(fact).__name__}; it must begin with JobSubmitted.")
    match fact:
        case TaskCompleted():
            return _ended(saga, fact.service, Ending.SUCCEEDED)
        case TasksDispatched():
            dispatched = {
                task.service: OpenTask(task.attempt, task.command_id, dispatched_at=fact.dispatched_at) for task in fact.tasks
            }
            return LookupSaga(saga.submitted, {**saga.open_tasks, **dispatched}, saga.endings, saga.closed)
        case TaskDeferred():
            before = saga.open_tasks[fact.service]
            deferred = OpenTask(before.attempt, before.command_id, deferred_until=fact.until)
            return LookupSaga(saga.submitted, {**saga.open_tasks, fact.service: deferred}, saga.endings, saga.closed)
        case TaskFailed():
            return _ended(saga, fact.service, Ending.FAILED)
        case TaskTimedOut():
            return _ended(saga, fact.service, Ending.TIMED_OUT)
        case TaskSkipped():
            return _ended(saga, fact.service, Ending.SKIPPED)
        case JobCompleted() | JobFailed() | JobCancelled():
            return LookupSaga(saga.submitted, saga.open_tasks, saga.endings, closed=True)
        case ResultCorrected():
            return saga  # What was found is not what was decided.
        case _:
            raise ValueError(f"{type(fact).__name__} is not a fact about a job.")


def replay(facts: Iterable[Fact]) -> LookupSaga:
    """The state after all facts of a job's stream."""
    saga: LookupSaga | None = None
    for fact in facts:
        saga = evolve(saga, fact)
    if saga is None:
        raise ValueError("A job without facts has no state.")
    return saga


def _ended(saga: LookupSaga, service: Service, ending: Ending) -> LookupSaga:
    still_open = {name: task for name, task in saga.open_tasks.items() if name is not service}
    return LookupSaga(saga.submitted, still_open, {**saga.endings, service: ending}, saga.closed)


# --- Decisions --------------------------------------------------------------------------------------------------------


def submit(command: SubmitLookup, rules: Rules) -> list[JobFact]:
    """Take a job on: dispatch what applies, skip what does not, and close it at once if nothing is left to ask."""
    submitted = JobSubmitted(
        job_id=command.job_id,
        tenant=command.tenant,
        target=command.target,
        target_type=command.target.type,
        services=tuple(command.services),
        options={} if command.timeout_s is None else {TIMEOUT: repr(command.timeout_s)},
        priority=command.priority,
        sensitivity=command.sensitivity,
        requested_by=command.requested_by,
        expires_at=command.now + lifetime_of(command.priority, command.services, command.timeout_s, rules),
        submitted_at=command.now,
    )
    skipped = [
        TaskSkipped(
            job_id=command.job_id,
            service=service,
            reason=reason,
            message=_unnamed(message, command.target),
            skipped_at=command.now,
        )
        for service, (reason, message) in command.refusals.items()
    ]
    tasks = [
        Task(
            service=service, command_id=command.command_ids[service], attempt=1, timeout_s=_timeout_s(submitted, service, rules)
        )
        for service in command.services
        if service not in command.refusals
    ]
    facts: list[JobFact] = [submitted]
    if tasks:
        facts.append(_dispatched(submitted, command.target, tasks, command.now))
    facts.extend(skipped)
    return _closed_if_done(None, facts, command.now)


def record_outcome(
    saga: LookupSaga, outcome: TaskOutcome, *, next_command_id: UUID, now: datetime, rules: Rules
) -> list[JobFact]:
    """Take an attempt's outcome in. A repeated, late or unasked-for one is no news: no facts.

    A success of any attempt counts; anything else counts only for the last dispatch; the first terminal outcome stands.
    A deferral past the job's end is its end: nobody is kept waiting for a turn that never comes.
    """
    task = saga.open_tasks.get(outcome.service)
    succeeded = isinstance(outcome.ending, Succeeded)
    if saga.closed or task is None or (not succeeded and outcome.command_id != task.command_id):
        # The broker delivers at least once, and a superseded dispatch may still report its failure.
        return []
    if isinstance(outcome.ending, Deferred) and task.dispatched_at is None:
        return []
    if _deserves_another_attempt(saga, outcome, rules, now):
        return [_dispatched_again(saga, outcome.service, next_command_id, task.attempt + 1, now, rules)]
    outcome = _in_time(saga, outcome)
    return _closed_if_done(saga, [_fact_of(_without_target(outcome, saga.submitted.target), now)], now)


def expire_tasks(
    saga: LookupSaga, command: ExpireTasks, *, next_command_ids: Mapping[Service, UUID], rules: Rules
) -> list[JobFact]:
    """What the clock demands: a deferred task's turn, another attempt for a silent one, or the end.

    Nothing is dispatched again before the relay has passed the dispatch on: it is not the worker that is late then.
    """
    if saga.closed:
        return []
    facts: list[JobFact] = []
    for service, task in saga.open_tasks.items():
        if command.now >= saga.submitted.expires_at:
            facts.append(_timed_out(saga, service, task, command.now))
        elif task.deferred_until is not None and command.now >= task.deferred_until:
            facts.append(_dispatched_again(saga, service, next_command_ids[service], task.attempt, command.now, rules))
        elif _is_silent(task, command, rules):
            if task.attempt < rules.attempts_max[service]:
                again = _dispatched_again(saga, service, next_command_ids[service], task.attempt + 1, command.now, rules)
                facts.append(again)
            else:
                facts.append(_timed_out(saga, service, task, command.now))
    return _closed_if_done(saga, facts, command.now)


def cancel(saga: LookupSaga, *, by: str, reason: str, now: datetime) -> list[JobFact]:
    """Call a job off. One that has ended is left as it ended."""
    if saga.closed:
        return []
    return [JobCancelled(job_id=saga.submitted.job_id, by=by, reason=reason, cancelled_at=now)]


def due_at(saga: LookupSaga, rules: Rules) -> datetime | None:
    """When `expire_tasks` next has something to decide, None for a closed job."""
    if saga.closed:
        return None
    times = [saga.submitted.expires_at]
    for task in saga.open_tasks.values():
        if task.deferred_until is not None:
            times.append(task.deferred_until)
        elif task.dispatched_at is not None:
            times.append(task.dispatched_at + rules.redispatch_after)
    return min(times)


# --- How decisions are put into facts ---------------------------------------------------------------------------------


def _timeout_s(submitted: JobSubmitted, service: Service, rules: Rules) -> float:
    """A request may ask for less than the service's setting, never for more."""
    asked = submitted.options.get(TIMEOUT)
    return rules.timeout_s[service] if asked is None else min(rules.timeout_s[service], float(asked))


def lifetime_of(priority: Priority, services: Iterable[Service], timeout_s: float | None, rules: Rules) -> timedelta:
    """Who gives each attempt less time does not wait the full lifetime for a worker that is not there, either.

    Bulk work waits in its queue for as long as it must, however short its attempts are.
    """
    lifetime = rules.lifetime[priority]
    if timeout_s is None or priority is Priority.BULK:
        return lifetime
    attempts = max(rules.attempts_max[service] for service in services)
    return min(lifetime.total_seconds(), attempts * timeout_s + ON_THE_WAY_S) * timedelta(seconds=1)


def _deserves_another_attempt(saga: LookupSaga, outcome: TaskOutcome, rules: Rules, now: datetime) -> bool:
    return (
        (isinstance(outcome.ending, TimedOut) or (isinstance(outcome.ending, Failed) and outcome.ending.transient))
        and outcome.attempt < rules.attempts_max[outcome.service]
        and now < saga.submitted.expires_at
    )


def _in_time(saga: LookupSaga, outcome: TaskOutcome) -> TaskOutcome:
    """The outcome, or the failure that a deferral to after the job's end amounts to."""
    if not isinstance(outcome.ending, Deferred) or outcome.ending.until < saga.submitted.expires_at:
        return outcome
    code, message = TOO_LATE[outcome.ending.reason]
    return outcome.model_copy(update={"ending": Failed(error=TaskError(code=code, message=message), transient=False)})


def _without_target(outcome: TaskOutcome, target: Target | Erased) -> TaskOutcome:
    """A message is in the chained part of its fact, for ever: whatever a worker says, it must not name what may be erased."""
    match outcome.ending:
        case Failed(error=error):
            error = error.model_copy(update={"message": _unnamed(error.message, target)})
            return outcome.model_copy(update={"ending": outcome.ending.model_copy(update={"error": error})})
        case Skipped(message=message):
            skipped = outcome.ending.model_copy(update={"message": _unnamed(message, target)})
            return outcome.model_copy(update={"ending": skipped})
        case _:
            return outcome


def _unnamed(message: str, target: Target | Erased) -> str:
    if isinstance(target, Erased):
        return message
    spellings = "|".join(re.escape(spelling) for spelling in (target.raw.strip(), target.canonical))
    named = re.compile(spellings, re.IGNORECASE)
    return named.sub(lambda found: "the target" if found.start() else "The target", message)


def _is_silent(task: OpenTask, command: ExpireTasks, rules: Rules) -> bool:
    return (
        task.dispatched_at is not None
        and task.dispatched_at <= command.relayed_until
        and command.now >= task.dispatched_at + rules.redispatch_after
    )


def _fact_of(outcome: TaskOutcome, now: datetime) -> JobFact:
    match outcome.ending:
        case Succeeded() as success:
            return TaskCompleted(
                job_id=outcome.job_id,
                service=outcome.service,
                attempt=outcome.attempt,
                result=success.result,
                duration_ms=outcome.duration_ms,
                source=success.source,
                observed_at=success.observed_at,
                completed_at=now,
                worker=outcome.worker,
                provider=success.provider,
                parser=success.parser,
                raw=success.raw,
                raw_absent=success.raw_absent,
            )
        case Failed(error=error):
            return TaskFailed(
                job_id=outcome.job_id,
                service=outcome.service,
                attempt=outcome.attempt,
                error=error,
                duration_ms=outcome.duration_ms,
                failed_at=now,
                worker=outcome.worker,
            )
        case TimedOut():
            return TaskTimedOut(job_id=outcome.job_id, service=outcome.service, attempt=outcome.attempt, timed_out_at=now)
        case Skipped(reason=reason, message=message):
            return TaskSkipped(job_id=outcome.job_id, service=outcome.service, reason=reason, message=message, skipped_at=now)
        case Deferred(until=until, reason=reason):
            return TaskDeferred(
                job_id=outcome.job_id,
                service=outcome.service,
                attempt=outcome.attempt,
                until=until,
                reason=reason,
                deferred_at=now,
            )


def _dispatched(submitted: JobSubmitted, target: Target | Erased, tasks: Iterable[Task], now: datetime) -> TasksDispatched:
    return TasksDispatched(
        job_id=submitted.job_id,
        target=target,
        target_type=submitted.target_type,
        priority=submitted.priority,
        sensitivity=submitted.sensitivity,
        expires_at=submitted.expires_at,
        tasks=tuple(tasks),
        dispatched_at=now,
    )


def _dispatched_again(
    saga: LookupSaga, service: Service, command_id: UUID, attempt: int, now: datetime, rules: Rules
) -> TasksDispatched:
    task = Task(service=service, command_id=command_id, attempt=attempt, timeout_s=_timeout_s(saga.submitted, service, rules))
    return _dispatched(saga.submitted, saga.submitted.target, [task], now)


def _timed_out(saga: LookupSaga, service: Service, task: OpenTask, now: datetime) -> TaskTimedOut:
    return TaskTimedOut(job_id=saga.submitted.job_id, service=service, attempt=task.attempt, timed_out_at=now)


def _closed_if_done(saga: LookupSaga | None, facts: list[JobFact], now: datetime) -> list[JobFact]:
    """The facts, and the one that closes the job if they leave no task open."""
    if saga is not None and len(saga.open_tasks) > len(facts):
        return facts  # Each fact ends one task at most.
    for fact in facts:
        saga = evolve(saga, fact)
    if saga is None or not facts or saga.open_tasks:
        return facts
    return [*facts, _closing_fact(saga, now)]


def _closing_fact(saga: LookupSaga, now: datetime) -> JobCompleted | JobFailed:
    endings = list(saga.endings.values())
    counts = OutcomeCounts(
        succeeded=endings.count(Ending.SUCCEEDED),
        failed=endings.count(Ending.FAILED),
        timed_out=endings.count(Ending.TIMED_OUT),
        skipped=endings.count(Ending.SKIPPED),
    )
    job_id = saga.submitted.job_id
    if counts.succeeded:
        return JobCompleted(job_id=job_id, counts=counts, completed_at=now)
    return JobFailed(job_id=job_id, counts=counts, reason=NO_ANSWER, failed_at=now)
