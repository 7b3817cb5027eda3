"""What if: how would a job have ended under other settings? A pure function over its facts, which never guesses.

What is taken as given: an attempt that was made brings what it brought, as long after its dispatch as it did. What nobody can
know is what an attempt would have brought that was never made, or that was cut off. So a task is decided again fact by fact;
where a setting would have led to such an attempt, it is `UNKNOWN`, with the reason. Settings that are not changed are as they
were: the end of the job and the time of each attempt are in its facts. Only how many attempts a task had is not; that is as set
now.

The clock looks at a job twice a second. What lies within `SLACK` behind a new deadline might have come first, or not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from math import inf

from domain.commands import Rules
from domain.errors import ErrorCode
from domain.saga import TIMEOUT, TOO_LATE, lifetime_of
from events.facts import (
    JobCancelled,
    JobCompleted,
    JobFact,
    JobFailed,
    JobSubmitted,
    Priority,
    Service,
    TaskCompleted,
    TaskDeferred,
    TaskFailed,
    TasksDispatched,
    TaskSkipped,
    TaskTimedOut,
)

SLACK = timedelta(seconds=1)
PERMANENT = frozenset(
    {
        ErrorCode.ADDRESS_REFUSED,
        ErrorCode.ANSWER_TOO_LARGE,
        ErrorCode.INTERNAL_ERROR,
        ErrorCode.NAME_NOT_FOUND,
        ErrorCode.NETWORK_UNREACHABLE,
        ErrorCode.NO_LOCATION,
        ErrorCode.NO_REPLY,
        ErrorCode.NOT_FOUND,
        ErrorCode.PROBE_NOT_PERMITTED,
        ErrorCode.RDAP_NO_SERVER,
        ErrorCode.UNPARSABLE_ANSWER,
        ErrorCode.WORKER_CRASHED,
        *(code for code, _ in TOO_LATE.values()),
    }
)
"""Failures that no other attempt would have mended, whatever the settings (docs/errors.md)."""


class Prospect(StrEnum):
    """How a task would have ended. `NO_ANSWER` is failed or timed out: its last attempt ended as one of the two, and which
    is not in the log.
    """

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    SKIPPED = "skipped"
    NO_ANSWER = "no_answer"
    UNKNOWN = "unknown"


class Comparison(StrEnum):
    """A job under other settings, beside what became of it."""

    SAME = "same"
    DIFFERENT = "different"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Changes:
    """The settings that are changed, and nothing else."""

    timeout_s: Mapping[Service, float] = field(default_factory=dict)
    attempts_max: Mapping[Service, int] = field(default_factory=dict)
    lifetime: Mapping[Priority, timedelta] = field(default_factory=dict)
    redispatch_after: timedelta | None = None

    def applied_to(self, rules: Rules) -> Rules:
        return Rules(
            {**rules.timeout_s, **self.timeout_s},
            {**rules.attempts_max, **self.attempts_max},
            {**rules.lifetime, **self.lifetime},
            rules.redispatch_after if self.redispatch_after is None else self.redispatch_after,
        )


@dataclass(frozen=True, slots=True)
class Happened:
    """A fact, and whether the clock led to it (the deadlines part, or a doctor in its stead) rather than an outcome."""

    fact: JobFact
    by_clock: bool


@dataclass(frozen=True, slots=True)
class Outlook:
    """How a task would have ended, and why that is not what became of it, or cannot be known."""

    prospect: Prospect
    why: str = ""


@dataclass(frozen=True, slots=True)
class Redecided:
    """A job under other settings. `status` and `recorded_status` are Completed or Failed, `status` None if unknown."""

    recorded_status: str
    status: str | None
    recorded: Mapping[Service, Prospect]
    outlooks: Mapping[Service, Outlook]

    @property
    def comparison(self) -> Comparison:
        if any(self._differs(service) for service in self.recorded):
            return Comparison.DIFFERENT
        unknown = any(outlook.prospect is Prospect.UNKNOWN for outlook in self.outlooks.values())
        return Comparison.UNKNOWN if unknown else Comparison.SAME

    def _differs(self, service: Service) -> bool:
        then, now = self.recorded[service], self.outlooks[service].prospect
        if now is Prospect.UNKNOWN:
            return False
        if now is Prospect.NO_ANSWER:
            return then is Prospect.SUCCEEDED
        return then is not now


def redecide(story: Sequence[Happened], rules: Rules, changes: Changes) -> Redecided | None:
    """A job's story decided again under changed settings; `rules` are those of now. None of one that is open or cancelled."""
    submitted, closed = story[0].fact, _closing_of(story)
    if not isinstance(submitted, JobSubmitted):
        raise TypeError(f"A job's stream begins with {type(submitted).__name__}; it must begin with JobSubmitted.")
    if closed is None or isinstance(closed, JobCancelled):
        return None
    steps = {service: list(_steps_of(story, service)) for service in submitted.services}
    recorded = {service: _ended_as(of_task) for service, of_task in steps.items()}
    ends_at = _new_end(submitted, rules, changes)
    outlooks = {
        service: _outlook(of_task, _terms(submitted, service, of_task, ends_at, rules, changes))
        for service, of_task in steps.items()
    }
    recorded_status = "Completed" if isinstance(closed, JobCompleted) else "Failed"
    return Redecided(recorded_status, _status([outlook.prospect for outlook in outlooks.values()]), recorded, outlooks)


def _closing_of(story: Sequence[Happened]) -> JobCompleted | JobFailed | JobCancelled | None:
    closing = (happened.fact for happened in story if isinstance(happened.fact, JobCompleted | JobFailed | JobCancelled))
    return next(closing, None)


def _status(prospects: Sequence[Prospect]) -> str | None:
    if Prospect.SUCCEEDED in prospects:
        return "Completed"  # One answer is enough, whatever became of the others.
    return None if Prospect.UNKNOWN in prospects else "Failed"


# --- What the facts tell of one task ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Step:
    """Something that happened to a task. `prospect` is how it ended, None if it did not: it was dispatched, or deferred."""

    at: datetime
    by_clock: bool
    attempt: int = 1
    prospect: Prospect | None = None
    timeout_s: float = inf
    took_s: float = 0.0
    code: str = ""
    until: datetime | None = None


def _steps_of(story: Sequence[Happened], service: Service) -> Iterator[_Step]:
    for happened in story:
        fact, by_clock = happened.fact, happened.by_clock
        match fact:
            case TasksDispatched():
                for task in fact.tasks:
                    if task.service is service:
                        yield _Step(fact.dispatched_at, by_clock, task.attempt, timeout_s=task.timeout_s)
            case TaskDeferred() if fact.service is service:
                yield _Step(fact.deferred_at, by_clock, fact.attempt, until=fact.until)
            case TaskCompleted() if fact.service is service:
                took_s = fact.duration_ms / 1000
                yield _Step(fact.completed_at, by_clock, fact.attempt, Prospect.SUCCEEDED, took_s=took_s)
            case TaskFailed() if fact.service is service:
                took_s = fact.duration_ms / 1000
                yield _Step(fact.failed_at, by_clock, fact.attempt, Prospect.FAILED, took_s=took_s, code=fact.error.code)
            case TaskTimedOut() if fact.service is service:
                yield _Step(fact.timed_out_at, by_clock, fact.attempt, Prospect.TIMED_OUT)
            case TaskSkipped() if fact.service is service:
                yield _Step(fact.skipped_at, by_clock, prospect=Prospect.SKIPPED)
            case _:
                pass


@dataclass(frozen=True, slots=True)
class _Terms:
    """What a task is decided by. None where nothing is changed, or nothing comes of it."""

    ended_at: datetime
    ends_at: datetime | None
    attempts: int
    attempts_then: int
    timeout_s: float | None
    redispatch_after: timedelta | None

    @property
    def ends_sooner(self) -> datetime | None:
        return self.ends_at if self.ends_at is not None and self.ends_at < self.ended_at else None


def _terms(
    submitted: JobSubmitted,
    service: Service,
    steps: Sequence[_Step],
    ends_at: datetime | None,
    rules: Rules,
    changes: Changes,
) -> _Terms:
    attempts_then = max(rules.attempts_max[service], *(step.attempt for step in steps), 1)
    timeout_s = changes.timeout_s.get(service)
    asked = submitted.options.get(TIMEOUT)
    return _Terms(
        ended_at=submitted.expires_at,
        ends_at=ends_at,
        attempts=changes.attempts_max.get(service, attempts_then),
        attempts_then=attempts_then,
        timeout_s=timeout_s if timeout_s is None or asked is None else min(timeout_s, float(asked)),
        redispatch_after=changes.redispatch_after,
    )


def _new_end(submitted: JobSubmitted, rules: Rules, changes: Changes) -> datetime | None:
    """When the job would have had to end; None = when it had to."""
    asked = submitted.options.get(TIMEOUT)
    timeout_s = None if asked is None else float(asked)
    depends_on_attempts = timeout_s is not None and bool(changes.attempts_max)
    if submitted.priority not in changes.lifetime and not depends_on_attempts:
        return None
    lifetime = lifetime_of(submitted.priority, submitted.services, timeout_s, changes.applied_to(rules))
    ends_at = submitted.submitted_at + lifetime
    return None if ends_at == submitted.expires_at else ends_at


# --- What would have become of it -------------------------------------------------------------------------------------


def _outlook(steps: Sequence[_Step], terms: _Terms) -> Outlook:
    """Goes through what happened, up to where it would have happened otherwise. `waiting`: the dispatch without an outcome."""
    waiting: _Step | None = None
    for step in steps:
        for rule in RULES:
            outlook = rule(step, waiting, terms)
            if outlook is not None:
                return outlook
        waiting = step if step.until is None and step.prospect is None else None
    return Outlook(_ended_as(steps))


def _ended_as(steps: Sequence[_Step]) -> Prospect:
    prospect = steps[-1].prospect if steps else None
    if prospect is None:
        raise ValueError("A task of a closed job has not ended.")
    return prospect


def _too_late(step: _Step, waiting: _Step | None, terms: _Terms) -> Outlook | None:
    """The job would have ended before this."""
    ends_at = terms.ends_sooner
    if ends_at is None or step.at <= ends_at:
        return None
    if waiting is not None and waiting.attempt < terms.attempts and _given_up_before(ends_at, waiting, terms):
        return Outlook(Prospect.UNKNOWN, "Another attempt would have been made before the job's end.")
    if step.at <= ends_at + SLACK:
        return Outlook(Prospect.UNKNOWN, "It ended in the very moment in which the job would have had to.")
    return Outlook(Prospect.TIMED_OUT, "The job would have ended before the answer came.")


def _given_up_before(ends_at: datetime, waiting: _Step, terms: _Terms) -> bool:
    sooner = terms.timeout_s is not None and terms.timeout_s < waiting.timeout_s
    return sooner or (terms.redispatch_after is not None and waiting.at + terms.redispatch_after <= ends_at)


def _no_turn_in_time(step: _Step, _: _Step | None, terms: _Terms) -> Outlook | None:
    """A deferral to after the job's end is its end."""
    ends_at = terms.ends_sooner
    if step.until is None or ends_at is None or step.until < ends_at:
        return None
    return Outlook(Prospect.FAILED, "Its turn would have come after the job's end.")


def _silence(step: _Step, waiting: _Step | None, terms: _Terms) -> Outlook | None:
    """The task would have been dispatched again, or given up, sooner or later than it was."""
    if terms.redispatch_after is None or waiting is None:
        return None
    due = waiting.at + terms.redispatch_after
    was_silence = step.by_clock and step.at < terms.ended_at
    longer = Outlook(Prospect.UNKNOWN, "It would have been waited for longer.") if was_silence else None
    if due >= (terms.ends_at or terms.ended_at):
        return longer
    if was_silence and abs(step.at - due) <= SLACK:
        return None
    if step.at <= due:
        return longer
    if step.at <= due + SLACK:
        return Outlook(Prospect.UNKNOWN, "It ended in the very moment in which it would have been dispatched again.")
    if waiting.attempt >= terms.attempts:
        return Outlook(Prospect.TIMED_OUT, "It would have been given up before its outcome came.")
    return Outlook(Prospect.UNKNOWN, "Another attempt would have been made meanwhile.")


def _own_time(step: _Step, waiting: _Step | None, terms: _Terms) -> Outlook | None:
    """The attempt would have had less time, or more."""
    had_s = inf if waiting is None else waiting.timeout_s
    if terms.timeout_s is None or terms.timeout_s == had_s:
        return None
    if step.by_clock:
        return _time_of_a_silent_one(step, waiting, terms.timeout_s < had_s, terms)
    if terms.timeout_s < had_s:
        return _less_time(step, waiting, terms.timeout_s, terms)
    return _more_time(step, waiting, had_s)


def _time_of_a_silent_one(step: _Step, waiting: _Step | None, less: bool, terms: _Terms) -> Outlook | None:
    """What a silent attempt was doing is not in the log: one that was lost is as silent as one that was about to answer."""
    if waiting is None:
        return None
    if step.prospect is None or (less and waiting.attempt < terms.attempts):
        return Outlook(Prospect.UNKNOWN, "The attempt before might have come to an end sooner, or to another one.")
    return None


def _less_time(step: _Step, waiting: _Step | None, timeout_s: float, terms: _Terms) -> Outlook | None:
    if step.prospect is None:
        # How long the attempt itself took is not in the log, only how long ago it was dispatched.
        in_time = waiting is None or (step.at - waiting.at).total_seconds() <= timeout_s
        return None if in_time else Outlook(Prospect.UNKNOWN, "It might have run out of time, and been tried again sooner.")
    if step.prospect not in {Prospect.SUCCEEDED, Prospect.FAILED} or step.took_s <= timeout_s:
        return None
    if waiting is None or step.attempt != waiting.attempt or step.attempt < terms.attempts:
        return Outlook(Prospect.UNKNOWN, "It would have run out of time, and another attempt have decided.")
    if step.prospect is Prospect.FAILED:
        return Outlook(Prospect.NO_ANSWER, "It would have run out of time, if it had not failed before.")
    if step.took_s <= timeout_s + SLACK.total_seconds():
        return Outlook(Prospect.UNKNOWN, "It took about as long as it would have been given.")
    return Outlook(Prospect.TIMED_OUT, "The attempt would have run out of time.")


def _more_time(step: _Step, waiting: _Step | None, had_s: float) -> Outlook | None:
    """What ended well before its time was up would have ended so anyway."""
    if step.prospect in {Prospect.SUCCEEDED, Prospect.SKIPPED} or step.until is not None or waiting is None:
        return None
    used_s = step.took_s if step.prospect is Prospect.FAILED else (step.at - waiting.at).total_seconds()
    if used_s < had_s:
        return None
    return Outlook(Prospect.UNKNOWN, "With more time it might have brought something else.")


def _attempts(step: _Step, waiting: _Step | None, terms: _Terms) -> Outlook | None:
    """The task would have had fewer attempts, or more."""
    if waiting is not None and step.prospect is None and step.attempt > max(terms.attempts, waiting.attempt):
        prospect = Prospect.TIMED_OUT if step.by_clock else Prospect.NO_ANSWER
        return Outlook(prospect, "It would have had no further attempt.")
    if step.attempt >= terms.attempts or terms.attempts <= terms.attempts_then:
        return None
    retried = step.prospect is Prospect.FAILED and step.attempt >= terms.attempts_then and step.code not in PERMANENT
    if retried or (step.prospect is Prospect.TIMED_OUT and not _is_expiry(step, terms)):
        return Outlook(Prospect.UNKNOWN, "Another attempt would have been made.")
    return None


def _longer_life(step: _Step, _: _Step | None, terms: _Terms) -> Outlook | None:
    """The job would have had longer."""
    if terms.ends_at is None or terms.ends_at <= terms.ended_at:
        return None
    out_of_time = step.prospect is Prospect.FAILED and step.code in {code for code, _ in TOO_LATE.values()}
    at_the_end = step.prospect in {Prospect.FAILED, Prospect.TIMED_OUT} and step.at >= terms.ended_at
    if out_of_time or (at_the_end and step.code not in PERMANENT):
        return Outlook(Prospect.UNKNOWN, "The job would have gone on.")
    return None


def _is_expiry(step: _Step, terms: _Terms) -> bool:
    return step.by_clock and step.at >= terms.ended_at


RULES = (_too_late, _silence, _own_time, _no_turn_in_time, _attempts, _longer_life)
"""In this order: what would have happened first, or would have made the rest unknowable."""
