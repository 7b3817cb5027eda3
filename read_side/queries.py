"""Answer: a poller's document in one round trip to Redis, from the views alone.

A job that was taken on a moment ago may not have reached the views yet. Its id says when it was made (UUIDv7), so an unknown id
that is only seconds old is waited for, within a bound; "not found" is said only of what the views would know by now.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from redis.asyncio import Redis
from redis.exceptions import RedisError

from events.batching import Batcher, Overloaded
from events.ending import end
from projections.views import GET_JOBS, JOB_STATUS_VERSION, Keys

WAIT_MAX_S = 2.0
STOP_S = 10.0
WAITERS_MAX = 1_000
LOOKS_MAX = 50
YOUNG_MS = 10_000
"""An id older than what the views have seen by this much is not on its way any more: an append takes less."""
UUID_V7 = 7

log = logging.getLogger(__name__)


class ViewsUnavailable(Exception):  # noqa: N818 - a state, in the field's words
    """Redis cannot be reached: nothing can be said about any job."""


class ViewsRebuilding(Exception):  # noqa: N818 - a state, in the field's words
    """The views are incomplete or behind: a job that they do not have may exist all the same."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A job's document (JSON) and its entity tag: view version and the position of the job's last fact."""

    body: bytes
    etag: str


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one look at the views found."""

    complete: bool
    caught_up_ms: int
    document: bytes | None


@dataclass
class JobQueries:
    """Reads views. `start` listens for the projector's moves, so that waiting readers wake at once."""

    redis: Redis
    now: Callable[[], datetime]
    keys: Keys = field(default_factory=Keys)

    def __post_init__(self) -> None:
        self._get_jobs = self.redis.register_script(GET_JOBS)
        self._looks: Batcher[UUID, _Seen] = Batcher(self._look_at, batch_max=LOOKS_MAX)
        self._moved = asyncio.Condition()
        self._waiters = 0
        self._listener: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._listener = asyncio.create_task(self._listen())

    async def stop(self) -> None:
        if self._listener is not None:
            await end([self._listener], STOP_S)

    async def job(self, job_id: UUID) -> Answer | None:
        """The job's document; None when there is no such job. Raises `ViewsUnavailable` or `ViewsRebuilding`."""
        asked_ms = int(self.now().timestamp() * 1000)
        seen = await self._look(job_id)
        if seen.document is None and not self._is_known_absent(job_id, seen):
            seen = await self._wait_for(job_id, seen, asked_ms)
        if seen.document is not None:
            position, _, body = seen.document.partition(b"\n")
            return Answer(body, f'"{JOB_STATUS_VERSION}-{position.decode()}"')
        if self._is_known_absent(job_id, seen) or _has_all_until(asked_ms, seen):
            return None
        raise ViewsRebuilding

    async def _look(self, job_id: UUID) -> _Seen:
        try:
            return await self._looks.add(job_id)
        except (RedisError, OSError, Overloaded) as error:
            raise ViewsUnavailable from error

    async def _look_at(self, job_ids: Sequence[UUID]) -> Sequence[_Seen]:
        """Those who ask at the same time share a round trip."""
        args = [self.keys.prefix, *(str(job_id) for job_id in job_ids)]
        complete, caught_up_ms, *documents = await self._get_jobs(keys=[self.keys.live], args=args)
        return [_Seen(complete == b"1", int(caught_up_ms or 0), document) for document in documents]

    async def _wait_for(self, job_id: UUID, seen: _Seen, asked_ms: int) -> _Seen:
        """Look again at each move of the projector until it has come past our question, for `WAIT_MAX_S` at most."""
        if self._waiters >= WAITERS_MAX:
            return seen
        self._waiters += 1
        try:
            async with asyncio.timeout(WAIT_MAX_S):
                while seen.document is None and not _has_all_until(asked_ms, seen):
                    await self._next_move()
                    seen = await self._look(job_id)
        except TimeoutError:
            seen = await self._look(job_id)
        finally:
            self._waiters -= 1
        return seen

    async def _next_move(self) -> None:
        """A message can be lost while the listener connects again, so nobody relies on it for longer than a moment."""
        with suppress(TimeoutError):
            async with asyncio.timeout(WAIT_MAX_S / 4), self._moved:
                await self._moved.wait()

    def _is_known_absent(self, job_id: UUID, seen: _Seen) -> bool:
        """Whether a job of this id, had it ever been taken on, would be in the views."""
        if not seen.complete:
            return False
        return job_id.version != UUID_V7 or _made_at_ms(job_id) < seen.caught_up_ms - YOUNG_MS

    async def _listen(self) -> None:
        while True:
            try:
                async with self.redis.pubsub() as pubsub:
                    await pubsub.subscribe(self.keys.moved)
                    while True:
                        await self._tell(await pubsub.get_message(ignore_subscribe_messages=True, timeout=1.0))
            except (RedisError, OSError):
                await asyncio.sleep(0.5)

    async def _tell(self, message: Any) -> None:
        if message is None:
            return
        async with self._moved:
            self._moved.notify_all()


def _has_all_until(asked_ms: int, seen: _Seen) -> bool:
    """Whether the views hold every job that was taken on before the question: who asks after a 202 asks after its commit.

    A small lag would not do: a projector that died a second ago is hardly behind, and misses the jobs of that second.
    """
    return seen.complete and seen.caught_up_ms > asked_ms


def _made_at_ms(job_id: UUID) -> int:
    """The Unix time in ms that a UUIDv7 carries in its first 48 bits (RFC 9562 section 5.7)."""
    return job_id.int >> 80
