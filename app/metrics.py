"""Metrics: what the parts of a process have counted, and how far log, relay and views have come, as Prometheus reads it.

Counting costs an addition: parts keep plain integers, and nobody looks at them but a scrape. What has to be asked of a server
is asked by a scrape, within a bound; what does not answer is missing from it, and `lookup_reading_up` says so.
"""

import asyncio
import resource
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import psycopg
from aiohttp import web
from redis.exceptions import RedisError

from events.facts import Service
from events.store import StoreUnavailable
from projections.projector import ProjectorCounters
from workers.runner import WorkerCounters
from write_side.deadlines import DeadlineCounters
from write_side.drain import DrainCounters
from write_side.gather import GatherCounters
from write_side.head_keeper import HeadCounters
from write_side.relay import RelayCounters
from write_side.sagas import SagaCounters

READING_S = 2.0
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Prometheus' text exposition format."""

Samples = Mapping[str, float]
"""Values by what tells them apart: the value of their family's one label, or "" where it has none."""
Counting = TypeVar("Counting")


@dataclass(frozen=True, slots=True)
class Family:
    """All values of one metric. `shared` are labels that they have in common."""

    name: str
    kind: str
    meaning: str
    label: str
    samples: Samples
    shared: Mapping[str, str] = field(default_factory=dict)


Looking = Callable[[], list[Family]]
"""Looks at what is known here."""
Reading = Callable[[], Awaitable[list[Family]]]
"""Asks a server. May raise `StoreUnavailable`, `psycopg.Error`, `RedisError` or `OSError`."""

# By the class that counts it: name, label and meaning. The label's values are the names of the counters in that class.
COUNTED: Mapping[type[Any], tuple[str, str, str]] = {
    SagaCounters: ("lookup_decisions_total", "result", "Decisions about jobs: new jobs, later ones, and version conflicts."),
    GatherCounters: ("lookup_outcomes_total", "result", "Outcomes of tasks that arrived, by what became of them."),
    DeadlineCounters: ("lookup_deadlines_total", "result", "Tasks that were silent for too long, by what was done."),
    DrainCounters: ("lookup_dead_letters_total", "result", "Dead letters that were put into the table."),
    RelayCounters: ("lookup_relayed_total", "what", "What the relay published, as the broker confirmed it."),
    HeadCounters: ("lookup_heads_total", "what", "Heads of the log that were signed, and the facts that they vouch for."),
    ProjectorCounters: ("lookup_projected_facts_total", "result", "Facts that the projector folded into views."),
    WorkerCounters: ("lookup_worker_items_total", "result", "What workers were handed, by what became of it."),
}


class Counters:
    """The counters of everything that runs in this process, made when first asked for. They outlive a part's restarts."""

    def __init__(self) -> None:
        self._kept: dict[tuple[type[Any], Service | None], Any] = {}

    def of(self, counting: type[Counting], service: Service | None = None) -> Counting:
        kept: Counting = self._kept.setdefault((counting, service), counting())
        return kept

    def look(self) -> list[Family]:
        return [_counted(counters, service) for (_, service), counters in self._kept.items()]


def _counted(counters: Any, service: Service | None) -> Family:
    name, label, meaning = COUNTED[type(counters)]
    samples = {counter.name: getattr(counters, counter.name) for counter in fields(counters)}
    return Family(name, "counter", meaning, label, samples, {} if service is None else {"service": service.value})


def metrics_routes(looks: Iterable[Looking], readings: Mapping[str, Reading]) -> list[web.RouteDef]:
    """`/metrics`: everything that is known here, and what the readings bring."""
    looking = [*looks, _process]

    async def scrape(_: web.Request) -> web.Response:
        known = [family for look in looking for family in look()]
        return web.Response(body=exposition([*known, *await _read_all(readings)]), headers={"Content-Type": CONTENT_TYPE})

    return [web.get("/metrics", scrape)]


async def _read_all(readings: Mapping[str, Reading]) -> list[Family]:
    found = await asyncio.gather(*(_bounded(read) for read in readings.values()))
    up = {name: float(families is not None) for name, families in zip(readings, found, strict=True)}
    told = Family("lookup_reading_up", "gauge", "Whether what the other gauges show could be asked.", "reading", up)
    return [family for families in found for family in families or ()] + ([told] if up else [])


async def _bounded(read: Reading) -> list[Family] | None:
    try:
        async with asyncio.timeout(READING_S):
            return await read()
    except (TimeoutError, StoreUnavailable, psycopg.Error, RedisError, OSError):
        return None


def _process() -> list[Family]:
    """What Prometheus' own clients tell of a process, under the same names."""
    cpu_s = time.process_time()
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return [
        Family("process_cpu_seconds_total", "counter", "Processor time of this process, in seconds.", "", {"": cpu_s}),
        Family("process_peak_memory_bytes", "gauge", "The most memory that this process has had.", "", {"": peak_bytes}),
    ]


def exposition(families: Iterable[Family]) -> bytes:
    """The text of a scrape. Families of one name are told together, as the format demands."""
    by_name: dict[str, list[Family]] = {}
    for family in families:
        by_name.setdefault(family.name, []).append(family)
    lines: list[str] = []
    for name, several in by_name.items():
        lines += [f"# HELP {name} {several[0].meaning}", f"# TYPE {name} {several[0].kind}"]
        lines += [_line(family, told_apart, value) for family in several for told_apart, value in family.samples.items()]
    return "".join(line + "\n" for line in lines).encode()


def _line(family: Family, told_apart: str, value: float) -> str:
    labels = dict(family.shared)
    if family.label:
        labels[family.label] = told_apart
    # Every label's value is a word of ours: there is nothing to be escaped.
    text = ",".join(f'{name}="{value}"' for name, value in labels.items())
    return f"{family.name}{{{text}}} {value}" if text else f"{family.name} {value}"
