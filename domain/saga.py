"""The saga of one job: what may be decided about it, as pure functions from state and command to facts.

The state is rebuilt from the job's facts (`evolve`), never stored. Time and ids come in with the command; nothing is awaited,
logged or kept here, so that a decision can be made again from the log alone, and comes out the same.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from uuid import UUID

from domain.commands import Deferred, ExpireTasks, Failed, Rules, Skipped, SubmitLookup, Succeeded, TaskOutcome, TimedOut
from events.facts import (
    Erased,
    Fact,
    JobCancelled,
    JobCompleted,
    JobFact,
    JobFailed,
    JobSubmitted,
    OutcomeCounts,
    Service,
    Target,
    Task,
    TaskCompleted,
    TaskDeferred,
    TaskFailed,
    TasksDispatched,
    TaskSkipped,
    TaskTimedOut,
)

NO_ANSWER = "None of the requested services brought an answer."


class Ending(StrEnum):
    """How a task ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class OpenTask:
    """A task without a terminal outcome. Exactly one of `dispatched_at` and `deferred_until` is set.

    `command_id` is of its last dispatch: after a deferral the next one has the same attempt, but not the same id.
    """

    attempt: int
    command_id: UUID
    dispatched_at: datetime | None = None
    deferred_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class LookupSaga:
    """What decisions about a job depend on, rebuilt from its facts."""

    submitted: JobSubmitted
    open_tasks: Mapping[Service, OpenTask] = field(default_factory=lambda: MappingProxyType({}))
    endings: Mapping[Service, Ending] = field(default_factory=lambda: MappingProxyType({}))
    closed: bool = False


# --- What happened ----------------------------------------------------------------------------------------------------


def evolve(saga: LookupSaga | None, fact: Fact) -> LookupSaga:
    """The state after one more fact."""
    if isinstance(fact, JobSubmitted):
        return LookupSaga(fact)
    if saga is None:
        raise ValueError(f"A job's stream begins with {type(fact).__name__}; it must begin with JobSubmitted.")
    match fact:
        case TasksDispatched():
            dispatched = {
                task.service: OpenTask(task.attempt, task.command_id, dispatched_at=fact.dispatched_at) for task in fact.tasks
            }
            return LookupSaga(saga.submitted, {**saga.open_tasks, **dispatched}, saga.endings, saga.closed)
        case TaskDeferred():
            deferred = replace(saga.open_tasks[fact.service], dispatched_at=None, deferred_until=fact.until)
            return LookupSaga(saga.submitted, {**saga.open_tasks, fact.service: deferred}, saga.endings, saga.closed)
        case TaskCompleted():
            return _ended(saga, fact.service, Ending.SUCCEEDED)
        case TaskFailed():
            return _ended(saga, fact.service, Ending.FAILED)
        case TaskTimedOut():
            return _ended(saga, fact.service, Ending.TIMED_OUT)
        case TaskSkipped():
            return _ended(saga, fact.service, Ending.SKIPPED)
        case JobCompleted() | JobFailed() | JobCancelled():
            return LookupSaga(saga.submitted, saga.open_tasks, saga.endings, closed=True)
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
        priority=command.priority,
        sensitivity=command.sensitivity,
        requested_by=command.requested_by,
        expires_at=command.now + rules.lifetime[command.priority],
        submitted_at=command.now,
    )
    skipped = [
        TaskSkipped(job_id=command.job_id, service=service, reason=reason, message=message, skipped_at=command.now)
        for service, (reason, message) in command.refusals.items()
    ]
    tasks = [
        Task(service=service, command_id=command.command_ids[service], attempt=1, timeout_s=rules.timeout_s[service])
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
    return _closed_if_done(saga, [_fact_of(outcome, now)], now)


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


def _deserves_another_attempt(saga: LookupSaga, outcome: TaskOutcome, rules: Rules, now: datetime) -> bool:
    return (
        (isinstance(outcome.ending, TimedOut) or (isinstance(outcome.ending, Failed) and outcome.ending.transient))
        and outcome.attempt < rules.attempts_max[outcome.service]
        and now < saga.submitted.expires_at
    )


def _is_silent(task: OpenTask, command: ExpireTasks, rules: Rules) -> bool:
    return (
        task.dispatched_at is not None
        and task.dispatched_at <= command.relayed_until
        and command.now >= task.dispatched_at + rules.redispatch_after
    )


def _fact_of(outcome: TaskOutcome, now: datetime) -> JobFact:
    match outcome.ending:
        case Succeeded(result=result, source=source, observed_at=observed_at):
            return TaskCompleted(
                job_id=outcome.job_id,
                service=outcome.service,
                attempt=outcome.attempt,
                result=result,
                duration_ms=outcome.duration_ms,
                source=source,
                observed_at=observed_at,
                completed_at=now,
            )
        case Failed(error=error):
            return TaskFailed(
                job_id=outcome.job_id,
                service=outcome.service,
                attempt=outcome.attempt,
                error=error,
                duration_ms=outcome.duration_ms,
                failed_at=now,
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
    task = Task(service=service, command_id=command_id, attempt=attempt, timeout_s=rules.timeout_s[service])
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
