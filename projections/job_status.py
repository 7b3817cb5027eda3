"""The view that pollers read: one document for each job."""

from dataclasses import replace

from events.facts import (
    Erased,
    JobCancelled,
    JobCompleted,
    JobFact,
    JobFailed,
    JobSubmitted,
    Service,
    TaskCompleted,
    TaskDeferred,
    TaskFailed,
    TasksDispatched,
    TaskSkipped,
    TaskTimedOut,
)
from projections.views import ENDED, ERASED_TEXT, JobStatus, TaskStatus

NO_OUTCOME_IN_TIME = "No answer came in time."


def begin(fact: JobSubmitted) -> JobStatus:
    """The view of a job that has just been taken on."""
    return JobStatus(
        job_id=fact.job_id,
        target=ERASED_TEXT if isinstance(fact.target, Erased) else fact.target.raw,
        target_type=fact.target_type,
        services=fact.services,
        created_at=fact.submitted_at,
        tasks={service: TaskStatus() for service in fact.services},
    )


def project(view: JobStatus, fact: JobFact) -> JobStatus:
    match fact:
        case JobSubmitted():
            return begin(fact)
        case TasksDispatched():
            dispatched = {task.service: TaskStatus(attempt=task.attempt) for task in fact.tasks}
            return replace(view, status="Processing", tasks={**view.tasks, **dispatched})
        case TaskCompleted():
            ended = TaskStatus(
                "Succeeded", fact.attempt, completed_at=fact.completed_at, duration_ms=fact.duration_ms, result=fact.result
            )
            return _with_task(view, fact.service, ended)
        case TaskFailed():
            ended = TaskStatus("Failed", fact.attempt, fact.error.message, fact.failed_at, fact.duration_ms)
            return _with_task(view, fact.service, ended)
        case TaskTimedOut():
            ended = TaskStatus("TimedOut", fact.attempt, NO_OUTCOME_IN_TIME, fact.timed_out_at)
            return _with_task(view, fact.service, ended)
        case TaskSkipped():
            return _with_task(view, fact.service, TaskStatus("Skipped", 1, fact.message, fact.skipped_at))
        case TaskDeferred():
            deferred = _with_task(view, fact.service, TaskStatus("Deferred", fact.attempt))
            waits = all(task.status == "Deferred" for task in deferred.tasks.values())
            return replace(deferred, status="Pending" if waits else deferred.status)
        case JobCompleted():
            return replace(view, status="Completed", completed_at=fact.completed_at)
        case JobFailed():
            return replace(view, status="Failed", completed_at=fact.failed_at)
        case JobCancelled():
            return _cancelled(view, fact)


def _with_task(view: JobStatus, service: Service, task: TaskStatus) -> JobStatus:
    return replace(view, tasks={**view.tasks, service: task})


def _cancelled(view: JobStatus, fact: JobCancelled) -> JobStatus:
    skipped = TaskStatus("Skipped", 1, "The job was cancelled.", fact.cancelled_at)
    tasks = {service: task if task.status in ENDED else skipped for service, task in view.tasks.items()}
    return replace(view, status="Cancelled", completed_at=fact.cancelled_at, tasks=tasks)
