"""What is measured, the same for every contender: single jobs on an idle system, then many jobs at once.

A job is done when its client has seen its last result. Never more than `unfinished_max` jobs are on their way.
"""

import os
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from bench.processor_time import processor_seconds, spent

Job = TypeVar("Job")


@dataclass(frozen=True, slots=True)
class Load:
    """How much is asked. `submitters` hand jobs in side by side where a contender's client can do that."""

    jobs: int
    singles: int
    warm_up: int
    submitters: int = 64
    unfinished_max: int = 1_000
    job_timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run found. `processor_s` is that of all programs from the first job handed in to the last one seen done."""

    jobs: int
    seconds: float
    single_ms: list[float] = field(repr=False)
    processor_s: dict[str, float]

    @property
    def jobs_per_s(self) -> float:
        return self.jobs / self.seconds

    @property
    def p50_ms(self) -> float:
        return statistics.median(self.single_ms)

    @property
    def p95_ms(self) -> float:
        return statistics.quantiles(self.single_ms, n=20, method="inclusive")[-1]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Stopwatch:
    """Wall time, and the processor time of all that the bench (our parent) has started."""

    def __init__(self) -> None:
        self._processor = processor_seconds(os.getppid())
        self._started_at = time.perf_counter()

    def stop(self, jobs: int, single_ms: list[float]) -> Measured:
        seconds = time.perf_counter() - self._started_at
        return Measured(jobs, seconds, single_ms, spent(self._processor, processor_seconds(os.getppid())))


def measure(load: Load, submit: Callable[[], Job], finish: Callable[[Job], None]) -> Measured:
    """Drive a client library: `submit` hands a job in, `finish` waits for its last result and raises if it is wrong.

    One thread: the libraries' clients are bound by the processor, and more threads made both of them slower.
    """
    for _ in range(load.warm_up):
        finish(submit())
    single_ms = [_single_ms(submit, finish) for _ in range(load.singles)]
    watch = Stopwatch()
    unfinished: deque[Job] = deque()
    for _ in range(load.jobs):
        if len(unfinished) >= load.unfinished_max:
            finish(unfinished.popleft())
        unfinished.append(submit())
    while unfinished:
        finish(unfinished.popleft())
    return watch.stop(load.jobs, single_ms)


def _single_ms(submit: Callable[[], Job], finish: Callable[[Job], None]) -> float:
    started_at = time.perf_counter()
    finish(submit())
    return 1000 * (time.perf_counter() - started_at)
