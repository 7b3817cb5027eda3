"""Deliberate bugs, each of which the simulation has to catch: the mistakes that systems like this one are known to make."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from domain.commands import Succeeded, TaskOutcome, lines_of
from domain.saga import LookupSaga, OpenTask, evolve
from events.bus import COMMANDS, FACTS, Delivery, Inbox
from events.facts import Erased, Fact, JobFact, TasksDispatched
from events.log_tail import LogTail
from events.record import Cause, StoredFact
from events.store import AppendUnit, NewFacts, StreamHead, VersionConflict
from events.wire import cloud_events, stretch_headers
from projections.folding import NOTHING, Folded
from projections.projector import Projector
from tests.simulation.loop import at_once
from tests.simulation.servers import LinkedStore
from write_side import checkpoints
from write_side.checkpoints import Checkpoint, RelayLedger
from write_side.deadlines import Deadlines
from write_side.gather import Gatherer
from write_side.relay import Relay, _command
from write_side.sagas import Loaded, Sagas, _loaded

Patch = tuple[type, str, Callable[..., Any]]


@dataclass(frozen=True)
class Mutant:
    """A bug: methods that are replaced by wrong ones while it is on."""

    name: str
    patches: tuple[Patch, ...]

    @contextmanager
    def on(self) -> Iterator[None]:
        originals = [(owner, name, owner.__dict__[name]) for owner, name, _ in self.patches]
        for owner, name, wrong in self.patches:
            setattr(owner, name, wrong)
        try:
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)


# --- What leaves too early --------------------------------------------------------------------------------------------


async def _publish_facts_first(store: LinkedStore, unit: AppendUnit) -> Sequence[StreamHead]:
    """The facts are told to everybody, and then stored: if that goes wrong, everybody knows what never happened."""
    rows = [row for stream in store._store._scribe.write(unit) for row in stream]
    head = at_once(store._store.head())
    stretch = [row.at(position) for position, row in enumerate(rows, start=head + 1)]
    headers = stretch_headers(head, head + len(stretch))
    await store.bus.publish(FACTS, cloud_events(stretch, "/lookup/mutant"), headers)
    return await _append(store, unit)


async def _send_commands_meanwhile(store: LinkedStore, unit: AppendUnit) -> Sequence[StreamHead]:
    """The workers are told at once, while the facts are on their way to the store."""
    for new in unit.streams:
        for fact in new.facts:
            if isinstance(fact, TasksDispatched) and not isinstance(fact.target, Erased):
                for task in fact.tasks:
                    body = lines_of([_command(fact, task, None)])
                    sending = store.bus.publish(COMMANDS[task.service, fact.priority], body)
                    asyncio.get_running_loop().create_task(_quietly(sending))
    return await _append(store, unit)


async def _quietly(sending: Any) -> None:
    await asyncio.gather(sending, return_exceptions=True)


_append = LinkedStore.append


# --- Outcomes that are lost, or count twice ---------------------------------------------------------------------------


async def _load_remembered_only(sagas: Sagas, job_ids: Sequence[UUID]) -> Mapping[UUID, Loaded]:
    """Who was not here when the job was taken on does not know it, and drops its outcomes."""
    return {job_id: sagas._cache[job_id] for job_id in job_ids if job_id in sagas._cache}


async def _append_and_shrug(sagas: Sagas, unit: AppendUnit, job_id: UUID) -> StreamHead | None:
    """Somebody else has appended? Then it must be done already."""
    try:
        (head,) = await sagas._store.append(unit)
    except VersionConflict:
        return unit.streams[0].head
    return head


async def _acknowledge_first(gatherer: Gatherer, inbox: Inbox, deliveries: Sequence[Delivery]) -> None:
    await inbox.ack(deliveries)
    await _gather(gatherer, inbox, deliveries)


_gather = Gatherer.gather


def _decide_last_wins(
    gatherer: Gatherer, saga: LookupSaga, outcomes: Sequence[TaskOutcome]
) -> tuple[list[tuple[TaskOutcome, list[JobFact]]], LookupSaga]:
    """A later answer is a better answer."""
    led_to, after = _decide(gatherer, saga, outcomes)
    if led_to or saga.closed:
        return led_to, after
    for outcome in outcomes:
        if outcome.service in saga.endings and isinstance(outcome.ending, Succeeded):
            reopened = saga._replace(open_tasks={**saga.open_tasks, outcome.service: _task_of(outcome)})
            led_to, _ = _decide(gatherer, reopened, [outcome])
            for _, facts in led_to:
                for fact in facts:
                    saga = evolve(saga, fact)
            return led_to, saga
    return [], saga


def _task_of(outcome: TaskOutcome) -> OpenTask:
    return OpenTask(outcome.attempt, outcome.command_id, dispatched_at=outcome.ended_at)


_decide = Gatherer._decide


# --- Jobs that never end, or begin twice ------------------------------------------------------------------------------


async def _look_away(_: Deadlines) -> None:
    """Workers always answer, don't they?"""


async def _begin_again(sagas: Sagas, job_id: UUID, facts: Sequence[JobFact], cause: Cause) -> StreamHead:
    """The job is there already? Then it is begun once more."""
    try:
        return await _begin(sagas, job_id, facts, cause)
    except VersionConflict:
        stream = (await sagas._store.read([job_id]))[job_id]
        head = _loaded(stream).head
        (head,) = await sagas._store.append(AppendUnit([NewFacts(job_id, head, facts)], cause))
        return head


_begin = Sagas.begin


# --- Checkpoints that move too early ----------------------------------------------------------------------------------


async def _follow_at_hand(relay: Relay, ledger: RelayLedger) -> None:
    _at_hand[id(relay)] = ledger
    await _follow(relay, ledger)


async def _move_then_publish(relay: Relay, stretch: Sequence[StoredFact], after: object, *, to_all: bool) -> None:
    done = relay.checkpoints[checkpoints.FACTS]
    new = [stored for stored in stretch if stored.position > done.position]
    if new and to_all:
        relay._move({checkpoints.FACTS: Checkpoint(new[-1].position, done.log_head)})
        await relay._save(_at_hand[id(relay)])
        await relay.bus.publish(FACTS, cloud_events(new, "/lookup"), stretch_headers(done.position, new[-1].position))


_at_hand: dict[int, RelayLedger] = {}
_follow = Relay._follow


async def _checkpoint_then_views(projector: Projector, folded: Folded, position: int, fact_hash: str) -> None:
    await _commit_views(projector, NOTHING, position, fact_hash)
    await _commit_views(projector, folded, position, fact_hash)


_commit_views = Projector._commit_views


def _remember_without_looking(tail: LogTail, facts: Sequence[StoredFact], written: Sequence[Fact]) -> None:
    """What others append in between will come some other way."""
    tail._facts += zip(facts, written, strict=True)


MUTANTS = (
    Mutant("publish before append", ((LinkedStore, "append", _publish_facts_first),)),
    Mutant("commands out before the append commits", ((LinkedStore, "append", _send_commands_meanwhile),)),
    Mutant("an outcome for a job not yet known is dropped", ((Sagas, "load", _load_remembered_only),)),
    Mutant("a version conflict is not retried", ((Sagas, "_append", _append_and_shrug),)),
    Mutant("no deadline", ((Deadlines, "tick", _look_away),)),
    Mutant("a repeated submission restarts a finished job", ((Sagas, "begin", _begin_again),)),
    Mutant("the outcome is acknowledged before it is appended", ((Gatherer, "gather", _acknowledge_first),)),
    Mutant("last outcome wins", ((Gatherer, "_decide", _decide_last_wins),)),
    Mutant(
        "the checkpoint moves before the publish is confirmed",
        ((Relay, "_follow", _follow_at_hand), (Relay, "_tell_facts", _move_then_publish)),
    ),
    Mutant("the projector's checkpoint is written before its views", ((Projector, "_commit_views", _checkpoint_then_views),)),
    Mutant("a neighbour passes over what others appended", ((LogTail, "append", _remember_without_looking),)),
)
