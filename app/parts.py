"""Keeps parts running: any number of them in one process, each started again with a growing pause when it ends in an error."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial

from aiohttp import web

from app.health import Check, health_routes
from app.heartbeat import HEALTHY, beat
from app.http.serving import serving
from app.metrics import Family, Reading, metrics_routes
from app.readings import watch_look
from app.wiring import Wiring, utc_now
from events.ending import end
from events.facts import Service
from read_side.queries import JobQueries

WRITE, READ, RELAY, SAGA, WORKER, PROJECTOR, KEEPER = "write", "read", "relay", "saga", "worker", "projector", "keeper"
PAUSE_FIRST_S = 0.25
PAUSE_MAX_S = 5.0
STEADY_AFTER_S = 30.0
STOP_S = 20.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartNames:
    """Which parts a process runs. `workers` are the services whose workers it runs."""

    names: frozenset[str]
    workers: tuple[Service, ...] = ()

    @classmethod
    def all(cls) -> "PartNames":
        return cls(frozenset({WRITE, READ, RELAY, SAGA, PROJECTOR, KEEPER}), tuple(Service))


class UnknownPart(ValueError):  # noqa: N818 - what the input is, in our words
    """A word on the command line that names no part or service."""


def parse_parts(words: Sequence[str]) -> PartNames:
    """`["relay", "saga", "worker", "Ping", "RDAP"]` -> the parts. Service names in any case; `worker` alone is all of them."""
    services = {service.value.lower(): service for service in Service}
    names: set[str] = set()
    workers: list[Service] = []
    after_worker = False
    for word in words:
        if after_worker and word.lower() in services:
            workers.append(services[word.lower()])
            continue
        if after_worker and not workers:
            workers.extend(Service)
        after_worker = word == WORKER
        if not after_worker and word not in PartNames.all().names:
            known = f"{WRITE}, {READ}, {RELAY}, {SAGA}, {PROJECTOR}, {KEEPER}, {WORKER}"
            raise UnknownPart(f"{word!r} is no part. Parts are {known}; services are {', '.join(Service)}.")
        if not after_worker:
            names.add(word)
    if after_worker and not workers:
        workers.extend(Service)
    return PartNames(frozenset(names), tuple(dict.fromkeys(workers)))


@dataclass
class Part:
    """A part and how it fares."""

    name: str
    run: Callable[[], Awaitable[None]]
    state: str = "starting"
    detail: str = ""
    starts: int = 0

    def tell(self) -> tuple[str, str]:
        return self.state, self.detail

    async def keep_running(self) -> None:
        """Run until cancelled. What ends in an error is started again: the pause doubles, and is short again after a while.

        The log is told an error once, and again when it is another one or comes after a while; `state` shows it always.
        """
        clock = asyncio.get_running_loop().time
        pause = PAUSE_FIRST_S
        told = ""
        while True:
            started_at = clock()
            self.state, self.detail = "running", ""
            self.starts += 1
            try:
                await self.run()
            except Exception as error:
                self.state, self.detail = "retrying", type(error).__name__
                why = _why(error)
                if why != told or clock() - started_at > STEADY_AFTER_S:
                    log.warning("%s ended (%s); starting it again, quietly while that stays so.", self.name, why)
                told = why
                log.debug("%s ended.", self.name, exc_info=error)
            if clock() - started_at > STEADY_AFTER_S:
                pause = PAUSE_FIRST_S
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, so that parts do not return in step
            pause = min(2 * pause, PAUSE_MAX_S)


def _why(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@dataclass
class Process:
    """The parts of one process. `run` returns when `stop` is set and everything has been put in order, within a bound."""

    wiring: Wiring
    parts: PartNames
    host: str
    port: int
    on_ready: Callable[[str], None] = lambda _: None
    _running: list[Part] = field(default_factory=list)

    async def run(self, stop: asyncio.Event) -> None:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.wiring.aclose)
            self._running = self._background_parts()
            tasks = [asyncio.create_task(part.keep_running(), name=part.name) for part in self._running]
            stack.push_async_callback(end, tasks, STOP_S)
            if self.parts.names & {WRITE, READ}:
                self.on_ready(await self._serve(stack))
            await self._serve_metrics(stack)
            tasks += [asyncio.create_task(beat(self.wiring.redis, part.name, part.tell, utc_now)) for part in self._running]
            await stop.wait()

    def _background_parts(self) -> list[Part]:
        wiring = self.wiring
        made: dict[str, Sequence[Part]] = {
            RELAY: [Part(RELAY, wiring.relay)],
            SAGA: [
                Part("saga.gather", wiring.gather),
                Part("saga.deadlines", wiring.deadlines),
                Part("saga.dead-letters", wiring.drain),
            ],
            PROJECTOR: [Part(PROJECTOR, wiring.projector)],
            KEEPER: [
                Part("keeper.watch", wiring.watch_views),
                Part("keeper.retention", wiring.retention),
                Part("keeper.heads", wiring.sign_heads),
                Part("keeper.self-check", wiring.self_check),
            ],
        }
        parts = [part for name, several in made.items() if name in self.parts.names for part in several]
        return parts + [Part(f"{WORKER}.{service}", partial(wiring.worker, service)) for service in self.parts.workers]

    async def _serve(self, stack: AsyncExitStack) -> str:
        """One application from the route tables of the HTTP parts that run here; gives its address."""
        routes: list[web.RouteDef] = []
        let_go: Callable[[], None] | None = None
        checks: dict[str, Check] = {}
        if WRITE in self.parts.names:
            routes += self.wiring.write_routes()
            checks |= self.wiring.write_checks()
            self._running.append(Part(WRITE, _nothing_more, state="running"))
        if READ in self.parts.names:
            queries = JobQueries(self.wiring.redis, utc_now, self.wiring.keys)
            await queries.start()
            stack.push_async_callback(queries.stop)
            let_go = queries.let_go
            routes += await self.wiring.read_routes(queries)
            checks |= self.wiring.read_checks()
            self._running.append(Part(READ, _nothing_more, state="running"))
        if self.wiring.settings.metrics_port is None:
            routes += self._metrics_routes()
        server = serving([*routes, *health_routes(checks)], self.host, self.port, let_go)
        return await stack.enter_async_context(server)

    async def _serve_metrics(self, stack: AsyncExitStack) -> None:
        """On a port of their own, if one is set: parts without HTTP have no other, and what is public does not show them."""
        port = self.wiring.settings.metrics_port
        if port is not None:
            url = await stack.enter_async_context(serving(self._metrics_routes(), self.host, port))
            log.info("Metrics are at %s/metrics", url)

    def _metrics_routes(self) -> list[web.RouteDef]:
        readings: dict[str, Reading] = {}
        if WRITE in self.parts.names:
            readings |= self.wiring.write_readings()
        if self.parts.names & {WRITE, READ, PROJECTOR, KEEPER}:
            readings |= self.wiring.projection_readings()
        looks = [self.wiring.counters.look, self._look_at_parts]
        if KEEPER in self.parts.names:
            looks.append(watch_look(self.wiring.watched))
        return metrics_routes(looks, readings)

    def _look_at_parts(self) -> list[Family]:
        well = {part.name: float(part.state in HEALTHY) for part in self._running}
        starts = {part.name: part.starts for part in self._running if part.starts}
        return [
            Family("lookup_part_up", "gauge", "Whether a part of this process runs, or waits for its turn.", "part", well),
            Family("lookup_part_starts_total", "counter", "How often a part was started.", "part", starts),
        ]


async def _nothing_more() -> None:
    """An HTTP part has no loop of its own: the server runs it."""
