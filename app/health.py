"""Is what a process depends on there? One check a dependency, each bounded, none of them cached longer than a moment."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any

import aio_pika
import orjson
from aio_pika.exceptions import AMQPError
from aiohttp import web
from redis.asyncio import Redis
from redis.exceptions import RedisError

from events.store import EventStore, StoreUnavailable
from projections.views import Keys

CHECK_S = 3.0
LAG_MAX_MS = 10_000

Check = Callable[[], Awaitable[str | None]]
"""None when all is well, else one sentence about what is not."""


def health_routes(checks: Mapping[str, Check]) -> list[web.RouteDef]:
    """`/health/live` says that the process runs; `/health/ready` names each dependency and what is wrong with it."""

    async def live(_: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def ready(_: web.Request) -> web.Response:
        findings = await run_checks(checks)
        is_ready = all(finding is None for finding in findings.values())
        body = {
            "status": "ready" if is_ready else "not ready",
            "checks": {name: finding or "ok" for name, finding in findings.items()},
        }
        headers = {} if is_ready else {"Retry-After": "5"}
        return web.Response(
            status=200 if is_ready else 503, body=orjson.dumps(body), content_type="application/json", headers=headers
        )

    return [web.get("/health/live", live), web.get("/health/ready", ready)]


async def run_checks(checks: Mapping[str, Check]) -> dict[str, str | None]:
    """All checks side by side, none for longer than `CHECK_S`."""
    findings = await asyncio.gather(*(_bounded(check) for check in checks.values()))
    return dict(zip(checks, findings, strict=True))


async def _bounded(check: Check) -> str | None:
    try:
        async with asyncio.timeout(CHECK_S):
            return await check()
    except TimeoutError:
        return "does not answer in time"


def store_check(store: EventStore) -> Check:
    async def check() -> str | None:
        try:
            await store.log_id()
            await store.head()
        except StoreUnavailable:
            return "the database cannot be reached, or `lookup migrate` has not been run"
        return None

    return check


def redis_check(redis: Redis) -> Check:
    async def check() -> str | None:
        try:
            await redis.ping()
        except (RedisError, OSError):
            return "Redis cannot be reached"
        return None

    return check


def rabbitmq_check(broker_url: str) -> Check:
    async def check() -> str | None:
        try:
            connection = await aio_pika.connect(broker_url, timeout=CHECK_S)
        except (AMQPError, OSError, TimeoutError):
            return "RabbitMQ cannot be reached"
        await connection.close()
        return None

    return check


def projection_check(redis: Redis, now: Callable[[], datetime], keys: Keys) -> Check:
    """Needs no projector to be alive: it reads when the views were last known to be current."""

    async def check() -> str | None:
        try:
            lag_ms = await projection_lag_ms(redis, now, keys)
        except (RedisError, OSError):
            return "Redis cannot be reached"
        if lag_ms is None:
            return "the views have not been built yet"
        if lag_ms > LAG_MAX_MS:
            return f"the views are {lag_ms // 1000} s behind, or no projector runs"
        return None

    return check


async def projection_lag_ms(redis: Redis, now: Callable[[], datetime], keys: Keys) -> int | None:
    """How long ago the views were last known to be current, in ms; None without complete views."""
    meta = await view_meta(redis, keys)
    if meta.get("complete") != "1":
        return None
    return max(0, int(now().timestamp() * 1000) - int(meta["caught_up_ms"]))


async def view_meta(redis: Redis, keys: Keys) -> dict[str, str]:
    """What is known of the live generation (`Keys.meta`), with its name as `generation`; empty without one."""
    answer: Any = await redis.get(keys.live)
    if answer is None:
        return {}
    generation = answer.decode()
    fields: Any = await redis.hgetall(keys.meta(generation))
    return {name.decode(): value.decode() for name, value in fields.items()} | {"generation": generation}
