"""The simulation's own event loop: virtual time, no sockets, no threads, and processes that may freeze or vanish at any await.

asyncio's own tasks, timeouts, locks and queues run on it. Each simulated process keeps the order that asyncio promises; which
process runs next is drawn from the seed, and the clock moves only when nobody can run.
"""

import asyncio
import heapq
import sys
import warnings
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar, copy_context
from itertools import count
from random import Random
from typing import Any, TypeVar, cast

Returned = TypeVar("Returned")
_CLOSES_MAX = 10


class Process:
    """What a machine would run as one process: its callbacks wait in `ready`, in the order in which they came."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ready: deque[Handle] = deque()
        self.alive = True
        self.frozen = False
        self.crashes_in: int | None = None
        """Steps until it dies; None: it does not."""
        self.context = copy_context()
        self.context.run(_PROCESS.set, self)

    def can_run(self) -> bool:
        return self.alive and not self.frozen and bool(self.ready)


_PROCESS: ContextVar[Process] = ContextVar("process")


class Handle:
    """A callback that waits for its turn."""

    __slots__ = ("_cancelled", "args", "callback", "context", "process")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: Context) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.process = context[_PROCESS]
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True
        self.args = ()

    def cancelled(self) -> bool:
        return self._cancelled


class NumberedTask(asyncio.Task[Any]):
    """asyncio keeps tasks in sets: hashed by their address they would come in another order each time."""

    _numbers = count()

    def __init__(self, *args: Any, number: int, **kwargs: Any) -> None:
        self._number = number
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class SimulatedLoop:
    """Runs until told to stop, or until nothing can ever happen again."""

    def __init__(self, chance: Random, on_crash: Callable[[Process], None]) -> None:
        self._chance = chance
        self._on_crash = on_crash
        self._now = 0.0
        self._timers: list[tuple[float, int, Handle]] = []
        self._numbers = count()
        self._runnable: list[Process] = []
        self._tasks: list[NumberedTask] = []
        self._stopping = False
        self.steps = 0

    # --- What a simulation does with it -------------------------------------------------------------------------------

    def spawn(self, process: Process, work: Coroutine[Any, Any, Any]) -> None:
        self.create_task(work, context=process.context.copy())

    def run(self, until_s: float) -> None:
        """Run up to that virtual second, or until `stop`."""
        while not self._stopping and (self._runnable or self._next_timers(until_s)):
            if self._runnable:
                self._step()

    @contextmanager
    def is_the_running_one(self) -> Iterator[None]:
        asyncio._set_running_loop(cast("asyncio.AbstractEventLoop", self))
        try:
            yield
        finally:
            asyncio._set_running_loop(None)

    def stop(self) -> None:
        self._stopping = True

    def kill(self, process: Process) -> None:
        """All its tasks vanish where they stand; nothing of it is cleaned up."""
        process.alive = False
        process.ready.clear()
        self._leave(process)

    def freeze(self, process: Process) -> None:
        process.frozen = True
        self._leave(process)

    def thaw(self, process: Process) -> None:
        process.frozen = False
        self._join(process)

    def dispose(self) -> None:
        """Let go of what vanished: its clean-up code, which never ran, must not run into the next simulation."""
        hook, sys.unraisablehook = sys.unraisablehook, _nothing
        try:
            for task in self._tasks:
                if not task.done():
                    vars_of_asyncio: Any = task
                    vars_of_asyncio._log_destroy_pending = False
                    _close(task.get_coro())
            self._tasks.clear()
            self._timers.clear()
        finally:
            sys.unraisablehook = hook

    def _step(self) -> None:
        process = self._runnable[int(self._chance.random() * len(self._runnable))]
        handle = process.ready.popleft()
        if not process.ready:
            self._runnable.remove(process)
        if handle._cancelled:
            return
        self.steps += 1
        handle.context.run(handle.callback, *handle.args)
        if process.crashes_in is not None and process.alive:
            process.crashes_in -= 1
            if process.crashes_in <= 0:
                self._on_crash(process)

    def _next_timers(self, until_s: float) -> bool:
        """Move the clock to the next timer, and all timers that are due then to their processes. False at the end."""
        while self._timers and self._timers[0][2]._cancelled:
            heapq.heappop(self._timers)
        if not self._timers or self._timers[0][0] > until_s:
            return False
        self._now = self._timers[0][0]
        while self._timers and self._timers[0][0] <= self._now:
            _, _, handle = heapq.heappop(self._timers)
            self._enqueue(handle)
        return True

    def _enqueue(self, handle: Handle) -> None:
        process = handle.process
        if process.alive and not handle._cancelled:
            process.ready.append(handle)
            if len(process.ready) == 1:
                self._join(process)

    def _join(self, process: Process) -> None:
        if process.can_run() and process not in self._runnable:
            self._runnable.append(process)

    def _leave(self, process: Process) -> None:
        if process in self._runnable:
            self._runnable.remove(process)

    # --- What asyncio asks of a loop ----------------------------------------------------------------------------------

    def time(self) -> float:
        return self._now

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Any:
        handle = Handle(callback, args, context or copy_context())
        self._enqueue(handle)
        return handle

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Any:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Any:
        handle = Handle(callback, args, context or copy_context())
        heapq.heappush(self._timers, (max(when, self._now), next(self._numbers), handle))
        return handle

    def create_future(self) -> "asyncio.Future[Any]":
        return asyncio.Future(loop=cast("asyncio.AbstractEventLoop", self))

    def create_task(self, coro: Any, *, name: str | None = None, context: Context | None = None, **_: Any) -> Any:
        number = next(self._numbers)
        task = NumberedTask(coro, loop=self, name=name or f"task-{number}", context=context, number=number)
        self._tasks.append(task)
        return task

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """A failure that nobody looked at: when it is told depends on the garbage collector, so it counts for nothing."""


def at_once(coroutine: Coroutine[Any, Any, Returned]) -> Returned:
    """The answer of an in-memory twin, which never waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        answer: Returned = stop.value
        return answer
    raise AssertionError("A twin waited for something.")


def _close(coroutine: Any) -> None:
    """Close what vanished, however often its clean-up wants to wait for something."""
    for _ in range(_CLOSES_MAX):
        if coroutine.cr_frame is None:
            return
        # Nobody is left who could be told, nor of what had not even begun.
        with suppress(BaseException), warnings.catch_warnings(action="ignore"):
            coroutine.close()


def _nothing(_: object) -> None:
    """What a vanished process would have complained about."""
