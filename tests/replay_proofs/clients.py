"""A thousand clients poll while `lookup replay` runs, as a process of its own, once of all views and once of one; and back.

Each polls the job that it has submitted itself, jobs of others, and jobs that are submitted meanwhile.
"""

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.replay_log import fill
from tests.e2e.processes import LookupProcess
from tests.replay_proofs.judging import Judgement
from tests.replay_proofs.site import Say, Site, standing_site
from tests.replay_proofs.watching import Board, Clients, newest_or_any

REPLAYS = (("--json",), ("--view", "job_status", "--json"), ("--rollback", "--view", "job_status", "--json"))
REPLAY_S = 600.0
SEEN_S = 120.0


@dataclass(frozen=True, slots=True)
class Plan:
    """`history` facts are in the log before anybody comes (a multiple of ten); `rate` bounds each replay."""

    clients: int
    history: int = 0
    pause_s: float = 2.0
    pace_s: float = 0.3
    rate: float | None = None
    seed: int = 1


@dataclass
class Replay:
    """One run of the command, and how many polls were answered while it ran."""

    words: str
    after_s: float
    took_s: float
    polls: int
    told: dict[str, Any]

    @property
    def differences(self) -> dict[str, Any]:
        """What it said would change, by view; a rollback says nothing of it."""
        views = self.told["views"]
        found = views.items() if isinstance(views, dict) else ()
        return {view: one for view, one in found if any(one["counts"][kind] for kind in ("changed", "added", "gone"))}


@dataclass
class Report:
    plan: Plan
    took_s: float = 0.0
    jobs: int = 0
    replays: list[Replay] = field(default_factory=list)
    board: Board = field(default_factory=Board)
    judgement: Judgement | None = None

    def __str__(self) -> str:
        board = self.board
        statuses = ", ".join(f"{status}: {count}" for status, count in sorted(board.statuses.items()))
        return "\n".join(
            (
                f"{self.plan.clients} clients, {self.plan.history} facts of history, {self.took_s:.0f} s",
                f"  jobs               {self.jobs}, of which {self.jobs - self.plan.clients} were submitted beside the replays",
                *(_line(replay) for replay in self.replays),
                f"  polls              {board.polls} ({statuses}), the slowest {board.slowest_s:.2f} s",
                f"  wrong              {len(board.wrong)}",
                f"  against a rebuild  {self.judgement}",
            )
        )


def _line(replay: Replay) -> str:
    folded = f", {replay.told['events']} facts" if "events" in replay.told else ""
    when = f"after {replay.after_s:.1f} s for {replay.took_s:.1f} s"
    return f"  lookup replay {replay.words}: {when}{folded}, {replay.polls} polls meanwhile"


class Polled:
    """One run of a plan on a site of its own."""

    def __init__(self, plan: Plan, folder: Path, say: Say) -> None:
        self.plan = plan
        self.report = Report(plan)
        self._folder = folder
        self._say = say

    async def run(self) -> Report:
        """Raises `AssertionError` with what was broken."""
        began = time.monotonic()
        async with standing_site(self._folder, self._fill) as site:
            await site.is_caught_up()
            self._say(f"The views have all {await site.head()} facts of the history.")
            while len(site.jobs) < self.plan.clients:
                await site.submit()
            # A thousand jobs at once are more than a small machine has in its views within the time that a poll waits.
            await site.is_quiet()
            clients = Clients(
                site.deployment.read_url,
                self.report.board,
                lambda number, chance: _choice(site, number, chance),
                self.plan.pause_s,
                self.plan.seed,
            )
            self.report.judgement = await site.judged(clients, self.plan.clients, self._replay_under_load)
            self.report.jobs = len(site.jobs)
        self.report.took_s = time.monotonic() - began
        self._say(str(self.report))
        self._must_hold()
        return self.report

    def _must_hold(self) -> None:
        judgement, board = self.report.judgement, self.report.board
        assert board.wrong == [], board.wrong
        assert set(board.statuses) <= {200, 304}
        assert judgement is not None
        assert judgement.wrong == [], judgement.wrong[:5]
        for replay in self.report.replays:
            assert replay.differences == {}, replay
            assert replay.polls > 0

    def _fill(self, database_url: str) -> None:
        if self.plan.history:
            fill(database_url, self.plan.history, self.plan.seed)

    async def _replay_under_load(self, site: Site) -> None:
        replaying = asyncio.create_task(self._replay_all(site))
        await site.submit_while(lambda: not replaying.done(), self.plan.pace_s)
        await replaying

    async def _replay_all(self, site: Site) -> None:
        async with asyncio.timeout(SEEN_S):
            while self.report.board.polls < 2 * self.plan.clients:  # noqa: ASYNC110 - nobody sets an event
                await asyncio.sleep(0.1)
        for number, words in enumerate(REPLAYS):
            self.report.replays.append(await self._replay(site, words, f"replay-{number}"))

    async def _replay(self, site: Site, words: tuple[str, ...], name: str) -> Replay:
        rated = () if self.plan.rate is None or "--rollback" in words else ("--rate", str(self.plan.rate))
        deployment = site.deployment
        replay = LookupProcess("replay", *words, *rated, folder=deployment.folder, env=deployment.environment(name), name=name)
        board = self.report.board
        polls, began = board.polls, time.monotonic()
        replay.launch()
        try:
            code = await replay.ended(REPLAY_S)
        finally:
            await replay.stop()
        assert code == 0, replay.err
        took_s = time.monotonic() - began
        after_s, told = began - board.began, json.loads(replay.out)
        return Replay(" ".join((*words, *rated)), after_s, took_s, board.polls - polls, told)


def _choice(site: Site, number: int, chance: random.Random) -> str | None:
    """Its own job, every third time; else one that others look at as well, and often a new one."""
    return site.jobs[number] if chance.random() < 0.33 else newest_or_any(site.jobs, chance)
