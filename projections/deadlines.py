"""The to-do list of the deadlines part: when something is due for each open job.

It is the saga's own fold: what is due when is decided in one place, `domain/saga.py`.
"""

from domain.commands import Rules
from domain.saga import LookupSaga, due_at, evolve
from events.facts import JobFact


def project(view: LookupSaga | None, fact: JobFact) -> LookupSaga:
    return evolve(view, fact)


def due_ms(view: LookupSaga, rules: Rules) -> int | None:
    """The Unix time in ms at which something is due, None for a closed job. Rounded up: due means that it can be decided."""
    at = due_at(view, rules)
    return None if at is None else int(at.timestamp() * 1000) + 1
