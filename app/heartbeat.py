"""Each part tells Redis that it lives and how it fares; `lookup status`, `lookup health` and readiness read it."""

import asyncio
import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime

from redis.asyncio import Redis
from redis.exceptions import RedisError

PREFIX = "parts:"
INTERVAL_S = 3.0
TTL_S = 12
HEALTHY = {"running", "waiting"}


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """One part of one process. `state`: starting, running, waiting (another one leads), retrying. `detail` is for people."""

    part: str
    state: str
    detail: str
    host: str
    pid: int
    at: str


async def beat(redis: Redis, part: str, state_of: Callable[[], tuple[str, str]], now: Callable[[], datetime]) -> None:
    """Tell Redis how the part fares, until cancelled; then take the note away."""
    key = f"{PREFIX}{part}:{socket.gethostname()}:{os.getpid()}"
    try:
        while True:
            state, detail = state_of()
            note = Heartbeat(part, state, detail, socket.gethostname(), os.getpid(), now().isoformat())
            with suppress(RedisError, OSError):
                await redis.set(key, json.dumps(asdict(note)), ex=TTL_S)
            await asyncio.sleep(INTERVAL_S)
    finally:
        with suppress(RedisError, OSError):
            await redis.delete(key)


async def heartbeats(redis: Redis) -> list[Heartbeat]:
    """Of all parts that live. Raises `RedisError`."""
    keys = [key async for key in redis.scan_iter(f"{PREFIX}*", count=1_000)]
    notes = await redis.mget(keys) if keys else []
    found = [beat for note in notes if note is not None and (beat := _read(note)) is not None]
    return sorted(found, key=lambda beat: (beat.part, beat.host, beat.pid))


def _read(note: bytes | str) -> Heartbeat | None:
    """None for what no part of this version wrote."""
    try:
        return Heartbeat(**json.loads(note))
    except (ValueError, TypeError):
        return None
