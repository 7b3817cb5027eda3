"""Checks of one stream, from its facts alone: nothing is missing, nothing was changed, and the story makes sense."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from uuid import UUID

from app.audit.rows import fault_of, told_hash
from app.doctor.findings import Problem
from events.catalog import UnknownFact
from events.chain import GENESIS
from events.facts import (
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobSubmitted,
    OutcomeCounts,
    ResultCorrected,
    Service,
    TaskCompleted,
    TaskDeferred,
    TaskFailed,
    TasksDispatched,
    TaskSkipped,
    TaskTimedOut,
)
from events.record import Recorded, StoredFact, read

CLOSING = (JobCompleted, JobFailed, JobCancelled)
ENDING = (TaskCompleted, TaskFailed, TaskTimedOut, TaskSkipped)


@dataclass(frozen=True, slots=True)
class Stream:
    """A whole stream as it lies in the log. `facts` are those that can be read; `unreadable` says why others cannot."""

    stream_id: UUID
    rows: Sequence[StoredFact]
    facts: Sequence[Recorded]
    unreadable: Sequence[Problem]


def stream_of(stream_id: UUID, rows: Sequence[StoredFact]) -> Stream:
    facts: list[Recorded] = []
    unreadable: list[Problem] = []
    for stored in rows:
        try:
            facts.append(read(stored))
        except UnknownFact:
            unreadable.append(
                Problem(f"It is of the kind {stored.topic!r}, which this program does not know.", stored.position)
            )
        except (ValueError, KeyError, IndexError):
            unreadable.append(Problem(f"It is no {stored.topic!r} that can be read.", stored.position))
    return Stream(stream_id, rows, facts, unreadable)


# --- Any stream -------------------------------------------------------------------------------------------------------


def missing_versions(stream: Stream) -> Iterator[Problem]:
    """The versions of a stream are 1 to n."""
    expected = 1
    for stored in stream.rows:
        if stored.stream_version > expected:
            yield Problem(_missing(expected, stored.stream_version - 1), stored.position)
        expected = stored.stream_version + 1


def _missing(first: int, last: int) -> str:
    return f"Version {first} is missing." if first == last else f"Versions {first} to {last} are missing."


def broken_links(stream: Stream) -> Iterator[Problem]:
    """Each fact carries the hash of itself and of the fact before it. One that is missing is no second problem here."""
    previous, version = GENESIS, 0
    for stored in stream.rows:
        follows = stored.stream_version == version + 1
        if follows and fault_of(stored, previous) is not None:
            yield Problem(f"Version {stored.stream_version} is not what was recorded, or does not follow.", stored.position)
        previous, version = told_hash(stored), stored.stream_version


def unreadable_facts(stream: Stream) -> Iterator[Problem]:
    """Every fact ever written can be read."""
    yield from stream.unreadable


# --- A job's stream ---------------------------------------------------------------------------------------------------


def out_of_order(stream: Stream) -> Iterator[Problem]:
    """A job begins once, with its submission; only a task that is open can be put off, and only an answer be corrected."""
    open_tasks: set[Service] = set()
    answered: set[Service] = set()
    for number, recorded in enumerate(stream.facts):
        fact = recorded.fact
        match fact:
            case JobSubmitted():
                if number > 0 or fact.job_id != stream.stream_id:
                    yield Problem("It is submitted twice, or by another job's submission.", recorded.position)
            case TasksDispatched():
                open_tasks |= {task.service for task in fact.tasks}
            case TaskDeferred():
                if fact.service not in open_tasks:
                    yield Problem(f"{fact.service} is deferred, but was not open.", recorded.position)
            case ResultCorrected():
                if fact.service not in answered:
                    yield Problem(f"The result of {fact.service} is corrected, but there was none.", recorded.position)
            case TaskCompleted() | TaskFailed() | TaskTimedOut() | TaskSkipped():
                open_tasks.discard(fact.service)
                answered |= {fact.service} if isinstance(fact, TaskCompleted) else set()
            case _:
                pass
        if number == 0 and not isinstance(fact, JobSubmitted):
            yield Problem(f"It begins with {type(fact).__name__}.", recorded.position)


def facts_after_the_end(stream: Stream) -> Iterator[Problem]:
    """A job ends once, and nothing happens to it after that but that its answers are read again."""
    ended_by = ""
    for recorded in stream.facts:
        name = type(recorded.fact).__name__
        if ended_by and not isinstance(recorded.fact, ResultCorrected):
            yield Problem(f"{name} comes after {ended_by}, which had ended the job.", recorded.position)
        elif isinstance(recorded.fact, CLOSING):
            ended_by = name


def outcomes_counted_twice(stream: Stream) -> Iterator[Problem]:
    """The first terminal outcome of a task stands, and is the only one."""
    ended: set[Service] = set()
    for recorded in stream.facts:
        fact = recorded.fact
        if isinstance(fact, ENDING):
            if fact.service in ended:
                yield Problem(f"{type(fact).__name__} is a second outcome of {fact.service}.", recorded.position)
            ended.add(fact.service)


def false_endings(stream: Stream) -> Iterator[Problem]:
    """What ends a job says how its tasks ended: all of them did, and it is completed only if one brought an answer."""
    submitted = stream.facts[0].fact
    if not isinstance(submitted, JobSubmitted):
        return
    ended: dict[Service, type] = {}
    for recorded in stream.facts:
        fact = recorded.fact
        if isinstance(fact, ENDING):
            ended.setdefault(fact.service, type(fact))  # A second one is another check's business.
        elif isinstance(fact, JobCompleted | JobFailed):
            counts = _counts(list(ended.values()))
            unfinished = [service for service in submitted.services if service not in ended]
            if unfinished:
                yield Problem(f"{type(fact).__name__} came without an outcome of {', '.join(unfinished)}.", recorded.position)
            elif fact.counts != counts or isinstance(fact, JobCompleted) != (counts.succeeded > 0):
                yield Problem(f"{type(fact).__name__} does not agree with the outcomes of its tasks.", recorded.position)
            return


def _counts(endings: Sequence[type]) -> OutcomeCounts:
    return OutcomeCounts(
        succeeded=endings.count(TaskCompleted),
        failed=endings.count(TaskFailed),
        timed_out=endings.count(TaskTimedOut),
        skipped=endings.count(TaskSkipped),
    )
