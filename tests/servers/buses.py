"""Any number of connections to one broker, of each transport in turn."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from events.bus import Bus
from events.memory import MemoryBus
from events.rabbit_bus import RabbitBus
from events.redis_bus import RedisBus

TRANSPORTS = ("memory", "redis", "rabbitmq")

OpenBus = Callable[[], Bus]


@asynccontextmanager
async def opening_buses(request: pytest.FixtureRequest, **of_redis: Any) -> AsyncIterator[OpenBus]:
    """Opens buses of the transport `request.param`; all are stopped at the end. `of_redis` are options of `RedisBus`."""
    opened: list[Bus] = []
    server = {"redis": "redis_url", "rabbitmq": "rabbitmq_vhost_url"}.get(request.param)
    url = request.getfixturevalue(server) if server else ""

    def make() -> Bus:
        if request.param == "memory":
            opened.append(opened[0] if opened else MemoryBus())
        elif request.param == "redis":
            opened.append(RedisBus(url, **of_redis))
        else:
            opened.append(RabbitBus(url))
        return opened[-1]

    yield make
    for bus in opened:
        with suppress(Exception):
            await bus.stop()
