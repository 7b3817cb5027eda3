"""Each fact as one sentence for people: good English, concrete values, nothing that was erased."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from events.facts import (
    DeadLetterDiscarded,
    DeadLetterRetried,
    DeferReason,
    Erased,
    Fact,
    JobCancelled,
    JobCompleted,
    JobFact,
    JobFailed,
    JobSubmitted,
    OutcomeCounts,
    ResultCorrected,
    Service,
    SkipReason,
    Source,
    Task,
    TaskCompleted,
    TaskDeferred,
    TaskFailed,
    TasksDispatched,
    TaskSkipped,
    TaskTimedOut,
)
from projections.views import ERASED_TEXT

A_SECOND_MS = 1_000
SKIPPED = {
    SkipReason.NOT_APPLICABLE: "it does not apply to such a target",
    SkipReason.POLICY: "the address policy forbids it",
    SkipReason.CANCELLED: "the job was cancelled",
}
DEFERRED = {
    DeferReason.QUOTA: "the source allows no more questions for now",
    DeferReason.BREAKER: "the source keeps failing and is left alone for a while",
}
SHARED = {
    Source.CACHE: " The answer was remembered from {observed_at}.",
    Source.COALESCED: " The answer was that to another job's question, of {observed_at}.",
}


def sentences_of(facts: Iterable[Fact]) -> list[str]:
    """A sentence for each fact about one job, in the order of the log: a dispatch reads differently the second time."""
    dispatched: dict[Service, int] = {}
    sentences: list[str] = []
    for fact in facts:
        sentences.append(_of_job(fact, dispatched) if isinstance(fact, JobFact) else _of_others(fact))
        if isinstance(fact, TasksDispatched):
            dispatched |= {task.service: task.attempt for task in fact.tasks}
    return sentences


def _of_job(fact: JobFact, dispatched: dict[Service, int]) -> str:
    match fact:
        case JobSubmitted():
            about = ERASED_TEXT if isinstance(fact.target, Erased) else fact.target.raw.strip()
            services = enumerated(fact.services)
            return f"A lookup of {about} by {services} was accepted, to end by {instant(fact.expires_at)} at the latest."
        case TasksDispatched():
            return " ".join(_dispatches(fact.tasks, dispatched))
        case TaskCompleted():
            return _answered(fact)
        case ResultCorrected():
            return f"{fact.service}'s answer (attempt {fact.attempt}) was read again by {fact.parser}: {_ended(fact.reason)}"
        case TaskFailed():
            took = duration(fact.duration_ms)
            return f"{fact.service} failed after {took} (attempt {fact.attempt}, {fact.error.code}): {fact.error.message}"
        case TaskTimedOut():
            return f"{fact.service} brought no answer in time (attempt {fact.attempt})."
        case TaskSkipped():
            return f"{fact.service} was not asked, as {SKIPPED[fact.reason]}: {fact.message}"
        case TaskDeferred():
            why = DEFERRED[fact.reason]
            return f"{fact.service} was put off until {instant(fact.until)}, as {why} (still attempt {fact.attempt})."
        case JobCompleted():
            return f"The job was completed: {counted(fact.counts)}."
        case JobFailed():
            return f"The job failed: {counted(fact.counts)}. {fact.reason}"
        case JobCancelled():
            return f"The job was cancelled by {fact.by}: {_ended(fact.reason)}"


def _of_others(fact: Fact) -> str:
    match fact:
        case DeadLetterRetried():
            why = f": {_ended(fact.reason)}" if fact.reason else "."
            return f"Dead letter {fact.letter_id} of the queue {fact.queue} was published again by {fact.by}{why}"
        case DeadLetterDiscarded():
            return f"Dead letter {fact.letter_id} of the queue {fact.queue} was discarded by {fact.by}: {_ended(fact.reason)}"
        case _:
            return f"{words(type(fact).__name__)}."


def _dispatches(tasks: Sequence[Task], dispatched: dict[Service, int]) -> Iterable[str]:
    """A sentence for what goes out the first time, one for further attempts, one for those whose turn has come."""
    first = [task for task in tasks if task.service not in dispatched]
    if first:
        yield f"{_named(first)} dispatched, to end within {_bounds(first)}."
    for task in tasks:
        attempted = dispatched.get(task.service)
        if attempted is not None and attempted < task.attempt:
            yield f"{task.service} was dispatched again as attempt {task.attempt}, to end within {task.timeout_s:g} s."
        elif attempted is not None:
            yield f"{task.service} was dispatched again, still as attempt {task.attempt}, to end within {task.timeout_s:g} s."


def _named(tasks: Sequence[Task]) -> str:
    return f"{enumerated([task.service for task in tasks])} {'was' if len(tasks) == 1 else 'were'}"


def _bounds(tasks: Sequence[Task]) -> str:
    """`12 s`, `10 s each`, or `15 s, 12 s and 20 s`."""
    bounds = [f"{task.timeout_s:g} s" for task in tasks]
    if len(set(bounds)) == 1:
        return bounds[0] if len(bounds) == 1 else f"{bounds[0]} each"
    return enumerated(bounds)


def _answered(fact: TaskCompleted) -> str:
    asked = f", by {fact.provider}" if fact.provider else ""
    shared = SHARED.get(fact.source, "").format(observed_at=instant(fact.observed_at))
    return f"{fact.service} answered in {duration(fact.duration_ms)} (attempt {fact.attempt}{asked}).{shared}"


def counted(counts: OutcomeCounts) -> str:
    """`3 services answered and 1 timed out`."""
    told = [
        (counts.succeeded, "answered"),
        (counts.failed, "failed"),
        (counts.timed_out, "timed out"),
        (counts.skipped, "not asked"),
    ]
    return enumerated([f"{number} {what}" for number, what in told if number]) or "nothing was asked"


def enumerated(names: Sequence[str]) -> str:
    """`GeoIP, Ping and RDAP`."""
    *most, last = names or [""]
    return f"{', '.join(most)} and {last}" if most else str(last)


def duration(duration_ms: int) -> str:
    return f"{duration_ms} ms" if duration_ms < A_SECOND_MS else f"{duration_ms / A_SECOND_MS:.1f} s"


def instant(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def words(name: str) -> str:
    """`TaskTimedOut` as `Task timed out`."""
    spaced = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()
    return spaced[:1].upper() + spaced[1:]


def _ended(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."
