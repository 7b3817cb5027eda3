"""The views: one file each, listed here. A new one is built from the log beside the others at the next start of a projector."""

from collections.abc import Sequence

from projections import deadlines, job_status, jobs_by_target, jobs_by_time, service_stats, target_history
from projections.job_views import View

__all__ = ["PROJECTIONS", "View"]

PROJECTIONS: Sequence[View] = (
    job_status.VIEW,
    deadlines.VIEW,
    target_history.VIEW,
    jobs_by_time.VIEW,
    jobs_by_target.VIEW,
    service_stats.VIEW,
)
"""Of each name there is one."""
