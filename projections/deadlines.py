"""The to-do list of the deadlines part: when something is due for each open job.

It is the saga's own fold: what is due when is decided in one place, `domain/saga.py`.
"""

from collections.abc import Iterable

from domain.commands import Rules
from domain.saga import LookupSaga, due_at, evolve
from events.facts import JobFact
from projections.job_views import JobViews, View
from projections.views import DEADLINES
from projections.writes import Rank, Unrank, Write


def project(view: LookupSaga | None, fact: JobFact) -> LookupSaga:
    return evolve(view, fact)


def due_ms(view: LookupSaga, rules: Rules) -> int | None:
    """The Unix time in ms at which something is due, None for a closed job. Rounded up: due means that it can be decided."""
    at = due_at(view, rules)
    return None if at is None else int(at.timestamp() * 1000) + 1


def of_job(job: JobViews) -> Iterable[Write]:
    """An open job is on the list, by the ms at which something is due; a closed one is not."""
    due = due_ms(job.saga, job.terms.rules)
    member = str(job.status.job_id)
    yield Unrank("", member) if due is None else Rank("", member, due)


VIEW = View(name=DEADLINES, version=1, of_job=of_job)
