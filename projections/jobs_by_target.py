"""The jobs of each target in the order in which they were taken on: what `GET /api/lookup?target=…` pages through.

Sorted sets of job ids by the position of the job's first fact, one for each target and hour, under a hash of the target
(`projections/views.py:target_key`). A target that was erased has none.
"""

from collections.abc import Iterable

from events.facts import JobSubmitted, Target
from events.record import Recorded
from projections.hours import hour_of, kept_until_s, listed
from projections.job_views import JobViews, View
from projections.views import JOBS_BY_TARGET, target_key
from projections.writes import Expire, KeepLast, Rank, Write

JOBS_MAX = 1_000
"""So many jobs of one target and hour are listed, the last ones."""


def of_fact(recorded: Recorded, job: JobViews) -> Iterable[Write]:
    """The list of hours tells of no target: it is the same before and after an erasure."""
    fact = recorded.fact
    if not isinstance(fact, JobSubmitted):
        return
    hour = hour_of(fact.submitted_at)
    yield from listed(hour, job.terms)
    if not isinstance(fact.target, Target):
        return
    key = f"{target_key(fact.target.canonical)}:{hour}"
    yield Rank(key, str(fact.job_id), recorded.position)
    yield KeepLast(key, JOBS_MAX)
    yield Expire(key, kept_until_s(hour, job.terms))


VIEW = View(name=JOBS_BY_TARGET, version=1, of_fact=of_fact, facts=(JobSubmitted,))
