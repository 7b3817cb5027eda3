"""The crash test: real servers and the parts in several processes, killed and frozen under a steady load.

Afterwards: every accepted job has ended, once, with the right answer; no deadline was missed; `lookup doctor` finds nothing;
and the views are what a fresh fold of the log gives.
"""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.plan import Blow, Plan, Step
from tests.e2e import independent_check
from tests.e2e.deployment import HTTP, Deployment
from tests.e2e.journey import client_of
from tests.e2e.processes import lookup, until
from tests.e2e.served import Served, serving_peers
from tests.e2e.traffic import Traffic, all_closed, assert_ended_in_time, at

TIMEOUT_S = '{"GeoIP": 5, "Ping": 5, "RDAP": 5, "ReverseDNS": 5}'
SLACK_S = 30.0
STEP_S = 60.0

Say = Callable[[str], None]


@dataclass
class Report:
    """What a run came to."""

    plan: Plan
    transport: str
    took_s: float = 0.0
    tried: int = 0
    accepted: int = 0
    in_log: int = 0
    facts: int = 0
    second_attempts: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    blows: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        blows = ", ".join(f"{blow} {count}x" for blow, count in sorted(self.blows.items()))
        statuses = ", ".join(f"{status} {count}" for status, count in sorted(self.statuses.items()))
        return "\n".join(
            (
                f"seed {self.plan.seed}, {self.transport}: {self.took_s:.0f} s",
                f"  blows              {sum(self.blows.values())}: {blows}",
                f"  requests           {self.tried}, of which {self.accepted} were accepted",
                f"  jobs in the log    {self.in_log} with {self.facts} facts",
                "  lost 0, stuck 0, outcomes counted twice 0; every view is the fold of its facts",
                f"  tasks              {statuses}; {self.second_attempts} needed a second attempt",
                f"  slowest job        {self.slowest_s:.1f} s",
            )
        )


class Chaos:
    """One run of a plan on a deployment of its own."""

    def __init__(self, plan: Plan, folder: Path, say: Say) -> None:
        self.plan = plan
        self._folder = folder
        self._say = say
        self.report = Report(plan, "RabbitMQ" if "rabbitmq" in plan.servers else "Redis streams")

    async def run(self, pace_s: float) -> Report:
        """Raises `AssertionError` with what was broken."""
        started_at = time.monotonic()
        async with serving_peers(self._folder / "peers") as peers:
            env = {**peers.environment(), **self._times()}
            folder = self._folder / "deployment"
            deployment = Deployment(folder, env, self.plan.layout.processes, with_rabbitmq="rabbitmq" in self.plan.servers)
            try:
                await deployment.start()
                for name in self.plan.layout.twins:
                    deployment.launch(name, twin="-twin")
                async with client_of(deployment.write_url, deployment.read_url) as client:
                    traffic = Traffic(client)
                    await self._break_under_load(deployment, traffic, pace_s)
                    await self._check(deployment, traffic, peers)
            finally:
                await deployment.stop()
        self.report.took_s = time.monotonic() - started_at
        return self.report

    def _times(self) -> dict[str, str]:
        return {
            "LOOKUP_INTERACTIVE_LIFETIME_S": str(self.plan.lifetime_s),
            "LOOKUP_REDISPATCH_AFTER_S": str(self.plan.redispatch_after_s),
            "LOOKUP_TIMEOUT_S": TIMEOUT_S,
        }

    async def _break_under_load(self, deployment: Deployment, traffic: Traffic, pace_s: float) -> None:
        breaking = asyncio.create_task(self._break(deployment, traffic))
        await traffic.submit_while(lambda: not breaking.done() or len(traffic.accepted) < self.plan.jobs, pace_s)
        await breaking
        await traffic.follow_all(self.plan.lifetime_s + SLACK_S)
        await until(lambda: all_closed(deployment.database_url), self.plan.lifetime_s, "jobs whose answer was lost to end")

    async def _check(self, deployment: Deployment, traffic: Traffic, peers: Served) -> None:
        finished = traffic.client.finished
        assert finished.keys() == set(traffic.accepted)
        assert_ended_in_time(finished, self.plan.lifetime_s)
        log = independent_check.check(deployment.database_url, finished, peers)
        examined = await lookup("doctor", "--json", cwd=self._folder, env=deployment.environment("doctor"))
        assert examined.code == 0, f"lookup doctor found something:\n{examined.out}\n{examined.err}"
        _sum_up(self.report, traffic, log)

    async def _break(self, deployment: Deployment, traffic: Traffic) -> None:
        wanted = 0
        mending: set[asyncio.Task[None]] = set()
        for number, step in enumerate(self.plan.steps(), start=1):
            wanted = max(wanted, len(traffic.accepted)) + step.jobs
            await traffic.has_come_to(accepted=wanted)
            await self._back(step.victim, mending)
            self._say(f"{number:>4}  after {len(traffic.accepted):>5} jobs: {step}")
            self.report.blows[f"{step.blow} {step.victim}"] += 1
            task = asyncio.create_task(_strike(deployment, step), name=step.victim)
            mending.add(task)
        await asyncio.gather(*mending)

    async def _back(self, victim: str, mending: set["asyncio.Task[None]"]) -> None:
        """Nobody is struck who still lies on the ground."""
        for task in [task for task in mending if task.done() or task.get_name() == victim]:
            async with asyncio.timeout(STEP_S):
                await task
            mending.discard(task)


async def _strike(deployment: Deployment, step: Step) -> None:
    servers = {server.name: server for server in deployment.servers}
    if step.victim in servers:
        server = servers[step.victim]
        server.kill()
        await asyncio.sleep(step.down_s)
        server.launch()
        await server.ready()
        return
    part = deployment.parts[step.victim]
    if step.blow is Blow.FREEZE:
        part.send(signal.SIGSTOP)
        await asyncio.sleep(step.down_s)
        part.send(signal.SIGCONT)
        return
    part.send(signal.SIGKILL)
    await part.ended()
    await asyncio.sleep(step.down_s)
    deployment.launch(step.victim)
    if step.victim in HTTP:
        await deployment.parts[step.victim].listens()


def _sum_up(report: Report, traffic: Traffic, log: independent_check.Log) -> None:
    report.tried, report.accepted = traffic.tried, len(traffic.accepted)
    report.in_log = len(log.jobs)
    report.facts = sum(len(stream) for stream in log.jobs.values())
    for document in traffic.client.finished.values():
        for result in document["results"]:
            report.statuses[result["status"]] += 1
            report.second_attempts += result["attempt"] > 1
    report.slowest_s = max((_took_s(stream) for stream in log.jobs.values()), default=0.0)


def _took_s(stream: Sequence[independent_check.Row]) -> float:
    closed = stream[-1].fields
    ended_at = closed["completed_at" if stream[-1].name == "JobCompleted" else "failed_at"]
    return (at(ended_at) - at(stream[0].fields["submitted_at"])).total_seconds()
