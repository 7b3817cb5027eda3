"""How each service fares: outcomes, error codes and how long answers took, in all and for each hour. Its size is bounded.

Counters only, so that the same facts give the same numbers however they are cut. Field names begin with the service:
`Ping:succeeded`, `Ping:failed`, `Ping:timed_out`, `Ping:skipped`, `Ping:error:no_reply`, and `Ping:ms:17`, the number of
answers whose duration lies in band 17 (`projections/views.py:BANDS`).
"""

from collections.abc import Iterable

from domain.errors import ErrorCode
from events.facts import Service, TaskCompleted, TaskFailed, TaskSkipped, TaskTimedOut
from events.record import Recorded
from projections.hours import hour_of
from projections.job_views import JobViews, View
from projections.views import HOUR_S, SERVICE_STATS, STATS_HOURS_MAX, STATS_TOTAL, band_of
from projections.writes import Count, Expire, Write

CODES = frozenset(code.value for code in ErrorCode)
OTHER = "other"
"""A code that this version does not know: a worker of a newer one may say anything, and counters are to be bounded."""


def of_fact(recorded: Recorded, _: JobViews) -> Iterable[Write]:
    """A task that ended is counted twice: in all, and in the hour in which that was recorded."""
    match recorded.fact:
        case TaskCompleted() as fact:
            names = ["succeeded", f"ms:{band_of(fact.duration_ms)}"]
        case TaskFailed() as fact:
            names = ["failed", f"error:{fact.error.code if fact.error.code in CODES else OTHER}"]
        case TaskTimedOut() as fact:
            names = ["timed_out"]
        case TaskSkipped() as fact:
            names = ["skipped"]
        case _:
            return
    yield from _counted(fact.service, names, hour_of(recorded.recorded_at))


def _counted(service: Service, names: Iterable[str], hour: int) -> Iterable[Write]:
    for name in names:
        yield Count(STATS_TOTAL, f"{service}:{name}", 1)
        yield Count(str(hour), f"{service}:{name}", 1)
    yield Expire(str(hour), (hour + 1 + STATS_HOURS_MAX) * HOUR_S)


VIEW = View(name=SERVICE_STATS, version=1, of_fact=of_fact, facts=(TaskCompleted, TaskFailed, TaskTimedOut, TaskSkipped))
