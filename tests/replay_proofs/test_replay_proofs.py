"""The short forms; `python -m tests.replay_proofs` has the long ones."""

from pathlib import Path

import pytest

from tests.replay_proofs import clients, kills

pytestmark = pytest.mark.timeout(300)


@pytest.mark.long
async def test_views_are_those_of_a_clean_rebuild_however_often_the_projector_is_killed(servers_folder: Path) -> None:
    """And who polled meanwhile never saw anything older than what somebody had seen before."""
    plan = kills.Plan(kills=5, facts=200, freezes=1, pace_s=0.25, waits_for_lease=False)

    report = await kills.Kills(plan, servers_folder / "kills", print).run()

    assert len(report.behind) == plan.kills
    assert report.freezes == plan.freezes


async def test_who_polls_while_views_are_replayed_sees_no_error_and_nothing_older(servers_folder: Path) -> None:
    plan = clients.Plan(clients=20, pause_s=0.5, pace_s=0.4)

    report = await clients.Polled(plan, servers_folder / "clients", print).run()

    assert [replay.told.get("shown") for replay in report.replays] == [True, True, None]
