"""The history of a target: who asked about it and what came of it, the same however the log is cut into batches."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import orjson
import pytest

from events.facts import Erased, JobFact, ResultCorrected, Service, Target, TargetType
from events.record import Recorded
from projections import target_history
from projections.folding import fold
from projections.job_views import JobViews, Terms
from projections.memory import MemoryGeneration
from projections.target_history import JOBS_MAX, KEPT, VIEW
from projections.views import target_key
from projections.writes import Pending
from results.documents import reference_to
from tests.builders import (
    ADDRESS,
    DOMAIN,
    NOW,
    RULES,
    completed,
    counts,
    dispatched,
    failed,
    job_cancelled,
    job_completed,
    submitted,
)

GEOIP, PING, RDAP, REVERSE_DNS = Service
TERMS = Terms(RULES, timedelta(hours=24))
TARGETS = (ADDRESS, DOMAIN, Target(raw="192.0.2.1", canonical="192.0.2.1", type=TargetType.IP_ADDRESS))
OLD, NEW = b'{"old":1}', b'{"new":2}'


@dataclass
class Log:
    """Facts in the order of the log, each with the time at which it was recorded."""

    recorded: list[Recorded] = field(default_factory=list)

    def append(self, fact: JobFact, when: datetime) -> None:
        position = 10 * (len(self.recorded) + 1)
        self.recorded.append(Recorded(position, fact.job_id, 1, fact, "", when))


@dataclass
class Projected:
    """The view as a projector would keep it, one batch after the other."""

    generation: MemoryGeneration = field(default_factory=lambda: MemoryGeneration("g1", "log", {}))
    jobs: dict[UUID, JobViews] = field(default_factory=dict)

    def take(self, batch: Sequence[Recorded]) -> None:
        pending = Pending()
        for recorded in batch:
            job = self.jobs[recorded.stream_id] = fold(self.jobs.get(recorded.stream_id), recorded, TERMS)
            pending.add(target_history.of_fact(recorded, job))
        self.generation.apply(VIEW.name, list(pending.writes()))
        until_s = max(int(recorded.recorded_at.timestamp()) for recorded in batch)
        self.generation.log_s = max(self.generation.log_s, until_s)
        self.generation.expire(1_000)

    def held(self) -> dict[str, list[str]]:
        """Members by key, in the order of the sorted set."""
        sets = {name[1]: members for name, members in self.generation.sets.items() if members}
        return {key: sorted(members, key=lambda member: (members[member], member)) for key, members in sets.items()}

    def of(self, target: Target) -> list[dict[str, Any]]:
        return [orjson.loads(member) for member in self.held().get(target_key(target.canonical), [])]


def job_id(number: int) -> UUID:
    return UUID(int=(7 << 76) | (2 << 62) | number)


def projected(log: Log, *, cut: int = 1) -> Projected:
    view = Projected()
    for at in range(0, len(log.recorded), cut):
        view.take(log.recorded[at : at + cut])
    return view


def one_job(log: Log, number: int, when: datetime, target: Target = ADDRESS) -> None:
    """A job that asked two services, of which one answered."""
    job = job_id(number)
    log.append(submitted(PING, RDAP, job_id=job, target=target, when=when), when)
    log.append(dispatched(PING, RDAP, job_id=job, when=when), when)
    log.append(completed(RDAP, job_id=job, document=OLD, when=when), when)
    log.append(failed(PING, job_id=job, when=when), when)
    log.append(job_completed(counts(succeeded=1, failed=1), job_id=job, when=when + timedelta(seconds=2)), when)


def test_a_job_is_remembered_from_its_submission_on_and_anew_when_it_ends() -> None:
    log = Log()
    one_job(log, 1, NOW)
    pending = {
        "jobId": str(job_id(1)),
        "position": 10,
        "status": "Pending",
        "submittedAt": "2026-01-02T03:04:05Z",
        "completedAt": None,
        "results": [
            {"serviceType": "Ping", "status": "Pending", "sha256": None},
            {"serviceType": "RDAP", "status": "Pending", "sha256": None},
        ],
    }

    view = Projected()
    view.take(log.recorded[:4])
    assert view.of(ADDRESS) == [pending]

    view.take(log.recorded[4:])
    assert view.of(ADDRESS) == [
        pending
        | {
            "status": "Completed",
            "completedAt": "2026-01-02T03:04:07Z",
            "results": [
                {"serviceType": "Ping", "status": "Failed", "sha256": None},
                {"serviceType": "RDAP", "status": "Succeeded", "sha256": reference_to(job_id(1), OLD).sha256},
            ],
        }
    ]


def test_no_key_names_whom_it_is_about() -> None:
    log = Log()
    one_job(log, 1, NOW, DOMAIN)

    (key,) = projected(log).held()

    assert "example" not in key
    assert key == target_key("example.com") != target_key("example.org")


def test_an_answer_that_is_corrected_after_the_end_is_corrected_here() -> None:
    log = Log()
    one_job(log, 1, NOW)
    correction = ResultCorrected(
        job_id=job_id(1),
        service=RDAP,
        attempt=1,
        result=reference_to(job_id(1), NEW),
        replaces=reference_to(job_id(1), OLD).sha256,
        parser="rdap/2",
        reason="a better parser",
        corrected_at=NOW,
    )
    log.append(correction, NOW)

    (entry,) = projected(log).of(ADDRESS)

    assert [result["sha256"] for result in entry["results"]] == [None, reference_to(job_id(1), NEW).sha256]


def test_only_the_last_jobs_are_remembered() -> None:
    log = Log()
    for number in range(JOBS_MAX + 7):
        one_job(log, number, NOW + timedelta(seconds=number))

    remembered = projected(log).of(ADDRESS)

    assert [entry["jobId"] for entry in remembered] == [str(job_id(number)) for number in range(7, JOBS_MAX + 7)]


def test_a_job_keeps_its_place_however_late_it_ends() -> None:
    log = Log()
    log.append(submitted(PING, job_id=job_id(1), when=NOW), NOW)
    one_job(log, 2, NOW + timedelta(seconds=5))
    log.append(job_cancelled(job_id=job_id(1), when=NOW + timedelta(seconds=9)), NOW + timedelta(seconds=9))

    assert [entry["jobId"] for entry in projected(log).of(ADDRESS)] == [str(job_id(1)), str(job_id(2))]


def test_a_job_is_forgotten_by_the_logs_time_and_a_history_with_its_last_job() -> None:
    log = Log()
    one_job(log, 1, NOW)
    one_job(log, 2, NOW + timedelta(days=1))
    one_job(log, 3, NOW + KEPT)
    assert [entry["jobId"] for entry in projected(log).of(ADDRESS)] == [str(job_id(2)), str(job_id(3))]

    one_job(log, 4, NOW + 2 * KEPT + timedelta(hours=2), DOMAIN)
    assert projected(log).held().keys() == {target_key(DOMAIN.canonical)}


def test_an_erased_target_has_no_history() -> None:
    log = Log()
    one_job(log, 1, NOW)
    log.recorded[0] = Recorded(10, job_id(1), 1, log.recorded[0].fact.model_copy(update={"target": Erased()}), "", NOW)

    assert projected(log).held() == {}


@pytest.mark.parametrize("seed", range(60))
def test_it_does_not_matter_how_the_log_is_cut(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks disagree by minutes, months pass, jobs of one target lie over each other, and some are called off."""
    monkeypatch.setattr(target_history, "JOBS_MAX", 3)
    chance = random.Random(seed)
    log, when = Log(), NOW
    open_jobs: list[UUID] = []
    for number in range(60):
        when += chance.choice([timedelta(), timedelta(milliseconds=1), timedelta(days=1), KEPT / 2, KEPT])
        told = when + timedelta(minutes=chance.choice([-9, 0, 9]))
        if open_jobs and chance.random() < 0.5:
            job = open_jobs.pop(chance.randrange(len(open_jobs)))
            log.append(job_cancelled(job_id=job, when=told), told)
        else:
            open_jobs.append(job_id(number))
            log.append(submitted(PING, job_id=job_id(number), target=chance.choice(TARGETS), when=told), told)

    whole = projected(log, cut=len(log.recorded)).held()

    for cut in (1, 2, 7, 31):
        assert projected(log, cut=cut).held() == whole
