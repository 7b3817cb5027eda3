"""Answer: a poller's document in one round trip to Redis, from the views alone; or, to who would rather wait, the job's end.

A job that was taken on a moment ago may not have reached the views yet. Its id says when it was made (UUIDv7), so an unknown id
that is only seconds old is waited for, within a bound; "not found" is said only of what the views would know by now.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from redis.asyncio import Redis
from redis.exceptions import RedisError

from events.batching import Batcher, Overloaded, happens_within
from events.ending import end
from events.ids import made_at_ms
from projections.views import GET_JOBS, JOB_STATUS, Keys

WAIT_MAX_S = 2.0
LOOK_MAX_S = 1.5
LOOK_AGAIN_S = 0.5
BEGUN_S = 0.1
STOP_S = 10.0
WAITERS_MAX = 1_000
LOOKS_MAX = 50
YOUNG_MS = 30_000
"""An id older than what the views have seen by this much is not on its way any more.

An append takes a few seconds at most; a machine that stood still between the id and its commit may make more of them.
"""
ANY_MOVE = ""

_OPEN = (b"Pending", b"Processing")
_NO_JOB = UUID(int=0)

log = logging.getLogger(__name__)


class ViewsUnavailable(Exception):  # noqa: N818 - a state, in the field's words
    """Redis cannot be reached: nothing can be said about any job."""


class ViewBehind(Exception):  # noqa: N818 - a state, in the field's words
    """The views have not come as far as somebody asked for in the time that was given."""


class ViewsRebuilding(Exception):  # noqa: N818 - a state, in the field's words
    """The views are incomplete or behind: a job that they do not have may exist all the same."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A job's document (JSON) and its entity tag: view version and the position of the job's last fact."""

    body: bytes
    etag: str

    @property
    def ended(self) -> bool:
        """Whether the job has. The first `"status"` is the job's own: before it come texts only, whose quotes are escaped."""
        return not self.body.partition(b'"status":"')[2].startswith(_OPEN)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one look at the views found."""

    complete: bool
    caught_up_ms: int
    checkpoint: int
    version: str
    document: bytes | None


@dataclass(slots=True, eq=False)
class _Waiter:
    """Somebody who waits: for a job's end, or for any move.

    `told` is the job as it ended, if the projector has told that too. Who waits has looked first, and a look shows an end that
    was told before: so this is newer than what they saw.
    """

    moved: asyncio.Event = field(default_factory=asyncio.Event)
    told: Answer | None = None

    async def next_move(self) -> None:
        """A message can be lost while the listener connects again, so nobody relies on it for longer than a moment."""
        await happens_within(self.moved, LOOK_AGAIN_S)
        self.moved.clear()


@dataclass
class JobQueries:
    """Reads views. `start` listens for the projector's moves, so that waiting readers wake at once."""

    redis: Redis
    now: Callable[[], datetime]
    keys: Keys = field(default_factory=Keys)

    def __post_init__(self) -> None:
        self._get_jobs = self.redis.register_script(GET_JOBS)
        self._looks: Batcher[UUID, _Seen] = Batcher(self._look_at, batch_max=LOOKS_MAX)
        self._waiting: dict[str, set[_Waiter]] = {}
        self._waiters = 0
        self._letting_go = False
        self._listener: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._listener = asyncio.create_task(self._listen())

    def let_go(self) -> None:
        """We are about to stop: who waits for a job's end is told how far it is."""
        self._letting_go = True
        for waiters in self._waiting.values():
            for waiter in waiters:
                waiter.moved.set()

    async def stop(self) -> None:
        if self._listener is not None:
            await end([self._listener], STOP_S)

    async def job(self, job_id: UUID) -> Answer | None:
        """The job's document; None when there is no such job. Raises `ViewsUnavailable` or `ViewsRebuilding`."""
        asked_ms = self._now_ms()
        return await self._answer(job_id, await self._look(job_id), asked_ms)

    async def _answer(self, job_id: UUID, seen: _Seen, asked_ms: int) -> Answer | None:
        """What was seen, or what can be seen a moment later."""
        if seen.document is None and not self._is_known_absent(job_id, seen):
            seen = await self._wait_for(job_id, seen, asked_ms)
        if seen.document is not None:
            return _answer(seen.version, seen.document)
        if self._is_known_absent(job_id, seen) or _has_all_until(asked_ms, seen):
            return None
        raise ViewsRebuilding

    async def ended_job(self, job_id: UUID, within_s: float) -> Answer | None:
        """Like `job`, but waits until the job has ended, for `within_s` at most. Who waits too many is answered at once."""
        with self._listening(job_id) as waiter:
            asked_ms, seen = self._now_ms(), await self._look(job_id)
            if waiter is None:
                return await self._answer(job_id, seen, asked_ms)
            if seen.document is None and not self._is_known_absent(job_id, seen):
                # It has just been taken on. Who waits for its end need not see it begin, if that is all that there is to see.
                await happens_within(waiter.moved, min(within_s, BEGUN_S))
                waiter.moved.clear()
                if waiter.told is not None:
                    return waiter.told
                seen = await self._look(job_id)
            answer = await self._answer(job_id, seen, asked_ms)
            with suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    while answer is not None and not answer.ended and not self._letting_go:
                        await waiter.next_move()
                        answer = waiter.told or await self.job(job_id)
            return answer

    async def reached(self, position: int, within_s: float) -> None:
        """Wait until the views show all facts up to a position. Raises `ViewBehind`, or `ViewsUnavailable`.

        They do not go back behind it: what is asked after this is answered of this position or a later one.
        """
        with self._listening(None) as waiter:
            try:
                async with asyncio.timeout(within_s):
                    while (await self._look(_NO_JOB)).checkpoint < position:
                        if waiter is None or self._letting_go:
                            raise ViewBehind
                        await waiter.next_move()
            except TimeoutError:
                raise ViewBehind from None

    async def _look(self, job_id: UUID) -> _Seen:
        try:
            return await self._looks.add(job_id, within_s=LOOK_MAX_S)
        except (RedisError, OSError, TimeoutError, Overloaded) as error:
            raise ViewsUnavailable from error

    async def _look_at(self, job_ids: Sequence[UUID]) -> Sequence[_Seen]:
        """Those who ask at the same time share a round trip."""
        args = [self.keys.prefix, JOB_STATUS, *(str(job_id) for job_id in job_ids)]
        complete, caught_up_ms, checkpoint, told, *documents = await self._get_jobs(keys=[self.keys.live], args=args)
        stands = complete == b"1", int(caught_up_ms or 0), int(checkpoint or 0), (told or b"").decode()
        return [_Seen(*stands, document) for document in documents]

    async def _wait_for(self, job_id: UUID, seen: _Seen, asked_ms: int) -> _Seen:
        """Look again at each move of the projector until it has come past our question, for `WAIT_MAX_S` at most."""
        with self._listening(None) as waiter:
            if waiter is None:
                return seen
            try:
                async with asyncio.timeout(WAIT_MAX_S):
                    while seen.document is None and not _has_all_until(asked_ms, seen):
                        await waiter.next_move()
                        seen = await self._look(job_id)
            except TimeoutError:
                seen = await self._look(job_id)
        return seen

    @contextmanager
    def _listening(self, what: UUID | None) -> Iterator[_Waiter | None]:
        """Is told when this job ends (None: of each move of any view); None when too many wait already."""
        if self._waiters >= WAITERS_MAX:
            yield None
            return
        key, waiter = str(what) if what else ANY_MOVE, _Waiter()
        self._waiting.setdefault(key, set()).add(waiter)
        self._waiters += 1
        try:
            yield waiter
        finally:
            self._waiters -= 1
            self._waiting[key].discard(waiter)
            if not self._waiting[key]:
                del self._waiting[key]

    def _now_ms(self) -> int:
        return int(self.now().timestamp() * 1000)

    def _is_known_absent(self, job_id: UUID, seen: _Seen) -> bool:
        """Whether a job of this id, had it ever been taken on, would be in the views."""
        if not seen.complete:
            return False
        made_ms = made_at_ms(job_id)
        return made_ms is None or made_ms < seen.caught_up_ms - YOUNG_MS

    async def _listen(self) -> None:
        while True:
            try:
                async with self.redis.pubsub() as pubsub:
                    await pubsub.subscribe(self.keys.moved)
                    while True:
                        message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=1.0)
                        if message is not None:
                            self._tell(message["data"])
            except (RedisError, OSError):
                await asyncio.sleep(0.5)

    def _tell(self, message: bytes) -> None:
        """Wake who waits for one of these jobs, or for any move at all."""
        checkpoint_and_ids, _, view = message.partition(b"\n")
        for key in (ANY_MOVE, *checkpoint_and_ids.decode().split(" ")[1:]):
            for waiter in self._waiting.get(key, ()):
                if key and view:
                    waiter.told = _ended(view)
                waiter.moved.set()


def _answer(version: str, document: bytes) -> Answer:
    position, _, body = document.partition(b"\n")
    return Answer(body, f'"{version}-{position.decode()}"')


def _ended(view: bytes) -> Answer | None:
    """A job's view as `Keys.moved` tells it. None if the job has not ended in it: another generation may be shown."""
    version, _, document = view.partition(b"\n")
    answer = _answer(version.decode(), document)
    return answer if answer.ended else None


def _has_all_until(asked_ms: int, seen: _Seen) -> bool:
    """Whether the views hold every job that was taken on before the question: who asks after a 202 asks after its commit.

    A small lag would not do: a projector that died a second ago is hardly behind, and misses the jobs of that second.
    """
    return seen.complete and seen.caught_up_ms > asked_ms
