"""The history of a target, and what changed between two of its jobs.

The history comes from the views alone. The documents of two jobs that are held against each other do, too; where a document has
gone from there, the log is asked for it.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import orjson
from redis.asyncio import Redis
from redis.exceptions import RedisError

from events.facts import Service
from projections.views import GET_JOBS, GET_RANKED, JOB_STATUS, TARGET_HISTORY, Keys, target_key
from read_side.diff import RESULT_GONE, SAME, UNKNOWN, Comparison, compare_jobs, new_steps, outcome_of
from read_side.history import JobHistory, Unanswered
from read_side.queries import ViewsRebuilding, ViewsUnavailable

LOOK_MAX_S = 1.5
ANSWER_MAX_S = 10.0
ASKERS_MAX = 16
AT_ONCE_MAX = 2
"""So many comparisons are under way at the same time: they are work of ours, and pollers come first."""

Data = dict[str, Any]
Reference = UUID | int
"""A job by its id, or by its position in the target's history."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A job as its target's history has it. `results` has for each service its status and the SHA-256 of its result."""

    told: Data

    @property
    def job_id(self) -> UUID:
        return UUID(self.told["jobId"])

    @property
    def position(self) -> int:
        return int(self.told["position"])

    @property
    def completed(self) -> bool:
        return bool(self.told["status"] == "Completed")

    @property
    def ended(self) -> bool:
        return self.told["completedAt"] is not None

    @property
    def results(self) -> dict[str, tuple[str, str | None]]:
        return {result["serviceType"]: (result["status"], result["sha256"]) for result in self.told["results"]}


@dataclass(frozen=True, slots=True)
class Compared:
    """A job, the completed one before it (if there is one), and how their results compare, service by service."""

    entry: Entry
    before: Entry | None
    parts: Sequence[Comparison] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """Jobs of a target, the newest first. `more`: there are older ones."""

    jobs: Sequence[Compared]
    more: bool


@dataclass
class TargetQueries:
    """Reads a target's history. All methods raise `ViewsUnavailable`, `ViewsRebuilding`, or `Unanswered` with a stable code.

    `past` is where documents are that the views show no more; None = there is no database to ask.
    """

    redis: Redis
    past: JobHistory | None = None
    keys: Keys = field(default_factory=Keys)

    def __post_init__(self) -> None:
        self._get_ranked = self.redis.register_script(GET_RANKED)
        self._get_jobs = self.redis.register_script(GET_JOBS)
        self._at_once = asyncio.Semaphore(AT_ONCE_MAX)
        self._askers = 0

    async def history(self, target: str, before: int | None, limit: int) -> Page:
        """Jobs of a (canonical) target that were submitted before a position, the newest first, at most `limit`.

        Each that has ended is compared with the completed one before it, as far as the views have their documents.
        """
        entries = await self._entries(target)
        older = [entry for entry in entries if before is None or entry.position < before]
        pairs = [(entry, _completed_before(entry, entries)) for entry in older[:limit]]
        async with self._bounded():
            return Page(await self._compared(pairs), len(older) > limit)

    async def diff(self, target: str, from_: Reference | None, to: Reference | None) -> Compared:
        """Two jobs of a (canonical) target; by default the last two that completed."""
        entries = await self._entries(target)
        later = _found(entries, to) if to is not None else _last_completed(entries)
        earlier = _found(entries, from_) if from_ is not None else _completed_before(later, entries)
        if earlier is None:
            raise Unanswered("nothing_to_compare", "No job about this target completed before that one.")
        async with self._bounded():
            documents = await self._document(earlier.job_id), await self._document(later.job_id)
            return Compared(later, earlier, await self._parts(earlier, later, *documents, new_steps()))

    async def _compared(self, pairs: Sequence[tuple[Entry, Entry | None]]) -> list[Compared]:
        """One after the other, so that few documents are held at a time; the newer one of a pair is the older of the last."""
        steps, held = new_steps(), dict[UUID, bytes | None]()
        compared = []
        for entry, before in pairs:
            if before is None or not entry.ended:
                compared.append(Compared(entry, None))
                continue
            if not _are_known_alike(before, entry):
                ids = entry.job_id, before.job_id
                held = {job_id: held[job_id] if job_id in held else await self._shown(job_id) for job_id in ids}
            newer, older = held.get(entry.job_id), held.get(before.job_id)
            compared.append(Compared(entry, before, await self._parts(before, entry, older, newer, steps)))
        return compared

    async def _parts(
        self, before: Entry, after: Entry, older: bytes | None, newer: bytes | None, steps: Counter[str]
    ) -> Sequence[Comparison]:
        if older is None or newer is None:
            return _by_digest(before, after)
        async with self._at_once:
            # A large document takes a while: nobody else's answer waits for it.
            return await asyncio.to_thread(_compare, older, newer, steps)

    # --- where it lies ------------------------------------------------------------------------------------------------

    async def _entries(self, target: str) -> list[Entry]:
        """The whole history, the newest first; the view bounds it."""
        args = [self.keys.prefix, TARGET_HISTORY, target_key(target)]
        complete, *members = await self._run(self._get_ranked, args)
        if complete != b"1":
            raise ViewsRebuilding
        entries = [Entry(orjson.loads(member)) for member in members]
        return sorted(entries, key=lambda entry: -entry.position)

    async def _shown(self, job_id: UUID) -> bytes | None:
        """A job's document as the views have it; None when they do not have it any more."""
        *_, document = await self._run(self._get_jobs, [self.keys.prefix, JOB_STATUS, str(job_id)])
        return None if document is None else document.partition(b"\n")[2]

    async def _document(self, job_id: UUID) -> bytes | None:
        """From the views or from the log; None when that has forgotten it, too."""
        shown = await self._shown(job_id)
        if shown is not None:
            return shown
        if self.past is None:
            raise Unanswered("history_unavailable", "The views do not have that job any more, and there is no log to ask.")
        try:
            return (await self.past.story(job_id)).document
        except Unanswered as unanswered:
            if unanswered.code == "job_not_found":
                return None
            raise

    async def _run(self, script: Any, args: list[str]) -> list[Any]:
        try:
            async with asyncio.timeout(LOOK_MAX_S):
                answer: list[Any] = await script(keys=[self.keys.live], args=args)
        except (RedisError, OSError, TimeoutError) as error:
            raise ViewsUnavailable from error
        return answer

    @asynccontextmanager
    async def _bounded(self) -> AsyncIterator[None]:
        """`ASKERS_MAX` at a time, and none for longer than `ANSWER_MAX_S`."""
        if self._askers >= ASKERS_MAX:
            raise Unanswered("busy", "Too many ask what changed right now. Try again shortly.")
        self._askers += 1
        try:
            async with asyncio.timeout(ANSWER_MAX_S):
                yield
        except TimeoutError:
            raise Unanswered("busy", "The comparison took too long. Try again shortly.") from None
        finally:
            self._askers -= 1


def _last_completed(entries: Sequence[Entry]) -> Entry:
    found = next((entry for entry in entries if entry.completed), None)
    if found is None:
        raise Unanswered("nothing_to_compare", "No job about this target has completed.")
    return found


def _completed_before(later: Entry, entries: Sequence[Entry]) -> Entry | None:
    return next((entry for entry in entries if entry.completed and entry.position < later.position), None)


def _found(entries: Sequence[Entry], reference: Reference) -> Entry:
    """The job of this id or position; of a position between two jobs, the last that had completed among those before it."""
    for entry in entries:
        if reference in {entry.job_id, entry.position}:
            return entry
    earlier = [entry for entry in entries if isinstance(reference, int) and entry.completed and entry.position < reference]
    if not earlier:
        raise Unanswered("job_not_in_history", f"The history of this target has no job {reference}.")
    return earlier[0]


def _are_known_alike(before: Entry, after: Entry) -> bool:
    """Whether the same bytes came from every service: then no document need be read."""
    return all(digest is not None for _, digest in after.results.values()) and before.results == after.results


def _by_digest(before: Entry, after: Entry) -> list[Comparison]:
    """Of two jobs whose documents are not both at hand: the same bytes are the same answer, of others nothing is known."""
    older, newer = before.results, after.results
    nobody = ("not_asked", None)
    parts = []
    for service in Service:
        if service not in older and service not in newer:
            continue
        (_, digest), (_, other) = older.get(service, nobody), newer.get(service, nobody)
        alike = digest is not None and digest == other
        parts.append(Comparison(service, SAME) if alike else Comparison(service, UNKNOWN, why=(RESULT_GONE, RESULT_GONE)))
    return parts


def _compare(older: bytes, newer: bytes, steps: Counter[str]) -> list[Comparison]:
    return compare_jobs(orjson.loads(older), orjson.loads(newer), steps)


def outcome(compared: Compared) -> str | None:
    """None when there is nothing to compare with."""
    return None if compared.before is None else outcome_of(compared.parts)
