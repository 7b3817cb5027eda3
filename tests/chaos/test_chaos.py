"""The short form of the crash test; `make chaos` is the long one."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.plan import ALONE, NEIGHBOURS, Layout, Plan
from tests.chaos.run import Chaos

PLAN = Plan(
    seed=4,
    jobs=250,
    kills=2,
    server_kills=1,
    freezes=1,
    servers=("postgres", "valkey", "rabbitmq"),
    lifetime_s=180,
    redispatch_after_s=120,
)
"""What dies has to come again by itself: a deadline that helped would show as a second attempt."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", [pytest.param(ALONE, id="alone"), pytest.param(NEIGHBOURS, id="neighbours")])
async def test_nothing_is_lost_stuck_or_counted_twice_whatever_is_killed_or_frozen(
    servers_folder: Path, layout: Layout
) -> None:
    said: list[str] = []
    plan = replace(PLAN, layout=layout)
    try:
        report = await Chaos(plan, servers_folder / f"chaos{len(layout.processes)}", said.append).run(pace_s=0.1)
    except BaseException:
        print(*said, sep="\n")
        raise
    print(report)

    assert report.accepted >= PLAN.jobs
    assert sum(report.blows.values()) == len(plan.steps())
    assert set(report.statuses) == {"Succeeded"}
    assert report.second_attempts == 0
