"""Natural batching: what arrives while a flush is under way goes down together in the next one.

Idle, a batch is one item and nothing waits for a timer; under load it grows to its bound by itself.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Overloaded(Exception):  # noqa: N818 - a state, in the field's words
    """More waits already than may wait, or it waited for as long as it may: nothing was done about the item, nor will be."""


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Item, Answer]):
    """An item on its way into a flush."""

    item: Item
    future: "asyncio.Future[Answer]"
    taken: bool = False
    withdrawn: bool = False


class Batcher(Generic[Item, Answer]):
    """Turns single calls of `add` into calls of `flush` with everything that waits, one flush at a time.

    `flush` gets 1 to `batch_max` items and returns one answer for each, in order; an answer that is an exception is raised
    to its own caller only, an exception raised by `flush` to all of them. A caller that gives up does not pull its item out
    of a flush. At most `waiting_max` items wait; one more raises `Overloaded`. After an idle time the first flush waits until
    `enough` items have come, but for `linger_s` at most, and not if the last item that came after such a time stayed alone.
    """

    def __init__(
        self,
        flush: Callable[[Sequence[Item]], Awaitable[Sequence[Answer | Exception]]],
        *,
        batch_max: int,
        waiting_max: int = 10_000,
        linger_s: float = 0.0,
        enough: int = 2,
    ) -> None:
        self._flush = flush
        self._batch_max = batch_max
        self._waiting_max = waiting_max
        self._linger_s = linger_s
        self._enough = enough
        self._has_enough = asyncio.Event()
        self._expects_more = False
        self._waiting: list[_Waiting[Item, Answer]] = []
        self._flusher: asyncio.Task[None] | None = None

    async def add(self, item: Item, *, within_s: float | None = None) -> Answer:
        """Hand an item in and wait for its own answer, at most `within_s`.

        If that is over, an item that still waits is withdrawn (`Overloaded`); of one in a flush under way, nobody can tell
        yet what becomes of it (`TimeoutError`).
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        waiting = self._hand_in(item, future)
        if within_s is None:
            return await future
        try:
            async with asyncio.timeout(within_s):
                return await future
        except TimeoutError:
            if waiting.taken:
                raise
            waiting.withdrawn = True
            raise Overloaded from None

    async def drain(self) -> None:
        """Wait until nothing waits any more."""
        while self._flusher is not None:
            await asyncio.wait([self._flusher])

    def _hand_in(self, item: Item, future: "asyncio.Future[Answer]") -> _Waiting[Item, Answer]:
        if len(self._waiting) >= self._waiting_max:
            raise Overloaded
        waiting = _Waiting(item, future)
        self._waiting.append(waiting)
        if len(self._waiting) >= self._enough:
            self._has_enough.set()
        if self._flusher is None:
            self._flusher = asyncio.create_task(self._flush_all())
        return waiting

    async def _flush_all(self) -> None:
        try:
            if self._linger_s and self._expects_more and len(self._waiting) < self._enough:
                self._has_enough.clear()
                await happens_within(self._has_enough, self._linger_s)
            flushed = 0
            while batch := self._next_batch():
                flushed += len(batch)
                await self._flush_batch(batch)
            self._expects_more = flushed > 1
        finally:
            self._flusher = None

    def _next_batch(self) -> list[_Waiting[Item, Answer]]:
        waiting = [entry for entry in self._waiting if not entry.withdrawn]
        batch, self._waiting = waiting[: self._batch_max], waiting[self._batch_max :]
        for entry in batch:
            entry.taken = True
        return batch

    async def _flush_batch(self, batch: list[_Waiting[Item, Answer]]) -> None:
        try:
            answers = await self._flush([entry.item for entry in batch])
        except asyncio.CancelledError:
            for entry in batch:
                entry.future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - whatever went wrong is each caller's to judge
            answers = [error] * len(batch)
        for entry, answer in zip(batch, answers, strict=True):
            future = entry.future
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)


def groups_within(items: Iterable[Item], size_of: Callable[[Item], int], size_max: int) -> Iterator[list[Item]]:
    """The items in order, in groups of at most `size_max` together; one that is larger by itself is a group of its own."""
    group: list[Item] = []
    taken = 0
    for item in items:
        size = size_of(item)
        if group and taken + size > size_max:
            yield group
            group, taken = [], 0
        group.append(item)
        taken += size
    if group:
        yield group


async def happens_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event, but so long at most; says whether it happened."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
