"""Every decision about a job, as given facts / when a command comes / then these facts."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from uuid import UUID

import pytest

from domain.commands import ExpireTasks, TaskOutcome
from domain.saga import NO_ANSWER, due_at, evolve, expire_tasks, record_outcome, replay, submit
from events.facts import (
    DeferReason,
    Fact,
    IdempotencyKeyClaimed,
    JobCompleted,
    JobFact,
    JobFailed,
    JobSubmitted,
    Priority,
    Service,
    TaskFailed,
    TasksDispatched,
)
from tests.builders import (
    ADDRESS,
    DOMAIN,
    GEOIP,
    JOB,
    LIFETIME,
    NOW,
    OUT_OF_TIME,
    PERMANENT,
    PING,
    RDAP,
    REDISPATCH_AFTER,
    REFUSAL,
    REFUSED,
    REVERSE_DNS,
    RULES,
    TRANSIENT,
    at,
    command_id,
    completed,
    corrected,
    counts,
    deferred,
    dispatched,
    failed,
    job_cancelled,
    job_completed,
    job_failed,
    outcome,
    quota,
    skipped,
    submit_command,
    submitted,
    timed_out,
)

NEXT_ID = UUID(int=99)
NEXT_IDS = {service: UUID(int=100 + number) for number, service in enumerate(Service)}


def decide(facts: Sequence[Fact], of: TaskOutcome, now: datetime = NOW) -> list[JobFact]:
    return record_outcome(replay(facts), of, next_command_id=NEXT_ID, now=now, rules=RULES)


def expire(facts: Sequence[Fact], now: datetime, relayed_until: datetime | None = None) -> list[JobFact]:
    command = ExpireTasks(JOB, now, now if relayed_until is None else relayed_until)
    return expire_tasks(replay(facts), command, next_command_ids=NEXT_IDS, rules=RULES)


def timeouts_of(facts: Sequence[JobFact]) -> dict[Service, float]:
    """How long what these facts dispatch may take, by service."""
    return {task.service: task.timeout_s for fact in facts if isinstance(fact, TasksDispatched) for task in fact.tasks}


def attempts_of(facts: Sequence[JobFact]) -> dict[Service, int]:
    """What these facts dispatch: the attempt by service."""
    return {task.service: task.attempt for fact in facts if isinstance(fact, TasksDispatched) for task in fact.tasks}


# --- Submit -----------------------------------------------------------------------------------------------------------


def test_a_submitted_job_is_dispatched_whole_in_one_fact() -> None:
    facts = submit(submit_command(GEOIP, PING, RDAP, REVERSE_DNS), RULES)

    assert facts == [submitted(GEOIP, PING, RDAP, REVERSE_DNS), dispatched(GEOIP, PING, RDAP, REVERSE_DNS)]


def test_a_job_promises_an_answer_within_the_lifetime_of_its_priority() -> None:
    first, *_ = submit(submit_command(PING), RULES)

    assert isinstance(first, JobSubmitted)
    assert first.expires_at == NOW + LIFETIME


def test_a_service_that_does_not_apply_is_skipped_with_its_sentence_and_the_rest_is_dispatched() -> None:
    facts = submit(submit_command(PING, REVERSE_DNS, refused=(REVERSE_DNS,)), RULES)

    assert facts == [submitted(PING, REVERSE_DNS), dispatched(PING), skipped(REVERSE_DNS)]
    assert facts[-1] == skipped(REVERSE_DNS).model_copy(update={"message": REFUSAL[1]})


def test_a_job_of_which_everything_is_skipped_fails_at_once() -> None:
    facts = submit(submit_command(PING, REVERSE_DNS, refused=(PING, REVERSE_DNS)), RULES)

    assert facts == [
        submitted(PING, REVERSE_DNS),
        skipped(PING),
        skipped(REVERSE_DNS),
        job_failed(counts(skipped=2), reason=NO_ANSWER),
    ]
    assert expire(facts, at(3600)) == []


def test_the_target_is_kept_as_typed_and_in_its_canonical_form() -> None:
    first, second = submit(submit_command(PING, target=DOMAIN), RULES)

    assert isinstance(first, JobSubmitted)
    assert isinstance(second, TasksDispatched)
    assert first.target == second.target == DOMAIN
    assert first.target_type == DOMAIN.type


@pytest.mark.parametrize(("asked_s", "given_s"), [(0.5, 0.5), (10.0, 10.0), (11.0, 10.0), (1e300, 10.0), (None, 10.0)])
def test_a_request_may_ask_for_shorter_attempts_but_not_for_longer_ones(asked_s: float | None, given_s: float) -> None:
    facts = submit(submit_command(PING, RDAP, timeout_s=asked_s), RULES)

    assert timeouts_of(facts) == {PING: given_s, RDAP: given_s}


def test_what_was_asked_for_holds_for_every_attempt() -> None:
    given = submit(submit_command(PING, timeout_s=2.5), RULES)

    assert timeouts_of(decide(given, outcome(PING, OUT_OF_TIME), at(3))) == {PING: 2.5}
    assert timeouts_of(expire([*given, deferred(PING, until=at(4))], at(4))) == {PING: 2.5}
    impatient = replace(RULES, redispatch_after=timedelta(seconds=5))
    silent = ExpireTasks(JOB, at(6), at(6))
    assert timeouts_of(expire_tasks(replay(given), silent, next_command_ids=NEXT_IDS, rules=impatient)) == {PING: 2.5}


@pytest.mark.parametrize(("asked_s", "lifetime_s"), [(2.5, 15.0), (40.0, 90.0), (1e300, 90.0), (None, 90.0)])
def test_a_job_with_shorter_attempts_is_promised_sooner(asked_s: float | None, lifetime_s: float) -> None:
    """Two attempts, and what it takes to hand them out and to be told."""
    first, *_ = submit(submit_command(PING, timeout_s=asked_s), RULES)

    assert isinstance(first, JobSubmitted)
    assert first.expires_at == at(lifetime_s)


def test_bulk_work_may_wait_in_its_queue_however_short_its_attempts_are() -> None:
    first, *_ = submit(submit_command(PING, timeout_s=2.5, priority=Priority.BULK), RULES)

    assert isinstance(first, JobSubmitted)
    assert first.expires_at == NOW + RULES.lifetime[Priority.BULK]


def test_a_job_whose_request_asked_for_nothing_reads_as_it_always_did() -> None:
    first, *_ = submit(submit_command(PING), RULES)

    assert isinstance(first, JobSubmitted)
    assert first.options == {}


# --- Outcomes that are news -------------------------------------------------------------------------------------------


def test_an_answer_completes_its_task_and_leaves_the_others_open() -> None:
    given = [submitted(PING, RDAP), dispatched(PING, RDAP)]

    then = decide(given, outcome(PING), at(2))

    assert then == [completed(PING, when=at(2))]
    assert replay([*given, *then]).open_tasks.keys() == {RDAP}


def test_the_last_answer_closes_the_job() -> None:
    given = [submitted(PING, RDAP), dispatched(PING, RDAP), completed(PING)]

    assert decide(given, outcome(RDAP)) == [completed(RDAP), job_completed(counts(succeeded=2))]


def test_one_answer_among_failures_completes_the_job() -> None:
    given = [submitted(*Service), dispatched(GEOIP, PING, RDAP), skipped(REVERSE_DNS), failed(GEOIP), completed(PING)]

    then = decide(given, outcome(RDAP, OUT_OF_TIME), at(91))

    assert then[-1] == job_completed(counts(succeeded=1, failed=1, timed_out=1, skipped=1), when=at(91))


def test_a_job_without_any_answer_fails() -> None:
    given = [submitted(PING, RDAP), dispatched(PING, RDAP), failed(PING)]

    assert decide(given, outcome(RDAP, PERMANENT)) == [failed(RDAP), job_failed(counts(failed=2), reason=NO_ANSWER)]


def test_a_permanent_failure_is_final_although_attempts_are_left() -> None:
    given = [submitted(PING, RDAP), dispatched(PING, RDAP)]

    assert decide(given, outcome(PING, PERMANENT)) == [failed(PING)]


def test_a_worker_may_skip_a_task() -> None:
    given = [submitted(PING, RDAP), dispatched(PING, RDAP)]

    (then,) = decide(given, outcome(PING, REFUSED))

    assert then == skipped(PING).model_copy(update={"reason": REFUSED.reason, "message": REFUSED.message})


# --- Outcomes that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "again", [outcome(PING), outcome(PING, PERMANENT), outcome(PING, TRANSIENT), outcome(PING, OUT_OF_TIME)]
)
def test_a_repeated_outcome_leaves_no_trace(again: TaskOutcome) -> None:
    given = [submitted(PING, RDAP), dispatched(PING, RDAP), completed(PING)]

    assert decide(given, again) == []


def test_an_answer_to_a_task_that_has_failed_comes_too_late() -> None:
    given = [submitted(PING, RDAP), dispatched(PING, RDAP), failed(PING)]

    assert decide(given, outcome(PING)) == []


@pytest.mark.parametrize(
    "closing",
    [job_completed(counts(succeeded=1)), job_failed(counts(failed=1), reason=NO_ANSWER), job_cancelled()],
    ids=lambda fact: type(fact).__name__,
)
def test_nothing_is_news_to_a_closed_job(closing: JobFact) -> None:
    given = [submitted(PING, RDAP), dispatched(PING, RDAP), closing]

    assert decide(given, outcome(PING)) == []
    assert decide(given, outcome(RDAP, TRANSIENT)) == []
    assert expire(given, at(3600)) == []
    assert due_at(replay(given), RULES) is None


def test_an_outcome_of_a_service_that_was_not_asked_is_no_news() -> None:
    given = [submitted(PING), dispatched(PING)]

    assert decide(given, outcome(RDAP)) == []


def test_an_outcome_of_a_skipped_service_is_no_news() -> None:
    given = [submitted(PING, REVERSE_DNS), dispatched(PING), skipped(REVERSE_DNS)]

    assert decide(given, outcome(REVERSE_DNS)) == []


# --- Attempts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [TRANSIENT, OUT_OF_TIME], ids=["transient failure", "time ran out"])
def test_what_may_end_better_is_dispatched_again_while_attempts_are_left(ending: object) -> None:
    given = [submitted(PING, RDAP), dispatched(PING, RDAP)]

    (again,) = decide(given, outcome(PING).model_copy(update={"ending": ending}), at(3))

    assert isinstance(again, TasksDispatched)
    assert attempts_of([again]) == {PING: 2}
    assert again.tasks[0].command_id == NEXT_ID
    assert (again.dispatched_at, again.expires_at, again.target) == (at(3), NOW + LIFETIME, ADDRESS)


def test_the_last_attempt_that_fails_is_final() -> None:
    given = [submitted(PING, RDAP), dispatched(PING, RDAP), dispatched(PING, attempt=2)]

    assert decide(given, outcome(PING, TRANSIENT, attempt=2)) == [failed(PING, attempt=2)]
    assert decide(given, outcome(PING, OUT_OF_TIME, attempt=2)) == [timed_out(PING, attempt=2)]


def test_an_expired_job_gets_no_further_attempt() -> None:
    given = [submitted(PING, RDAP), dispatched(PING, RDAP)]

    assert decide(given, outcome(PING, TRANSIENT), at(90)) == [failed(PING, when=at(90))]


@pytest.mark.parametrize("ending", [PERMANENT, TRANSIENT, OUT_OF_TIME, REFUSED, quota(at(9))], ids=lambda ending: ending.kind)
def test_a_superseded_attempt_may_report_its_failure_to_nobody(ending: object) -> None:
    given = [submitted(PING, RDAP), dispatched(PING, RDAP), dispatched(PING, attempt=2)]

    assert decide(given, outcome(PING, attempt=1).model_copy(update={"ending": ending})) == []


def test_a_superseded_attempts_answer_counts_all_the_same() -> None:
    given = [submitted(PING, RDAP), dispatched(PING, RDAP), dispatched(PING, attempt=2)]

    assert decide(given, outcome(PING, attempt=1)) == [completed(PING, attempt=1)]
    assert decide([*given, completed(PING, attempt=1)], outcome(PING, attempt=2)) == []


# --- Deferral ---------------------------------------------------------------------------------------------------------


def test_a_deferred_task_stays_open_and_is_due_when_its_turn_comes() -> None:
    given = [submitted(PING), dispatched(PING)]

    then = decide(given, outcome(PING, quota(at(20))), at(1))

    assert then == [deferred(PING, until=at(20), when=at(1))]
    assert due_at(replay([*given, *then]), RULES) == at(20)


def test_a_deferral_uses_up_no_attempt() -> None:
    given = [submitted(PING), dispatched(PING), deferred(PING, until=at(20))]

    assert expire(given, at(19.9)) == []
    again = expire(given, at(20))

    assert attempts_of(again) == {PING: 1}
    retried = decide([*given, *again], outcome(PING, TRANSIENT).model_copy(update={"command_id": NEXT_IDS[PING]}), at(21))
    assert attempts_of(retried) == {PING: 2}


def test_a_deferral_that_is_told_twice_is_recorded_once() -> None:
    given = [submitted(PING), dispatched(PING), deferred(PING, until=at(20))]

    assert decide(given, outcome(PING, quota(at(20)))) == []


@pytest.mark.parametrize("ending", [quota(at(20)), TRANSIENT, OUT_OF_TIME, PERMANENT], ids=lambda ending: ending.kind)
def test_what_a_deferred_command_still_reports_says_nothing_about_the_one_that_followed_it(ending: object) -> None:
    """Both are attempt 1: the broker may deliver the first command, or its outcome, again after the second has left."""
    given = [
        submitted(PING),
        dispatched(PING, dispatch=1),
        deferred(PING, until=at(20)),
        dispatched(PING, dispatch=2, when=at(20)),
    ]

    assert decide(given, outcome(PING, dispatch=1).model_copy(update={"ending": ending}), at(21)) == []
    assert decide(given, outcome(PING, dispatch=2).model_copy(update={"ending": ending}), at(21)) != []


@pytest.mark.parametrize(("reason", "code"), [(DeferReason.QUOTA, "quota_exhausted"), (DeferReason.BREAKER, "upstream_down")])
def test_a_deferral_to_after_the_jobs_end_is_its_end(reason: DeferReason, code: str) -> None:
    """Nobody waits until then to hear that nobody will be asked."""
    given = [submitted(PING), dispatched(PING)]

    task, closing = decide(given, outcome(PING, quota(at(90)).model_copy(update={"reason": reason})), at(1))

    assert isinstance(task, TaskFailed)
    assert task.error.code == code
    assert closing == job_failed(counts(failed=1), reason=NO_ANSWER, when=at(1))
    (in_time,) = decide(given, outcome(PING, quota(at(89.9))), at(1))
    assert in_time == deferred(PING, until=at(89.9), when=at(1))


def test_the_answer_to_a_deferred_task_counts() -> None:
    given = [submitted(PING), dispatched(PING), deferred(PING, until=at(20))]

    assert decide(given, outcome(PING)) == [completed(PING), job_completed(counts(succeeded=1))]


# --- Deadlines --------------------------------------------------------------------------------------------------------


def test_a_silent_task_is_dispatched_again() -> None:
    given = [submitted(PING, RDAP), dispatched(PING, RDAP), completed(RDAP)]

    assert expire(given, at(29.9)) == []
    again = expire(given, at(30))

    assert attempts_of(again) == {PING: 2}
    assert replay([*given, *again]).open_tasks[PING].dispatched_at == at(30)


def test_nothing_is_dispatched_again_before_the_relay_has_passed_it_on() -> None:
    given = [submitted(PING), dispatched(PING)]

    assert expire(given, at(60), relayed_until=at(-0.001)) == []
    assert attempts_of(expire(given, at(60), relayed_until=at(0))) == {PING: 2}


def test_a_task_that_stays_silent_in_its_last_attempt_has_timed_out() -> None:
    given = [submitted(PING), dispatched(PING), dispatched(PING, attempt=2, when=at(30))]

    assert expire(given, at(59.9)) == []
    assert expire(given, at(60)) == [
        timed_out(PING, attempt=2, when=at(60)),
        job_failed(counts(timed_out=1), reason=NO_ANSWER, when=at(60)),
    ]


def test_expiry_ends_everything_whatever_the_relay_has_passed_on() -> None:
    given = [submitted(*Service), dispatched(*Service), completed(GEOIP), deferred(RDAP, until=at(200)), failed(REVERSE_DNS)]

    then = expire(given, at(90), relayed_until=at(-100))

    assert then == [
        timed_out(PING, when=at(90)),
        timed_out(RDAP, when=at(90)),
        job_completed(counts(succeeded=1, failed=1, timed_out=2), when=at(90)),
    ]
    assert expire([*given, *then], at(91)) == []


def test_each_task_is_expired_by_its_own_clock() -> None:
    given = [
        submitted(*Service),
        dispatched(*Service),
        deferred(GEOIP, until=at(31)),
        deferred(RDAP, until=at(40)),
        dispatched(PING, attempt=2, when=at(1)),
        dispatched(REVERSE_DNS, attempt=2, when=at(5)),
    ]

    then = expire(given, at(31))

    assert attempts_of(then) == {GEOIP: 1}
    assert [fact for fact in then if not isinstance(fact, TasksDispatched)] == [timed_out(PING, attempt=2, when=at(31))]


def test_an_outcome_that_beats_the_clock_leaves_it_nothing_to_decide() -> None:
    given = [submitted(PING), dispatched(PING), completed(PING), job_completed(counts(succeeded=1))]

    assert expire(given, at(90)) == []


def test_due_is_the_first_of_expiry_turn_and_silence() -> None:
    given: list[Fact] = [submitted(PING, RDAP), dispatched(PING, RDAP)]
    assert due_at(replay(given), RULES) == NOW + REDISPATCH_AFTER

    given = [*given, deferred(PING, until=at(10))]
    assert due_at(replay(given), RULES) == at(10)

    given = [submitted(PING), dispatched(PING), deferred(PING, until=at(1000))]
    assert due_at(replay(given), RULES) == NOW + LIFETIME


def test_what_is_due_is_decided_when_it_is_due() -> None:
    for given in (
        [submitted(PING), dispatched(PING)],
        [submitted(PING), dispatched(PING), dispatched(PING, attempt=2, when=at(30))],
        [submitted(PING), dispatched(PING), deferred(PING, until=at(20))],
        [submitted(PING), dispatched(PING), deferred(PING, until=at(500))],
    ):
        due = due_at(replay(given), RULES)
        assert due is not None
        assert expire(given, due) != []


# --- State ------------------------------------------------------------------------------------------------------------


def test_a_state_is_never_changed_only_followed_by_another() -> None:
    before = replay([submitted(PING, RDAP), dispatched(PING, RDAP)])
    copy = before._replace(open_tasks=dict(before.open_tasks), endings=dict(before.endings))

    evolve(before, completed(PING))
    record_outcome(before, outcome(PING), next_command_id=NEXT_ID, now=NOW, rules=RULES)
    expire_tasks(before, ExpireTasks(JOB, at(90), at(90)), next_command_ids=NEXT_IDS, rules=RULES)

    assert before == copy


def test_a_decision_made_again_comes_out_the_same() -> None:
    given = [submitted(PING, RDAP), dispatched(PING, RDAP)]

    assert decide(given, outcome(PING, TRANSIENT)) == decide(given, outcome(PING, TRANSIENT))
    assert submit(submit_command(PING), RULES) == submit(submit_command(PING), RULES)


def test_a_stream_that_does_not_begin_with_a_submission_is_refused() -> None:
    with pytest.raises(ValueError, match="begins with TaskCompleted"):
        replay([completed(PING)])
    with pytest.raises(ValueError, match="without facts"):
        replay([])


def test_a_fact_about_something_else_is_refused() -> None:
    claimed = IdempotencyKeyClaimed(job_id=JOB, request_sha256="00", claimed_at=NOW)

    with pytest.raises(ValueError, match="IdempotencyKeyClaimed is not a fact about a job"):
        replay([submitted(PING), claimed])


def test_a_closing_fact_counts_every_requested_service_once() -> None:
    given = [submitted(*Service), dispatched(GEOIP, PING, RDAP), skipped(REVERSE_DNS), completed(GEOIP), failed(PING)]

    closing = decide(given, outcome(RDAP, PERMANENT))[-1]

    assert isinstance(closing, JobCompleted | JobFailed)
    assert sum(closing.counts.model_dump().values()) == len(Service)


def test_the_commands_of_a_task_can_be_told_apart() -> None:
    """The builders' own promise, on which the tests about superseded attempts rest."""
    assert len({command_id(service, number) for service in Service for number in (1, 2)}) == 8


# --- Corrections ------------------------------------------------------------------------------------------------------


def test_a_correction_decides_nothing() -> None:
    """What was found is read anew; that the task ended, and how the job did, stays."""
    open_still: list[Fact] = [submitted(PING, RDAP), dispatched(PING, RDAP), completed(PING)]
    over: list[Fact] = [*open_still, completed(RDAP), job_completed(counts(succeeded=2))]

    for facts in (open_still, over):
        assert replay([*facts, corrected(PING)]) == replay(facts)
    assert decide([*over, corrected(PING)], outcome(PING)) == []
    assert expire([*over, corrected(PING)], at(3600)) == []
