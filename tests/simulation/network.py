"""The simulated network: every call takes its time, and may be lost on its way there or back.

A call is carried out on the server's side, whatever becomes of its caller meanwhile: what a process sent before it died may
still arrive after its successor's first words.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Any, TypeVar

from tests.simulation.loop import Process, SimulatedLoop

Answer = TypeVar("Answer")

STORE, DOCUMENTS, BROKER, VIEWS = "store", "documents", "broker", "views"
SERVERS = (STORE, DOCUMENTS, BROKER, VIEWS)
LATENCY_S = 0.03
SLOW_MAX_S = 3.0
UNREACHABLE_S = 0.2
CLEARED_EACH_S = 0.1


@dataclass(frozen=True)
class Faults:
    """How often something goes wrong: the probability for each call or message. Nothing does unless it is said."""

    call_lost: float = 0.0
    answer_lost: float = 0.0
    call_slow: float = 0.0
    append_refused: float = 0.0
    append_in_doubt: float = 0.0
    publish_refused: float = 0.0
    message_dropped: float = 0.0
    message_duplicated: float = 0.0
    message_delayed: float = 0.0
    message_reordered: float = 0.0
    ack_lost: float = 0.0

    @classmethod
    def drawn(cls, chance: Random, share: float) -> "Faults":
        """Some kinds at some rate, the others not at all: rare combinations come up often when each run has few kinds."""
        drawn = {kind.name: chance.random() * share for kind in fields(cls) if chance.random() < 0.5}
        return replace(cls(), **drawn)


@dataclass
class Network:
    """Which process reaches which server, and how well."""

    loop: SimulatedLoop
    chance: Random
    faults: Faults
    counts: Counter[str]
    servers: Process
    """Where calls are carried out."""

    def __post_init__(self) -> None:
        self.down: set[str] = set()
        self.cut: set[tuple[str, str]] = set()

    def happens(self, kind: str) -> bool:
        """Whether this fault happens now; counted."""
        rate = getattr(self.faults, kind)
        if rate and self.chance.random() < rate:
            self.counts[kind] += 1
            return True
        return False

    def reaches(self, process: Process, server: str) -> bool:
        return server not in self.down and (process.name, server) not in self.cut

    def latency_s(self) -> float:
        slow = self.chance.random() * SLOW_MAX_S if self.happens("call_slow") else 0.0
        return 0.001 + self.chance.random() ** 3 * LATENCY_S + slow

    def later(self, delay_s: float, do: Callable[..., object], *args: Any) -> None:
        """Carry something out on the servers' side after a while."""
        self.loop.call_later(delay_s, do, *args, context=self.servers.context)


@dataclass
class Link:
    """One process's way to one server."""

    network: Network
    process: Process
    server: str

    def is_up(self) -> bool:
        return self.network.reaches(self.process, self.server)

    async def is_cleared(self) -> None:
        """Wait until the server can be reached."""
        while not self.is_up():  # noqa: ASYNC110 - as a client that tries to connect again
            await asyncio.sleep(CLEARED_EACH_S)

    async def call(
        self,
        effect: Callable[[], Answer],
        unreachable: Callable[[], Exception],
        *,
        in_doubt: Callable[[], Exception] | None = None,
    ) -> Answer:
        """Have the server do something, and give its answer.

        Raises `unreachable` when it was not done, `in_doubt` (or the same) when it was and nobody heard of it.
        """
        answer: asyncio.Future[Answer] = self.network.loop.create_future()
        self.network.later(self.network.latency_s(), self._arrive, effect, answer, unreachable, in_doubt or unreachable)
        return await answer

    def _arrive(
        self,
        effect: Callable[[], Answer],
        answer: "asyncio.Future[Answer]",
        unreachable: Callable[[], Exception],
        in_doubt: Callable[[], Exception],
    ) -> None:
        if not self.is_up() or self.network.happens("call_lost"):
            self.network.later(UNREACHABLE_S, _fail, answer, unreachable())
            return
        try:
            done = effect()
        except Exception as error:  # noqa: BLE001 - the server's refusal is the caller's to judge
            self.network.later(self.network.latency_s(), _fail, answer, error)
            return
        self.network.later(self.network.latency_s(), self._return, done, answer, in_doubt)

    def _return(self, done: Answer, answer: "asyncio.Future[Answer]", in_doubt: Callable[[], Exception]) -> None:
        if not self.is_up() or self.network.happens("answer_lost"):
            self.network.later(UNREACHABLE_S, _fail, answer, in_doubt())
        elif not answer.done():
            answer.set_result(done)


def _fail(answer: "asyncio.Future[Any]", error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
