"""The view that pollers read: one document for each job."""

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

from domain.errors import ErrorCode
from events.facts import (
    Erased,
    JobCancelled,
    JobCompleted,
    JobFact,
    JobFailed,
    JobSubmitted,
    ResultCorrected,
    Service,
    SkipReason,
    TaskCompleted,
    TaskDeferred,
    TaskFailed,
    TasksDispatched,
    TaskSkipped,
    TaskTimedOut,
)
from projections.job_views import JobViews, View
from projections.views import ENDED, ERASED_TEXT, JOB_STATUS, JobStatus, TaskStatus, document_of
from projections.writes import Put, Write

NO_OUTCOME_IN_TIME = "No answer came in time."
SKIPPED = {
    SkipReason.NOT_APPLICABLE: ErrorCode.NOT_APPLICABLE,
    SkipReason.POLICY: ErrorCode.ADDRESS_REFUSED,
    SkipReason.CANCELLED: ErrorCode.CANCELLED,
}
"""Whether the policy spoke at submission or in the worker, the code is the same."""


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


def fold(view: JobStatus | None, fact: JobFact) -> JobStatus:
    """The view after one more of the job's facts, of which the first is `JobSubmitted`."""
    if isinstance(fact, JobSubmitted):
        return begin(fact)
    if view is None:
        raise ValueError(f"Job {fact.job_id} begins with {type(fact).__name__}.")
    return project(view, fact)


def project(view: JobStatus, fact: JobFact) -> JobStatus:
    match fact:
        # The frequent ones first: kinds are asked for one after the other.
        case TaskCompleted():
            ended = TaskStatus(
                "Succeeded", fact.attempt, completed_at=fact.completed_at, duration_ms=fact.duration_ms, result=fact.result
            )
            return _with_task(view, fact.service, ended)
        case TasksDispatched():
            dispatched = {task.service: TaskStatus(attempt=task.attempt) for task in fact.tasks}
            return _changed(view, "Processing", {**view.tasks, **dispatched}, view.completed_at)
        case ResultCorrected():
            return _with_task(view, fact.service, view.tasks[fact.service]._replace(result=fact.result))
        case TaskFailed():
            ended = TaskStatus(
                "Failed", fact.attempt, fact.error.message, fact.failed_at, fact.duration_ms, error_code=fact.error.code
            )
            return _with_task(view, fact.service, ended)
        case TaskTimedOut():
            ended = TaskStatus("TimedOut", fact.attempt, NO_OUTCOME_IN_TIME, fact.timed_out_at, error_code=ErrorCode.TIMED_OUT)
            return _with_task(view, fact.service, ended)
        case TaskSkipped():
            ended = TaskStatus("Skipped", 1, fact.message, fact.skipped_at, error_code=SKIPPED[fact.reason])
            return _with_task(view, fact.service, ended)
        case TaskDeferred():
            deferred = _with_task(view, fact.service, TaskStatus("Deferred", fact.attempt))
            waits = all(task.status == "Deferred" for task in deferred.tasks.values())
            return deferred._replace(status="Pending") if waits else deferred
        case JobCompleted():
            return _changed(view, "Completed", view.tasks, fact.completed_at)
        case JobFailed():
            return _changed(view, "Failed", view.tasks, fact.failed_at)
        case JobCancelled():
            return _cancelled(view, fact)
        case JobSubmitted():
            return begin(fact)


def _with_task(view: JobStatus, service: Service, task: TaskStatus) -> JobStatus:
    return _changed(view, view.status, {**view.tasks, service: task}, view.completed_at)


def _changed(view: JobStatus, status: str, tasks: Mapping[Service, TaskStatus], completed_at: datetime | None) -> JobStatus:
    """What `replace` would give, without its walk over the fields: a replay does this for each fact of the log."""
    return JobStatus(view.job_id, view.target, view.target_type, view.services, view.created_at, status, completed_at, tasks)


def _cancelled(view: JobStatus, fact: JobCancelled) -> JobStatus:
    skipped = TaskStatus("Skipped", 1, "The job was cancelled.", fact.cancelled_at, error_code=ErrorCode.CANCELLED)
    tasks = {service: task if task.status in ENDED else skipped for service, task in view.tasks.items()}
    return _changed(view, "Cancelled", tasks, fact.cancelled_at)


# --- What is written of it --------------------------------------------------------------------------------------------


def of_job(job: JobViews) -> Iterable[Write]:
    yield Put(str(job.status.job_id), value_of(job), expires_at_s(job.status, job.terms.retention))


def value_of(job: JobViews) -> bytes:
    """What the store holds of a job for pollers: the position of its last fact, a line feed, the JSON."""
    return b"%d\n%b" % (job.position, document_of(job.status, job.documents))


def expires_at_s(view: JobStatus, retention: timedelta) -> int:
    """The Unix second at which a closed job's view goes (0 = never): by its closing fact, so a rebuild gives the same."""
    return 0 if view.completed_at is None else int((view.completed_at + retention).timestamp())


VIEW = View(name=JOB_STATUS, version=2, of_job=of_job)
