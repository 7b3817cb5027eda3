"""The saga under any order of deliveries, clock ticks and crashes: what must hold whatever happens."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from domain.commands import Deferred, ExpireTasks, Failed, Skipped, Succeeded, TaskOutcome, TimedOut
from domain.saga import LookupSaga, due_at, evolve, expire_tasks, record_outcome, replay, submit
from events.facts import (
    DeferReason,
    Fact,
    JobCancelled,
    JobCompleted,
    JobFact,
    JobFailed,
    JobSubmitted,
    Service,
    Task,
    TaskCompleted,
    TaskFailed,
    TasksDispatched,
    TaskSkipped,
    TaskTimedOut,
)
from tests.builders import (
    LIFETIME,
    NOW,
    OUT_OF_TIME,
    PERMANENT,
    REFUSED,
    RULES,
    TRANSIENT,
    numbered_ids,
    submit_command,
    success,
)

Ending = Succeeded | Failed | TimedOut | Skipped | Deferred
CLOSING = JobCompleted | JobFailed | JobCancelled
TERMINAL = TaskCompleted | TaskFailed | TaskTimedOut | TaskSkipped
SERVICES = st.lists(st.sampled_from(Service), min_size=1, max_size=4, unique=True)
ENDINGS = st.sampled_from(["success", "permanent", "transient", "out of time", "skipped", "deferred"])


class OneJob(RuleBasedStateMachine):
    """A job, workers that report each of its commands any number of times in any order, and a clock."""

    def __init__(self) -> None:
        super().__init__()
        self.facts: list[Fact] = []
        self.saga: LookupSaga | None = None
        self.now = NOW
        self.relayed_until = NOW - timedelta(seconds=1)
        self.new_id = numbered_ids()
        self.outcomes: list[TaskOutcome] = []

    # --- What can happen ----------------------------------------------------------------------------------------------

    @initialize(services=SERVICES, refused=st.sets(st.sampled_from(Service)))
    def somebody_asks(self, services: list[Service], refused: set[Service]) -> None:
        command = submit_command(*services, refused=tuple(service for service in services if service in refused))
        ids = {service: self.new_id() for service in services}
        self._append(submit(replace(command, command_ids=ids), RULES))

    @precondition(lambda self: self._commands())
    @rule(pick=st.integers(min_value=0), ending=ENDINGS, wait_s=st.integers(min_value=1, max_value=60))
    def a_worker_reports(self, pick: int, ending: str, wait_s: int) -> None:
        """Any command that ever left, current or superseded."""
        commands = self._commands()
        task = commands[pick % len(commands)]
        self._take_in(self._outcome(task, self._ending(ending, wait_s)))

    @precondition(lambda self: self.outcomes)
    @rule(pick=st.integers(min_value=0))
    def the_broker_delivers_again(self, pick: int) -> None:
        before = len(self.facts)
        self._take_in(self.outcomes[pick % len(self.outcomes)])
        assert len(self.facts) == before, "an outcome that was taken in before is no news"

    @rule(service=st.sampled_from(Service), ending=ENDINGS)
    def somebody_reports_what_nobody_asked_for(self, service: Service, ending: str) -> None:
        assert self.saga is not None
        if service not in self.saga.submitted.services:
            before = len(self.facts)
            task = Task(service=service, command_id=self.new_id(), attempt=1, timeout_s=1.0)
            self._take_in(self._outcome(task, self._ending(ending, 1)))
            assert len(self.facts) == before

    @rule(seconds=st.integers(min_value=1, max_value=40))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @rule()
    def the_relay_catches_up(self) -> None:
        self.relayed_until = self.now

    @rule()
    def the_clock_is_looked_at(self) -> None:
        self._expire()

    @rule()
    def the_process_starts_again(self) -> None:
        """Whatever was in memory is gone; the log is all there is."""
        self.saga = replay(self.facts)

    # --- What must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def the_state_is_the_replay_of_the_facts(self) -> None:
        if self.facts:
            assert replay(self.facts) == self.saga

    @invariant()
    def there_is_at_most_one_closing_fact_and_nothing_after_it(self) -> None:
        closings = [number for number, fact in enumerate(self.facts) if isinstance(fact, CLOSING)]
        assert closings in ([], [len(self.facts) - 1])

    @invariant()
    def each_task_ends_at_most_once_and_is_dispatched_no_more_then(self) -> None:
        ended: set[Service] = set()
        for fact in self.facts:
            if isinstance(fact, TasksDispatched):
                assert not ended & {task.service for task in fact.tasks}
            elif isinstance(fact, TERMINAL):
                assert fact.service not in ended
                ended.add(fact.service)

    @invariant()
    def a_job_is_closed_when_its_last_task_ends_and_not_before(self) -> None:
        if self.saga is not None:
            assert self.saga.closed == (not self.saga.open_tasks)
            assert self.saga.open_tasks.keys() | self.saga.endings.keys() == set(self.saga.submitted.services)
            assert not self.saga.open_tasks.keys() & self.saga.endings.keys()

    @invariant()
    def the_counts_add_up(self) -> None:
        if self.facts and isinstance(self.facts[-1], JobCompleted | JobFailed):
            closing, endings = self.facts[-1], [fact for fact in self.facts if isinstance(fact, TERMINAL)]
            assert sum(closing.counts.model_dump().values()) == len(self._submitted().services) == len(endings)
            assert closing.counts.succeeded == sum(isinstance(fact, TaskCompleted) for fact in endings)
            assert isinstance(closing, JobCompleted) == (closing.counts.succeeded > 0)

    @invariant()
    def no_task_has_more_attempts_than_the_rules_allow(self) -> None:
        attempts = [task.attempt for fact in self.facts if isinstance(fact, TasksDispatched) for task in fact.tasks]
        assert all(1 <= attempt <= 2 for attempt in attempts)

    @invariant()
    def no_command_is_sent_twice(self) -> None:
        ids = [task.command_id for task in self._commands()]
        assert len(ids) == len(set(ids))

    @invariant()
    def an_open_job_has_something_due_by_its_expiry(self) -> None:
        if self.saga is not None:
            due = due_at(self.saga, RULES)
            assert due is None if self.saga.closed else due is not None and due <= NOW + LIFETIME

    def teardown(self) -> None:
        """Whatever happened: a look at the clock after the expiry ends the job."""
        if self.saga is not None:
            self.now = max(self.now, NOW + LIFETIME)
            self._expire()
            assert self.saga.closed

    # --- How ----------------------------------------------------------------------------------------------------------

    def _expire(self) -> None:
        assert self.saga is not None
        ids = {service: self.new_id() for service in Service}
        command = ExpireTasks(self.saga.submitted.job_id, self.now, self.relayed_until)
        facts = expire_tasks(self.saga, command, next_command_ids=ids, rules=RULES)
        for fact in facts:
            if isinstance(fact, TasksDispatched):
                self._must_be_allowed(fact)
        self._append(facts)

    def _must_be_allowed(self, again: TasksDispatched) -> None:
        """Nothing is dispatched again before the relay has passed it on, nor after the job's time."""
        assert self.saga is not None
        assert self.now < self.saga.submitted.expires_at
        for task in again.tasks:
            dispatched_at = self.saga.open_tasks[task.service].dispatched_at
            assert dispatched_at is None or dispatched_at <= self.relayed_until

    def _take_in(self, outcome: TaskOutcome) -> None:
        assert self.saga is not None
        facts = record_outcome(self.saga, outcome, next_command_id=self.new_id(), now=self.now, rules=RULES)
        self.outcomes.append(outcome)
        self._append(facts)

    def _append(self, facts: Sequence[JobFact]) -> None:
        for fact in facts:
            self.saga = evolve(self.saga, fact)
        self.facts.extend(facts)

    def _submitted(self) -> JobSubmitted:
        first = self.facts[0]
        assert isinstance(first, JobSubmitted)
        return first

    def _commands(self) -> list[Task]:
        return [task for fact in self.facts if isinstance(fact, TasksDispatched) for task in fact.tasks]

    def _outcome(self, task: Task, ending: Ending) -> TaskOutcome:
        return TaskOutcome(
            job_id=self._submitted().job_id,
            command_id=task.command_id,
            service=task.service,
            attempt=task.attempt,
            worker="worker-1",
            duration_ms=5,
            ended_at=self.now,
            ending=ending,
        )

    def _ending(self, name: str, wait_s: int) -> Ending:
        deferred = Deferred(until=self.now + timedelta(seconds=wait_s), reason=DeferReason.QUOTA)
        endings: dict[str, Ending] = {
            "success": success(),
            "permanent": PERMANENT,
            "transient": TRANSIENT,
            "out of time": OUT_OF_TIME,
            "skipped": REFUSED,
            "deferred": deferred,
        }
        return endings[name]


OneJob.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestOneJob = OneJob.TestCase
