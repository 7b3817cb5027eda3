"""`lookup what-if`: what is typed becomes changes, and a log of jobs becomes counts and samples."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest

from app.cli import app
from app.what_if import Tally, WrongSetting, changes_of, look, report_of, settings_in
from app.what_if_view import NoSuchView, compare, view_named
from domain.what_if import Changes, Comparison
from events.facts import JobFact, Priority, Service
from events.memory import MemoryStore
from events.record import Cause
from events.store import AppendUnit, NewFacts, StreamHead
from projections import job_status
from projections.job_views import JobViews, Terms
from projections.table import PROJECTIONS
from projections.writes import Put, Write
from results.documents import MemoryDocuments
from tests.builders import (
    PING,
    RDAP,
    RULES,
    at,
    completed,
    counts,
    dispatched,
    job_completed,
    job_failed,
    memory_store,
    submitted,
    timed_out,
)

SLOW = 8.0


async def happened(store: MemoryStore, *facts: JobFact, by_clock: bool = False) -> None:
    cause = Cause("deadlines" if by_clock else "worker-1", facts[0].job_id)
    await store.append(AppendUnit([NewFacts(facts[0].job_id, StreamHead(), facts)], cause))


async def log_of_four() -> MemoryStore:
    """A quick job, a slow one, one that nobody answered, and one that is still open."""
    store = memory_store()
    for number, seconds in ((1, 1.0), (2, SLOW)):
        job_id, then = UUID(int=number), at(seconds)
        answer = completed(PING, job_id=job_id, when=then).model_copy(update={"duration_ms": int(seconds * 900)})
        over = job_completed(counts(succeeded=1), job_id=job_id, when=then)
        await happened(store, submitted(PING, job_id=job_id), dispatched(PING, job_id=job_id), answer, over)
    third, fourth = UUID(int=3), UUID(int=4)
    silent = timed_out(RDAP, attempt=2, job_id=third, when=at(60))
    none = job_failed(counts(timed_out=1), job_id=third, reason="none", when=at(60))
    first, again = dispatched(RDAP, job_id=third), dispatched(RDAP, attempt=2, job_id=third, when=at(30))
    await happened(store, submitted(RDAP, job_id=third), first, again, silent, none, by_clock=True)
    await happened(store, submitted(PING, job_id=fourth), dispatched(PING, job_id=fourth))
    return store


async def told(*sets: str, samples_max: int = 5) -> Tally:
    return await look(await log_of_four(), RULES, changes_of(sets), samples_max)


async def test_a_log_is_told_by_what_would_have_ended_otherwise() -> None:
    report = report_of(await told("interactive_lifetime_s=5"))

    assert (report["jobs"], report["undecided"], report["different"], report["same"], report["unknown"]) == (4, 1, 1, 2, 0)
    assert {"recorded": "Completed", "status": "Failed", "jobs": 1} in report["statuses"]
    (sample,) = report["samples"]
    assert sample["job_id"] == str(UUID(int=2))
    assert sample["tasks"]["Ping"]["prospect"] == "timed_out"


async def test_what_a_further_attempt_would_have_brought_is_unknown() -> None:
    report = report_of(await told("attempts_max=3"))

    assert (report["different"], report["same"], report["unknown"]) == (0, 2, 1)
    assert report["samples"][0]["tasks"]["RDAP"]["why"] == "Another attempt would have been made."


async def test_nothing_is_written_and_samples_are_bounded() -> None:
    store = await log_of_four()
    head = await store.head()

    tally = await look(store, RULES, changes_of(["interactive_lifetime_s=0.5"]), 1)

    assert {comparison: len(jobs) for comparison, jobs in tally.samples.items() if jobs} == {
        Comparison.DIFFERENT: 1,
        Comparison.UNKNOWN: 1,
    }
    assert tally.comparisons.total() == 3
    assert await store.head() == head


def test_settings_are_read_as_they_are_typed() -> None:
    sets = ["attempts_max=3", "attempts_max.rdap=1", "timeout_s.Ping=2.5", "bulk_lifetime_s=60", "redispatch_after_s=10"]

    assert changes_of(sets) == Changes(
        timeout_s={PING: 2.5},
        attempts_max={**dict.fromkeys(Service, 3), RDAP: 1},
        lifetime={Priority.BULK: timedelta(seconds=60)},
        redispatch_after=timedelta(seconds=10),
    )


@pytest.mark.parametrize(
    "text",
    ["attempts_max", "attempts_max=1.5", "attempts_max=101", "attempts_max.Whois=1", "port=80", "timeout_s=0", "timeout_s=nan",
     "redispatch_after_s.RDAP=1", "bulk_lifetime_s=inf", "=1"],
)  # fmt: skip
def test_a_setting_that_makes_no_sense_is_refused_in_our_words(text: str) -> None:
    with pytest.raises(WrongSetting):
        changes_of([text])


def test_nothing_to_change_is_refused_too() -> None:
    with pytest.raises(WrongSetting, match="Nothing is changed"):
        changes_of([])


def test_a_file_of_settings_has_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "settings"
    file.write_text("# tried in November\nattempts_max=3\n\n  timeout_s=4 \n")

    assert settings_in(file) == ["attempts_max=3", "timeout_s=4"]
    with pytest.raises(WrongSetting):
        settings_in(tmp_path / "none")


# --- Another version of a view --------------------------------------------------------------------------------------------


def shouting(job: JobViews) -> Iterator[Write]:
    """As today's, but for what is said of jobs that are still open; and nothing of the first one."""
    for write in job_status.VIEW.of_job(job) if job_status.VIEW.of_job else ():
        if isinstance(write, Put) and not job.saga.closed:
            yield write._replace(value=write.value.upper())
        elif job.status.job_id != UUID(int=1):
            yield write


LOUD = replace(job_status.VIEW, version=99, of_job=shouting)


async def test_another_version_of_a_view_is_told_by_the_keys_that_would_differ() -> None:
    terms = Terms(RULES, timedelta(hours=1))

    then = await compare(await log_of_four(), MemoryDocuments(), terms, job_status.VIEW, LOUD)

    told = then.as_json(5)
    assert (told["same"], told["changed"], told["added"], told["gone"]) == (2, 1, 0, 1)
    assert (told["changed_keys"], told["gone_keys"]) == ([str(UUID(int=4))], [str(UUID(int=1))])


def test_a_view_is_found_by_the_module_that_it_is_in() -> None:
    assert view_named("projections.job_status:VIEW") == (job_status.VIEW, job_status.VIEW)
    assert view_named("projections.job_status") == (job_status.VIEW, job_status.VIEW)


async def test_every_view_is_the_same_as_itself() -> None:
    for view in PROJECTIONS:
        then = await compare(await log_of_four(), MemoryDocuments(), Terms(RULES, timedelta(hours=1)), view, view)

        assert (then.changed, then.added, then.gone) == ([], [], [])


@pytest.mark.parametrize("text", ["no.such.module:VIEW", "projections.job_status:NONE", "json:dumps", "", ":"])
def test_what_is_no_view_is_refused_in_our_words(text: str) -> None:
    with pytest.raises(NoSuchView):
        view_named(text)


@pytest.mark.parametrize(
    "words",
    [
        ["--reparse", "RDAP", "--what-if"],
        ["--apply"],
        ["--set", "attempts_max=1"],
        ["--reparse", "RDAP", "--rollback"],
        ["--reparse", "Whois"],
        ["--what-if", "--view", "a:b", "--view", "c:d"],
        ["--what-if", "--view", "a:b", "--set", "attempts_max=1"],
    ],
)
def test_replay_hands_the_questions_on_or_says_what_goes_with_what(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert app(["replay", *words], result_action="return_value") == 2
    assert capsys.readouterr().err.startswith("lookup: ")
