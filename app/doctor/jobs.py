"""Checks of one job: what its facts promised, and what its views show of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import orjson

from app.doctor.findings import Problem
from app.doctor.stories import Stream
from domain.commands import Rules
from domain.saga import LookupSaga, OpenTask, replay
from events.facts import Erased, ResultCorrected, ResultReference, Service, TaskCompleted, TasksDispatched
from projections.folding import fold
from projections.job_status import expires_at_s, value_of
from projections.job_views import JobViews, Terms

LATE = timedelta(seconds=5)
"""So long after its deadline a job is over at the latest. Nothing else that has a time is late before this has passed."""

ANSWERS = (TaskCompleted, ResultCorrected)


@dataclass(frozen=True, slots=True)
class Shown:
    """What Redis had of one job at one moment. `expires` says whether the view goes away by itself.

    `is_listed` says whether the to-do list is of that moment too, so that `due_ms` can be held against the view.
    """

    value: bytes | None
    expires: bool
    due_ms: int | None
    is_listed: bool = True


@dataclass(frozen=True, slots=True)
class Job:
    """One job at one moment: its facts, and its views if there are any that can be held against them.

    `folded` is what the views must show: the facts up to the checkpoint of the views. `relayed` is the position up to
    which commands have left for the workers.
    """

    stream: Stream
    saga: LookupSaga
    folded: JobViews | None
    shown: Shown | None
    results: Mapping[str, bytes]
    relayed: int
    now: datetime
    rules: Rules
    retention: timedelta


def references_of(stream: Stream) -> list[ResultReference]:
    return [recorded.fact.result for recorded in stream.facts if isinstance(recorded.fact, ANSWERS)]


def saga_of(stream: Stream) -> LookupSaga:
    return replay(recorded.fact for recorded in stream.facts)


def folded_to(stream: Stream, checkpoint: int, results: Mapping[str, bytes], terms: Terms) -> JobViews | None:
    """What the projector makes of the facts up to a checkpoint, None of no facts."""
    views: JobViews | None = None
    for recorded in stream.facts:
        if recorded.position <= checkpoint:
            views = fold(views, recorded, terms)
    if views is not None:
        keys = [reference.location.key for reference in views.missing]
        views.documents.update({key: results[key] for key in keys if key in results})
    return views


def lacks_results(folded: JobViews) -> bool:
    """Whether documents that should be there are not. Those of an erased target should not be."""
    if isinstance(folded.saga.submitted.target, Erased):
        return False
    return any(reference.location.key not in folded.documents for reference in folded.missing)


# --- Its facts --------------------------------------------------------------------------------------------------------


def past_its_deadline(job: Job) -> Iterator[Problem]:
    """Every job ends, at the latest 5 s after its deadline."""
    if job.saga.closed or job.now < job.saga.submitted.expires_at + LATE:
        return
    over_s = (job.now - job.saga.submitted.expires_at).total_seconds()
    waiting = [service for service in job.saga.submitted.services if service not in job.saga.endings]
    missing = f"no outcome of {', '.join(waiting)}" if waiting else "all its tasks have ended"
    yield Problem(f"Open {over_s:.0f} s after its deadline; {missing}.", _last(job))


def never_answered(job: Job) -> Iterator[Problem]:
    """Every task that was dispatched is answered, dispatched again or given up."""
    if job.saga.closed or job.now >= job.saga.submitted.expires_at:
        return
    for service in job.saga.submitted.services:
        task = job.saga.open_tasks.get(service)
        if task is not None:
            yield from _silence_of(job, service, task)
        elif service not in job.saga.endings:
            yield Problem(f"{service} was asked for and never dispatched.", _last(job))


def _silence_of(job: Job, service: Service, task: OpenTask) -> Iterator[Problem]:
    position, timeout_s = _dispatch_of(job.stream, task)
    if task.deferred_until is not None:
        if job.now >= task.deferred_until + LATE:
            yield Problem(f"{service} was deferred until {task.deferred_until:%F %T} and not dispatched again.", _last(job))
    elif task.dispatched_at is not None and position <= job.relayed:
        waited = job.now - task.dispatched_at
        if waited >= timedelta(seconds=timeout_s) + job.rules.redispatch_after + LATE:
            yield Problem(f"{service} was dispatched {waited.total_seconds():.0f} s ago and never answered.", position)


def _dispatch_of(stream: Stream, task: OpenTask) -> tuple[int, float]:
    """The position of a task's last dispatch, and how long its attempt may take."""
    for recorded in reversed(stream.facts):
        if isinstance(recorded.fact, TasksDispatched):
            for dispatched in recorded.fact.tasks:
                if dispatched.command_id == task.command_id:
                    return recorded.position, dispatched.timeout_s
    raise ValueError(f"Command {task.command_id} was never dispatched.")


def missing_results(job: Job) -> Iterator[Problem]:
    """Every answer that a fact tells of is stored, and is the one that the fact tells of; unless it was erased."""
    if isinstance(job.saga.submitted.target, Erased):
        return
    for recorded in job.stream.facts:
        fact = recorded.fact
        if isinstance(fact, ANSWERS) and fact.result.location.key not in job.results:
            yield Problem(f"The stored result of {fact.service} is missing or damaged.", recorded.position)


# --- Its views --------------------------------------------------------------------------------------------------------


def missing_view(job: Job) -> Iterator[Problem]:
    """Every job has a view, until its retention is over."""
    if job.folded is None or job.shown is None or job.shown.value is not None:
        return
    expires_at = expires_at_s(job.folded.status, job.retention)
    if not expires_at or expires_at > (job.now + LATE).timestamp():
        yield Problem("No view, though its facts were folded.", job.folded.position)


def different_view(job: Job) -> Iterator[Problem]:
    """Every view is the fold of its job's facts up to the checkpoint of the views. One that shows a result that is missing
    in the store is not held against it: it may be the last copy.
    """
    if job.folded is None or job.shown is None or job.shown.value is None or lacks_results(job.folded):
        return
    expected = value_of(job.folded)
    if job.shown.value != expected:
        yield Problem(_difference(job.shown.value, expected), job.folded.position)


def _difference(shown: bytes, expected: bytes) -> str:
    position, _, document = shown.partition(b"\n")
    wanted_position, _, wanted = expected.partition(b"\n")
    if position != wanted_position:
        return f"It is of position {position[:20].decode(errors='replace')}; the job's facts end at {wanted_position.decode()}."
    try:
        told, should = orjson.loads(document), orjson.loads(wanted)
        fields = [name for name in should if told.get(name) != should[name]]
    except (orjson.JSONDecodeError, AttributeError):
        return "It is no document."
    return f"It differs in {', '.join(fields)}." if fields else "It has other bytes."


def view_of_a_wrong_age(job: Job) -> Iterator[Problem]:
    """The view of an open job stays; that of a closed one goes away by itself."""
    if job.folded is None or job.shown is None or job.shown.value is None:
        return
    if job.shown.expires and not job.folded.saga.closed:
        yield Problem("Its view will go away, though the job is open.", job.folded.position)
    if not job.shown.expires and job.folded.saga.closed:
        yield Problem("Its view will never go away, though the job is closed.", job.folded.position)


def wrong_on_the_to_do_list(job: Job) -> Iterator[Problem]:
    """An open job is on the to-do list, no later than its deadline; a closed one is not."""
    if job.folded is None or job.shown is None or not job.shown.is_listed:
        return
    if job.folded.saga.closed:
        if job.shown.due_ms is not None:
            yield Problem("It is closed, and still on the list.", job.folded.position)
    elif job.shown.due_ms is None:
        yield Problem("It is open, and not on the list.", job.folded.position)
    elif job.shown.due_ms > job.folded.saga.submitted.expires_at.timestamp() * 1000 + 1:
        yield Problem("It is due on the list only after its deadline.", job.folded.position)


def _last(job: Job) -> int:
    return job.stream.rows[-1].position
