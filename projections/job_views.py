"""What is folded of one job, and what a view is: the writes that it makes of that. Pure: no clock, no chance, no network.

`projections/folding.py` folds, `projections/table.py` lists the views.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import get_args

from domain.commands import Rules
from domain.saga import LookupSaga
from events.facts import Fact, JobFact, ResultReference
from events.record import Recorded
from projections.views import JobStatus
from projections.writes import Write

JOB_FACTS: Collection[type[Fact]] = frozenset(get_args(JobFact))
"""All facts about jobs, by their classes."""


@dataclass(frozen=True, slots=True)
class Terms:
    """The settings that views depend on: when something is due, and how long the view of a closed job stays."""

    rules: Rules
    retention: timedelta


@dataclass(slots=True)
class JobViews:
    """What is folded of one job: how it stands, and the result documents that it shows, by their keys.

    `position` is that of its last fact, `first_position` that of its `JobSubmitted`.
    `missing` are the results whose documents have not been looked for yet.
    """

    terms: Terms
    status: JobStatus
    saga: LookupSaga
    position: int
    first_position: int
    documents: dict[str, bytes] = field(default_factory=dict)
    missing: list[ResultReference] = field(default_factory=list)

    def find(self, documents: Mapping[str, bytes]) -> None:
        """Take the documents that were looked for. One that was not found is missing for good."""
        for reference in self.missing:
            document = documents.get(reference.location.key)
            if document is not None:
                self.documents[reference.location.key] = document
        self.missing.clear()


@dataclass(frozen=True, slots=True)
class View:
    """One view: its name in the keys, its version, and its writes. The same facts must give the same writes for ever:
    what gives others is another version, and is built anew beside this one.

    `of_job` is called once for each job that a batch touched, for what is written whole. `of_fact` is called for each fact
    of a job, after it was folded; what it writes must come to the same however the log is cut into batches. `facts` are the
    kinds of facts that it is called for, where it writes nothing for the others.
    """

    name: str
    version: int
    of_job: Callable[[JobViews], Iterable[Write]] | None = None
    of_fact: Callable[[Recorded, JobViews], Iterable[Write]] | None = None
    facts: Collection[type[Fact]] = JOB_FACTS
