"""Folds stretches of the log into what the views write. The projector and `lookup replay` share it: both come to the same.

It knows no clock, no broker and no view store: it reads whole streams and result documents, and remembers open jobs.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol, cast
from uuid import UUID

from events.facts import Fact, JobFact, JobSubmitted, ResultCorrected, ResultReference, TaskCompleted
from events.record import Recorded, StoredFact, read
from projections import deadlines, job_status
from projections.job_views import JOB_FACTS, JobViews, Terms, View
from projections.writes import Pending, Write

OPEN_JOBS_MAX = 20_000
ANSWERS = (TaskCompleted, ResultCorrected)
"""What brings a result document."""

EPOCH = datetime.fromtimestamp(0, UTC)
OfFact = Callable[[Recorded, JobViews], Iterable[Write]]
Add = Callable[[Iterable[Write]], None]

Documents = Callable[[Sequence[ResultReference]], Awaitable[Mapping[str, bytes]]]
"""Finds result documents by their keys; what is missing for certain is not in the answer."""


class Streams(Protocol):
    """What folding needs of the log: whole streams."""

    async def read(self, stream_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[StoredFact]]: ...


@dataclass(frozen=True, slots=True)
class Folded:
    """What a stretch of the log comes to: the writes of each view, the jobs that ended in it, the log's time (Unix s)."""

    writes: Mapping[str, Sequence[Write]] = field(default_factory=dict)
    ended: Sequence[UUID] = ()
    until_s: int = 0


NOTHING = Folded()


class Folder:
    """Folds one stretch after the other: `prepare` it, then `fold` it. Who goes back in the log has to `forget` first."""

    def __init__(self, streams: Streams, views: Sequence[View], terms: Terms) -> None:
        self._streams = streams
        self._views = tuple(views)
        self._terms = terms
        self._jobs: OrderedDict[UUID, JobViews] = OrderedDict()
        self._found: Mapping[str, bytes] = {}

    def forget(self) -> None:
        self._jobs.clear()

    async def prepare(self, facts: Sequence[Recorded], documents: Documents) -> None:
        """Load the jobs that we do not remember, and all result documents that are needed, in one query each."""
        loaded = await self._load_missing(facts)
        wanted = [reference for job in loaded.values() for reference in job.missing]
        wanted += [fact.result for recorded in facts if isinstance(fact := recorded.fact, ANSWERS)]
        self._found = await documents(wanted) if wanted else {}
        for job in loaded.values():
            job.find(self._found)
        self._jobs |= loaded

    def fold(self, facts: Sequence[Recorded]) -> Folded:
        stretch = self.begin()
        stretch.take(facts)
        return stretch.end()

    def begin(self) -> "Stretch":
        """Fold what was prepared bit by bit: who has others wait for the processor lets them have it in between."""
        return Stretch(self, self._views)

    def fold_one(self, recorded: Recorded) -> JobViews:
        known = self._jobs.get(recorded.stream_id)
        job = fold(known, recorded, self._terms)
        if job.missing:
            job.find(self._found)
        if job is not known:
            self._jobs[recorded.stream_id] = job
        return job

    def let_go(self, touched: Iterable[JobViews]) -> list[UUID]:
        """Jobs that ended are not needed any more, nor documents that were found, and of the others only so many are kept."""
        self._found = {}
        ended = [job.status.job_id for job in touched if job.saga.closed]
        for job_id in ended:
            self._jobs.pop(job_id, None)
        while len(self._jobs) > OPEN_JOBS_MAX:
            self._jobs.popitem(last=False)
        return ended

    async def _load_missing(self, facts: Sequence[Recorded]) -> dict[UUID, JobViews]:
        """Jobs that we do not remember, folded from the log up to where these facts begin."""
        begun = {recorded.stream_id for recorded in facts if type(recorded.fact) is JobSubmitted}
        of_jobs = {recorded.stream_id for recorded in facts if type(recorded.fact) in JOB_FACTS}
        wanted = of_jobs - begun - self._jobs.keys()
        loaded: dict[UUID, JobViews] = {}
        if not wanted:
            return loaded
        for job_id, stream in (await self._streams.read(list(wanted))).items():
            earlier = [read(stored) for stored in stream if stored.position < facts[0].position]
            if earlier:
                loaded[job_id] = fold_stream(earlier, self._terms)
        return loaded


class Stretch:
    """One stretch of the log while it is folded: `take` its facts in order, then `end`."""

    def __init__(self, folder: Folder, views: Sequence[View]) -> None:
        self._folder = folder
        self._views = views
        self._touched: dict[int, JobViews] = {}
        self._pending = {view.name: Pending() for view in views}
        self._by_kind = {kind: self._told_of(kind) for kind in JOB_FACTS}
        self._until = EPOCH

    def take(self, facts: Sequence[Recorded]) -> None:
        for recorded in facts:
            of_kind = self._by_kind.get(type(recorded.fact))
            if of_kind is None:
                continue
            job = self._folder.fold_one(recorded)
            self._touched[job.first_position] = job
            for of_fact, add in of_kind:
                add(of_fact(recorded, job))
        self._until = max(self._until, max((recorded.recorded_at for recorded in facts), default=EPOCH))

    def end(self) -> Folded:
        jobs = self._touched.values()
        for view in self._views:
            if view.of_job is not None:
                self._pending[view.name].add(write for job in jobs for write in view.of_job(job))
        coalesced = {name: list(writes.writes()) for name, writes in self._pending.items()}
        return Folded(coalesced, self._folder.let_go(jobs), int(self._until.timestamp()))

    def _told_of(self, kind: type[Fact]) -> list[tuple[OfFact, Add]]:
        """Which views are told of a kind of facts, and where their writes go."""
        return [
            (view.of_fact, self._pending[view.name].add)
            for view in self._views
            if view.of_fact is not None and kind in view.facts
        ]


def fold_stream(facts: Iterable[Recorded], terms: Terms) -> JobViews:
    """What the facts of one job come to, from its first one on. Its documents are still missing."""
    job: JobViews | None = None
    for recorded in facts:
        job = fold(job, recorded, terms)
    if job is None:
        raise ValueError("A job without facts has no views.")
    return job


def fold(job: JobViews | None, recorded: Recorded, terms: Terms) -> JobViews:
    """A job after one more fact. Pure but for reusing `job`."""
    fact = cast("JobFact", recorded.fact)
    if isinstance(fact, JobSubmitted):
        return JobViews(terms, job_status.begin(fact), deadlines.project(None, fact), recorded.position, recorded.position)
    if job is None:
        raise ValueError(f"Job {recorded.stream_id} begins with {type(fact).__name__} at position {recorded.position}.")
    job.status = job_status.project(job.status, fact)
    job.saga = deadlines.project(job.saga, fact)
    job.position = recorded.position
    if isinstance(fact, ANSWERS):
        job.missing.append(fact.result)
    return job
