"""Requests that are being answered, so that a server which stops can wait for them before it closes their connections.

aiohttp waits for its handlers too, but drops what still arrives of their requests: one whose body is under way would never end.
"""

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from events.batching import happens_within

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class InFlight:
    """A middleware that counts, and `drain`, which waits until there is nothing to count."""

    def __init__(self) -> None:
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()
        self._stopping = False

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._count += 1
        self._none.clear()
        try:
            response = await handler(request)
            if self._stopping:
                response.force_close()
            return response
        finally:
            self._count -= 1
            if self._count == 0:
                self._none.set()

    async def drain(self, within_s: float) -> None:
        """From now on an answer ends its connection. Returns when all have been given, or the time is over."""
        self._stopping = True
        await happens_within(self._none, within_s)
