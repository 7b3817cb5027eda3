"""Natural batching: order, growth under load, and that one caller's trouble is nobody else's."""

import asyncio
from collections.abc import Sequence

import pytest

from events.batching import Batcher, Overloaded, groups_within

PATIENCE_S = 5.0


class Slow:
    """A flush that lets one batch through at a time, when told to, and remembers them."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.finished: list[list[int]] = []
        self.under_way = 0
        self._gate = asyncio.Semaphore(0)
        self._began = asyncio.Event()

    def let_through(self, batches: int = 1_000) -> None:
        for _ in range(batches):
            self._gate.release()

    async def began(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self._began.wait()

    async def flush(self, items: Sequence[int]) -> Sequence[int | Exception]:
        self.under_way += 1
        assert self.under_way == 1, "one flush at a time"
        self.batches.append(list(items))
        self._began.set()
        await self._gate.acquire()
        self.finished.append(list(items))
        self.under_way -= 1
        return [10 * item for item in items]


async def added(batcher: Batcher[int, int], *items: int) -> list["asyncio.Task[int]"]:
    """These items, handed in one after the other and waiting."""
    tasks = [asyncio.create_task(batcher.add(item)) for item in items]
    await asyncio.sleep(0)
    return tasks


async def answers(tasks: Sequence["asyncio.Task[int]"]) -> list[int | BaseException]:
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.gather(*tasks, return_exceptions=True)


async def test_each_caller_gets_its_own_answer() -> None:
    slow = Slow()
    slow.let_through()
    batcher = Batcher(slow.flush, batch_max=7)

    assert await answers(await added(batcher, *range(50))) == [10 * item for item in range(50)]


async def test_an_item_alone_does_not_wait_for_others() -> None:
    slow = Slow()
    slow.let_through()
    batcher = Batcher(slow.flush, batch_max=100)

    async with asyncio.timeout(PATIENCE_S):
        assert [await batcher.add(1), await batcher.add(2)] == [10, 20]

    assert slow.batches == [[1], [2]]


async def lingering(slow: Slow, *, enough: int) -> Batcher[int, int]:
    """One that waits for ever until enough have come; its last items came together."""
    slow.let_through()
    batcher: Batcher[int, int] = Batcher(slow.flush, batch_max=10, linger_s=600.0, enough=enough)
    await answers(await added(batcher, -2, -1))
    assert slow.batches.pop() == [-2, -1]
    return batcher


async def test_the_first_items_may_wait_a_moment_for_what_comes_then() -> None:
    slow = Slow()
    slow.let_through()
    batcher: Batcher[int, int] = Batcher(slow.flush, batch_max=10, linger_s=0.05, enough=4)
    await answers(await added(batcher, -2, -1))

    first = asyncio.ensure_future(batcher.add(1))
    second = asyncio.ensure_future(batcher.add(2))
    await asyncio.sleep(0.01)
    assert [*await asyncio.gather(first, second, batcher.add(3))] == [10, 20, 30]

    assert slow.batches == [[-2, -1], [1, 2, 3]]


async def test_nobody_waits_longer_than_until_enough_have_come() -> None:
    slow = Slow()
    batcher = await lingering(slow, enough=2)

    first = asyncio.ensure_future(batcher.add(1))
    await asyncio.sleep(0.01)
    assert slow.batches == []
    async with asyncio.timeout(PATIENCE_S):
        assert [await batcher.add(2), await first] == [20, 10]

    assert slow.batches == [[1, 2]]


async def test_enough_items_wait_for_nobody() -> None:
    slow = Slow()
    batcher = await lingering(slow, enough=2)

    assert await answers(await added(batcher, 1, 2)) == [10, 20]

    assert slow.batches == [[1, 2]]


async def test_who_stayed_alone_the_last_time_does_not_wait() -> None:
    """One service's worker in a process of its own has nobody to wait for."""
    slow = Slow()
    slow.let_through()
    batcher: Batcher[int, int] = Batcher(slow.flush, batch_max=10, linger_s=600.0, enough=3)

    for alone in range(3):
        assert await answers(await added(batcher, alone)) == [10 * alone]
    in_company = await answers(await added(batcher, 3, 4))
    waiting = await added(batcher, 5, 6)
    await asyncio.sleep(0.01)
    assert slow.batches == [[0], [1], [2], [3, 4]]

    assert in_company + await answers(waiting + await added(batcher, 7)) == [30, 40, 50, 60, 70]
    assert slow.batches[4:] == [[5, 6, 7]]


async def test_what_came_while_the_first_was_flushed_was_company() -> None:
    slow = Slow()
    batcher: Batcher[int, int] = Batcher(slow.flush, batch_max=10, linger_s=600.0, enough=3)
    first = await added(batcher, 1)
    await slow.began()
    second = await added(batcher, 2)
    slow.let_through()
    await answers(first + second)

    waiting = await added(batcher, 3)
    await asyncio.sleep(0.01)
    assert slow.batches == [[1], [2]]

    assert await answers(waiting + await added(batcher, 4, 5)) == [30, 40, 50]
    assert slow.batches == [[1], [2], [3, 4, 5]]


async def test_what_comes_during_a_flush_goes_down_together_in_order_up_to_the_bound() -> None:
    slow = Slow()
    batcher = Batcher(slow.flush, batch_max=4)
    first = await added(batcher, 0)
    await slow.began()
    rest = await added(batcher, *range(1, 11))

    slow.let_through()
    await answers(first + rest)

    assert slow.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]


async def test_an_answer_that_is_an_error_reaches_its_own_caller_only() -> None:
    async def flush(items: Sequence[int]) -> Sequence[int | Exception]:
        return [LookupError(item) if item == 2 else item for item in items]

    batcher: Batcher[int, int] = Batcher(flush, batch_max=10)

    one, two, three = await answers(await added(batcher, 1, 2, 3))

    assert (one, three) == (1, 3)
    assert isinstance(two, LookupError)


async def test_a_flush_that_breaks_fails_its_own_batch_and_the_next_goes_on() -> None:
    async def flush(items: Sequence[int]) -> Sequence[int | Exception]:
        if 1 in items:
            raise ConnectionError
        return list(items)

    batcher: Batcher[int, int] = Batcher(flush, batch_max=2)

    found = await answers(await added(batcher, 0, 1, 2, 3))

    assert [isinstance(answer, ConnectionError) for answer in found] == [True, True, False, False]
    async with asyncio.timeout(PATIENCE_S):
        assert await batcher.add(5) == 5


async def test_a_caller_that_gives_up_neither_stops_the_flush_nor_its_neighbours() -> None:
    slow = Slow()
    batcher = Batcher(slow.flush, batch_max=10)
    first = await added(batcher, 0)
    await slow.began()
    gone, stays = await added(batcher, 1, 2)
    first[0].cancel()
    gone.cancel()

    slow.let_through()

    assert await answers([stays]) == [20]
    assert slow.finished == [[0], [1, 2]]


async def test_one_more_than_may_wait_is_overload_and_room_comes_back() -> None:
    slow = Slow()
    batcher = Batcher(slow.flush, batch_max=10, waiting_max=3)
    flying = await added(batcher, 0)
    await slow.began()
    waiting = await added(batcher, 1, 2, 3)

    with pytest.raises(Overloaded):
        await batcher.add(4)

    slow.let_through()
    assert await answers(flying + waiting) == [0, 10, 20, 30]
    async with asyncio.timeout(PATIENCE_S):
        assert await batcher.add(4) == 40


async def test_who_waits_too_long_is_told_whether_the_item_may_still_go_down() -> None:
    slow = Slow()
    batcher = Batcher(slow.flush, batch_max=10)
    flying = asyncio.create_task(batcher.add(0, within_s=0.2))
    await slow.began()
    waiting = asyncio.create_task(batcher.add(1, within_s=0.1))
    patient = (await added(batcher, 2))[0]

    in_doubt, withdrawn = await answers([flying, waiting])
    slow.let_through()

    assert isinstance(in_doubt, TimeoutError)
    assert isinstance(withdrawn, Overloaded)
    assert await answers([patient]) == [20]
    assert slow.finished == [[0], [2]]


async def test_when_all_that_waited_is_withdrawn_nothing_is_flushed() -> None:
    slow = Slow()
    batcher = Batcher(slow.flush, batch_max=10)
    flying = await added(batcher, 0)
    await slow.began()

    with pytest.raises(Overloaded):
        await batcher.add(1, within_s=0.05)
    slow.let_through()
    await answers(flying)
    async with asyncio.timeout(PATIENCE_S):
        await batcher.drain()

    assert slow.finished == [[0]]


async def test_draining_waits_until_everything_went_down() -> None:
    slow = Slow()
    batcher = Batcher(slow.flush, batch_max=2)
    tasks = await added(batcher, *range(5))
    draining = asyncio.create_task(batcher.drain())
    await slow.began()
    assert not draining.done()

    slow.let_through()
    async with asyncio.timeout(PATIENCE_S):
        await draining

    assert slow.finished == [[0, 1], [2, 3], [4]]
    assert all(isinstance(answer, int) for answer in await answers(tasks))


async def test_draining_an_idle_batcher_returns_at_once() -> None:
    async with asyncio.timeout(PATIENCE_S):
        await Batcher(Slow().flush, batch_max=2).drain()


@pytest.mark.parametrize(
    ("items", "groups"),
    [([], []), ([4, 6], [[4, 6]]), ([4, 6, 1], [[4, 6], [1]]), ([11, 1], [[11], [1]]), ([1, 11, 10], [[1], [11], [10]])],
    ids=["nothing", "just full", "one too many", "one too large", "too large between others"],
)
def test_groups_keep_the_order_and_the_bound(items: list[int], groups: list[list[int]]) -> None:
    assert list(groups_within(items, lambda size: size, 10)) == groups
