"""A plain connection to RabbitMQ, for a question or two. The parts talk to it through the bus."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aio_pika
from aio_pika.abc import AbstractConnection


@asynccontextmanager
async def connected(broker_url: str, timeout_s: float) -> AsyncIterator[AbstractConnection]:
    """Raises `AMQPError`, `OSError` or `TimeoutError` when there is no connecting.

    One that did not come about is closed too: aio-pika would else do that when it is forgotten, in whatever thread that is.
    """
    connection = aio_pika.Connection(aio_pika.connection.make_url(broker_url))
    try:
        await connection.connect(timeout=timeout_s)
        yield connection
    finally:
        await connection.close()
