"""Where a process's time goes: looks at its threads every few milliseconds of work and counts what used the processor since.

Not a tracer: nothing is slowed down but by the looking, and code in C counts for the Python function that called it.
"""

import json
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

INTERVAL_S = 0.002
DEPTH_MAX = 200
OURS = ("app", "bench", "domain", "events", "projections", "read_side", "results", "workers", "write_side")


class Sampler:
    """Samples this process while its block runs, then writes what it saw to the file `samples`; None: does nothing.

    The timer counts processor time, and Python runs the handler in the main thread between two steps of whatever runs there.
    A thread of our own would see the event loop only where it lets go of the interpreter.
    """

    def __init__(self, samples: str | None) -> None:
        self._file = Path(samples) if samples else None
        self._used: dict[int, float] = {}
        self._areas: Counter[str] = Counter()
        self._alone: Counter[str] = Counter()
        self._with_calls: Counter[str] = Counter()
        self._threads: Counter[str] = Counter()

    def __enter__(self) -> None:
        if self._file is not None:
            signal.signal(signal.SIGPROF, self._sample)
            signal.setitimer(signal.ITIMER_PROF, INTERVAL_S, INTERVAL_S)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._file.write_text(json.dumps(self._as_json()))

    def _as_json(self) -> dict[str, Any]:
        return {
            "areas": dict(self._areas),
            "alone": dict(self._alone),
            "with_calls": dict(self._with_calls),
            "threads": dict(self._threads),
        }

    def _sample(self, _: int, here: FrameType | None) -> None:
        frames: dict[int, FrameType | None] = {**sys._current_frames(), threading.get_ident(): here}  # noqa: SLF001
        for thread in threading.enumerate():
            used_s = self._used_since(thread) if thread.ident in frames else 0.0
            if used_s > 0:
                assert thread.ident is not None
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

    def _count(self, thread_name: str, frame: FrameType | None, used_s: float) -> None:
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
