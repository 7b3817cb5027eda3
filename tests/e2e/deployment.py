"""A deployment of our own: servers that may be broken, and parts as processes of their own, on fixed ports."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from psycopg.conninfo import make_conninfo
from redis.asyncio import Redis

from app.heartbeat import heartbeats
from app.migrate import APP_ROLE, migrate
from tests.e2e.compose_harness import free_port
from tests.e2e.journey import Client, client_of
from tests.e2e.processes import POLL_S, START_S, LookupProcess
from tests.servers.breakable import Breakable, BreakablePostgres, BreakableRabbitMQ, BreakableValkey

HTTP = ("write", "read")
WORKING = {"running", "waiting"}
IN_TWO: Mapping[str, Sequence[str]] = {
    "write": ["write"],
    "read": ["read"],
    "rest": ["relay", "saga", "projector", "worker"],
}
"""Few processes, where what is tested is a server."""
EACH_ALONE: Mapping[str, Sequence[str]] = {
    "write": ["write"],
    "read": ["read"],
    "relay": ["relay"],
    "saga": ["saga"],
    "projector": ["projector"],
    "worker": ["worker"],
}


@dataclass
class Deployment:
    """`processes` names the processes and the parts that each runs. `rabbitmq` is None where Redis is the transport."""

    folder: Path
    env: Mapping[str, str]
    processes: Mapping[str, Sequence[str]]
    with_rabbitmq: bool
    parts: dict[str, LookupProcess] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.postgres = BreakablePostgres(self.folder)
        self.valkey = BreakableValkey(self.folder)
        self.rabbitmq = BreakableRabbitMQ(self.folder / "rabbitmq") if self.with_rabbitmq else None
        self._ports = {name: free_port() for name in HTTP}
        self.write_url, self.read_url = (f"http://127.0.0.1:{self._ports[name]}" for name in HTTP)

    @property
    def servers(self) -> list[Breakable]:
        servers: list[Breakable] = [self.postgres, self.valkey]
        return servers if self.rabbitmq is None else [*servers, self.rabbitmq]

    @property
    def database_url(self) -> str:
        """As the owner."""
        return self.postgres.url

    async def start(self, *names: str) -> None:
        """The servers, the tables, and the processes (all, unless some are named)."""
        for server in self.servers:
            server.launch()
        await asyncio.gather(*(server.ready() for server in self.servers))
        migrate(self.database_url, uuid4(), {})
        for name in names or self.processes:
            self.launch(name)
        await self.listening()

    async def listening(self) -> None:
        """Until the HTTP parts that were launched listen."""
        await asyncio.gather(*(self.parts[name].listens() for name in HTTP if name in self.parts))

    def launch(self, name: str, twin: str = "") -> LookupProcess:
        """Starts a process, or the successor of one that ended. `twin` makes it another one beside the first."""
        words = [*self.processes[name]]
        if name in HTTP:
            words += ["--port", str(self._ports[name])]
        part = LookupProcess(*words, folder=self.folder, env=self.environment(name + twin), name=name + twin)
        part.launch()
        self.parts[name + twin] = part
        return part

    async def works(self, name: str) -> None:
        """Until every part of a process says that it runs, or waits for its turn to lead."""
        pid = self.parts[name].pid
        async with asyncio.timeout(START_S), Redis.from_url(self.valkey.url) as redis:
            while True:
                beats = [beat for beat in await heartbeats(redis) if beat.pid == pid]
                if beats and all(beat.state in WORKING for beat in beats):
                    return
                assert not self.parts[name].has_ended, f"{name} ended.\n{self.parts[name].err}"
                await asyncio.sleep(POLL_S)

    async def stop(self) -> None:
        for server in self.servers:
            server.thaw()
        try:
            await asyncio.gather(*(part.stop() for part in self.parts.values()))
        finally:
            for server in reversed(self.servers):
                server.stop()

    def environment(self, name: str) -> dict[str, str]:
        """What a process of this deployment is told; `name` is how it shows in PostgreSQL."""
        broker = {} if self.rabbitmq is None else {"LOOKUP_BROKER_URL": self.rabbitmq.url}
        return {
            "LOOKUP_DATABASE_URL": make_conninfo(self.database_url, user=APP_ROLE),
            "LOOKUP_REDIS_URL": self.valkey.url,
            "PGAPPNAME": name,
            **broker,
            **self.env,
        }


@asynccontextmanager
async def deployed(
    folder: Path, env: Mapping[str, str], processes: Mapping[str, Sequence[str]], *, with_rabbitmq: bool
) -> AsyncIterator[tuple[Deployment, Client]]:
    """A running deployment and a client of it; stopped in any case."""
    deployment = Deployment(folder, env, processes, with_rabbitmq)
    try:
        await deployment.start()
        async with client_of(deployment.write_url, deployment.read_url) as client:
            yield deployment, client
    finally:
        await deployment.stop()


@asynccontextmanager
async def broken(server: Breakable, how: str) -> AsyncIterator[None]:
    """Within the block the server is `stopped` or `frozen`; after it, it serves again."""
    if how == "frozen":
        server.freeze()
    else:
        server.stop()
    try:
        yield
    finally:
        if how == "frozen":
            server.thaw()
        else:
            server.launch()
            await server.ready()
