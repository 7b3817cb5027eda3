"""The views that are shown against a clean rebuild of the log in an empty Redis: every key, byte for byte, expiry included.

It reads Redis by itself, key by key, and shares nothing with `projections/comparison.py`.
"""

from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import Redis

from app.settings import Settings
from events.postgres import PostgresHistory
from projections.generations import RedisGenerations
from projections.job_views import Terms
from projections.replay import Rebuild, leading
from projections.table import PROJECTIONS
from projections.views import Keys
from results.postgres import PostgresDocuments

KEYS = Keys()
PAGE = 500
OF_THE_CLOCK = {b"caught_up_ms", b"checked_ms"}
"""What a generation's own note has that tells when somebody looked, not what the log says."""
READ = {
    b"string": lambda pipe, key: pipe.get(key),
    b"hash": lambda pipe, key: pipe.hgetall(key),
    b"zset": lambda pipe, key: pipe.zrange(key, 0, -1, withscores=True),
}

Contents = dict[str, tuple[Any, int]]
"""What a key holds and the Unix second at which it goes (-1: never), by the view and the sub-key."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """`keys` counts the keys of each view that were held against each other; `wrong` names some that differ."""

    position: int
    keys: Mapping[str, int]
    wrong: Sequence[str]

    def __str__(self) -> str:
        views = ", ".join(f"{view} {count}" for view, count in sorted(self.keys.items()))
        return f"{sum(self.keys.values())} keys at position {self.position} ({views}): {len(self.wrong)} differ"


async def judge(database_url: str, redis_url: str, settings: Settings) -> Judgement:
    """Of a site at rest, whose views stand at the end of the log."""
    async with Redis.from_url(redis_url) as shown, _second_database(redis_url) as clean:
        pointers: Any = await shown.hgetall(KEYS.live)
        live = {view.decode(): name.decode() for view, name in pointers.items()}
        assert live.keys() == {view.name for view in PROJECTIONS}, live
        position, rebuilt = await _rebuild(database_url, clean, settings)
        expected = await _contents(clean, dict.fromkeys(live, rebuilt))
        found = await _contents(shown, live)
        await clean.flushdb()
    names = [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
    wrong = [f"{name}: {found.get(name)!r:.200} instead of {expected.get(name)!r:.200}" for name in names]
    return Judgement(position, Counter(name.partition(":")[0] for name in expected), wrong)


async def _rebuild(database_url: str, redis: Redis, settings: Settings) -> tuple[int, str]:
    """The end of the log, and the generation that was made of it."""
    log, documents = PostgresHistory(database_url), PostgresDocuments(database_url)
    await documents.open()
    generations = RedisGenerations(redis)
    terms = Terms(settings.rules, settings.retention)
    try:
        async with leading(generations) as fence:
            rebuild = Rebuild(fence, generations, log, documents.get, PROJECTIONS, terms, lambda: datetime.now(UTC))
            await rebuild.open()
            await rebuild.build_up_to(await log.head())
            assert not rebuild.resumed
            return rebuild.position, rebuild.name
    finally:
        await documents.close()
        await log.close()


async def _contents(redis: Redis, shown: Mapping[str, str]) -> Contents:
    """Of each view in the generation that is shown of it; and of those generations how far they are."""
    contents: Contents = {}
    for generation in set(shown.values()):
        views = {view for view, name in shown.items() if name == generation}
        base = f"{KEYS.prefix}{generation}:"
        keys = [key async for key in redis.scan_iter(match=f"{base}*", count=PAGE)]
        for first in range(0, len(keys), PAGE):
            page = keys[first : first + PAGE]
            for key, (value, expires_at_s) in zip(page, await _read(redis, page), strict=True):
                view, _, sub_key = key.decode().removeprefix(base).partition(":")
                if view in views:
                    contents[f"{view}:{sub_key}"] = value, expires_at_s
                elif view == "meta":
                    _tell_meta(contents, value, views)
                elif view == "expiry":
                    _tell_expiry(contents, value, views)
    return contents


def _tell_meta(contents: Contents, meta: Mapping[bytes, bytes], views: set[str]) -> None:
    for view in views:
        of_view = {name: text for name, text in meta.items() if name not in OF_THE_CLOCK and not name.startswith(b"view:")}
        contents[f"{view}:(meta)"] = of_view | {b"version": meta[f"view:{view}".encode()]}, -1


def _tell_expiry(contents: Contents, expiry: Sequence[tuple[bytes, float]], views: set[str]) -> None:
    """Keys that go by the log's time: a list of all views of a generation."""
    for name, at_s in expiry:
        if (view := name.decode().split(":")[1]) in views:
            contents[f"{view}:(expiry of {name.decode()})"] = at_s, -1


async def _read(redis: Redis, keys: Sequence[bytes]) -> list[tuple[Any, int]]:
    about: Any = redis.pipeline(transaction=False)
    for key in keys:
        about.type(key).expiretime(key)
    told: list[Any] = await about.execute()
    values: Any = redis.pipeline(transaction=False)
    for key, kind in zip(keys, told[::2], strict=True):
        READ[kind](values, key)
    return list(zip(await values.execute(), told[1::2], strict=True))


@asynccontextmanager
async def _second_database(redis_url: str) -> AsyncIterator[Redis]:
    """An empty logical database of the same server."""
    parts = urlsplit(redis_url)
    other = f"unix://{parts.path}?db=1" if parts.scheme == "unix" else parts._replace(path="/1").geturl()
    async with Redis.from_url(other) as redis:
        await redis.flushdb()
        yield redis
