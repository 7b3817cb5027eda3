"""Natural batching: what arrives while a flush is under way goes down together in the next one.

Idle, a batch is one item and nothing waits for a timer; under load it grows to its bound by itself.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Overloaded(Exception):  # noqa: N818 - a state, in the field's words
    """More waits already than may wait."""


class Batcher(Generic[Item, Answer]):
    """Turns single calls of `add` into calls of `flush` with everything that waits, one flush at a time.

    `flush` gets 1 to `batch_max` items and returns one answer for each, in order; an answer that is an exception is raised
    to its own caller only, an exception raised by `flush` to all of them. A caller that gives up does not pull its item out
    of a flush under way. At most `waiting_max` items wait; one more raises `Overloaded`.
    """

    def __init__(
        self,
        flush: Callable[[Sequence[Item]], Awaitable[Sequence[Answer | Exception]]],
        *,
        batch_max: int,
        waiting_max: int = 10_000,
    ) -> None:
        self._flush = flush
        self._batch_max = batch_max
        self._waiting_max = waiting_max
        self._waiting: list[tuple[Item, asyncio.Future[Answer] | None]] = []
        self._flusher: asyncio.Task[None] | None = None

    async def add(self, item: Item) -> Answer:
        """Hand an item in and wait for its own answer."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._hand_in(item, future)
        return await future

    def add_and_go_on(self, item: Item) -> None:
        """Hand an item in whose answer nobody waits for, nor a failure of it."""
        self._hand_in(item, None)

    async def drain(self) -> None:
        """Wait until nothing waits any more."""
        while self._flusher is not None:
            await asyncio.wait([self._flusher])

    def _hand_in(self, item: Item, future: "asyncio.Future[Answer] | None") -> None:
        if len(self._waiting) >= self._waiting_max:
            raise Overloaded
        self._waiting.append((item, future))
        if self._flusher is None:
            self._flusher = asyncio.create_task(self._flush_all())

    async def _flush_all(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[: self._batch_max], self._waiting[self._batch_max :]
                await self._flush_batch(batch)
        finally:
            self._flusher = None

    async def _flush_batch(self, batch: list[tuple[Item, "asyncio.Future[Answer] | None"]]) -> None:
        try:
            answers = await self._flush([item for item, _ in batch])
        except asyncio.CancelledError:
            for _, future in batch:
                if future is not None:
                    future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - whatever went wrong is each caller's to judge
            answers = [error] * len(batch)
        for (_, future), answer in zip(batch, answers, strict=True):
            if future is None or future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)


async def happens_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event, but so long at most; says whether it happened."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
