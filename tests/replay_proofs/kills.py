"""`kill -9` of the projector, again and again, while jobs come in and clients poll; and a frozen one that wakes up again."""

import asyncio
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.processes import LookupProcess
from tests.replay_proofs.judging import Judgement
from tests.replay_proofs.site import LOOK_AGAIN_S, Say, Site, standing_site
from tests.replay_proofs.watching import Board, Clients, newest_or_any

POLLERS = 10
POLL_PAUSE_S = 0.1
STEP_S = 60.0
NAME = "projector"


@dataclass(frozen=True, slots=True)
class Plan:
    """`waits_for_lease`: the dead one's lease runs out by itself (5 s); else it ends with its holder."""

    kills: int
    facts: int
    freezes: int = 1
    pace_s: float = 0.2
    seed: int = 1
    waits_for_lease: bool = True


@dataclass
class Report:
    """What a run came to. `behind` has, for each kill, how many facts the log had that the views had not."""

    took_s: float = 0.0
    freezes: int = 0
    behind: list[int] = field(default_factory=list)
    jobs: int = 0
    board: Board = field(default_factory=Board)
    judgement: Judgement | None = None

    def __str__(self) -> str:
        board = self.board
        statuses = ", ".join(f"{status}: {count}" for status, count in sorted(board.statuses.items()))
        at_work = sum(behind > 0 for behind in self.behind)
        return "\n".join(
            (
                f"{len(self.behind)} kills -9 of the projector and {self.freezes} freezes in {self.took_s:.0f} s",
                f"  killed at work     {at_work} had facts to fold, {max(self.behind, default=0)} at most",
                f"  jobs               {self.jobs}",
                f"  polls              {board.polls} by {POLLERS} clients ({statuses})",
                f"  backward or wrong  {len(board.wrong)}",
                f"  against a rebuild  {self.judgement}",
            )
        )


class Kills:
    """One run of a plan on a site of its own."""

    def __init__(self, plan: Plan, folder: Path, say: Say) -> None:
        self.plan = plan
        self.report = Report(board=Board(may_wait=True))
        self._folder = folder
        self._say = say
        self._chance = random.Random(plan.seed)

    async def run(self) -> Report:
        """Raises `AssertionError` with what was broken."""
        began = time.monotonic()
        async with standing_site(self._folder) as site:
            clients = Clients(
                site.deployment.read_url, self.report.board, lambda _, chance: newest_or_any(site.jobs, chance), POLL_PAUSE_S
            )
            self.report.judgement = await site.judged(clients, POLLERS, self._break_under_load)
            self.report.jobs = len(site.jobs)
        self.report.took_s = time.monotonic() - began
        self._say(str(self.report))
        self._must_hold()
        return self.report

    def _must_hold(self) -> None:
        judgement = self.report.judgement
        assert judgement is not None
        assert judgement.wrong == [], judgement.wrong[:5]
        assert self.report.board.wrong == [], self.report.board.wrong
        assert judgement.position >= self.plan.facts
        assert any(self.report.behind), "none was killed at work"

    async def _break_under_load(self, site: Site) -> None:
        breaking = asyncio.create_task(self._break(site))
        await site.submit_while(lambda: not breaking.done(), self.plan.pace_s)
        await breaking

    async def _break(self, site: Site) -> None:
        """The blows are spread over the facts that are wanted."""
        at_work, fence = site.deployment.parts[NAME], await _led(site, None)
        for number in range(1, self.plan.kills + 1):
            await _has_come_to(site, self.plan.facts * number // (self.plan.kills + 1))
            if number <= self.plan.freezes:
                at_work, fence = await self._freeze(site, at_work, fence, number)
            await self._moment(site)
            await self._kill(site, at_work, number)
            at_work = site.deployment.launch(NAME, twin=f"-{number}")
            fence = await _led(site, fence)
        await _has_come_to(site, self.plan.facts)

    async def _moment(self, site: Site) -> None:
        """At once, while the next one still reads what it missed; or after it has moved a little, in the middle of a fold."""
        if self._chance.random() < 0.6:
            stood = await site.checkpoint()
            async with asyncio.timeout(STEP_S):
                while await site.checkpoint() <= stood + self._chance.randrange(3):  # noqa: ASYNC110 - Redis sets no event
                    await asyncio.sleep(0.002)
        await asyncio.sleep(self._chance.uniform(0.0, 0.02))

    async def _kill(self, site: Site, victim: LookupProcess, number: int) -> None:
        victim.send(signal.SIGKILL)
        await victim.ended()
        await self._let_lease_end(site)
        self.report.behind.append(await site.head() - await site.checkpoint())
        if number % 10 == 0:
            self._say(f"{number:>4} kills, {await site.head():>6} facts, {self.report.board.polls:>7} polls")

    async def _freeze(self, site: Site, frozen: LookupProcess, fence: bytes, number: int) -> tuple[LookupProcess, bytes]:
        """It falls silent, another one leads, and then it wakes up in the middle of what it did. It must not lead again."""
        frozen.send(signal.SIGSTOP)
        await self._let_lease_end(site)
        successor = site.deployment.launch(NAME, twin=f"-after-freeze-{number}")
        new = await _led(site, fence)
        frozen.send(signal.SIGCONT)
        await _has_come_to(site, await site.head() + 10)
        await site.is_caught_up()
        assert await site.fence() == new, "the one that woke up leads again"
        self.report.freezes += 1
        frozen.send(signal.SIGKILL)
        await frozen.ended()
        return successor, new

    async def _let_lease_end(self, site: Site) -> None:
        if not self.plan.waits_for_lease:
            await site.redis.delete("views:{0}:lease")


async def _led(site: Site, before: bytes | None) -> bytes:
    """Until another one leads than before; gives its fence."""
    async with asyncio.timeout(STEP_S):
        while (fence := await site.fence()) is None or fence == before:  # noqa: ASYNC110 - Redis sets no event
            await asyncio.sleep(0.002)
    return fence


async def _has_come_to(site: Site, facts: int) -> None:
    while await site.head() < facts:  # noqa: ASYNC110 - PostgreSQL sets no event
        await asyncio.sleep(LOOK_AGAIN_S * 5)
