"""Standing: the log says whether anybody still waits for an item."""

from typing import Any
from uuid import UUID

import pytest

from domain.commands import LookUp
from events.catalog import TOPICS
from events.facts import TaskTimedOut
from events.store import StoreUnavailable
from tests.builders import (
    PING,
    RDAP,
    at,
    completed,
    counts,
    deferred,
    dispatched,
    failed,
    given,
    job_cancelled,
    job_completed,
    look_up_command,
    memory_store,
    submitted,
    timed_out,
)
from workers.standing import LogStanding

OPEN: list[Any] = [submitted(PING, RDAP), dispatched(PING, RDAP)]


@pytest.mark.parametrize(
    ("facts", "item", "wanted"),
    [
        (OPEN, look_up_command(PING), True),
        ([*OPEN, completed(RDAP)], look_up_command(PING), True),
        ([*OPEN, completed(PING)], look_up_command(PING), False),
        ([*OPEN, failed(PING)], look_up_command(PING), False),
        ([*OPEN, timed_out(PING)], look_up_command(PING), False),
        ([*OPEN, dispatched(PING, attempt=2)], look_up_command(PING), False),
        ([*OPEN, dispatched(PING, attempt=2)], look_up_command(PING, attempt=2), True),
        ([*OPEN, deferred(PING, until=at(9))], look_up_command(PING), False),
        ([*OPEN, deferred(PING, until=at(9)), dispatched(PING, dispatch=2)], look_up_command(PING), False),
        ([*OPEN, completed(PING), completed(RDAP), job_completed(counts(succeeded=2))], look_up_command(PING), False),
        ([*OPEN, job_cancelled()], look_up_command(PING), False),
        (OPEN, look_up_command(PING, job_id=UUID(int=4711)), False),
    ],
)
async def test_an_item_is_wanted_while_its_own_dispatch_is_the_last_and_unanswered(
    facts: list[Any], item: LookUp, wanted: bool
) -> None:
    store = memory_store()
    await given(store, *facts)

    assert await LogStanding(store).is_wanted(item) is wanted


async def test_without_the_log_every_item_is_wanted() -> None:
    """To look something up for nobody is waste; not to look it up for somebody is a task that never ends well."""

    class Down:
        async def read(self, _: object) -> None:
            raise StoreUnavailable

    store: Any = Down()
    assert await LogStanding(store).is_wanted(look_up_command(PING))


async def test_what_a_newer_saga_wrote_does_not_stop_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are never replaced in one instant, and the saga goes first."""
    store = memory_store()
    topics: dict[Any, str] = TOPICS  # type: ignore[assignment]
    with monkeypatch.context() as newer:
        newer.setitem(topics, TaskTimedOut, "lookup.TaskTimedOut.v9")
        await given(store, *OPEN, timed_out(RDAP))

    assert await LogStanding(store).is_wanted(look_up_command(PING))
