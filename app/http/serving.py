"""The HTTP server of a process: one application made of route tables, behind connections that are bounded in every way."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from aiohttp import web

from app.http.connection import Connection
from app.http.in_flight import InFlight
from app.http.middlewares import BODY_BYTES_MAX, with_bounded_body, with_problems, with_request_id

FINISH_S = 5.0
"""How long requests under way may take to be finished when the server stops."""


class CannotListen(Exception):  # noqa: N818 - what is the case, in our words
    """Another program has the port, or the address is not ours; the message says which."""


@asynccontextmanager
async def serving(
    routes: Iterable[web.AbstractRouteDef], host: str, port: int, let_go: Callable[[], None] | None = None
) -> AsyncIterator[str]:
    """Serve these routes; gives the address, as in `http://127.0.0.1:8080` (port 0 = any free one). Raises `CannotListen`.

    `let_go` is called at the end, when nothing more is accepted and before answers under way are waited for.
    """
    in_flight = InFlight()
    middlewares = [in_flight.middleware, with_request_id, with_problems, with_bounded_body]
    app = web.Application(middlewares=middlewares, client_max_size=BODY_BYTES_MAX)
    app.add_routes(routes)
    runner = web.AppRunner(app, shutdown_timeout=FINISH_S)
    await runner.setup()
    server = runner.server
    assert server is not None
    try:
        listener = await _listen(server, host, port)
        try:
            yield _url(*listener.sockets[0].getsockname()[:2])
        finally:
            listener.close()
            if let_go is not None:
                let_go()
            await in_flight.drain(FINISH_S)
    finally:
        await runner.cleanup()


async def _listen(server: web.Server, host: str, port: int) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    try:
        return await loop.create_server(lambda: Connection(server, loop), host, port)
    except OSError as error:
        raise CannotListen(f"{host}:{port} cannot be listened on ({os.strerror(error.errno or 0)}).") from error


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
