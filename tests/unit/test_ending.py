"""A task that is told to end ends, though its cancellation may get lost on the way."""

import asyncio

import pytest

from events import ending
from events.ending import end


async def deaf_to(cancellations: int) -> None:
    """Takes so many cancellations for something else, as `asyncio.wait_for` may before Python 3.12."""
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if cancellations == 0:
                raise
            cancellations -= 1


async def started(cancellations: int) -> "asyncio.Task[None]":
    task = asyncio.create_task(deaf_to(cancellations))
    await asyncio.sleep(0)
    return task


async def test_a_lost_cancellation_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "AGAIN_S", 0.01)
    tasks = [await started(0), await started(3)]

    await end(tasks, 10)

    assert all(task.cancelled() for task in tasks)


async def test_who_does_not_listen_in_time_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "AGAIN_S", 0.01)
    deaf = await started(100)

    await end([deaf], 0.05)

    assert not deaf.done()
    await end([deaf], 10)


async def test_what_an_ending_task_raises_is_dropped() -> None:
    async def fails() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise OSError

    task = asyncio.create_task(fails())
    await asyncio.sleep(0)

    await end([task], 10)

    assert isinstance(task.exception(), OSError)
