"""What is broken when: chosen by a seed, so that a run can be had again."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from tests.e2e.deployment import EACH_ALONE


@dataclass(frozen=True)
class Layout:
    """The parts of each process; which processes are frozen now and then, and which have a twin that waits for its turn."""

    processes: Mapping[str, Sequence[str]]
    frozen: Sequence[str]
    twins: Sequence[str] = ()


ALONE = Layout(EACH_ALONE, frozen=("relay", "projector"), twins=("relay", "projector"))
NEIGHBOURS = Layout(
    {
        "write": ["write", "relay", "saga", "projector"],
        "read": ["read"],
        "core": ["relay", "saga", "projector"],
        "worker": ["worker"],
    },
    frozen=("core",),
)
"""Two processes in which facts go from neighbour to neighbour; one of them leads, and both append."""
LAYOUTS = {"alone": ALONE, "neighbours": NEIGHBOURS}


class Blow(StrEnum):
    """What is done to a victim."""

    KILL = "kill -9"
    FREEZE = "SIGSTOP"


@dataclass(frozen=True)
class Step:
    """One blow, after so many jobs more have been accepted; the victim is back (or thawed) after `down_s`."""

    jobs: int
    victim: str
    blow: Blow
    down_s: float

    def __str__(self) -> str:
        return f"{self.blow} {self.victim} for {self.down_s:.1f} s"


@dataclass(frozen=True)
class Plan:
    """`kills` of each process and `server_kills` of each server, `freezes` of those that are frozen, over `jobs` jobs."""

    seed: int
    jobs: int
    kills: int
    server_kills: int
    freezes: int
    servers: Sequence[str]
    lifetime_s: int = 240
    redispatch_after_s: int = 60
    layout: Layout = ALONE

    def steps(self) -> list[Step]:
        chance = random.Random(self.seed)
        blows = [
            *((part, Blow.KILL) for part in self.layout.processes for _ in range(self.kills)),
            *((server, Blow.KILL) for server in self.servers for _ in range(self.server_kills)),
            *((part, Blow.FREEZE) for part in self.layout.frozen for _ in range(self.freezes)),
        ]
        chance.shuffle(blows)
        return list(self._paced(blows, chance))

    def _paced(self, blows: Sequence[tuple[str, Blow]], chance: random.Random) -> Iterator[Step]:
        """Spread over the traffic: a blow now and then, sometimes two in short succession."""
        average = self.jobs / (len(blows) + 1)
        for victim, blow in blows:
            # Longer than the lease and the lock last, so that a successor takes over and the frozen one wakes into its reign.
            down_s = chance.uniform(6.0, 9.0) if blow is Blow.FREEZE else chance.uniform(0.0, 1.0)
            yield Step(int(average * chance.uniform(0.2, 1.6)), victim, blow, down_s)
