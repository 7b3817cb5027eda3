"""Lists of jobs are cut into hours, each a key of its own: what is old goes whole and by the log's time.

An hour's key goes at a time that the hour alone decides, and each write to it says so again: then it is the same whether the
hour was gone before it was written to or not, however the log is cut. An open job that outlives its hour is on no list.
"""

from collections.abc import Iterable
from datetime import datetime

from projections.job_views import Terms
from projections.views import HOUR_S
from projections.writes import Rank, UnrankBelow, Write


def hour_of(at: datetime) -> int:
    """Hours since 1970."""
    return int(at.timestamp()) // HOUR_S


def kept_until_s(hour: int, terms: Terms) -> int:
    """The Unix second at which the last job of an hour has ended for sure, and its document has gone."""
    longest = max(terms.rules.lifetime.values()) + terms.retention
    return (hour + 1) * HOUR_S + int(longest.total_seconds())


def listed(hour: int, terms: Terms) -> Iterable[Write]:
    """The list of hours, at the view's own key: a reader has to know where to look."""
    yield Rank("", str(hour), hour)
    yield UnrankBelow("", hour - kept_until_s(0, terms) // HOUR_S - 1)
