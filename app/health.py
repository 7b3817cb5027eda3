"""Is what a process depends on there? One check a dependency, each bounded, none of them cached longer than a moment."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import orjson
from aio_pika.exceptions import AMQPError
from aiohttp import web
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.lag import Note, last_note, ms
from app.rabbitmq import connected
from events.store import EventStore, StoreUnavailable
from projections.views import JOB_STATUS, Keys

CHECK_S = 3.0

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
            async with connected(broker_url, CHECK_S):
                return None
        except (AMQPError, OSError, TimeoutError):
            return "RabbitMQ cannot be reached"

    return check


def projection_check(redis: Redis, now: Callable[[], datetime], keys: Keys, stalled_after: timedelta) -> Check:
    """Needs no projector to be alive."""

    async def check() -> str | None:
        try:
            return (await look_at_views(redis, now(), keys)).alarm(stalled_after)
        except (RedisError, OSError):
            return "Redis cannot be reached"

    return check


@dataclass(frozen=True, slots=True)
class ViewsSeen:
    """The live views as Redis has them, and what the watch left there, both of which need nobody to be alive.

    `lag_ms` is how long ago the views were last known to be current, None without complete views; `note` None without a watch
    that lives.
    """

    generation: str | None
    position: int
    lag_ms: int | None
    note: Note | None
    moved_ms_ago: int | None

    def alarm(self, stalled_after: timedelta) -> str | None:
        """What is wrong with the views, in one sentence. Where no watch is alive, their own age tells; though not all."""
        if self.note is not None and self.note.alarm:
            return f"stalled: {self.note.alarm}"
        if self.lag_ms is None:
            return "the views have not been built yet"
        if self.lag_ms > stalled_after / timedelta(milliseconds=1):
            return f"the views are {self.lag_ms // 1000} s behind, or no projector runs"
        return None


NOTHING_SEEN = ViewsSeen(None, 0, None, None, None)


async def look_at_views(redis: Redis, now: datetime, keys: Keys) -> ViewsSeen:
    """Raises `RedisError` or `OSError`."""
    meta = await view_meta(redis, keys)
    note = await last_note(redis)
    position = int(meta.get("checkpoint", 0))
    lag_ms = max(0, ms(now) - int(meta["caught_up_ms"])) if meta.get("complete") == "1" else None
    is_fresh = note is not None and note.is_fresh(now)
    knows_of_move = note is not None and note.moved_ms is not None and (is_fresh or note.position == position)
    moved_ms_ago = max(0, ms(now) - note.moved_ms) if note is not None and knows_of_move and note.moved_ms else None
    return ViewsSeen(meta.get("generation"), position, lag_ms, note if is_fresh else None, moved_ms_ago)


async def view_meta(redis: Redis, keys: Keys, view: str = JOB_STATUS) -> dict[str, str]:
    """What is known of the generation that a view is shown of (`Keys.meta`), and its name as `generation`; empty without."""
    answer: Any = await redis.hget(keys.live, view)
    if answer is None:
        return {}
    generation = answer.decode()
    fields: Any = await redis.hgetall(keys.meta(generation))
    return {name.decode(): value.decode() for name, value in fields.items()} | {"generation": generation}
