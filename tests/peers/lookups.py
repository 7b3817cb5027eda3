"""The demo's peers and a network that asks them, for the tests of the lookups."""

import socket
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from app.demo.peers import DemoPeers, start_demo_peers
from events.facts import Target, TargetType
from workers.lookup import Answer, LookupDeferred, LookupFailed, Result
from workers.network import Network, NetworkSettings, open_network

NOW = datetime(2025, 11, 24, 12, 0, tzinfo=UTC)


@asynccontextmanager
async def running_peers(data_dir: Path) -> AsyncIterator[DemoPeers]:
    peers = await start_demo_peers(data_dir)
    try:
        yield peers
    finally:
        await peers.stop()


@asynccontextmanager
async def network(settings: NetworkSettings, **changes: Any) -> AsyncIterator[Network]:
    net = await open_network(replace(settings, **changes), lambda: NOW)
    try:
        yield net
    finally:
        await net.aclose()


def address(text: str) -> Target:
    return Target(raw=text, canonical=text, type=TargetType.IP_ADDRESS)


def domain(text: str) -> Target:
    return Target(raw=text, canonical=text, type=TargetType.DOMAIN)


async def failure_of(lookup: Awaitable[Answer[Result]]) -> LookupFailed:
    with pytest.raises(LookupFailed) as caught:
        await lookup
    return caught.value


async def deferral_of(lookup: Awaitable[Answer[Result]]) -> LookupDeferred:
    with pytest.raises(LookupDeferred) as caught:
        await lookup
    return caught.value


@contextmanager
def closed_port() -> Iterator[int]:
    """A port of 127.0.0.1 that refuses connections: bound, so that nobody else opens it, and not listening."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@contextmanager
def deaf_port() -> Iterator[int]:
    """A port of 127.0.0.1 that does not answer at all: Linux drops a SYN while the queue of a listener is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        with socket.create_connection(listener.getsockname()):
            yield listener.getsockname()[1]


@contextmanager
def open_port() -> Iterator[int]:
    """A port of 127.0.0.1 that accepts connections."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield listener.getsockname()[1]
