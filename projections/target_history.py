"""The history of each target: the jobs that asked about it, with what each service brought.

One sorted set for each target, under a hash of it (`projections/views.py:target_key`): a member is a job, as JSON; its score,
the millisecond at which it was submitted. A job is in it from its submission on, and written anew when it ends.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta

import orjson

from events.facts import JobCancelled, JobCompleted, JobFailed, JobSubmitted, ResultCorrected, Target
from events.record import Recorded
from projections import job_status
from projections.job_views import JobViews, View
from projections.views import TARGET_HISTORY, JobStatus, target_key
from projections.writes import Expire, KeepLast, Rank, Unrank, UnrankBelow, Write

JOBS_MAX = 100
"""So many jobs of one target are remembered, the last ones."""

KEPT = timedelta(days=30)
"""So long a job is remembered, from its submission on, by the log's own time. Longer than its document is shown."""

CLOCKS_DIFFER_S = 3_600
"""A history goes so much later than its last job: by then the next fact would take that out, whichever clock it was told by."""


def of_fact(recorded: Recorded, job: JobViews) -> Iterable[Write]:
    """Written at the first fact and the last, and when an answer is corrected afterwards. An erased target has no history."""
    target = job.saga.submitted.target
    if not isinstance(target, Target):
        return
    fact, key, now = recorded.fact, target_key(target.canonical), member_of(job.status, job.first_position)
    match fact:
        case JobSubmitted():
            yield from _remembered(key, job, recorded, now)
        case JobCompleted() | JobFailed() | JobCancelled():
            yield Unrank(key, _member_at_first(job))
            yield from _remembered(key, job, recorded, now)
        case ResultCorrected() if job.saga.closed:
            yield Unrank(key, member_of(_uncorrected(job.status, fact), job.first_position))
            yield from _remembered(key, job, recorded, now)
        case _:
            return


def member_of(job: JobStatus, first_position: int) -> str:
    """A job as its target's history tells it. The id comes first, so that jobs of one millisecond are in its order."""
    return orjson.dumps(
        {
            "jobId": job.job_id,
            "position": first_position,
            "status": job.status,
            "submittedAt": job.created_at,
            "completedAt": job.completed_at,
            "results": [
                {
                    "serviceType": service,
                    "status": job.tasks[service].status,
                    "sha256": reference.sha256 if (reference := job.tasks[service].result) else None,
                }
                for service in job.services
            ],
        },
        option=orjson.OPT_UTC_Z,
    ).decode()


def _remembered(key: str, job: JobViews, recorded: Recorded, member: str) -> Iterable[Write]:
    submitted_ms = _ms(job.status.created_at)
    yield Rank(key, member, submitted_ms)
    yield UnrankBelow(key, _ms(recorded.recorded_at - KEPT))
    yield KeepLast(key, JOBS_MAX)
    yield Expire(key, submitted_ms // 1000 + int(KEPT.total_seconds()) + CLOCKS_DIFFER_S)


def _member_at_first(job: JobViews) -> str:
    """What was written of the job when it was submitted."""
    return member_of(job_status.begin(job.saga.submitted), job.first_position)


def _uncorrected(job: JobStatus, fact: ResultCorrected) -> JobStatus:
    task = job.tasks[fact.service]
    assert task.result is not None
    before = task._replace(result=task.result.model_copy(update={"sha256": fact.replaces}))
    return job._replace(tasks={**job.tasks, fact.service: before})


def _ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)


TOLD_OF = (JobSubmitted, JobCompleted, JobFailed, JobCancelled, ResultCorrected)
VIEW = View(name=TARGET_HISTORY, version=1, of_fact=of_fact, facts=TOLD_OF)
