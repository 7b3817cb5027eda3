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
from app.heartbeat import beat
from app.http.middlewares import BODY_BYTES_MAX, with_bounded_body, with_problems, with_request_id
from app.wiring import Wiring, utc_now
from events.ending import end
from events.facts import Service
from read_side.queries import JobQueries

WRITE, READ, RELAY, SAGA, WORKER, PROJECTOR = "write", "read", "relay", "saga", "worker", "projector"
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
        return cls(frozenset({WRITE, READ, RELAY, SAGA, PROJECTOR}), tuple(Service))


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
        if not after_worker and word not in {WRITE, READ, RELAY, SAGA, PROJECTOR}:
            known = f"{WRITE}, {READ}, {RELAY}, {SAGA}, {PROJECTOR}, {WORKER}"
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

    def tell(self) -> tuple[str, str]:
        return self.state, self.detail

    async def keep_running(self) -> None:
        """Run until cancelled. What ends in an error is started again: the pause doubles, and is short again after a while."""
        clock = asyncio.get_running_loop().time
        pause = PAUSE_FIRST_S
        while True:
            started_at = clock()
            self.state, self.detail = "running", ""
            try:
                await self.run()
            except Exception as error:
                self.state, self.detail = "retrying", type(error).__name__
                log.warning("%s ended (%s); starting it again.", self.name, _why(error))
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
            tasks += [asyncio.create_task(beat(self.wiring.redis, part.name, part.tell, utc_now)) for part in self._running]
            await stop.wait()

    def _background_parts(self) -> list[Part]:
        wiring = self.wiring
        made: dict[str, Sequence[Part]] = {
            RELAY: [Part(RELAY, wiring.relay)],
            SAGA: [Part("saga.gather", wiring.gather), Part("saga.deadlines", wiring.deadlines)],
            PROJECTOR: [Part(PROJECTOR, wiring.projector)],
        }
        parts = [part for name, several in made.items() if name in self.parts.names for part in several]
        return parts + [Part(f"{WORKER}.{service}", partial(wiring.worker, service)) for service in self.parts.workers]

    async def _serve(self, stack: AsyncExitStack) -> str:
        """One application from the route tables of the HTTP parts that run here; gives its address."""
        app = web.Application(middlewares=[with_request_id, with_problems, with_bounded_body], client_max_size=BODY_BYTES_MAX)
        checks: dict[str, Check] = {}
        if WRITE in self.parts.names:
            app.add_routes(self.wiring.write_routes())
            checks |= self.wiring.write_checks()
            self._running.append(Part(WRITE, _nothing_more, state="running"))
        if READ in self.parts.names:
            queries = JobQueries(self.wiring.redis, utc_now, self.wiring.keys)
            await queries.start()
            stack.push_async_callback(queries.stop)
            app.add_routes(self.wiring.read_routes(queries))
            checks |= self.wiring.read_checks()
            self._running.append(Part(READ, _nothing_more, state="running"))
        app.add_routes(health_routes(checks))
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=5.0)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, self.host, self.port).start()
        host, port = runner.addresses[0][:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _nothing_more() -> None:
    """An HTTP part has no loop of its own: the server runs it."""
