"""A connection is bounded at every stage: arriving, leaving, and being idle; and its answers keep their order."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from app.http import connection
from app.http.serving import CannotListen, serving
from tests.builders import eventually

PATIENCE_S = 10.0
LARGE = b"x" * 50_000_000
"""More than the kernel's buffers take off our hands."""


class Handlers:
    """One that waits until it is let go, and one whose answer is large."""

    def __init__(self) -> None:
        self.asked = 0
        self.let_go = asyncio.Event()

    async def wait(self, _: web.Request) -> web.Response:
        self.asked += 1
        await self.let_go.wait()
        return web.Response(text="waited")

    async def give_much(self, _: web.Request) -> web.Response:
        self.asked += 1
        return web.Response(body=LARGE)


@asynccontextmanager
async def connected(handlers: Handlers) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    routes = [web.get("/wait", handlers.wait), web.get("/much", handlers.give_much)]
    async with asyncio.timeout(PATIENCE_S), serving(routes, "127.0.0.1", 0) as url:
        address = urlsplit(url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1_000)
        try:
            yield reader, writer
        finally:
            handlers.let_go.set()
            writer.close()


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


async def test_a_connection_on_which_nothing_is_asked_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "IDLE_MAX_S", 0.2)

    async with connected(Handlers()) as (reader, _):
        assert await reader.read() == b""


async def test_a_client_that_does_not_read_its_answer_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would hold the answer in our memory for as long as it likes."""
    monkeypatch.setattr(connection, "LEAVING_MAX_S", 0.3)
    handlers = Handlers()

    async with connected(handlers) as (reader, writer):
        writer.write(get("/much"))
        await eventually(lambda: handlers.asked == 1)
        await asyncio.sleep(1.0)
        received = 0
        with suppress(ConnectionError):
            while piece := await reader.read(1_000_000):
                received += len(piece)

    assert received < len(LARGE)


async def test_a_refusal_waits_for_the_answers_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that does not come to its end, sent behind a request that is still being answered."""
    monkeypatch.setattr(connection, "ARRIVAL_MAX_S", 0.2)
    handlers = Handlers()

    async with connected(handlers) as (reader, writer):
        writer.write(get("/wait"))
        await eventually(lambda: handlers.asked == 1)
        writer.write(b"GET /")
        await asyncio.sleep(0.4)
        handlers.let_go.set()
        received = await reader.read()
        while piece := await reader.read():
            received += piece

    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    assert received.count(b"HTTP/1.") == 2
    assert b'"code":"request_too_slow"' in received


async def test_a_taken_port_is_named() -> None:
    async with serving([], "127.0.0.1", 0) as url:
        port = urlsplit(url).port
        with pytest.raises(CannotListen, match=rf"^127\.0\.0\.1:{port} cannot be listened on \(Address already in use\)\.$"):
            async with serving([], "127.0.0.1", port or 0):
                pytest.fail("It listens.")
