"""What `lookup what-if` does: every job of the log is decided again under other settings; which would have ended otherwise?

Nothing is written anywhere: jobs are read, decided and forgotten, one page after the other.
"""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from rich.console import Console

from app.logs import set_up_logs
from app.running import settings_of_running
from app.settings import Settings
from app.what_if_view import NoSuchView, compare, view_named
from app.wiring import Wiring
from domain.commands import Rules
from domain.what_if import Changes, Comparison, Happened, Prospect, Redecided, redecide
from events.catalog import UnknownFact, topics_of
from events.facts import JobFact, JobSubmitted, Priority, Service
from events.record import StoredFact, envelope_of, fact_of
from events.store import HistoryReader, StoreUnavailable
from projections.job_views import Terms
from results.documents import ResultsUnavailable
from write_side import deadlines

PAGE = 200
SUBMITTED = frozenset(topics_of(JobSubmitted))
NOT_NOW, WRONG, UNREACHABLE = 1, 2, 3
LIFETIMES = {"interactive_lifetime_s": Priority.INTERACTIVE, "bulk_lifetime_s": Priority.BULK}
KEYS = (
    "attempts_max[.SERVICE], timeout_s[.SERVICE], interactive_lifetime_s, bulk_lifetime_s and redispatch_after_s"
    " (SERVICE is GeoIP, Ping, RDAP or ReverseDNS; without one, all four)"
)
ATTEMPTS_MAX = 100


class WrongSetting(ValueError):  # noqa: N818 - what the input is, in our words
    """A setting that does not exist, or a value that it cannot have."""


@dataclass
class Tally:
    """Jobs by what would have become of them. `samples`: the first few that would have ended otherwise, then of the unknown."""

    jobs: int = 0
    undecided: int = 0
    comparisons: Counter[Comparison] = field(default_factory=Counter)
    statuses: Counter[tuple[str, str | None]] = field(default_factory=Counter)
    tasks: Counter[tuple[Service, Prospect, Prospect]] = field(default_factory=Counter)
    samples: dict[Comparison, list[tuple[UUID, Redecided]]] = field(default_factory=dict)


def what_if(data_dir: Path | None, sets: Sequence[str], file: Path | None, *, samples_max: int, as_json: bool) -> int:
    """`lookup what-if --set …`; gives the exit code."""

    async def work(wiring: Wiring) -> None:
        changes = changes_of([*settings_in(file), *sets])
        report = report_of(await look(wiring.history, wiring.settings.rules, changes, samples_max))
        if as_json:
            print(json.dumps(report, indent=2))  # noqa: T201 - a command prints
        else:
            print_report(report, Console())

    return _run(data_dir, work)


def what_if_view(data_dir: Path | None, text: str, *, samples_max: int, as_json: bool) -> int:
    """`lookup what-if --view MODULE:VIEW`; gives the exit code."""

    async def work(wiring: Wiring) -> None:
        today, other = view_named(text)
        terms = Terms(wiring.settings.rules, wiring.settings.retention)
        difference = await compare(wiring.history, await wiring.past_documents(), terms, today, other)
        told = difference.as_json(samples_max)
        print(json.dumps(told, indent=2) if as_json else _in_words(told))  # noqa: T201 - a command prints

    return _run(data_dir, work)


def _run(data_dir: Path | None, work: Callable[[Wiring], Awaitable[None]]) -> int:
    settings = Settings() if data_dir is None else Settings(data_dir=data_dir)
    set_up_logs(settings.log_format, settings.log_level)
    settings = settings_of_running(settings)
    if settings.database_url is None:
        return _say("nothing runs here, and LOOKUP_DATABASE_URL is not set.", UNREACHABLE)

    async def run() -> None:
        wiring = Wiring(settings)
        try:
            await work(wiring)
        finally:
            await wiring.aclose()

    try:
        asyncio.run(run())
    except (WrongSetting, NoSuchView) as wrong:
        return _say(str(wrong), WRONG)
    except UnknownFact as unknown:
        return _say(str(unknown), NOT_NOW)
    except (StoreUnavailable, ResultsUnavailable):
        return _say("The database cannot be reached.", UNREACHABLE)
    return 0


def _in_words(told: Mapping[str, Any]) -> str:
    lines = [f"{told['facts']} facts. Of the keys of the view {told['view']}", f"  {told['same']:>7} would be the same"]
    for name, words in (("changed", "would be different"), ("added", "would be new"), ("gone", "would be gone")):
        lines += [f"  {told[name]:>7} {words}", *(f"          {key}" for key in told[f"{name}_keys"])]
    return "\n".join(lines)


async def look(history: HistoryReader, rules: Rules, changes: Changes, samples_max: int = 5) -> Tally:
    """Decide every job of the log again. May raise `StoreUnavailable` or `UnknownFact`."""
    tally, after = Tally(), None
    while stream_ids := await history.stream_ids(after, PAGE):
        for stream in (await history.read(stream_ids)).values():
            if stream[0].topic in SUBMITTED:
                _count(tally, stream[0].stream_id, redecide(story_of(stream), rules, changes), samples_max)
        after = stream_ids[-1]
    return tally


def story_of(stream: Sequence[StoredFact]) -> list[Happened]:
    return [Happened(cast("JobFact", fact_of(stored.topic, stored.state)), _by_clock(stored)) for stored in stream]


def _by_clock(stored: StoredFact) -> bool:
    actor = envelope_of(stored.state)["actor"]
    return bool(actor == deadlines.ACTOR or actor.startswith("doctor"))


def _count(tally: Tally, job_id: UUID, job: Redecided | None, samples_max: int) -> None:
    tally.jobs += 1
    if job is None:
        tally.undecided += 1
        return
    tally.comparisons[job.comparison] += 1
    tally.statuses[job.recorded_status, job.status] += 1
    for service, outlook in job.outlooks.items():
        tally.tasks[service, job.recorded[service], outlook.prospect] += 1
    samples = tally.samples.setdefault(job.comparison, [])
    if job.comparison is not Comparison.SAME and len(samples) < samples_max:
        samples.append((job_id, job))


# --- The settings ---------------------------------------------------------------------------------------------------------


def settings_in(file: Path | None) -> list[str]:
    """`KEY=VALUE`, one a line; empty lines and those that begin with # are passed over. Raises `WrongSetting`."""
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WrongSetting(f"{file} cannot be read.") from error
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def changes_of(sets: Sequence[str]) -> Changes:
    """`["attempts_max.RDAP=3", "redispatch_after_s=10"]` -> the changes; the last one counts. Raises `WrongSetting`."""
    timeout_s: dict[Service, float] = {}
    attempts_max: dict[Service, int] = {}
    lifetime: dict[Priority, timedelta] = {}
    redispatch_after: timedelta | None = None
    if not sets:
        raise WrongSetting(f"Nothing is changed. --set KEY=VALUE changes one of {KEYS}.")
    for text in sets:
        key, value = _pair(text)
        name, _, service = key.partition(".")
        match name:
            case "timeout_s":
                timeout_s |= dict.fromkeys(_services(key, service), value)
            case "attempts_max" if value == int(value) and value <= ATTEMPTS_MAX:
                attempts_max |= dict.fromkeys(_services(key, service), int(value))
            case "interactive_lifetime_s" | "bulk_lifetime_s" if not service:
                lifetime[LIFETIMES[name]] = timedelta(seconds=value)
            case "redispatch_after_s" if not service:
                redispatch_after = timedelta(seconds=value)
            case _:
                raise WrongSetting(f"{text!r} is no setting that can be changed here. These are {KEYS}.")
    return Changes(timeout_s, attempts_max, lifetime, redispatch_after)


def _pair(text: str) -> tuple[str, float]:
    key, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e9:  # noqa: PLR2004 - half a lifetime in seconds: more is a slip of the hand
        raise WrongSetting(f"{text!r} is not KEY=VALUE with a number above 0.")
    return key.strip(), number


def _services(key: str, name: str) -> Iterator[Service]:
    named = [service for service in Service if not name or service.lower() == name.lower()]
    if not named:
        raise WrongSetting(f"{key!r} names no service. These are {', '.join(Service)}.")
    yield from named


# --- Telling --------------------------------------------------------------------------------------------------------------


def report_of(tally: Tally) -> dict[str, Any]:
    return {
        "jobs": tally.jobs,
        "undecided": tally.undecided,
        **{comparison: tally.comparisons[comparison] for comparison in Comparison},
        "statuses": [
            {"recorded": then, "status": now or "unknown", "jobs": number}
            for (then, now), number in sorted(tally.statuses.items(), key=str)
        ],
        "tasks": [
            {"service": service, "recorded": then, "prospect": now, "tasks": number}
            for (service, then, now), number in sorted(tally.tasks.items())
        ],
        "samples": [
            _sample(job_id, job)
            for comparison in (Comparison.DIFFERENT, Comparison.UNKNOWN)
            for job_id, job in tally.samples.get(comparison, ())
        ],
    }


def _sample(job_id: UUID, job: Redecided) -> dict[str, Any]:
    return {
        "job_id": str(job_id),
        "comparison": job.comparison,
        "recorded_status": job.recorded_status,
        "status": job.status or "unknown",
        "tasks": {
            service: {"recorded": job.recorded[service], "prospect": outlook.prospect, "why": outlook.why}
            for service, outlook in job.outlooks.items()
            if outlook.why
        },
    }


def print_report(report: Mapping[str, Any], console: Console) -> None:
    lines = [
        f"{report['jobs']} jobs, {report['undecided']} of them open or cancelled: left out. Of the others",
        f"  {report['different']:>7} would have ended otherwise",
        f"  {report['same']:>7} would have ended as they did",
        f"  {report['unknown']:>7} cannot be known: something would have been asked that nobody asked",
    ]
    lines += [
        f"  {row['jobs']:>7} {row['recorded']} -> {row['status']}"
        for row in report["statuses"]
        if row["recorded"] != row["status"]
    ]
    for sample in report["samples"]:
        lines.append(f"{sample['job_id']}  {sample['recorded_status']} -> {sample['status']}")
        lines += [
            f"    {service}: {task['recorded']} -> {task['prospect']}. {task['why']}"
            for service, task in sample["tasks"].items()
        ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _say(sentence: str, code: int) -> int:
    print(f"lookup: {sentence}", file=sys.stderr)  # noqa: T201 - for the person who typed the command
    return code
