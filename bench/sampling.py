"""Where a process's time goes: looks at its threads every few milliseconds and counts what used the processor since.

Not a tracer: nothing is slowed down but by the looking, and code in C counts for the Python function that called it.
"""

import json
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

INTERVAL_S = 0.003
DEPTH_MAX = 200
OURS = ("app", "bench", "domain", "events", "projections", "read_side", "results", "workers", "write_side")


class Sampler:
    """Samples this process while its block runs, then writes what it saw to the file `samples`; None: does nothing."""

    def __init__(self, samples: str | None) -> None:
        self._file = Path(samples) if samples else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="sampler", daemon=True)
        self._used: dict[int, float] = {}
        self._areas: Counter[str] = Counter()
        self._alone: Counter[str] = Counter()
        self._with_calls: Counter[str] = Counter()
        self._threads: Counter[str] = Counter()

    def __enter__(self) -> None:
        if self._file is not None:
            self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is None:
            return
        self._stop.set()
        self._thread.join()
        self._file.write_text(json.dumps(self._as_json()))

    def _as_json(self) -> dict[str, Any]:
        return {
            "areas": dict(self._areas),
            "alone": dict(self._alone),
            "with_calls": dict(self._with_calls),
            "threads": dict(self._threads),
        }

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            frames = sys._current_frames()  # noqa: SLF001 - the documented way to see other threads
            for thread in threading.enumerate():
                if thread.ident in frames and thread is not self._thread:
                    used_s = self._used_since(thread)
                    if used_s > 0:
                        self._count(thread.name, frames[thread.ident], used_s)

    def _used_since(self, thread: threading.Thread) -> float:
        """Processor seconds of a thread since the last look."""
        assert thread.ident is not None
        with suppress(OSError):  # It has just ended.
            now = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
            before = self._used.get(thread.ident, now)
            self._used[thread.ident] = now
            return now - before
        return 0.0

    def _count(self, thread_name: str, frame: FrameType, used_s: float) -> None:
        stack = _stack(frame)
        # All threads of a pool count as one.
        self._threads[thread_name.rpartition("_")[0] or thread_name] += used_s  # type: ignore[assignment]
        self._areas[_area(stack)] += used_s  # type: ignore[assignment]
        self._alone[stack[0]] += used_s  # type: ignore[assignment]
        for function in dict.fromkeys(stack):
            if function.startswith(OURS):
                self._with_calls[function] += used_s  # type: ignore[assignment]


def _stack(frame: FrameType | None) -> list[str]:
    """`module:function` of a stack, innermost first."""
    stack: list[str] = []
    while frame is not None and len(stack) < DEPTH_MAX:
        code = frame.f_code
        stack.append(f"{frame.f_globals.get('__name__', '?')}:{getattr(code, 'co_qualname', code.co_name)}")
        frame = frame.f_back
    return stack


def _area(stack: list[str]) -> str:
    """Whose time it is: the outermost module of ours that is no mere frame of the program, else the innermost library."""
    for function in reversed(stack):
        module = function.partition(":")[0]
        if module.startswith(OURS) and not module.startswith(("app.parts", "app.http", "app.wiring", "bench")):
            return module
    library = next(
        (f.partition(".")[0].partition(":")[0] for f in stack if not f.startswith(("asyncio", "threading"))), "asyncio"
    )
    return "the event loop" if library in {"bench", "__main__", "app", "uvloop"} else library
