"""A site of real servers and processes with the projector as one of its own, and jobs coming in."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import psycopg
from redis.asyncio import Redis

from app.settings import Settings
from projections.table import PROJECTIONS
from projections.views import Keys
from tests.e2e.deployment import Deployment
from tests.e2e.journey import Client, client_of
from tests.e2e.served import NEIGHBOURS, serving_peers
from tests.e2e.traffic import all_closed
from tests.replay_proofs.judging import Judgement, judge
from tests.replay_proofs.watching import Clients

PROCESSES: Mapping[str, Sequence[str]] = {
    "write": ["write"],
    "read": ["read"],
    "rest": ["relay", "saga", "worker"],
    "projector": ["projector"],
}
VIEW_RETENTION_H = 24.0 * 3_650
"""Old facts are replayed as well, and their documents are to be compared."""
LOOK_AGAIN_S = 0.02
QUIET_S = 120.0
KEYS = Keys()

Say = Callable[[str], None]


@dataclass
class Site:
    """`jobs` are the accepted ones, in order."""

    deployment: Deployment
    client: Client
    redis: Redis
    jobs: list[str] = field(default_factory=list)

    async def submit_while(self, goes_on: Callable[[], bool], pace_s: float) -> None:
        while goes_on():
            await self.submit()
            await asyncio.sleep(pace_s)

    async def submit(self) -> None:
        """One that was not accepted for certain (503: the machine is busy) is no job of ours."""
        answer = await self.client.post({"target": f"127.0.{NEIGHBOURS[len(self.jobs) % len(NEIGHBOURS)]}.1"})
        assert answer.status in {202, 503}, answer
        if answer.status == 202:
            self.jobs.append(str(answer.document["jobId"]))

    async def head(self) -> int:
        """How many facts the log has."""
        return await asyncio.to_thread(_head, self.deployment.database_url)

    async def checkpoint(self) -> int:
        """How far the views that are shown have come: the one that is furthest behind."""
        live: dict[bytes, bytes] = await cast("Any", self.redis.hgetall(KEYS.live))
        if len(live) < len(PROJECTIONS):
            return -1
        found: list[Any] = [await self.redis.hget(KEYS.meta(name.decode()), "checkpoint") for name in set(live.values())]
        return min(int(checkpoint or 0) for checkpoint in found)

    async def fence(self) -> bytes | None:
        """Whose lead it is, if anybody's."""
        fence: Any = await self.redis.get(KEYS.lease)
        return cast("bytes | None", fence)

    async def is_quiet(self) -> None:
        """Until every job has ended and the views have all of it."""
        async with asyncio.timeout(QUIET_S):
            while not await self._all_closed():  # noqa: ASYNC110 - PostgreSQL sets no event
                await asyncio.sleep(0.5)
            await self.is_caught_up()

    async def _all_closed(self) -> bool:
        return await asyncio.to_thread(all_closed, self.deployment.database_url)

    async def is_caught_up(self) -> None:
        async with asyncio.timeout(QUIET_S):
            while await self.checkpoint() < await self.head():  # noqa: ASYNC110 - Redis sets no event
                await asyncio.sleep(LOOK_AGAIN_S)

    async def judged(self, clients: Clients, count: int, trouble: Callable[["Site"], Awaitable[None]]) -> Judgement:
        """What the views come to, when so many clients have polled during the trouble and, after it, once more each job."""
        clients.start(count)
        try:
            await trouble(self)
            await self.is_quiet()
            for job_id in self.jobs:
                await clients.poll(job_id, None, {})
        finally:
            await clients.stop()
        return await self.judgement()

    async def judgement(self) -> Judgement:
        settings = Settings(_env_file=None, view_retention_h=VIEW_RETENTION_H)
        return await judge(self.deployment.database_url, self.deployment.valkey.url, settings)


@asynccontextmanager
async def standing_site(folder: Path, history: Callable[[str], None] = lambda _: None) -> AsyncIterator[Site]:
    """`history` may fill the log (given the owner's database URL) before the parts start."""
    async with serving_peers(folder / "peers") as peers:
        env = {**peers.environment(), "LOOKUP_VIEW_RETENTION_H": str(VIEW_RETENTION_H)}
        deployment = Deployment(folder / "d", env, PROCESSES, with_rabbitmq=False)
        try:
            await deployment.start("write")
            await asyncio.to_thread(history, deployment.database_url)
            for name in ("read", "rest", "projector"):
                deployment.launch(name)
            await deployment.listening()
            async with (
                client_of(deployment.write_url, deployment.read_url) as client,
                Redis.from_url(deployment.valkey.url) as redis,
            ):
                yield Site(deployment, client, redis)
        finally:
            with suppress(ProcessLookupError):
                await deployment.stop()


def _head(database_url: str) -> int:
    with psycopg.connect(database_url) as conn:
        row = conn.execute("SELECT coalesce(max(notification_id), 0) FROM stored_events").fetchone()
    assert row is not None
    return int(row[0])
