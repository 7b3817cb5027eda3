"""The composition root: which part gets which dependency. The only place that knows all packages.

A part is a coroutine that runs until cancelled. `app/parts.py` keeps it running; here is what it is made of.
"""

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from uuid import UUID

import orjson
import psycopg
from aiohttp import web
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from uuid_utils.compat import uuid7

from app import health, readings
from app.audit.keys import have_key, load_public, load_signer, public_path, verifiers
from app.http.middlewares import request_id_of
from app.http.problem import problem
from app.metrics import Counters, Reading
from app.self_check import Nightly, SelfChecker, self_check_reading
from app.settings import Settings
from app.watch import Watch, Watched
from domain.address_policy import AddressPolicy
from domain.services import SERVICES
from domain.target import InvalidTarget, parse_target
from events.bus import Bus
from events.facts import Service
from events.postgres import PostgresHistory, PostgresStore
from events.rabbit_bus import RabbitBus
from events.record import SALT_BYTES
from events.redis_bus import RedisBus
from events.redis_packing import pack_in_c
from events.segments import ArchivedLog
from events.store import Scribe, StoreUnavailable
from projections import job_status
from projections.comparison import Comparer
from projections.generations import RedisGenerations
from projections.job_views import Terms
from projections.projector import Projector, ProjectorCounters
from projections.table import PROJECTIONS
from projections.view_store import RedisViews
from projections.views import Keys
from read_side.api import ReadApi
from read_side.history import JobHistory
from read_side.history_api import HistoryApi
from read_side.listing import Listing
from read_side.listing_api import ListingApi
from read_side.page import page_routes
from read_side.queries import JobQueries
from read_side.targets import TargetQueries
from read_side.targets_api import NoTarget, TargetApi
from results.archived import ArchivedDocuments
from results.postgres import PostgresDocuments
from workers import geoip, ping, rdap, reverse_dns
from workers.lookup import Answer, LookUp, Result
from workers.network import Network, NetworkSettings, PingSettings, open_network
from workers.runner import Outbox, Worker, WorkerCounters
from workers.standing import LogStanding
from workers.trials import RedisTrials
from write_side import checkpoints
from write_side.api import WriteApi
from write_side.checkpoints import open_ledger
from write_side.dead_letters import open_letters
from write_side.deadlines import DeadlineCounters, Deadlines
from write_side.drain import Drain, DrainCounters
from write_side.gather import GatherCounters, Gatherer
from write_side.head_keeper import HeadCounters, HeadKeeper
from write_side.heads import HeadFile, open_heads
from write_side.relay import Relay, RelayCounters
from write_side.retention import Retention, RetentionTable, SomebodyElseSeals, open_retention_table
from write_side.sagas import SagaCounters, Sagas
from write_side.submit import Submitter

STEPS_MAX = 20
"""Segments that are sealed in a row, before others that wait for the lock have their turn."""

log = logging.getLogger(__name__)

WORKERS: dict[Service, Callable[..., Awaitable[Answer[Result]]]] = {
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
    counters: Counters = field(default_factory=Counters)
    _network: Network | None = None
    _documents: PostgresDocuments | None = None
    _past_documents: PostgresDocuments | None = None
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
    def history(self) -> ArchivedLog:
        """The whole log, sealed jobs included, for who only looks at it: under a role that can only select, if one is given."""
        return ArchivedLog(self._open_log, self.settings.segments)

    @cached_property
    def whole_log(self) -> ArchivedLog:
        """The same over the connection of those who write: it has what this process appended before the database is asked."""
        return ArchivedLog(self.store, self.settings.segments)

    @cached_property
    def _open_log(self) -> PostgresHistory:
        assert self._read_url is not None
        return PostgresHistory(self._read_url)

    @property
    def _read_url(self) -> str | None:
        return self.settings.database_read_url or self.settings.database_url

    @cached_property
    def sagas(self) -> Sagas:
        """One as well: a job that is taken on here need not be read again when its outcomes are gathered."""
        return Sagas(self.store, counters=self.counters.of(SagaCounters))

    @cached_property
    def redis(self) -> Redis:
        assert self.settings.redis_url is not None
        # A second try mends a connection that broke long ago; the library's own ten, ever later, would keep everybody waiting.
        once_more = Retry(NoBackoff(), 1)
        url = self.settings.redis_url
        return pack_in_c(Redis.from_url(url, socket_connect_timeout=2.0, socket_timeout=5.0, retry=once_more))

    @cached_property
    def views(self) -> RedisViews:
        return RedisViews(self.redis, self.keys)

    async def aclose(self) -> None:
        """Close what the parts shared."""
        if self._network is not None:
            await self._network.aclose()
        if self._outbox_bus is not None:
            await self._outbox_bus.stop()
        for documents in filter(None, (self._documents, self._past_documents)):
            await documents.close()
        if "_open_log" in self.__dict__:
            await self._open_log.close()
        if "store" in self.__dict__:
            await self.store.close()
        if "redis" in self.__dict__:
            await self.redis.aclose()

    def bus(self) -> Bus:
        if self.settings.broker_url is not None:
            return RabbitBus(self.settings.broker_url)
        assert self.settings.redis_url is not None
        return RedisBus(self.settings.redis_url, claim_idle_s=self.settings.claim_idle_s)

    async def documents(self) -> PostgresDocuments:
        """One for all workers: the results that they bring at the same time go down in one transaction."""
        assert self.settings.database_url is not None
        async with self._opening:
            if self._documents is None:
                self._documents = PostgresDocuments(self.settings.database_url)
                await self._documents.open()
        return self._documents

    async def all_documents(self) -> ArchivedDocuments:
        """Those of sealed jobs included."""
        return ArchivedDocuments(await self.documents(), self.whole_log)

    async def past_documents(self) -> ArchivedDocuments:
        """The same for who only looks at them, as `history`. Nothing is asked of the database before the first document is."""
        assert self._read_url is not None
        async with self._opening:
            if self._past_documents is None:
                self._past_documents = PostgresDocuments(self._read_url)
                await self._past_documents.open()
        return ArchivedDocuments(self._past_documents, self.history)

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

    async def read_routes(self, queries: JobQueries) -> list[web.RouteDef]:
        past = await self.job_history()
        api = ReadApi(queries, problem, _services_body(), self.settings.data_as_string, HistoryApi(past, problem))
        targets = TargetApi(TargetQueries(self.redis, past, self.keys), _canonical_target, problem)
        listing = ListingApi(Listing(self.redis, self.keys), queries, problem, _canonical_target, utc_now)
        return [*api.routes(), *targets.routes(), *listing.routes(), *page_routes()]

    async def job_history(self) -> JobHistory | None:
        """What answers questions about the past; None where no database was given: polling needs none."""
        if self._read_url is None:
            return None
        documents, view = await self.past_documents(), job_status.VIEW
        return JobHistory(self.history, documents, job_status.fold, view.version, self._letters_about, utc_now)

    async def _letters_about(self, job_id: UUID) -> Sequence[UUID]:
        assert self._read_url is not None
        try:
            async with open_letters(self._read_url) as letters:
                return await letters.streams_about(job_id)
        except psycopg.Error as error:
            raise StoreUnavailable("The database cannot be reached.") from error

    def write_checks(self) -> dict[str, health.Check]:
        broker_url = self.settings.broker_url
        broker = health.rabbitmq_check(broker_url) if broker_url else health.redis_check(self.redis)
        return {"store": health.store_check(self.store), "broker": broker}

    def read_checks(self) -> dict[str, health.Check]:
        return {
            "redis": health.redis_check(self.redis),
            "projection": health.projection_check(self.redis, utc_now, self.keys, self.settings.patience.stalled_after),
        }

    def write_readings(self) -> dict[str, Reading]:
        assert self.settings.database_url is not None
        return {
            "log": readings.log_reading(self.store),
            "relay": readings.relay_reading(self.settings.database_url),
            "dead_letters": readings.dead_letters_reading(self.settings.database_url),
        }

    def projection_readings(self) -> dict[str, Reading]:
        store = self.store if self.settings.database_url is not None else None
        after = self.settings.patience.stalled_after
        return {
            "projection": readings.projection_reading(self.redis, utc_now, self.keys, after, store),
            "self_check": self_check_reading(self.redis, utc_now),
        }

    # --- parts --------------------------------------------------------------------------------------------------------

    async def relay(self) -> None:
        assert self.settings.database_url is not None
        async with _started(self.bus()) as bus:
            ledger = partial(open_ledger, self.settings.database_url)
            await Relay(ledger, self.store, bus, utc_now, counters=self.counters.of(RelayCounters), tail=self.store.tail).run()

    async def gather(self) -> None:
        bus = self.bus()
        counters = self.counters.of(GatherCounters)
        gatherer = Gatherer(self.sagas, bus, self.settings.rules, utc_now, new_id, counters)
        inbox = gatherer.subscribe()
        async with _started(bus):
            await gatherer.run(inbox)

    async def drain(self) -> None:
        assert self.settings.database_url is not None
        bus = self.bus()
        drain = Drain(self.settings.database_url, bus, utc_now, self.counters.of(DrainCounters))
        inbox = drain.subscribe()
        async with _started(bus):
            await drain.run(inbox)

    async def deadlines(self) -> None:
        await self.watch().run()

    def watch(self) -> Deadlines:
        """What the deadlines part is made of: `lookup doctor --fix` has it look after jobs of the doctor's choice."""
        rules = self.settings.rules
        counters = self.counters.of(DeadlineCounters)
        return Deadlines(self.sagas, self.store, self.views.due, self._relayed_position, rules, utc_now, new_id, counters)

    async def projector(self) -> None:
        await Projector(
            self.views,
            self.whole_log,
            await self.all_documents(),
            self.bus(),
            self.settings.rules,
            self.settings.retention,
            utc_now,
            self.counters.of(ProjectorCounters),
            generations=RedisGenerations(self.redis, self.keys),
            tail=self.store.tail,
        ).run()

    @cached_property
    def watched(self) -> Watched:
        """One for the whole process: a watch that is started again has not forgotten its alarm."""
        return Watched(utc_now())

    async def watch_views(self) -> None:
        view_meta = partial(health.view_meta, self.redis, self.keys)
        await Watch(self.store, self.redis, view_meta, self.settings.patience, utc_now, new_id, self.watched).run()

    async def self_check(self) -> None:
        every = self.settings.self_check_every
        if not every:
            log.info("There is no self-check: LOOKUP_SELF_CHECK_EVERY_H is 0.")
            await asyncio.Event().wait()
        await Nightly(await self.self_checker(), self.settings.self_check_hour, every, utc_now).run()

    async def self_checker(self) -> SelfChecker:
        return SelfChecker(
            self.redis,
            RedisGenerations(self.redis, self.keys),
            Comparer(self.redis, self.keys),
            self.history,
            (await self.past_documents()).get,
            PROJECTIONS,
            Terms(self.settings.rules, self.settings.retention),
            utc_now,
            self.settings.self_check_rate,
        )

    async def retention(self) -> None:
        """Seal what is old, now and then. Where it is off, say so once and do nothing."""
        keep, url = self.settings.log_retention, self.settings.database_retention_url
        if keep is None or url is None:
            log.info("Retention is off: LOOKUP_LOG_RETENTION_DAYS or LOOKUP_DATABASE_RETENTION_URL is not set.")
            await asyncio.Event().wait()
            return
        while True:
            with suppress(SomebodyElseSeals):
                async with open_retention_table(url) as table:
                    tally = await self.retention_of(table, keep).run(steps_max=STEPS_MAX)
                if tally.segments:
                    log.info("Sealed %d jobs into %d segments.", tally.jobs, len(tally.segments))
            await asyncio.sleep(self.settings.retention_interval_s)

    def retention_of(self, table: RetentionTable, keep: timedelta) -> Retention:
        return Retention(self.store, self.whole_log, table, self.settings.segments, keep, utc_now, new_id)

    async def sign_heads(self) -> None:
        settings = self.settings
        assert settings.database_url is not None
        if settings.heads_key_make:
            have_key(settings.heads_key)
        signer = load_signer(settings.heads_key)
        keys = verifiers(load_public(public_path(settings.heads_key)))
        async with open_heads(settings.database_url) as table:
            await HeadKeeper(
                self.history,
                table,
                [HeadFile(path) for path in settings.heads_outside],
                signer,
                keys,
                settings.heads_facts,
                timedelta(seconds=settings.heads_every_s),
                utc_now,
                self.counters.of(HeadCounters),
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
            trials=RedisTrials(self.redis),
            counters=self.counters.of(WorkerCounters, service),
            standing=LogStanding(self.store),
            late_after=self.settings.rules.redispatch_after,
            raw_bytes_max=self.settings.raw_bytes_max,
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

    async def _relayed_position(self) -> int:
        assert self.settings.database_url is not None
        try:
            return (await checkpoints.relayed_positions(self.settings.database_url))[checkpoints.COMMANDS]
        except psycopg.Error as error:
            raise StoreUnavailable("The database cannot be reached.") from error


@asynccontextmanager
async def _started(bus: Bus) -> AsyncIterator[Bus]:
    try:
        await bus.start()
        yield bus
    finally:
        await bus.stop()


def _canonical_target(text: str) -> str:
    """The query side knows no rules of targets, so it is given them."""
    try:
        return parse_target(text).canonical
    except InvalidTarget as invalid:
        raise NoTarget(invalid.code, invalid.message) from invalid


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
