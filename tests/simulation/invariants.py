"""What must hold whatever happens, looked at on the servers' side at every step, and once more when all has come to rest."""

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from typing import Any
from uuid import UUID

import orjson

from domain.commands import LookUp, Succeeded, TaskOutcome
from events.bus import COMMANDS, FACTS, OUTCOMES, Delivery, Queue
from events.chain import GENESIS, chained_hash
from events.facts import (
    Fact,
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobSubmitted,
    Service,
    TaskCompleted,
    TaskDeferred,
    TaskFailed,
    TasksDispatched,
    TaskSkipped,
    TaskTimedOut,
)
from events.record import StoredFact, envelope_of, fact_of, hash_of
from events.wire import stretch_of
from projections.memory import MemoryGeneration
from projections.view_store import Verdict
from write_side import checkpoints

LATE_MAX = timedelta(seconds=5)
"""A job ends by its `expires_at`, and this much later at most."""
TRIES_BEFORE_PASSING_OVER = 3
TRACE_MAX = 400

ENDINGS: Mapping[type[Fact], str] = {
    TaskCompleted: "Succeeded",
    TaskFailed: "Failed",
    TaskTimedOut: "TimedOut",
    TaskSkipped: "Skipped",
}
CLOSINGS: Mapping[type[Fact], str] = {JobCompleted: "Completed", JobFailed: "Failed", JobCancelled: "Cancelled"}


class Trace:
    """What happened, in order: the last lines to read, and a digest of all of them to compare."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.lines: deque[str] = deque(maxlen=TRACE_MAX)
        self._clock = clock
        self._digest = sha256()

    def tell(self, line: str) -> None:
        told = f"{self._clock():9.4f}  {line}"
        self.lines.append(told)
        self._digest.update(told.encode())

    def digest(self) -> str:
        return self._digest.hexdigest()


@dataclass
class OpenTask:
    command_id: UUID
    attempt: int
    deferred: bool = False


@dataclass
class Story:
    """A job as its facts tell it: folded here once more, in the plainest way, and without the product's own saga."""

    submitted: JobSubmitted
    version: int = 0
    hash: bytes = GENESIS
    positions: list[int] = field(default_factory=list)
    open_tasks: dict[Service, OpenTask] = field(default_factory=dict)
    endings: dict[Service, str] = field(default_factory=dict)
    attempts: dict[Service, int] = field(default_factory=dict)
    documents: dict[Service, str] = field(default_factory=dict)
    closing: str | None = None
    closed_at: datetime | None = None

    @property
    def deadline(self) -> datetime:
        return self.submitted.expires_at + LATE_MAX


class Watch:
    """Looks on, counts, and says what is broken: the first time only, for what follows is a consequence."""

    def __init__(self, trace: Trace, counts: Counter[str], now: Callable[[], datetime], on_broken: Callable[[], None]) -> None:
        self.broken: str | None = None
        self.gentle = False
        """Whether nothing goes wrong that only a deadline could mend."""
        self.jobs: dict[UUID, Story] = {}
        self.accepted: set[UUID] = set()
        self._trace = trace
        self._counts = counts
        self._now = now
        self._on_broken = on_broken
        self._dispatched: dict[UUID, tuple[int, TasksDispatched]] = {}
        self._commands_confirmed: Counter[UUID] = Counter()
        self._commands_tried: Counter[UUID] = Counter()
        self._returned: set[UUID] = set()
        self._told: set[UUID] = set()
        self._heard: set[UUID] = set()
        self._facts_confirmed_until = 0
        self._polled: dict[UUID, tuple[str, int]] = {}
        self._projectors = 0

    def must(self, holds: bool, what: str, *details: object) -> None:
        if not holds and self.broken is None:
            self.broken = what.format(*details)
            self._trace.tell(f"BROKEN: {self.broken}")
            self._on_broken()

    # --- The log ------------------------------------------------------------------------------------------------------

    def appended(self, rows: Sequence[StoredFact]) -> None:
        for stored in rows:
            fact = fact_of(stored.topic, stored.state)
            actor = envelope_of(stored.state)["actor"]
            self._trace.tell(f"{actor} appends {stored.position}: {_told(stored.stream_id, stored.stream_version, fact)}")
            if actor == "deadlines":
                self._counts[f"deadlines: {type(fact).__name__}"] += 1
                self.must(
                    not self.gentle or not self._is_late(stored.stream_id, fact),
                    "Nothing should have waited for this: {}.",
                    fact,
                )
            self._judge(stored, fact)

    def _judge(self, stored: StoredFact, fact: Fact) -> None:
        job = self.jobs.get(stored.stream_id)
        if job is None:
            self.must(isinstance(fact, JobSubmitted), "Job {} begins with {}.", stored.stream_id, type(fact).__name__)
            assert isinstance(fact, JobSubmitted)
            job = self.jobs[stored.stream_id] = Story(fact)
        else:
            self.must(not isinstance(fact, JobSubmitted), "Job {} was begun a second time.", stored.stream_id)
        self.must(
            stored.stream_version == job.version + 1, "Job {}: version {} is not next.", stored.stream_id, stored.stream_version
        )
        envelope, chained, *_ = stored.state.split(b"\n")
        expected = chained_hash(job.hash, stored.stream_id, stored.stream_version, stored.topic, envelope, chained)
        self.must(
            hash_of(stored.state) == expected, "Job {}: the hash chain breaks at {}.", stored.stream_id, stored.stream_version
        )
        self.must(job.closing is None, "Job {}: {} after its end.", stored.stream_id, type(fact).__name__)
        job.version, job.hash = stored.stream_version, expected
        job.positions.append(stored.position)
        self._fold(job, stored.position, fact)

    def _fold(self, job: Story, position: int, fact: Fact) -> None:
        job_id = job.submitted.job_id
        if isinstance(fact, TasksDispatched):
            for task in fact.tasks:
                self.must(task.service not in job.endings, "Job {}: {} is dispatched after its end.", job_id, task.service)
                self.must(task.command_id not in self._dispatched, "Job {}: a command id was used twice.", job_id)
                again = task.service in job.open_tasks
                self._counts["dispatched again"] += again
                job.open_tasks[task.service] = OpenTask(task.command_id, task.attempt)
                job.attempts[task.service] = task.attempt
                self._dispatched[task.command_id] = (position, fact)
        elif isinstance(fact, TaskDeferred):
            job.open_tasks[fact.service].deferred = True
            self._counts["deferred"] += 1
        elif type(fact) in ENDINGS:
            self._end_task(job, fact)
        elif type(fact) in CLOSINGS:
            job.closing, job.closed_at = CLOSINGS[type(fact)], self._now()
            self.must(not job.open_tasks, "Job {} is closed with open tasks.", job_id)
            self.must(set(job.endings) == set(job.submitted.services), "Job {} is closed before all its tasks.", job_id)
            succeeded = "Succeeded" in job.endings.values()
            self.must(succeeded == (job.closing == "Completed"), "Job {} is {} with {}.", job_id, job.closing, job.endings)
            self._counts[f"job {job.closing}"] += 1

    def _end_task(self, job: Story, fact: Any) -> None:
        service: Service = fact.service
        self.must(service not in job.endings, "Job {}: {} has ended twice.", job.submitted.job_id, service)
        job.endings[service] = ENDINGS[type(fact)]
        job.open_tasks.pop(service, None)
        self._counts[f"task {ENDINGS[type(fact)]}"] += 1
        if isinstance(fact, TaskCompleted):
            job.documents[service] = fact.result.location.key
            job.attempts[service] = fact.attempt

    def conflicted(self, actor: str) -> None:
        self._trace.tell(f"{actor} meets a version conflict")
        self._counts[f"version conflict of {actor}"] += 1

    def _is_late(self, job_id: UUID, fact: Fact) -> bool:
        """Whether the deadlines have to help a task whose command had left: not one that was deferred, or passed over."""
        if isinstance(fact, TasksDispatched):
            waited = self.jobs[job_id].open_tasks[fact.tasks[0].service]
            return not waited.deferred and not self._was_passed_over(waited.command_id)
        if isinstance(fact, TaskTimedOut):
            return not self._was_passed_over(self.jobs[job_id].open_tasks[fact.service].command_id)
        return False

    def _was_passed_over(self, command_id: UUID) -> bool:
        tried, confirmed = self._commands_tried[command_id], self._commands_confirmed[command_id]
        return not confirmed and tried >= TRIES_BEFORE_PASSING_OVER

    # --- The broker ---------------------------------------------------------------------------------------------------

    def published(self, sender: str, queue: Queue, body: bytes) -> None:
        """Nothing is on the broker that is not in the log."""
        if queue in _COMMAND_QUEUES:
            for command in _commands(body):
                known = command.command_id in self._dispatched
                self.must(known, "{} publishes a command that is not in the log (job {}).", sender, command.job_id)
        elif queue == FACTS:
            for event in orjson.loads(body):
                job = self.jobs.get(UUID(event["subject"]))
                self.must(
                    job is not None and int(event["sequence"]) in job.positions,
                    "{} publishes a fact that is not in the log (position {}).",
                    sender,
                    event["sequence"],
                )

    def tried(self, queue: Queue, body: bytes) -> None:
        if queue in _COMMAND_QUEUES:
            self._commands_tried.update(command.command_id for command in _commands(body))

    def confirmed(self, sender: str, queue: Queue, body: bytes, headers: Mapping[str, str]) -> None:
        self._trace.tell(f"{sender} publishes on {queue.name}: {len(body)} bytes")
        if queue in _COMMAND_QUEUES:
            ids = [command.command_id for command in _commands(body)]
            self._commands_confirmed.update(ids)
            if sender.startswith("worker"):
                self._returned.update(ids)
                self._counts["worker gave commands back or split them"] += 1
        elif queue == OUTCOMES:
            self._told.update(outcome.command_id for outcome in _outcomes(body))
        elif queue == FACTS:
            previous, position = stretch_of(headers)
            if previous <= self._facts_confirmed_until:
                self._facts_confirmed_until = max(self._facts_confirmed_until, position)

    def acknowledged(self, reader: str, queue: Queue, deliveries: Sequence[Delivery]) -> None:
        """What is acknowledged is no news any more."""
        for delivery in deliveries:
            self._counts["redelivered"] += delivery.delivery_count > 1
            if queue == OUTCOMES:
                for outcome in _outcomes(delivery.body):
                    recorded = self._is_recorded(outcome)
                    self.must(recorded, "{} acknowledges an outcome that is not in the log ({}).", reader, outcome)
                    self._counts["a repeated outcome was ignored"] += outcome.command_id in self._heard
                    self._heard.add(outcome.command_id)
            elif queue in _COMMAND_QUEUES:
                for command in _commands(delivery.body):
                    done = command.command_id in self._told | self._returned or self._now() >= command.expires_at
                    self._counts["a superseded command was dropped"] += not done
                    fair = done or not self._is_waited_for(command)
                    self.must(fair, "{} acknowledges a command of which nobody was told anything ({}).", reader, command)

    def _is_waited_for(self, command: LookUp) -> bool:
        task = self.jobs[command.job_id].open_tasks.get(command.service)
        return task is not None and task.command_id == command.command_id

    def _is_recorded(self, outcome: TaskOutcome) -> bool:
        job = self.jobs.get(outcome.job_id)
        if job is None or outcome.service in job.endings:
            return True
        task = job.open_tasks[outcome.service]
        if isinstance(outcome.ending, Succeeded):
            return False
        return task.deferred or task.command_id != outcome.command_id

    # --- Relay and projector ------------------------------------------------------------------------------------------

    def relay_leads(self, *, over_another: bool) -> None:
        self._trace.tell("a relay takes the lead")
        self._counts["relay took over from a silent leader"] += over_another

    def relay_moved(self, name: str, position: int) -> None:
        """A checkpoint moves after the broker has confirmed, or after a queue was tried often enough."""
        self._trace.tell(f"the relay's {name} stand at {position}")
        if name == checkpoints.FACTS:
            confirmed = position <= self._facts_confirmed_until
            self.must(confirmed, "The relay's facts stand at {}, confirmed are {}.", position, self._facts_confirmed_until)
            return
        for command_id, (dispatched_at, fact) in self._dispatched.items():
            if dispatched_at <= position and fact.expires_at > self._now():
                left = self._commands_confirmed[command_id] > 0 or self._was_passed_over(command_id)
                self.must(left, "The relay's commands stand at {}, but one of {} never left.", position, dispatched_at)

    def projector_leads(self) -> None:
        self._trace.tell("a projector takes the lead")
        self._projectors += 1
        self._counts["another projector took the lead"] += self._projectors > 1

    def committed(self, verdict: Verdict, fed: Sequence[MemoryGeneration]) -> None:
        """At every commit: each view of each generation tells of all facts up to the checkpoint, and of none behind it."""
        if verdict is not Verdict.OK:
            self._counts[f"commit refused: {verdict}"] += 1
            return
        for generation in fed:
            self._shows_its_facts(generation)

    def _shows_its_facts(self, generation: MemoryGeneration) -> None:
        for job_id, job in self.jobs.items():
            told = bisect_right(job.positions, generation.checkpoint)
            expected = job.positions[told - 1] if told else None
            view = generation.document(job_id)
            shown = None if view is None else int(view.partition(b"\n")[0])
            self.must(
                shown == expected,
                "Checkpoint {}: the view of job {} shows {} instead of {}.",
                generation.checkpoint,
                job_id,
                shown,
                expected,
            )

    # --- Clients ------------------------------------------------------------------------------------------------------

    def took(self, job_id: UUID) -> None:
        """A client was told 202."""
        self._trace.tell(f"a client is told that job {job_id} was taken on")
        self.accepted.add(job_id)
        self.must(job_id in self.jobs, "Job {} was accepted, and is not in the log.", job_id)

    def polled(self, job_id: UUID, seen: tuple[str, int]) -> None:
        """`seen` is the generation, and the position of the view in it. Views restored from a backup are another generation."""
        before = self._polled.get(job_id)
        if before is not None and before[0] == seen[0]:
            self.must(seen[1] >= before[1], "A poller of job {} saw {} and then {}.", job_id, before[1], seen[1])
        self._polled[job_id] = seen
        self._counts["polled"] += 1

    # --- At rest ------------------------------------------------------------------------------------------------------

    def all_closed(self) -> bool:
        return all(job.closing for job in self.jobs.values())

    def at_rest(self, able_again: datetime, generation: MemoryGeneration | None, documents: Mapping[str, bytes]) -> None:
        """When nothing goes wrong any more and time has passed: every job has ended in time, and its view tells so."""
        for job_id, job in self.jobs.items():
            self.must(job.closed_at is not None, "Job {} has not ended: {}", job_id, _plainly(job))
            ended_at = job.closed_at or self._now()
            in_time = max(job.deadline, able_again + LATE_MAX)
            self.must(ended_at <= in_time, "Job {} ended at {}, which is after {}.", job_id, ended_at, in_time)
            view = generation.document(job_id) if generation else None
            self.must(view is not None, "Job {} has no view.", job_id)
            if view is not None and job.closing is not None:
                shown = orjson.loads(view.partition(b"\n")[2])
                self._compare(job, shown, documents)

    def _compare(self, job: Story, shown: dict[str, Any], documents: Mapping[str, bytes]) -> None:
        job_id = str(job.submitted.job_id)
        self.must((shown["jobId"], shown["status"]) == (job_id, job.closing), "Job {} is shown as {}.", job_id, shown["status"])
        for result in shown["results"]:
            service = Service(result["serviceType"])
            self.must(result["status"] == job.endings[service], "Job {}: {} is shown as {}.", job_id, service, result["status"])
            key = job.documents.get(service)
            data = orjson.loads(documents[key]) if key else None
            self.must(result["data"] == data, "Job {}: the answer of {} is not the one that was recorded.", job_id, service)


_COMMAND_QUEUES = frozenset(COMMANDS.values())


@lru_cache(maxsize=64)
def _commands(body: bytes) -> list[LookUp]:
    return [LookUp.model_validate_json(line) for line in body.split(b"\n")]


@lru_cache(maxsize=64)
def _outcomes(body: bytes) -> list[TaskOutcome]:
    return [TaskOutcome.model_validate_json(line) for line in body.split(b"\n")]


def _told(job_id: UUID, version: int, fact: Fact) -> str:
    services: Any = [task.service.value for task in fact.tasks] if isinstance(fact, TasksDispatched) else ""
    service = getattr(fact, "service", None) or services
    attempts = [task.attempt for task in fact.tasks] if isinstance(fact, TasksDispatched) else getattr(fact, "attempt", "")
    return f"job …{str(job_id)[-6:]} v{version} {type(fact).__name__} {service} {attempts}".rstrip()


def _plainly(job: Story) -> str:
    waiting = {str(service): f"attempt {task.attempt}" for service, task in job.open_tasks.items()}
    return f"open {waiting}, ended {dict(job.endings)}"
