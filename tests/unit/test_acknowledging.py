"""Acknowledgements are collected for a moment; none is told twice, none is forgotten."""

import asyncio
from collections.abc import Sequence

from events.acknowledging import Acknowledgements

PATIENCE_S = 5.0


class Broker:
    def __init__(self) -> None:
        self.told: list[list[int]] = []
        self.reached = asyncio.Event()
        self.answers = asyncio.Event()
        self.answers.set()

    async def tell(self, tokens: Sequence[int]) -> None:
        self.told.append(list(tokens))
        self.reached.set()
        await self.answers.wait()


async def test_what_is_acknowledged_in_a_moment_is_told_together() -> None:
    broker = Broker()
    acknowledgements = Acknowledgements(broker.tell)

    acknowledgements.add([1, 2])
    acknowledgements.add([])
    await asyncio.sleep(0)
    acknowledgements.add([3])
    await acknowledgements.drain()

    assert broker.told == [[1, 2, 3]]


async def test_draining_waits_for_what_came_while_the_broker_was_being_told() -> None:
    broker = Broker()
    broker.answers.clear()
    acknowledgements = Acknowledgements(broker.tell)
    acknowledgements.add([1])
    async with asyncio.timeout(PATIENCE_S):
        await broker.reached.wait()
    acknowledgements.add([2])
    draining = asyncio.ensure_future(acknowledgements.drain())
    await asyncio.sleep(0)
    assert not draining.done()

    broker.answers.set()
    async with asyncio.timeout(PATIENCE_S):
        await draining

    assert broker.told == [[1], [2]]


async def test_what_was_told_is_done_with_and_more_can_come() -> None:
    broker = Broker()
    acknowledgements = Acknowledgements(broker.tell)
    for token in (1, 2):
        acknowledgements.add([token])
        async with asyncio.timeout(PATIENCE_S):
            await acknowledgements.drain()

    async with asyncio.timeout(PATIENCE_S):
        await acknowledgements.drain()

    assert broker.told == [[1], [2]]
