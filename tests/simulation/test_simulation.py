"""The whole system under a thousand seeds of trouble: nothing is lost, nothing is stuck, nothing counts twice."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from inspect import signature
from typing import Any

import pytest

from tests.simulation.mutants import MUTANTS, Mutant
from tests.simulation.world import Report, simulate

SEEDS = 1_000
CAUGHT_WITHIN = 300
FOUND_ONCE = (37, 43, 1051, 1148, 1178, 1185)
"""Seeds that once found a bug. What they find depends on everything that is drawn before it, so they are kept for company."""

HAPPENED = (
    # What goes wrong:
    "call_lost",
    "answer_lost",
    "call_slow",
    "append_refused",
    "append_in_doubt",
    "publish_refused",
    "message_dropped",
    "message_duplicated",
    "message_delayed",
    "message_reordered",
    "ack_lost",
    "freeze",
    "partition",
    "outage",
    "lose_views",
    "roll_back_views",
    "empty_broker",
    "delete_queue",
    "gentle",
    "purge",
    "killed: write",
    "killed: relay",
    "killed: saga",
    "killed: projector",
    "killed: worker",
    "killed: together",
    # What it leads to:
    "dispatched again",
    "deferred",
    "deadlines: TasksDispatched",
    "deadlines: TaskTimedOut",
    "version conflict of gather",
    "version conflict of deadlines",
    "version conflict of client",
    "a repeated outcome was ignored",
    "a submission was there already",
    "a superseded command was dropped",
    "redelivered",
    "worker gave commands back or split them",
    "relay took over from a silent leader",
    "relay read the open jobs from the log",
    "saga read the open jobs from the log",
    "another projector took the lead",
    "a neighbour had facts first",
    "commit refused: fenced",
    "commit refused: checkpoint",
    "commit refused: generation",
    "relay ended with LeadershipLost",
    "projector ended with Superseded",
    "client was told StoreUnavailable",
    "client was told OutcomeUnknown",
    "task Succeeded",
    "task Failed",
    "task TimedOut",
    "task Skipped",
    "job Completed",
    "job Failed",
)


@cache
def reports() -> list[Report]:
    """Run once for all tests that look at them."""
    return [simulate(seed) for seed in range(SEEDS)]


@pytest.mark.timeout(600)
def test_whatever_goes_wrong_every_promise_holds() -> None:
    for report in reports():
        assert report.broken is None, str(report)


@pytest.mark.timeout(600)
def test_everything_that_can_go_wrong_did() -> None:
    """A simulation whose faults do not happen proves nothing."""
    counts: Counter[str] = Counter()
    for report in reports():
        counts.update(report.counts)

    assert [what for what in HAPPENED if not counts[what]] == []


@pytest.mark.parametrize("seed", FOUND_ONCE)
def test_what_was_found_once_stays_found(seed: int) -> None:
    report = simulate(seed)
    assert report.broken is None, str(report)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_deliberate_bug_is_called_like_what_it_replaces(mutant: Mutant) -> None:
    """Else it is caught for that, and nobody knows whether it would be for what it does."""
    for owner, name, wrong in mutant.patches:
        assert parameters_of(wrong) == parameters_of(getattr(owner, name))


def parameters_of(method: Callable[..., Any]) -> list[tuple[str, Any]]:
    """Names and kinds, without the object's own."""
    return [(parameter.name, parameter.kind) for parameter in signature(method).parameters.values()][1:]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_deliberate_bug_is_caught(mutant: Mutant) -> None:
    with mutant.on():
        caught = next(_broken_ones(), None)

    assert caught is not None, f"{CAUGHT_WITHIN} seeds noticed nothing of: {mutant.name}."
    assert simulate(caught.seed).broken is None


def _broken_ones() -> Iterator[Report]:
    return (report for report in map(simulate, range(CAUGHT_WITHIN)) if report.broken is not None)


def test_one_seed_is_one_run_in_any_process() -> None:
    """Also where strings hash differently, and what runs before has left its garbage."""
    here = [simulate(seed).digest for seed in range(20, 26)]

    code = "from tests.simulation.world import simulate\nfor seed in range(20, 26): print(simulate(seed).digest)"
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, env=environment)
        assert told.stdout.split() == here


def test_different_seeds_are_different_runs() -> None:
    assert len({simulate(seed).digest for seed in range(20, 30)}) == 10
