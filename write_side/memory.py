"""The in-memory twin of the relay's ledger. It ships with the product and passes the same contract suite."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from events.batching import happens_within
from events.chain import GENESIS
from events.memory import MemoryStore
from write_side.checkpoints import COMMANDS, FACTS, HEARTBEAT_S, SILENCE_MAX_S, Checkpoint, LeadershipLost

Answer = TypeVar("Answer")


class MemoryLedgers:
    """The database's side: who leads, and both checkpoints. A leader that has been silent for too long leads no more."""

    def __init__(self, store: MemoryStore, *, silence_max_s: float = SILENCE_MAX_S) -> None:
        self.checkpoints = {name: Checkpoint(0, GENESIS) for name in (COMMANDS, FACTS)}
        self._store = store
        self._silence_max_s = silence_max_s
        self._leader: MemoryLedger | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator["MemoryLedger"]:
        ledger = MemoryLedger(self, self._store)
        try:
            yield ledger
        finally:
            self.close(ledger)

    def close(self, ledger: "MemoryLedger") -> None:
        """What the end of a connection does: the lead goes with it."""
        self._store.unlisten(ledger.appended)
        if self._leader is ledger:
            self._leader = None

    def take_lead(self, ledger: "MemoryLedger") -> bool:
        ledger.heard_at = asyncio.get_running_loop().time()
        if self._leader is None or self._is_silent(self._leader):
            self._leader = ledger
        return self._leader is ledger

    def hear(self, ledger: "MemoryLedger") -> None:
        """Raises `LeadershipLost` for one whose silence has cost it the lead."""
        if self._leader is not ledger or self._is_silent(ledger):
            self.close(ledger)
            raise LeadershipLost("The leader was silent for too long.")
        ledger.heard_at = asyncio.get_running_loop().time()

    def read(self, ledger: "MemoryLedger") -> dict[str, Checkpoint]:
        self.hear(ledger)
        return dict(self.checkpoints)

    def move(self, ledger: "MemoryLedger", name: str, checkpoint: Checkpoint) -> None:
        self.hear(ledger)
        if self.checkpoints[name].position >= checkpoint.position:
            raise LeadershipLost("The checkpoint stands further than ours: somebody else leads.")
        self.checkpoints[name] = checkpoint

    def _is_silent(self, ledger: "MemoryLedger") -> bool:
        return asyncio.get_running_loop().time() - ledger.heard_at >= self._silence_max_s


class MemoryLedger:
    """A `RelayLedger`: one relay's connection."""

    def __init__(self, ledgers: MemoryLedgers, store: MemoryStore) -> None:
        self.heard_at = asyncio.get_running_loop().time()
        self.appended = asyncio.Event()
        self._ledgers = ledgers
        self._store = store

    async def lead(self) -> None:
        while not await self._ask(lambda: self._ledgers.take_lead(self)):  # noqa: ASYNC110 - as the database's lock is taken
            await asyncio.sleep(HEARTBEAT_S)
        self._store.listen(self.appended)

    async def read(self) -> dict[str, Checkpoint]:
        return await self._ask(lambda: self._ledgers.read(self))

    async def move(self, name: str, checkpoint: Checkpoint) -> None:
        await self._ask(lambda: self._ledgers.move(self, name, checkpoint))

    async def wait_for_more(self, within_s: float = HEARTBEAT_S) -> bool:
        if not await happens_within(self.appended, within_s):
            return False
        self.appended.clear()
        return True

    async def keep_alive(self) -> None:
        await self._ask(lambda: self._ledgers.hear(self))

    async def _ask(self, question: Callable[[], Answer]) -> Answer:
        """How a question comes to the database: at once. A simulated network takes its time here."""
        return question()
