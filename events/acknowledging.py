"""Acknowledgements on their way to a broker: collected for a moment, and told together.

Nobody waits until the broker knows: what it does not hear of is delivered again, which is promised. So it can as well hear of
it a little later, of more at once, and when whoever waits for an answer has it. A broker writes each acknowledgement down, and
at once they would come between a job's messages.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Generic, TypeVar

PAUSE_S = 0.02

Token = TypeVar("Token")


class Acknowledgements(Generic[Token]):
    """Hands to `tell`, which raises nothing, what was added in the last `PAUSE_S`."""

    def __init__(self, tell: Callable[[Sequence[Token]], Awaitable[None]]) -> None:
        self._tell = tell
        self._waiting: list[Token] = []
        self._telling: asyncio.Task[None] | None = None

    def add(self, tokens: Iterable[Token]) -> None:
        self._waiting += tokens
        if self._telling is None and self._waiting:
            self._telling = asyncio.create_task(self._tell_all())

    async def drain(self) -> None:
        """Wait until the broker has been told of everything, or could not be."""
        while self._telling is not None:
            await asyncio.wait({self._telling})

    async def _tell_all(self) -> None:
        try:
            while self._waiting:
                await asyncio.sleep(PAUSE_S)
                tokens, self._waiting = self._waiting, []
                await self._tell(tokens)
        finally:
            self._telling = None
