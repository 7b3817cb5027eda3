"""One simulated installation: the product's real parts in processes that crash and freeze, over servers that fail, and clients.

One seed is one run, exactly: every id, salt, delay, fault and turn is drawn from it.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from random import Random
from uuid import UUID

from app.parts import Part
from domain.address_policy import AddressPolicy
from domain.commands import Rules
from events.bus import ALL_QUEUES, BusUnavailable
from events.facts import DeferReason, Priority, Service, Target, TargetType
from events.record import SALT_BYTES, Cause
from events.store import OutcomeUnknown, Scribe, StoreUnavailable, VersionConflict
from projections.projector import Projector, Superseded
from results.documents import MemoryDocuments, ResultsUnavailable
from tests.simulation.invariants import Trace, Watch
from tests.simulation.loop import Process, SimulatedLoop
from tests.simulation.network import BROKER, DOCUMENTS, SERVERS, STORE, VIEWS, Faults, Link, Network
from tests.simulation.servers import (
    FaultyBroker,
    Ledgers,
    LinkedBus,
    LinkedDocuments,
    LinkedStore,
    LinkedTrials,
    LinkedViews,
    ViewsDown,
    WatchedLedgers,
    WatchedStore,
    WatchedViews,
)
from workers.lookup import Answer, LookupDeferred, LookupFailed, Result
from workers.runner import MessageStuck, Outbox, Worker
from workers.standing import LogStanding
from workers.trials import MemoryTrials
from write_side.checkpoints import COMMANDS, FACTS, LeadershipLost
from write_side.deadlines import Deadlines
from write_side.gather import Gatherer
from write_side.relay import Relay
from write_side.sagas import Sagas, TooManyConflicts
from write_side.submit import Accepted, Submitter

BEGINNING = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LIFETIME_S = 20.0
RULES = Rules(
    timeout_s=dict.fromkeys(Service, 2.0),
    attempts_max=dict.fromkeys(Service, 2),
    lifetime=dict.fromkeys(Priority, timedelta(seconds=LIFETIME_S)),
    redispatch_after=timedelta(seconds=5),
)
PATIENT_RULES = replace(RULES, redispatch_after=timedelta(seconds=LIFETIME_S))
RETENTION = timedelta(hours=24)
JOBS_MAX = 6
GENTLE_SHARE = 0.25
TOGETHER_SHARE = 0.3
"""Worlds in which one more process runs the write side, a relay, a saga and a projector, as `lookup up` does."""
ASKING_S = 8.0
TROUBLE_S = 12.0
REST_S = 20.0
"""How long after the last deadline everything has to have come to rest."""
NOTICED_AFTER_S = 1.5
SILENT_AFTER_S = 3.0
HTTP_TIMEOUT_S = 5.0
ANSWER_STEPS_MAX = 3_000
STEPS_MAX = 400_000

EXPECTED = (
    StoreUnavailable,
    OutcomeUnknown,
    BusUnavailable,
    ResultsUnavailable,
    ViewsDown,
    LeadershipLost,
    Superseded,
    TooManyConflicts,
    MessageStuck,
)
"""What may end a part. Anything else is a mistake in the program."""


class Answered(Result):
    """What a simulated lookup brings."""

    number: int


@dataclass
class Report:
    """What became of one seed."""

    seed: int
    broken: str | None
    digest: str
    steps: int
    seconds: float
    counts: Counter[str]
    trace: list[str]

    def __str__(self) -> str:
        lines = "\n".join(self.trace[-40:])
        again = f"python -m tests.simulation --seed {self.seed}"
        return f"Seed {self.seed} after {self.seconds:.1f} virtual seconds: {self.broken}\n{lines}\nAgain: {again}"


@dataclass
class Machine:
    """Where one process runs, again and again: `start` makes its parts anew, with empty memory."""

    name: str
    start: Callable[["Machine"], None]
    process: Process
    buses: list[LinkedBus] = field(default_factory=list)
    ledgers: Ledgers | None = None
    submitter: Submitter | None = None
    store: LinkedStore | None = None
    """Where the parts of a process share one."""
    up: bool = True


class World:
    """Everything that one seed brings about."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.chance = Random(seed)
        self.counts: Counter[str] = Counter()
        self.loop = SimulatedLoop(self.chance, self._crash)
        self.trace = Trace(self.loop.time)
        self.watch = Watch(self.trace, self.counts, self.now, self.loop.stop)
        self.nature = Process("nature")
        self.network = Network(self.loop, self.chance, Faults(), self.counts, self.nature)
        self.store = WatchedStore(Scribe(self.now, self.new_id, self._salt), self.new_id(), self.watch)
        self.documents = MemoryDocuments()
        self.trials = MemoryTrials()
        self.broker = FaultyBroker(self.network, self.watch)
        self.views = WatchedViews(self.now, self.new_id, self.watch)
        self.ledgers = WatchedLedgers(self.store, self.watch)
        self.machines: list[Machine] = []
        self.able_again = BEGINNING
        """When somebody could end jobs again: the store was back, or the only saga was woken or reached the store again."""
        self._crash_steps = 0
        self._clients = 0
        self.watch.gentle = self.chance.random() < GENTLE_SHARE
        self.rules = PATIENT_RULES if self.watch.gentle else RULES

    # --- Time, ids and chance -----------------------------------------------------------------------------------------

    def now(self) -> datetime:
        return BEGINNING + timedelta(seconds=self.loop.time())

    def new_id(self) -> UUID:
        """A UUIDv7 (RFC 9562 section 5.7) whose random part comes from the seed."""
        number = int(self.now().timestamp() * 1000) << 80 | self.chance.getrandbits(80)
        return UUID(int=number & ~(0xF << 76) & ~(0x3 << 62) | 0x7 << 76 | 0x2 << 62)

    def _salt(self) -> bytes:
        return self.chance.randbytes(SALT_BYTES)

    # --- A run --------------------------------------------------------------------------------------------------------

    def run(self) -> Report:
        with _only_this_chance(self.seed):
            try:
                with self.loop.is_the_running_one():
                    self._begin()
                    self.loop.run(TROUBLE_S + LIFETIME_S * 2 + REST_S)
                    self._conclude()
                return self._report()
            finally:
                self.loop.dispose()

    def _report(self) -> Report:
        broken, trace = self.watch.broken, self.trace
        return Report(
            self.seed, broken, self._digest(), self.loop.steps, self.loop.time(), Counter(self.counts), list(trace.lines)
        )

    def _digest(self) -> str:
        """Of everything that the run told and left behind: its story, the log with its ids and salts, and the views."""
        digest = sha256(self.trace.digest().encode())
        for stored in self.store._log:
            digest.update(stored.state)
        for generation in self.views.generations.values():
            for view in generation.values.values():
                digest.update(view.value)
        return digest.hexdigest()

    def _begin(self) -> None:
        starts: list[tuple[str, Callable[[Machine], None]]] = [
            ("write", self._start_write),
            ("relay", self._start_relay),
            ("saga", self._start_saga),
            ("projector", self._start_projector),
            ("worker", self._start_worker),
        ]
        for name, start in starts:
            for number in range(1, self.chance.randint(1, 2) + 1):
                self._start(Machine(f"{name}{number}", start, Process(f"{name}{number}")))
        if Random(f"together {self.seed}").random() < TOGETHER_SHARE:
            self._start(Machine("together1", self._start_together, Process("together1")))
        self.loop.spawn(self.nature, self._trouble())
        clients = Process("clients")
        for _ in range(self.chance.randint(1, JOBS_MAX)):
            self._clients += 1
            self.loop.spawn(clients, self._client(clients))
        self.loop.spawn(self.nature, self._end_when_at_rest())

    def _conclude(self) -> None:
        self.watch.must(self.loop.steps < STEPS_MAX, "Something goes on and on.")
        if self.watch.broken is None:
            self.watch.at_rest(self.able_again, self.views.live(), self.documents._documents)
        if self.watch.broken is None:
            head = len(self.store._log)
            stands = {name: checkpoint.position for name, checkpoint in self.ledgers.checkpoints.items()}
            self.watch.must(stands == {COMMANDS: head, FACTS: head}, "The relay stands at {}, the log at {}.", stands, head)

    async def _end_when_at_rest(self) -> None:
        while not self._is_at_rest() and self.loop.steps < STEPS_MAX:  # noqa: ASYNC110 - rest is nobody's event
            await asyncio.sleep(0.5)
        self.loop.stop()

    def _is_at_rest(self) -> bool:
        head = len(self.store._log)
        live = self.views.live()
        return (
            self.loop.time() > TROUBLE_S
            and not self.network.down
            and not self._clients
            and self.watch.all_closed()
            and all(checkpoint.position == head for checkpoint in self.ledgers.checkpoints.values())
            and live is not None
            and live.checkpoint == head
        )

    # --- The parts, as app/wiring.py puts them together ---------------------------------------------------------------

    def _start(self, machine: Machine) -> None:
        machine.up = True
        self.machines = [*(other for other in self.machines if other.name != machine.name), machine]
        if self._crash_steps:
            machine.process.crashes_in = self.chance.randint(1, self._crash_steps)
        machine.start(machine)

    def _keep_running(self, machine: Machine, name: str, run: Callable[[], Awaitable[None]]) -> None:
        async def told() -> None:
            try:
                await run()
            except Exception as error:
                self._judge(machine, name, error)
                raise

        self.loop.spawn(machine.process, Part(name, told).keep_running())

    def _judge(self, machine: Machine, name: str, error: BaseException) -> None:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        self.trace.tell(f"{machine.name}: {name} ends with {type(error).__name__}")
        self.counts[f"{name} ended with {type(error).__name__}"] += 1
        self.watch.must(isinstance(error, EXPECTED), "{} ended with {}: {}", name, type(error).__name__, error)

    def _link(self, machine: Machine, server: str) -> Link:
        return Link(self.network, machine.process, server)

    def _store(self, machine: Machine) -> LinkedStore:
        return machine.store or LinkedStore(self.store, self._link(machine, STORE), self._bus(machine))

    def _documents(self, machine: Machine) -> LinkedDocuments:
        return LinkedDocuments(self.documents, self._link(machine, DOCUMENTS))

    def _views(self, machine: Machine) -> LinkedViews:
        return LinkedViews(self.views, self._link(machine, VIEWS))

    def _bus(self, machine: Machine) -> LinkedBus:
        bus = LinkedBus(self.broker, self._link(machine, BROKER), self.watch)
        machine.buses.append(bus)
        return bus

    def _start_together(self, machine: Machine) -> None:
        machine.store = self._store(machine)
        for start in (self._start_write, self._start_relay, self._start_saga, self._start_projector):
            start(machine)

    def _start_write(self, machine: Machine) -> None:
        sagas = Sagas(self._store(machine))
        machine.submitter = Submitter(sagas, AddressPolicy(), self.rules, self.now, self.new_id, "default")

    def _start_relay(self, machine: Machine) -> None:
        ledgers = machine.ledgers = self._ledgers(machine)

        async def relay() -> None:
            bus = self._bus(machine)
            try:
                await bus.start()
                store = self._store(machine)
                await Relay(ledgers.open, store, bus, self.now, tail=store.tail).run()
            finally:
                await bus.stop()

        self._keep_running(machine, "relay", relay)

    def _ledgers(self, machine: Machine) -> Ledgers:
        return Ledgers(self.ledgers, self.store, self._link(machine, STORE))

    def _start_saga(self, machine: Machine) -> None:
        store = self._store(machine)
        sagas = Sagas(store)
        relayed_position = self._ledgers(machine).relayed_position

        async def gather() -> None:
            bus = self._bus(machine)
            gatherer = Gatherer(sagas, bus, self.rules, self.now, self.new_id)
            inbox = gatherer.subscribe()
            try:
                await bus.start()
                await gatherer.run(inbox)
            finally:
                await bus.stop()

        deadlines = Deadlines(sagas, store, self._views(machine).due, relayed_position, self.rules, self.now, self.new_id)
        self._keep_running(machine, "gather", gather)
        self._keep_running(machine, "deadlines", deadlines.run)

    def _start_projector(self, machine: Machine) -> None:
        async def project() -> None:
            bus = self._bus(machine)
            store, views, documents = self._store(machine), self._views(machine), self._documents(machine)
            await Projector(views, store, documents, bus, self.rules, RETENTION, self.now, tail=store.tail).run()

        self._keep_running(machine, "projector", project)

    def _start_worker(self, machine: Machine) -> None:
        outbox = Outbox(self._bus(machine))
        documents = self._documents(machine)
        redis = self._link(machine, VIEWS)
        standing = LogStanding(self._store(machine))

        async def work(service: Service) -> None:
            bus = self._bus(machine)
            worker = Worker(
                service,
                self._look_up,
                bus,
                outbox,
                documents,
                machine.name,
                self.now,
                trials=LinkedTrials(self.trials, redis),
                standing=standing,
                late_after=self.rules.redispatch_after,
            )
            inboxes = worker.subscribe()
            try:
                await bus.start()
                await worker.run(inboxes)
            finally:
                await bus.stop()

        for service in Service:
            self._keep_running(machine, f"worker {service}", partial(work, service))

    async def _look_up(self, _: Target) -> Answer[Answered]:
        await asyncio.sleep(self.chance.random() ** 2)
        fate = self.chance.random()
        if fate < 0.06:
            raise LookupFailed("unreachable", "It cannot be reached.", transient=True)
        if fate < 0.10:
            raise LookupFailed("refused", "It was refused.")
        if fate < 0.14:
            raise LookupDeferred(DeferReason.QUOTA, self.chance.random() * 3)
        if fate < 0.18:
            await asyncio.sleep(60)
        return Answer(Answered(number=self.chance.getrandbits(32)))

    # --- Clients ------------------------------------------------------------------------------------------------------

    async def _client(self, clients: Process) -> None:
        """Asks until it is told 202, or gives up; then polls, and sometimes sends the same again."""
        await asyncio.sleep(self.chance.random() * ASKING_S)
        job_id, ask = self._question()
        if await self._submits(job_id, ask):
            self.loop.spawn(clients, self._poll(clients, job_id))
            await asyncio.sleep(self.chance.random() * TROUBLE_S)
            if self.chance.random() < 0.5:
                self.counts["submitted again"] += 1
                await self._submits(job_id, ask)
        self._clients -= 1

    def _question(self) -> tuple[UUID, Callable[[Submitter], Awaitable[Accepted]]]:
        job_id = self.new_id()
        target = self.chance.choice(
            [
                Target(raw="198.51.100.7", canonical="198.51.100.7", type=TargetType.IP_ADDRESS),
                Target(raw="8.8.8.8", canonical="8.8.8.8", type=TargetType.IP_ADDRESS),
                Target(raw="Example.com", canonical="example.com", type=TargetType.DOMAIN),
            ]
        )
        services = self.chance.sample(tuple(Service), self.chance.randint(1, len(Service)))
        cause = Cause(actor="client", correlation_id=self.new_id())
        timeout_s = None if self.watch.gentle else self.chance.choice([None, None, 1.0])
        return job_id, lambda submitter: submitter.submit(
            job_id, target, services, cause, requested_by="203.0.113.9", timeout_s=timeout_s
        )

    async def _submits(self, job_id: UUID, ask: Callable[[Submitter], Awaitable[Accepted]]) -> bool:
        for _ in range(self.chance.randint(1, 4)):
            machine = self.chance.choice([machine for machine in self.machines if machine.submitter is not None])
            try:
                await self._posted(machine, ask)
            except VersionConflict:
                self.counts["a submission was there already"] += 1
                return True
            except (StoreUnavailable, OutcomeUnknown, TimeoutError) as refused:
                self.counts[f"client was told {type(refused).__name__}"] += 1
                await asyncio.sleep(self.chance.random())
            else:
                self.watch.took(job_id)
                return True
        return False

    async def _posted(self, machine: Machine, ask: Callable[[Submitter], Awaitable[Accepted]]) -> Accepted:
        """The request is handled in the write process, and its answer dies with it."""
        answer: asyncio.Future[Accepted] = self.loop.create_future()

        async def handle() -> None:
            assert machine.submitter is not None
            try:
                accepted = await ask(machine.submitter)
            except (StoreUnavailable, OutcomeUnknown, VersionConflict) as refused:
                self.network.later(self.network.latency_s(), _settle, answer, refused)
            else:
                self.network.later(self.network.latency_s(), _settle, answer, accepted)

        self.loop.spawn(machine.process, handle())
        async with asyncio.timeout(HTTP_TIMEOUT_S):
            return await answer

    async def _poll(self, clients: Process, job_id: UUID) -> None:
        views = LinkedViews(self.views, Link(self.network, clients, VIEWS))
        while True:
            await asyncio.sleep(0.3 + self.chance.random())
            with suppress(ViewsDown):
                seen = await views.shown(job_id)
                if seen is not None:
                    self.watch.polled(job_id, seen)

    # --- Trouble ------------------------------------------------------------------------------------------------------

    async def _trouble(self) -> None:
        """What goes wrong in this run, and that it ends."""
        if self.watch.gentle:
            self._begin_gentle_trouble()
        else:
            self._begin_trouble()
        await asyncio.sleep(TROUBLE_S)
        self.trace.tell("from here on nothing goes wrong")
        self.network.faults = Faults()
        self._crash_steps = 0
        for machine in self.machines:
            machine.process.crashes_in = None

    def _begin_trouble(self) -> None:
        """Few kinds in each run: then each combination comes up."""
        chance = self.chance
        self.network.faults = Faults.drawn(chance, share=chance.choice([0.02, 0.1, 0.3]))
        if chance.random() < 0.6:
            self._crash_steps = chance.choice([100, 400, 1500])
            for machine in self.machines:
                machine.process.crashes_in = chance.randint(1, self._crash_steps)
        kinds = [
            self._freeze,
            self._partition,
            self._outage,
            self._lose_views,
            self._roll_back_views,
            self._empty_broker,
            self._delete_queue,
            self._purge,
        ]
        plagues = chance.sample(kinds, chance.randint(0, len(kinds)))
        for plague in plagues:
            for _ in range(chance.randint(1, 2)):
                self.loop.spawn(self.nature, self._at(chance.random() * TROUBLE_S, plague))
        if chance.random() < 0.1:
            self.loop.spawn(self.nature, self._long_outage())

    def _begin_gentle_trouble(self) -> None:
        """Nothing that only a deadline could mend: no message is lost in silence, and nobody is away for long."""
        chance = self.chance
        self.counts["gentle"] += 1
        drawn = Faults.drawn(chance, share=chance.choice([0.02, 0.1]))
        self.network.faults = replace(drawn, message_dropped=0.0, message_delayed=0.0, call_slow=0.0)
        plagues = [
            self._lose_views,
            self._roll_back_views,
            self._empty_broker,
            self._delete_queue,
            self._kill_one,
            self._short_outage,
            self._short_outage,
        ]
        for plague in plagues:
            if chance.random() < 0.5:
                self.loop.spawn(self.nature, self._at(chance.random() * TROUBLE_S, plague))

    async def _kill_one(self) -> None:
        machine = self.chance.choice(self.machines)
        if machine.up:
            machine.process.crashes_in = self.chance.randint(1, 50)

    async def _short_outage(self) -> None:
        await self._down(self.chance.choice(SERVERS), self.chance.random() * 2)

    async def _at(self, second: float, plague: Callable[[], Awaitable[None]]) -> None:
        await asyncio.sleep(second)
        self.counts[plague.__name__.strip("_")] += 1
        await plague()

    def _crash(self, process: Process) -> None:
        """A process is killed: its memory is gone, its connections end when the servers notice, and it starts anew."""
        machine = next(machine for machine in self.machines if machine.process is process)
        self.trace.tell(f"{machine.name} is killed")
        self.counts[f"killed: {machine.name[:-1]}"] += 1
        self.loop.kill(process)
        machine.up = False
        self.network.later(self.chance.random() * NOTICED_AFTER_S, self._hang_up, machine.buses, machine.ledgers)
        self.network.later(self.chance.random() * 3, self._start_anew, machine)

    def _hang_up(self, buses: Sequence[LinkedBus], ledgers: Ledgers | None) -> None:
        for bus in buses:
            bus.end()
        if ledgers is not None:
            ledgers.end()

    def _start_anew(self, machine: Machine) -> None:
        self.trace.tell(f"{machine.name} starts anew")
        self._start(Machine(machine.name, machine.start, Process(machine.name)))

    async def _freeze(self) -> None:
        """SIGSTOP, and SIGCONT after a while: often long enough that a successor leads meanwhile."""
        machine = self.chance.choice(self.machines)
        if not machine.up or machine.process.frozen:
            return
        seconds = self.chance.choice([1, 9]) * self.chance.random()
        self.trace.tell(f"{machine.name} is frozen")
        self.loop.freeze(machine.process)
        if seconds > SILENT_AFTER_S:
            self.network.later(SILENT_AFTER_S, self._give_back, machine.buses)
        await asyncio.sleep(seconds)
        self.trace.tell(f"{machine.name} is woken")
        self._note_if_nobody_ends_jobs()
        self.loop.thaw(machine.process)

    def _note_if_nobody_ends_jobs(self) -> None:
        """Called just before this ends."""
        sagas = [other for other in self.machines if other.name.startswith(("saga", "together"))]
        if all(saga.process.frozen or (saga.name, STORE) in self.network.cut for saga in sagas):
            self.able_again = max(self.able_again, self.now())

    def _give_back(self, buses: Sequence[LinkedBus]) -> None:
        for bus in buses:
            bus.give_back()

    async def _partition(self) -> None:
        machine, server = self.chance.choice(self.machines), self.chance.choice(SERVERS)
        seconds = self.chance.random() * 6
        self.trace.tell(f"{machine.name} does not reach the {server}")
        self.network.cut.add((machine.name, server))
        if server == BROKER and seconds > SILENT_AFTER_S:
            self.network.later(SILENT_AFTER_S, self._give_back, machine.buses)
        await asyncio.sleep(seconds)
        self._note_if_nobody_ends_jobs()
        self.network.cut.discard((machine.name, server))
        self.trace.tell(f"{machine.name} reaches the {server} again")

    async def _outage(self) -> None:
        await self._down(self.chance.choice(SERVERS), self.chance.random() * 6)

    async def _long_outage(self) -> None:
        """Past the deadlines of most jobs."""
        server = self.chance.choice(SERVERS)
        self.counts[f"long outage of the {server}"] += 1
        await asyncio.sleep(self.chance.random() * TROUBLE_S)
        await self._down(server, LIFETIME_S * (0.5 + self.chance.random()))

    async def _down(self, server: str, seconds: float) -> None:
        if server in self.network.down:
            return
        self.trace.tell(f"the {server} is down")
        self.network.down.add(server)
        if server == STORE:
            self.able_again = max(self.able_again, self.now() + timedelta(seconds=seconds))
        await asyncio.sleep(seconds)
        self.network.down.discard(server)
        self.trace.tell(f"the {server} is up again")

    async def _lose_views(self) -> None:
        self.trace.tell("the views are wiped")
        self.views.wipe()

    async def _roll_back_views(self) -> None:
        snapshot = self.views.snapshot()
        await asyncio.sleep(self.chance.random() * 5)
        self.trace.tell("the views are rolled back")
        self.views.roll_back(snapshot)

    async def _empty_broker(self) -> None:
        self.trace.tell("the broker comes back empty")
        for queue in ALL_QUEUES:
            self.broker.lose(queue)

    async def _delete_queue(self) -> None:
        queue = self.chance.choice(ALL_QUEUES)
        self.trace.tell(f"somebody deletes {queue.name}")
        self.broker.lose(queue)

    async def _purge(self) -> None:
        queue = self.chance.choice(ALL_QUEUES)
        self.trace.tell(f"somebody purges {queue.name}")
        self.broker.purge(queue)


def simulate(seed: int) -> Report:
    """One run. The same seed gives the same report, on any machine."""
    return World(seed).run()


def _settle(answer: "asyncio.Future[Accepted]", outcome: Accepted | Exception) -> None:
    if answer.done():
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)


@contextmanager
def _only_this_chance(seed: int) -> Iterator[None]:
    """Jitter in the product and its libraries comes from the `random` module: seeded here, and put back. Logs are not read."""
    before = random.getstate()
    random.seed(seed)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        random.setstate(before)
