"""The lists of jobs and the services' numbers: pure, bounded, and the same however the log is cut."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events.facts import Erased, JobFact, JobSubmitted, Service, Target, TargetType, TaskError
from events.record import Recorded
from projections import jobs_by_target, jobs_by_time, service_stats
from projections.folding import Folder
from projections.hours import hour_of
from projections.job_views import Terms, View
from projections.memory import MemoryGeneration
from projections.views import BANDS, HOUR_S, STATS_TOTAL, band_of, target_key
from read_side.listing import RELATIVE_ERROR, ServiceStats
from tests.builders import (
    ADDRESS,
    DOMAIN,
    NOW,
    PING,
    RDAP,
    RULES,
    at,
    completed,
    counts,
    deferred,
    dispatched,
    failed,
    job_cancelled,
    job_completed,
    job_failed,
    memory_store,
    skipped,
    submitted,
    timed_out,
)

TERMS = Terms(RULES, timedelta(hours=24))
VIEWS: Sequence[View] = (jobs_by_time.VIEW, jobs_by_target.VIEW, service_stats.VIEW)
KEPT_HOURS = 26
"""An hour's jobs end within one more, and their documents stay for 24 after that."""

Held = Mapping[str, object]


async def folded(facts: Sequence[Recorded], cuts: Iterable[int] = (), views: Sequence[View] = VIEWS) -> MemoryGeneration:
    """What a store holds after these facts, folded in batches that end at the cuts."""
    generation = MemoryGeneration("g1", "log", {})
    folder = Folder(memory_store(), views, TERMS)
    edges = sorted({0, len(facts), *cuts})
    for first, behind in pairwise(edges):
        batch = facts[first:behind]
        await folder.prepare(batch, _no_documents)
        result = folder.fold(batch)
        for view, writes in result.writes.items():
            generation.apply(view, writes)
        generation.log_s = max(generation.log_s, result.until_s)
        generation.expire(10_000)
    return generation


async def _no_documents(_: object) -> Mapping[str, bytes]:
    return {}


def held(generation: MemoryGeneration) -> Held:
    """As Redis has it: a set without members is no key."""
    return {
        "sets": {name: members for name, members in generation.sets.items() if members},
        "counts": {name: fields for name, fields in generation.counts.items() if fields},
        "expiries": generation.expiries,
    }


def recorded(facts: Sequence[tuple[float, JobFact]]) -> list[Recorded]:
    """A log of these facts, each with the second at which it was recorded."""
    versions: Counter[UUID] = Counter()
    log: list[Recorded] = []
    for position, (second, fact) in enumerate(facts, start=1):
        versions[fact.job_id] += 1
        log.append(Recorded(position, fact.job_id, versions[fact.job_id], fact, "", at(second)))
    return log


def job_id(number: int) -> UUID:
    return UUID(int=(7 << 76) | (0b10 << 62) | number)


def story(number: int, begins: float, ending: str, target: Target = ADDRESS) -> list[tuple[float, JobFact]]:
    """The facts of a job, with the second of each."""
    of = job_id(number)
    first: list[tuple[float, JobFact]] = [
        (begins, submitted(PING, RDAP, job_id=of, target=target, when=at(begins))),
        (begins, dispatched(PING, RDAP, job_id=of, when=at(begins))),
    ]
    won, lost = completed(PING, job_id=of, when=at(begins + 1)), failed(PING, job_id=of, when=at(begins + 1))
    late = timed_out(RDAP, job_id=of, when=at(begins + 60))
    endings: dict[str, list[tuple[float, JobFact]]] = {
        "open": [(begins + 1, won)],
        "completed": [(begins + 1, won), (begins + 60, late), (begins + 60, job_completed(counts(), job_id=of))],
        "failed": [(begins + 1, lost), (begins + 60, late), (begins + 60, job_failed(counts(), job_id=of, reason="none"))],
        "cancelled": [(begins + 2, job_cancelled(job_id=of))],
        "very late": [(begins + 1, won), (begins + 100_000, late), (begins + 100_000, job_completed(counts(), job_id=of))],
        "deferred": [
            (begins + 1, deferred(PING, until=at(begins + 30), job_id=of)),
            (begins + 1, deferred(RDAP, until=at(begins + 30), job_id=of)),
        ],
        "skipped": [(begins + 1, skipped(RDAP, job_id=of)), (begins + 1, won)],
    }
    return first + endings[ending]


ENDINGS = ["open", "completed", "failed", "cancelled", "very late", "deferred", "skipped"]


@st.composite
def logs(draw: st.DrawFn) -> list[Recorded]:
    """Jobs of three days, mixed, recorded by writers whose clocks are up to half a minute apart."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    facts: list[tuple[float, JobFact]] = []
    for number in range(draw(st.integers(1, 12))):
        begins = draw(st.integers(0, 72 * HOUR_S))
        facts += story(number, begins, draw(st.sampled_from(ENDINGS)), chance.choice([ADDRESS, DOMAIN]))
    facts.sort(key=lambda fact: fact[0])
    return recorded([(second + chance.uniform(-15, 15), fact) for second, fact in facts])


@settings(max_examples=60, deadline=None)
@given(log=logs(), seed=st.integers(0, 2**32))
async def test_any_cut_into_batches_comes_to_the_same(log: list[Recorded], seed: int) -> None:
    chance = random.Random(seed)
    somewhere = chance.sample(range(len(log)), chance.randint(0, len(log) - 1))

    one_by_one = held(await folded(log, range(len(log))))

    assert held(await folded(log)) == one_by_one
    assert held(await folded(log, somewhere)) == one_by_one


# --- Lists ------------------------------------------------------------------------------------------------------------


def members(generation: MemoryGeneration, view: View, key: str) -> dict[str, int]:
    return generation.sets[view.name, key]


async def test_a_job_is_on_the_list_of_its_status_and_on_no_other() -> None:
    endings = {
        "open": "Processing",
        "completed": "Completed",
        "failed": "Failed",
        "cancelled": "Cancelled",
        "deferred": "Pending",
    }
    facts = [fact for number, ending in enumerate(endings) for fact in story(number, number, ending)]

    then = await folded(recorded(facts))

    hour = hour_of(NOW)
    for number, status in enumerate(endings.values()):
        assert list(members(then, jobs_by_time.VIEW, f"{hour}:{status}")) == [str(job_id(number))]
    assert sorted(members(then, jobs_by_time.VIEW, str(hour))) == [str(job_id(number)) for number in range(len(endings))]


async def test_the_score_is_the_position_of_the_first_fact() -> None:
    log = recorded([*story(1, 0, "completed"), *story(2, 0, "completed")])
    first = {str(fact.stream_id): fact.position for fact in log if isinstance(fact.fact, JobSubmitted)}

    then = await folded(log)

    hour = hour_of(NOW)
    assert members(then, jobs_by_time.VIEW, f"{hour}") == members(then, jobs_by_time.VIEW, f"{hour}:Completed") == first
    assert members(then, jobs_by_target.VIEW, f"{target_key(ADDRESS.canonical)}:{hour}") == first


async def test_an_hour_goes_whole_when_the_logs_time_has_come_and_the_list_of_hours_forgets_it() -> None:
    old, new = story(1, 0, "completed"), story(2, (KEPT_HOURS + 2) * HOUR_S, "completed")

    then = await folded(recorded([*old, *new]), [len(old)])

    hour = hour_of(NOW)
    for view in (jobs_by_time.VIEW, jobs_by_target.VIEW):
        assert [
            key for name, key in then.sets if name == view.name and key.startswith(str(hour)) and then.sets[name, key]
        ] == []
        assert members(then, view, "") == {str(hour + KEPT_HOURS + 2): hour + KEPT_HOURS + 2}


async def test_an_hour_stays_as_long_as_a_document_of_its_jobs_may() -> None:
    """Submitted in its last second, ended at the last moment."""
    begins = HOUR_S - NOW.minute * 60 - NOW.second - 1
    goes = begins + max(RULES.lifetime.values()).total_seconds() + TERMS.retention.total_seconds()
    log = [*story(1, begins, "open"), (goes, submitted(PING, job_id=job_id(2), when=at(goes)))]

    then = await folded(recorded(log), [3])

    assert members(then, jobs_by_time.VIEW, str(hour_of(NOW)))


async def test_the_list_of_a_target_is_bounded_and_its_key_does_not_tell_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_by_target, "JOBS_MAX", 3)
    log = recorded([fact for number in range(7) for fact in story(number, number, "open", DOMAIN)])

    then = await folded(log, range(0, len(log), 4))

    assert list(members(then, jobs_by_target.VIEW, f"{target_key(DOMAIN.canonical)}:{hour_of(NOW)}")) == [
        str(job_id(number)) for number in (4, 5, 6)
    ]
    assert not [key for _, key in then.sets if DOMAIN.canonical in key]


async def test_an_erased_target_is_on_no_list_of_a_target() -> None:
    fact = submitted(PING).model_copy(update={"target": Erased(), "target_type": TargetType.DOMAIN})

    then = await folded(recorded([(0, fact)]))

    assert [key for view, key in then.sets if view == jobs_by_target.VIEW.name] == [""]


# --- Numbers ----------------------------------------------------------------------------------------------------------


async def test_outcomes_and_codes_are_counted_in_all_and_by_the_hour_of_the_record() -> None:
    other = failed(PING).model_copy(update={"error": TaskError(code="who knows", message="?")})
    known = failed(PING).model_copy(update={"error": TaskError(code="no_reply", message="?")})
    facts: list[tuple[float, JobFact]] = [
        (0, submitted(PING, RDAP)),
        (0, skipped(RDAP)),
        (1, other),
        (HOUR_S, known),
        (HOUR_S, timed_out(PING)),
        (HOUR_S, completed(PING)),
    ]

    then = await folded(recorded(facts))

    stats = service_stats.VIEW.name
    in_the_first_hour = {"RDAP:skipped": 1, "Ping:failed": 1, "Ping:error:other": 1}
    in_the_second = {"Ping:failed": 1, "Ping:error:no_reply": 1, "Ping:timed_out": 1, "Ping:succeeded": 1, "Ping:ms:12": 1}
    assert then.counts[stats, str(hour_of(NOW))] == in_the_first_hour
    assert then.counts[stats, str(hour_of(NOW) + 1)] == in_the_second
    assert then.counts[stats, STATS_TOTAL] == dict(Counter(in_the_first_hour) + Counter(in_the_second))


async def test_the_counters_are_bounded_whatever_workers_say() -> None:
    chance = random.Random(5)
    facts: list[tuple[float, JobFact]] = [(0, submitted(*Service))]
    for number in range(3_000):
        service = chance.choice(list(Service))
        duration = {"duration_ms": int(10 ** chance.uniform(-1, 12))}
        error = TaskError(code=f"code {number}", message="?")
        facts += [(number, completed(service).model_copy(update=duration))]
        facts += [(number, failed(service).model_copy(update={"error": error}))]

    then = await folded(recorded(facts), range(0, 6_000, 500))

    most = len(Service) * (4 + len(service_stats.CODES) + 1 + len(BANDS) + 1)
    assert all(len(fields) <= most for fields in then.counts.values())
    assert most < 800


def test_bands_cover_every_duration_and_none_is_wider_than_a_tenth() -> None:
    assert [band_of(ms) for ms in (-1, 0, 1, 20, 21, 22, 23)] == [0, 0, 1, 20, 21, 21, 22]
    assert all(later <= max(earlier + 1, earlier * 11 // 10) for earlier, later in pairwise(BANDS))
    assert BANDS[-1] >= HOUR_S * 1000
    assert band_of(BANDS[-1] + 1) == len(BANDS)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3_000_000), min_size=1, max_size=400))
def test_a_quantile_is_off_by_no_more_than_is_said(durations: list[int]) -> None:
    """Against the sorted durations: the smallest one that at least this share does not exceed."""
    stats = ServiceStats(bands=Counter(map(band_of, durations)))
    for quantile in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = sorted(durations)[max(0, -(-int(quantile * 100) * len(durations) // 100) - 1)]

        then = stats.duration_ms(quantile)

        assert then is not None
        assert abs(then - exact) <= max(exact * RELATIVE_ERROR, 0.5)


def test_a_service_that_was_never_asked_has_no_share_and_no_durations() -> None:
    nothing = ServiceStats(outcomes={"skipped": 3})

    assert nothing.success_share is None
    assert nothing.duration_ms(0.5) is None
    assert ServiceStats(outcomes={"succeeded": 3, "failed": 1, "timed_out": 2, "skipped": 9}).success_share == 0.5
