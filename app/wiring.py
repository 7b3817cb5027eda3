"""The composition root: which part gets which dependency. The only place that knows all packages.

A part is a coroutine that runs until cancelled. `app/parts.py` keeps it running; here is what it is made of.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from uuid import UUID

import orjson
from aiohttp import web
from redis.asyncio import Redis
from redis.exceptions import RedisError
from uuid_utils.compat import uuid7

from app import health
from app.http.middlewares import request_id_of
from app.http.problem import problem
from app.settings import Settings
from domain.address_policy import AddressPolicy
from domain.services import SERVICES
from events.bus import Bus
from events.facts import Service
from events.postgres import PostgresStore
from events.rabbit_bus import RabbitBus
from events.record import SALT_BYTES
from events.redis_bus import RedisBus
from events.store import Scribe
from projections.projector import Projector
from projections.views import DUE, Keys
from read_side.api import ReadApi
from read_side.page import page_routes
from read_side.queries import JobQueries
from results.postgres import PostgresDocuments
from workers import geoip, ping, rdap, reverse_dns
from workers.lookup import LookUp, Result
from workers.network import Network, NetworkSettings, PingSettings, open_network
from workers.runner import Outbox, Worker
from write_side import checkpoints
from write_side.api import WriteApi
from write_side.deadlines import Deadlines
from write_side.gather import Gatherer
from write_side.relay import Relay
from write_side.sagas import Sagas
from write_side.submit import Submitter

DUE_LIST_GOOD_FOR_MS = 10_000

WORKERS: dict[Service, Callable[..., Awaitable[Result]]] = {
    Service.GEOIP: geoip.look_up,
    Service.PING: ping.look_up,
    Service.RDAP: rdap.look_up,
    Service.REVERSE_DNS: reverse_dns.look_up,
}


def utc_now() -> datetime:
    return datetime.now(UTC)


def new_id() -> UUID:
    return uuid7()


@dataclass
class Wiring:
    """Makes the parts from the settings. `network_settings` overrides what the settings say (the demo's local peers).

    `lookups` replaces the real lookups: `bench/` measures the machinery with ones that do nothing.
    """

    settings: Settings
    network_settings: NetworkSettings | None = None
    lookups: dict[Service, LookUp] | None = None
    keys: Keys = field(default_factory=Keys)
    _network: Network | None = None
    _documents: PostgresDocuments | None = None
    _outbox: Outbox | None = None
    _outbox_bus: Bus | None = None
    _opening: asyncio.Lock = field(default_factory=asyncio.Lock)

    # --- connections --------------------------------------------------------------------------------------------------

    @cached_property
    def store(self) -> PostgresStore:
        """One for the whole process: what its parts append at the same time goes down in one transaction."""
        assert self.settings.database_url is not None
        return PostgresStore(self.settings.database_url, Scribe(utc_now, new_id, partial(os.urandom, SALT_BYTES)))

    @cached_property
    def sagas(self) -> Sagas:
        """One as well: a job that is taken on here need not be read again when its outcomes are gathered."""
        return Sagas(self.store)

    @cached_property
    def redis(self) -> Redis:
        assert self.settings.redis_url is not None
        return Redis.from_url(self.settings.redis_url, socket_connect_timeout=2.0, socket_timeout=5.0)

    async def aclose(self) -> None:
        """Close what the parts shared."""
        if self._network is not None:
            await self._network.aclose()
        if self._outbox_bus is not None:
            await self._outbox_bus.stop()
        if self._documents is not None:
            await self._documents.close()
        if "store" in self.__dict__:
            await self.store.close()
        if "redis" in self.__dict__:
            await self.redis.aclose()

    def bus(self) -> Bus:
        if self.settings.broker_url is not None:
            return RabbitBus(self.settings.broker_url)
        assert self.settings.redis_url is not None
        return RedisBus(self.settings.redis_url, claim_idle_s=2 * max(self.settings.rules.timeout_s.values()))

    async def documents(self) -> PostgresDocuments:
        """One for all workers: the results that they bring at the same time go down in one transaction."""
        assert self.settings.database_url is not None
        async with self._opening:
            if self._documents is None:
                self._documents = PostgresDocuments(self.settings.database_url)
                await self._documents.open()
        return self._documents

    async def outbox(self) -> Outbox:
        """One for all workers, on a bus of its own. Raises `BusUnavailable`."""
        async with self._opening:
            if self._outbox is None:
                bus = self.bus()
                await bus.start()
                self._outbox, self._outbox_bus = Outbox(bus), bus
        return self._outbox

    def policy(self) -> AddressPolicy:
        if self.network_settings is not None:
            return self.network_settings.policy
        return AddressPolicy(allowed_networks=self.settings.probe_allow, ask_about_special=self.settings.ask_about_special)

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    def write_routes(self) -> list[web.RouteDef]:
        submitter = Submitter(self.sagas, self.policy(), self.settings.rules, utc_now, new_id, self.settings.tenant)
        return WriteApi(submitter, problem, new_id, request_id_of).routes()

    def read_routes(self, queries: JobQueries) -> list[web.RouteDef]:
        return [*ReadApi(queries, problem, _services_body(), self.settings.data_as_string).routes(), *page_routes()]

    def write_checks(self) -> dict[str, health.Check]:
        broker_url = self.settings.broker_url
        broker = health.rabbitmq_check(broker_url) if broker_url else health.redis_check(self.redis)
        return {"store": health.store_check(self.store), "broker": broker}

    def read_checks(self) -> dict[str, health.Check]:
        return {
            "redis": health.redis_check(self.redis),
            "projection": health.projection_check(self.redis, utc_now, self.keys),
        }

    # --- parts --------------------------------------------------------------------------------------------------------

    async def relay(self) -> None:
        assert self.settings.database_url is not None
        async with _started(self.bus()) as bus:
            await Relay(self.settings.database_url, self.store, bus, utc_now).run()

    async def gather(self) -> None:
        bus = self.bus()
        gatherer = Gatherer(self.sagas, bus, self.settings.rules, utc_now, new_id)
        inbox = gatherer.subscribe()
        async with _started(bus):
            await gatherer.run(inbox)

    async def deadlines(self) -> None:
        await Deadlines(
            self.sagas,
            self.store,
            self._due_jobs,
            self._relayed_position,
            self.settings.rules,
            utc_now,
            new_id,
        ).run()

    async def projector(self) -> None:
        await Projector(
            self.redis,
            self.store,
            await self.documents(),
            self.bus(),
            self.settings.rules,
            self.settings.retention,
            utc_now,
            self.keys,
        ).run()

    async def worker(self, service: Service) -> None:
        bus = self.bus()
        worker = Worker(
            service=service,
            look_up=await self._look_up(service),
            bus=bus,
            outbox=await self.outbox(),
            documents=await self.documents(),
            name=f"{service}@{socket.gethostname()}:{os.getpid()}",
            now=utc_now,
            concurrency=self.settings.worker_concurrency,
        )
        inboxes = worker.subscribe()
        async with _started(bus):
            await worker.run(inboxes)

    async def _look_up(self, service: Service) -> LookUp:
        if self.lookups is not None:
            return self.lookups[service]
        async with self._opening:
            if self._network is None:
                self._network = await open_network(self.network_settings or self._network_settings(), utc_now)
        return partial(WORKERS[service], net=self._network)

    def _network_settings(self) -> NetworkSettings:
        settings = self.settings
        return NetworkSettings(
            policy=self.policy(),
            nameservers=tuple(_host_and_port(server) for server in settings.nameservers),
            ping=PingSettings(method=settings.ping_method),
            geoip_mmdb=settings.geoip_mmdb,
            ip_api_url=settings.ip_api_url,
            ip_api_per_minute=settings.ip_api_per_minute,
            rdap_bootstrap_dir=settings.rdap_bootstrap_dir,
            rdap_refresh=settings.rdap_refresh,
            rdap_allow_http=settings.rdap_allow_http,
        )

    async def _due_jobs(self, now: datetime, limit: int) -> Sequence[UUID] | None:
        now_ms = int(now.timestamp() * 1000)
        try:
            due = await self.redis.eval(DUE, 1, self.keys.live, self.keys.prefix, now_ms, DUE_LIST_GOOD_FOR_MS, limit)
        except (RedisError, OSError):
            return None
        return None if due is None else [UUID(job_id.decode()) for job_id in due]

    async def _relayed_position(self) -> int:
        assert self.settings.database_url is not None
        return (await checkpoints.relayed_positions(self.settings.database_url))[checkpoints.COMMANDS]


@asynccontextmanager
async def _started(bus: Bus) -> AsyncIterator[Bus]:
    try:
        await bus.start()
        yield bus
    finally:
        await bus.stop()


def _services_body() -> bytes:
    return orjson.dumps([{"name": rule.service, "value": rule.value, "description": rule.description} for rule in SERVICES])


def _host_and_port(server: str) -> tuple[str, int]:
    """`192.0.2.53`, `192.0.2.53:5353`, `2001:db8::53` or `[2001:db8::53]:5353`."""
    if server.startswith("["):
        host, _, port = server[1:].partition("]")
        return host, int(port.removeprefix(":") or 53)
    if server.count(":") == 1:
        host, _, port = server.partition(":")
        return host, int(port)
    return server, 53
