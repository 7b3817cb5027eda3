"""The view that pollers read: what it says after each fact, and the document that is made of it."""

from typing import Any

import orjson
import pytest

from events.facts import Erased, Fact, JobFact, JobSubmitted, Service, SkipReason
from projections.job_status import NO_OUTCOME_IN_TIME, begin, project
from projections.views import JobStatus, TaskStatus, document_of
from results.documents import reference_to
from tests.builders import (
    DOCUMENT,
    DOMAIN,
    DOWN,
    GEOIP,
    JOB,
    PING,
    RDAP,
    REFUSAL,
    REVERSE_DNS,
    at,
    completed,
    corrected,
    counts,
    deferred,
    dispatched,
    failed,
    job_cancelled,
    job_completed,
    job_failed,
    skipped,
    submitted,
    timed_out,
)

Facts = list[JobFact]


def view_of(*facts: JobFact) -> JobStatus:
    first, *rest = facts
    assert isinstance(first, JobSubmitted)
    view = begin(first)
    for fact in rest:
        view = project(view, fact)
    return view


def document(*facts: JobFact, documents: dict[str, bytes] | None = None) -> dict[str, object]:
    found: dict[str, object] = orjson.loads(document_of(view_of(*facts), documents or {}))
    return found


# --- The job ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "status", "percentage"),
    [
        ([submitted(PING, RDAP)], "Pending", 0),
        ([submitted(PING, RDAP), dispatched(PING, RDAP)], "Processing", 0),
        ([submitted(PING, RDAP), dispatched(PING, RDAP), deferred(PING, until=at(5))], "Processing", 0),
        (
            [submitted(PING, RDAP), dispatched(PING, RDAP), deferred(PING, until=at(5)), deferred(RDAP, until=at(5))],
            "Pending",
            0,
        ),
        ([submitted(PING), dispatched(PING), deferred(PING, until=at(5)), dispatched(PING)], "Processing", 0),
        ([submitted(PING, RDAP), dispatched(PING, RDAP), completed(PING)], "Processing", 50),
        ([submitted(PING, RDAP, GEOIP), dispatched(PING, RDAP, GEOIP), failed(PING)], "Processing", 33),
        ([submitted(PING, RDAP, GEOIP), dispatched(PING), skipped(GEOIP), timed_out(RDAP)], "Processing", 66),
        ([submitted(PING), dispatched(PING), completed(PING), job_completed(counts(succeeded=1))], "Completed", 100),
        ([submitted(PING), dispatched(PING), failed(PING), job_failed(counts(failed=1), reason="none")], "Failed", 100),
        ([submitted(PING, RDAP), dispatched(PING, RDAP), completed(PING), job_cancelled()], "Cancelled", 100),
    ],
)
def test_a_job_says_how_far_it_is(facts: list[JobFact], status: str, percentage: int) -> None:
    found = document(*facts)

    assert (found["status"], found["completionPercentage"]) == (status, percentage)


@pytest.mark.parametrize(
    "closing",
    [
        job_completed(counts(succeeded=1), when=at(9)),
        job_failed(counts(failed=1), reason="none", when=at(9)),
        job_cancelled(when=at(9)),
    ],
    ids=lambda fact: type(fact).__name__,
)
def test_a_job_is_completed_at_its_closing_facts_time(closing: JobFact) -> None:
    facts: Facts = [submitted(PING), dispatched(PING), failed(PING, when=at(8))]

    assert document(*facts)["completedAt"] is None
    assert document(*facts, closing)["completedAt"] == "2026-01-02T03:04:14Z"


def test_a_job_tells_what_was_asked_as_it_was_typed() -> None:
    found = document(submitted(RDAP, PING), dispatched(RDAP, PING))

    assert {name: found[name] for name in ("jobId", "target", "targetType", "createdAt", "requestedServices")} == {
        "jobId": str(JOB),
        "target": " 198.51.100.7 ",
        "targetType": "IPAddress",
        "createdAt": "2026-01-02T03:04:05Z",
        "requestedServices": ["RDAP", "Ping"],
    }
    assert document(submitted(PING, target=DOMAIN))["target"] == "Example.com"


def test_an_erased_target_is_told_as_erased() -> None:
    fact = submitted(PING).model_copy(update={"target": Erased()})

    assert document(fact)["target"] == "[erased]"


def test_a_correction_replaces_what_was_found_and_nothing_else() -> None:
    """The job is over, and ended as it ended."""
    ended: Facts = [
        submitted(PING),
        dispatched(PING),
        completed(PING, when=at(2)),
        job_completed(counts(succeeded=1), when=at(3)),
    ]
    documents = {reference_to(JOB, body).location.key: body for body in (DOCUMENT, b'{"corrected":true}')}

    before, after = document(*ended, documents=documents), document(*ended, corrected(PING, when=at(90)), documents=documents)

    told: Any = before.pop("results")
    assert after.pop("results") == [told[0] | {"data": {"corrected": True}}]
    assert after == before


# --- The tasks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fact", "task"),
    [
        (
            completed(PING, when=at(2)),
            TaskStatus("Succeeded", 1, None, at(2), 12, reference_to(JOB, DOCUMENT)),
        ),
        (failed(PING, when=at(2)), TaskStatus("Failed", 1, DOWN.message, at(2), 12, error_code=DOWN.code)),
        (timed_out(PING, attempt=2, when=at(2)), TaskStatus("TimedOut", 2, NO_OUTCOME_IN_TIME, at(2), error_code="timed_out")),
        (skipped(PING, when=at(2)), TaskStatus("Skipped", 1, REFUSAL[1], at(2), error_code="not_applicable")),
        (deferred(PING, until=at(20)), TaskStatus("Deferred", 1)),
        (dispatched(PING, attempt=2), TaskStatus("Pending", 2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_task_says_how_it_ended_and_its_neighbour_stays_as_it_was(fact: JobFact, task: TaskStatus) -> None:
    view = view_of(submitted(PING, RDAP), dispatched(PING, RDAP), fact)

    assert view.tasks == {PING: task, RDAP: TaskStatus("Pending", 1)}


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (SkipReason.NOT_APPLICABLE, "not_applicable"),
        (SkipReason.POLICY, "address_refused"),
        (SkipReason.CANCELLED, "cancelled"),
    ],
)
def test_a_skipped_service_says_why_in_a_code(reason: SkipReason, code: str) -> None:
    view = view_of(submitted(PING), skipped(PING).model_copy(update={"reason": reason}))

    assert view.tasks[PING].error_code == code


def test_results_are_told_in_the_order_that_was_asked_whatever_order_they_came_in() -> None:
    facts: Facts = [
        submitted(RDAP, REVERSE_DNS, GEOIP, PING),
        dispatched(RDAP, GEOIP, PING),
        skipped(REVERSE_DNS),
        failed(PING),
        completed(RDAP),
        timed_out(GEOIP),
    ]

    results = document(*facts)["results"]

    assert isinstance(results, list)
    assert [result["serviceType"] for result in results] == ["RDAP", "ReverseDNS", "GeoIP", "Ping"]
    assert [result["status"] for result in results] == ["Succeeded", "Skipped", "TimedOut", "Failed"]
    assert [result["success"] for result in results] == [True, False, False, False]


def test_a_result_has_these_fields_whatever_became_of_it() -> None:
    facts: Facts = [submitted(*Service), dispatched(PING, RDAP, GEOIP), skipped(REVERSE_DNS), failed(PING), completed(RDAP)]

    results = document(*facts)["results"]

    assert isinstance(results, list)
    fields = {"serviceType", "success", "status", "data", "errorCode", "errorMessage", "completedAt", "durationMs", "attempt"}
    assert all(result.keys() == fields for result in results)


def test_a_document_is_told_byte_for_byte() -> None:
    """Numbers that JavaScript or Python would round, and the order of fields, are the worker's."""
    raw = b'{"big":12345678901234567890123,"exact":0.1000,"text":"\\u00fc"}'
    fact = completed(PING, document=raw)

    body = document_of(view_of(submitted(PING), dispatched(PING), fact), {fact.result.location.key: raw})

    assert b'"data":' + raw in body


def test_a_document_that_is_missing_becomes_null_and_a_warning() -> None:
    found = document(submitted(PING, RDAP), dispatched(PING, RDAP), completed(PING))

    assert found["warnings"] == ["The stored result of Ping is missing or damaged."]
    assert isinstance(found["results"], list)
    assert found["results"][0]["data"] is None
    assert found["results"][0]["success"] is True


def test_a_document_that_is_there_is_shown_without_a_warning() -> None:
    fact = completed(PING)

    found = document(submitted(PING), dispatched(PING), fact, documents={fact.result.location.key: DOCUMENT})

    assert found["warnings"] == []
    assert isinstance(found["results"], list)
    assert found["results"][0]["data"] == {"answer": 42}


def test_a_cancelled_jobs_open_tasks_are_skipped_and_its_answers_stay() -> None:
    view = view_of(submitted(PING, RDAP), dispatched(PING, RDAP), completed(PING), job_cancelled(when=at(3)))

    assert view.tasks[PING].status == "Succeeded"
    assert view.tasks[RDAP] == TaskStatus("Skipped", 1, "The job was cancelled.", at(3), error_code="cancelled")


# --- Purity -----------------------------------------------------------------------------------------------------------


def test_the_same_facts_give_the_same_bytes() -> None:
    facts: Facts = [submitted(*Service), dispatched(PING, RDAP, GEOIP), skipped(REVERSE_DNS), completed(RDAP)]
    documents = {reference_to(JOB, DOCUMENT).location.key: DOCUMENT}

    assert document_of(view_of(*facts), documents) == document_of(view_of(*facts), documents)


def test_a_view_is_never_changed_only_followed_by_another() -> None:
    before = view_of(submitted(PING, RDAP), dispatched(PING, RDAP))
    copy = before._replace(tasks=dict(before.tasks))

    for fact in (completed(PING), failed(RDAP), deferred(PING, until=at(1)), job_cancelled()):
        project(before, fact)

    assert before == copy


def test_every_kind_of_fact_about_a_job_has_its_line() -> None:
    """A kind without one would give None; mypy says so, too."""
    view = view_of(submitted(*Service))
    facts: list[Fact] = [
        submitted(*Service),
        dispatched(PING),
        completed(PING),
        corrected(PING),
        failed(PING),
        timed_out(PING),
        skipped(PING),
        deferred(PING, until=at(1)),
        job_completed(counts()),
        job_failed(counts(), reason="none"),
        job_cancelled(),
    ]

    assert {type(fact) for fact in facts} == set(JobFact.__args__)
    assert all(isinstance(project(view, fact), JobStatus) for fact in facts if isinstance(fact, JobFact))
