"""All jobs in the order in which they were taken on, and those of each status: what `GET /api/lookup` pages through.

Sorted sets of job ids by the position of the job's first fact, one for each hour and one for each hour and status. They tell
nothing of a job but its status: what a listing shows is read from the job's own document.
"""

from collections.abc import Iterable, Mapping

from events.facts import JobSubmitted
from events.record import Recorded
from projections.hours import hour_of, kept_until_s, listed
from projections.job_views import JobViews, View
from projections.views import JOBS_BY_TIME
from projections.writes import Expire, Rank, Unrank, Write

BEFORE: Mapping[str, tuple[str, ...]] = {
    "Pending": ("Processing",),
    "Processing": ("Pending",),
    "Completed": ("Pending", "Processing"),
    "Failed": ("Pending", "Processing"),
    "Cancelled": ("Pending", "Processing"),
}
"""A status, and those that a job can come from."""


def of_fact(_: Recorded, job: JobViews) -> Iterable[Write]:
    """A new job is on the list, and the lists of its hour get their end."""
    hour = hour_of(job.status.created_at)
    yield from listed(hour, job.terms)
    yield Rank(str(hour), str(job.status.job_id), job.first_position)
    until_s = kept_until_s(hour, job.terms)
    for key in (str(hour), *(f"{hour}:{status}" for status in BEFORE)):
        yield Expire(key, until_s)


def of_job(job: JobViews) -> Iterable[Write]:
    """A job is on the list of its status and on no other."""
    hour, job_id, status = hour_of(job.status.created_at), str(job.status.job_id), job.status.status
    for before in BEFORE[status]:
        yield Unrank(f"{hour}:{before}", job_id)
    yield Rank(f"{hour}:{status}", job_id, job.first_position)
    yield Expire(f"{hour}:{status}", kept_until_s(hour, job.terms))


VIEW = View(name=JOBS_BY_TIME, version=1, of_job=of_job, of_fact=of_fact, facts=(JobSubmitted,))
