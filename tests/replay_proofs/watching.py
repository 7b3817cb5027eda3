"""Clients that poll over HTTP, and the board on which they note what anybody was shown of each job, and what was wrong.

An answer is wrong if it is an error, or shows less than was shown to anybody before it was asked for: an earlier position,
other bytes of the same position, or an open job that had ended.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import aiohttp

from tests.e2e.journey import CLOSED, check_document

POLL_MAX_S = 20.0
WRONG_MAX = 20
REBUILDING = 503
"""What a poll of a job that nobody has seen yet may get while no projector lives; never a 404."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What an answer showed of a job. Positions are of the log; `digest` is of the whole document."""

    position: int
    digest: bytes
    closed: bool
    etag: str


NOTHING = Shown(0, b"", closed=False, etag="")


@dataclass
class Board:
    """`may_wait`: whether a job that nobody has seen yet may be answered with 503. `began`: from when on times are told."""

    may_wait: bool = False
    seen: dict[str, Shown] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    began: float = field(default_factory=time.monotonic)

    @property
    def polls(self) -> int:
        return sum(self.statuses.values())

    def note(self, job_id: str, floor: Shown, found: Shown) -> None:
        """`floor` is what anybody had been shown when this was asked for."""
        if found.position < floor.position:
            self.complain(f"{job_id}: position {found.position} after {floor.position} was shown")
        elif found.position == floor.position and found.digest != floor.digest:
            self.complain(f"{job_id}: another document of position {found.position}")
        elif floor.closed and not found.closed:
            self.complain(f"{job_id}: open again at position {found.position}")
        if found.position > self.seen.get(job_id, NOTHING).position:
            self.seen[job_id] = found

    def complain(self, what: str) -> None:
        if len(self.wrong) < WRONG_MAX:
            self.wrong.append(f"after {time.monotonic() - self.began:.1f} s: {what}")


@dataclass
class Clients:
    """Clients of one query service. Each polls what `choose` gives it, after a pause of about `pause_s`."""

    read_url: str
    board: Board
    choose: Callable[[int, random.Random], str | None]
    pause_s: float
    seed: int = 1
    _tasks: list["asyncio.Task[None]"] = field(default_factory=list)
    _http: aiohttp.ClientSession | None = None

    def start(self, clients: int) -> None:
        timeout = aiohttp.ClientTimeout(total=POLL_MAX_S)
        self._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
        self._tasks = [asyncio.create_task(self._poll_on(number)) for number in range(clients)]

    async def stop(self) -> None:
        """Raises what a client raised that was not an answer."""
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._http is not None:
            await self._http.close()
        for error in ended:
            if isinstance(error, BaseException) and not isinstance(error, asyncio.CancelledError):
                raise error

    async def _poll_on(self, number: int) -> None:
        chance = random.Random(self.seed * 1_000_003 + number)
        mine: dict[str, str] = {}
        await asyncio.sleep(chance.uniform(0, self.pause_s))
        while True:
            job_id = self.choose(number, chance)
            if job_id is not None:
                # Half of the polls are those of a client that knows the document already.
                await self.poll(job_id, mine.get(job_id) if chance.random() < 0.5 else None, mine)
            await asyncio.sleep(chance.uniform(0.5, 1.5) * self.pause_s)

    async def poll(self, job_id: str, etag: str | None, mine: dict[str, str]) -> None:
        assert self._http is not None
        board = self.board
        floor, began = board.seen.get(job_id, NOTHING), time.monotonic()
        headers = {} if etag is None else {"If-None-Match": etag}
        try:
            async with self._http.get(f"{self.read_url}/api/lookup/{job_id}", headers=headers) as answer:
                body = await answer.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            board.statuses[0] += 1
            board.complain(f"{job_id}: no answer ({type(error).__name__})")
            return
        board.slowest_s = max(board.slowest_s, time.monotonic() - began)
        board.statuses[answer.status] += 1
        told = answer.headers.get("ETag", "")
        if answer.status == 304:
            self._is_unchanged(job_id, told, floor)
        elif answer.status == 200:
            document = await answer.json()
            check_document(document)
            mine[job_id] = told
            board.note(job_id, floor, Shown(position_of(told), sha256(body).digest(), document["status"] in CLOSED, told))
        elif not (board.may_wait and answer.status == REBUILDING and floor is NOTHING):
            board.complain(f"{job_id}: {answer.status} {body[:100]!r}, with position {floor.position} shown before")

    def _is_unchanged(self, job_id: str, etag: str, floor: Shown) -> None:
        if position_of(etag) < floor.position:
            self.board.complain(f"{job_id}: unchanged since {position_of(etag)} after {floor.position} was shown")


def position_of(etag: str) -> int:
    return int(etag.strip('"').partition("-")[2])


def newest_or_any(jobs: Sequence[str], chance: random.Random, newest: int = 30) -> str | None:
    """Half of the time one of the newest jobs, which move; else any."""
    if not jobs:
        return None
    return chance.choice(jobs[-newest:] if chance.random() < 0.5 else jobs)
