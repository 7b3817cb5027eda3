"""The projector: folds stretches of the log into views and moves views and checkpoint in one step.

Promises:

- **Exactly-once effect.** Views and checkpoint go to Redis in one script that first compares fence, generation, log id and
  checkpoint with what Redis holds, and refuses otherwise. Then Redis is believed, and the log is read from its checkpoint on.
- **No gaps.** A stretch that begins behind our checkpoint is folded from the log instead. So is the log itself, once a second,
  when the broker is silent: a wiped or rolled back Redis and a lost message heal by themselves.
- **Stops loudly** at a fact that it does not know (`UnknownFact`), rather than skip it.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, cast
from uuid import UUID, uuid4

from redis.asyncio import Redis
from redis.commands.core import AsyncScript

from domain.commands import Rules
from domain.saga import LookupSaga
from events.bus import FACTS, Bus, Delivery, Inbox
from events.facts import JobFact, JobSubmitted, ResultReference, TaskCompleted
from events.record import Recorded, read
from events.store import EventStore
from events.wire import read_batch, stretch_of
from projections import deadlines, job_status
from projections.views import BEGIN, COMMIT, LEAD, JobStatus, Keys, document_of
from results.documents import ResultDocuments, ResultsUnavailable

LEASE_MS = 5_000
TICK_S = 1.0
IN_HAND_MAX = 16
CATCH_UP_PAGE = 1_000
COMMIT_MAX = 1_000
OPEN_JOBS_MAX = 20_000

log = logging.getLogger(__name__)


class Superseded(Exception):  # noqa: N818 - an outcome, in the field's words
    """Another projector leads."""


@dataclass(slots=True)
class JobViews:
    """What is folded of one job: its views, and the result documents that they show."""

    status: JobStatus
    saga: LookupSaga
    position: int
    documents: dict[str, bytes] = field(default_factory=dict)
    missing: list[ResultReference] = field(default_factory=list)


@dataclass(slots=True)
class Checkpoint:
    """How far the live generation has come, as Redis has it."""

    generation: str
    position: int
    hash: str
    complete: bool


@dataclass
class Projector:
    """One of any number of projectors; one leads, the others wait for its lease to end. Runs until cancelled."""

    redis: Redis
    store: EventStore
    documents: ResultDocuments
    bus: Bus
    rules: Rules
    retention: timedelta
    now: Callable[[], datetime]
    keys: Keys = field(default_factory=Keys)

    def __post_init__(self) -> None:
        self._jobs: OrderedDict[UUID, JobViews] = OrderedDict()
        self._lead: AsyncScript = self.redis.register_script(LEAD)
        self._begin: AsyncScript = self.redis.register_script(BEGIN)
        self._commit: AsyncScript = self.redis.register_script(COMMIT)
        self._fence = ""
        self._log_id = ""
        self._at = Checkpoint("", 0, "", complete=False)
        self._caught_up_until = datetime.fromtimestamp(0, tz=self.now().tzinfo)

    async def run(self) -> None:
        """Lead, catch up, then follow the bus. Starts the bus itself: who does not lead must not take its messages."""
        await self._become_leader()
        self._log_id = str(await self.store.log_id())
        inbox = self.bus.subscribe(FACTS, in_hand_max=IN_HAND_MAX)
        await self.bus.start()
        try:
            await self._take_over()
            await self.catch_up()
            await self._follow(inbox)
        finally:
            await self.bus.stop()

    async def _become_leader(self) -> None:
        while not await self._leads():  # noqa: ASYNC110 - the lease is in Redis: nothing here could set an event
            await asyncio.sleep(TICK_S)

    async def _leads(self) -> bool:
        """Take the lead, unless somebody else has it."""
        fence = await self._lead(keys=[self.keys.lease, self.keys.fence], args=[LEASE_MS, uuid4().hex])
        self._fence = _text(fence) or ""
        return fence is not None

    async def _follow(self, inbox: Inbox) -> None:
        taking = asyncio.ensure_future(inbox.take(IN_HAND_MAX))
        try:
            while True:
                done, _ = await asyncio.wait({taking}, timeout=TICK_S)
                if not done:
                    await self.catch_up()
                    continue
                deliveries = taking.result()
                taking = asyncio.ensure_future(inbox.take(IN_HAND_MAX))
                await self.project(deliveries)
                await inbox.ack(deliveries)
        finally:
            taking.cancel()

    async def project(self, deliveries: Sequence[Delivery]) -> None:
        """Fold what these deliveries bring behind our checkpoint, and what they leave out from the log."""
        stretches = sorted((stretch_of(delivery.headers), delivery.body) for delivery in deliveries)
        facts: list[Recorded] = []
        reached = self._at.position
        for (previous, position), body in stretches:
            if position <= reached:
                continue
            if previous > reached:
                log.info("A stretch is missing behind position %d; reading the log.", reached)
                await self._fold_and_commit(facts)
                await self.catch_up()
                facts, reached = [], self._at.position
                if position <= reached:
                    continue
            facts.extend(recorded for recorded in read_batch(body) if recorded.position > reached)
            reached = position
        await self._fold_and_commit(facts)

    async def catch_up(self) -> None:
        """Fold the log up to its end, then say so: also without traffic, so that a Redis that lost data is noticed."""
        while True:
            asked_at = self.now()
            page = await self.store.read_all(self._at.position, CATCH_UP_PAGE)
            if not page:
                break
            await self._fold_and_commit([read(stored) for stored in page])
        self._caught_up_until = asked_at
        self._at.complete = True
        await self._commit_views([], self._at.position, self._at.hash)

    # --- folding ------------------------------------------------------------------------------------------------------

    async def _fold_and_commit(self, facts: Sequence[Recorded]) -> None:
        stood = self._at
        for first in range(0, len(facts), COMMIT_MAX):
            await self._fold_and_commit_some(facts[first : first + COMMIT_MAX])
            if self._at is not stood:
                return  # Redis stands elsewhere: what follows would leave a gap, and the log is read from there.

    async def _fold_and_commit_some(self, facts: Sequence[Recorded]) -> None:
        if facts[0].position <= self._at.position:
            return  # Redis was taken back to an earlier checkpoint meanwhile: the log is read from there.
        stood = self._at
        touched = await self._fold(facts)
        await self._fetch_documents(touched.values())
        if self._at is not stood:
            return  # Redis turned out to stand elsewhere while the documents were waited for.
        last = facts[-1]
        self._caught_up_until = max(self._caught_up_until, last.recorded_at)
        await self._commit_views(list(touched.values()), last.position, last.hash)
        for job_id, views in touched.items():
            if views.saga.closed:
                self._jobs.pop(job_id, None)
        while len(self._jobs) > OPEN_JOBS_MAX:
            self._jobs.popitem(last=False)

    async def _fold(self, facts: Sequence[Recorded]) -> dict[UUID, JobViews]:
        await self._load_missing(facts)
        touched: dict[UUID, JobViews] = {}
        for recorded in facts:
            if not isinstance(recorded.fact, JobFact):
                continue
            views = touched.get(recorded.stream_id) or self._jobs.get(recorded.stream_id)
            views = fold(views, recorded)
            self._jobs[recorded.stream_id] = touched[recorded.stream_id] = views
        return touched

    async def _load_missing(self, facts: Sequence[Recorded]) -> None:
        """Jobs that we do not remember are folded from the log, up to where these facts begin."""
        begun = {recorded.stream_id for recorded in facts if isinstance(recorded.fact, JobSubmitted)}
        wanted = {recorded.stream_id for recorded in facts} - begun - self._jobs.keys()
        if not wanted:
            return
        for job_id, stream in (await self.store.read(list(wanted))).items():
            views: JobViews | None = None
            for stored in stream:
                if stored.position < facts[0].position:
                    views = fold(views, read(stored))
            if views is not None:
                self._jobs[job_id] = views

    async def _fetch_documents(self, touched: Iterable[JobViews]) -> None:
        """The documents that these views show and do not have yet, in one query. Waits while the store cannot be reached."""
        wanting = [views for views in touched if views.missing]
        if not wanting:
            return
        references = [reference for views in wanting for reference in views.missing]
        found = await self._documents(references)
        for views in wanting:
            for reference in views.missing:
                document = found.get(reference.location.key)
                if document is not None:
                    views.documents[reference.location.key] = document
            views.missing.clear()

    async def _documents(self, references: Sequence[ResultReference]) -> Mapping[str, bytes]:
        """Unreachable documents are waited for, and the lag tells: a view without them would be wrong for good."""
        while True:
            try:
                return await self.documents.get(references)
            except ResultsUnavailable:
                log.warning("The results cannot be read; the views wait for them.")
                await self._commit_views([], self._at.position, self._at.hash)
                await asyncio.sleep(TICK_S)

    # --- Redis --------------------------------------------------------------------------------------------------------

    async def _take_over(self) -> None:
        """Go on from where Redis stands, if it stands in our log; else begin a new generation."""
        generation = _text(await self.redis.get(self.keys.live))
        if generation is not None:
            meta = [
                _text(value)
                for value in await self.redis.hmget(self.keys.meta(generation), ["log_id", "checkpoint", "hash", "complete"])
            ]
            if await self._stands_in_our_log(meta):
                self._at = Checkpoint(generation, int(meta[1] or 0), meta[2] or "", complete=meta[3] == "1")
                return
            log.warning("The views are of another log, or ahead of this one: building them anew.")
        await self._begin_generation()

    async def _stands_in_our_log(self, meta: Sequence[str | None]) -> bool:
        log_id, checkpoint, fact_hash, _ = meta
        if log_id != self._log_id or checkpoint is None:
            return False
        if checkpoint == "0":
            return True
        found = await self.store.read_all(int(checkpoint) - 1, 1)
        return bool(found) and found[0].position == int(checkpoint) and read(found[0]).hash == fact_hash

    async def _begin_generation(self) -> None:
        generation = f"g{_ms(self.now())}"
        keys = [self.keys.lease, self.keys.live, self.keys.meta(generation)]
        if not await self._begin(keys=keys, args=[self._fence, generation, self._log_id]):
            raise Superseded
        self._jobs.clear()
        self._at = Checkpoint(generation, 0, "", complete=False)

    async def _commit_views(self, touched: Sequence[JobViews], position: int, fact_hash: str) -> None:
        documents: list[str | bytes | int] = []
        due: list[str | int] = []
        for views in touched:
            documents += [self.keys.job(self._at.generation, views.status.job_id), _value(views), self._expires_at(views)]
            at = deadlines.due_ms(views.saga, self.rules)
            due += [str(views.status.job_id), "" if at is None else at]
        answer = await self._commit(
            keys=[
                self.keys.lease,
                self.keys.live,
                self.keys.meta(self._at.generation),
                self.keys.deadlines(self._at.generation),
            ],
            args=[
                self._fence,
                self._at.generation,
                self._log_id,
                self._at.position,
                position,
                fact_hash,
                int(self._at.complete),
                _ms(self._caught_up_until),
                _ms(self.now()),
                LEASE_MS,
                self.keys.moved,
                len(touched),
                *documents,
                *due,
            ],
        )
        await self._judge(_text(answer) or "", position, fact_hash)

    async def _judge(self, answer: str, position: int, fact_hash: str) -> None:
        if answer == "ok":
            self._at.position, self._at.hash = position, fact_hash
            return
        self._jobs.clear()
        if answer == "fenced" and not await self._leads():
            raise Superseded
        log.warning("Redis is not where we left it (%s): going on from where it stands.", answer)
        await self._take_over()

    def _expires_at(self, views: JobViews) -> int:
        """The Unix second at which a closed job's view goes (0 = never): by its closing fact, so a rebuild gives the same."""
        if views.status.completed_at is None:
            return 0
        return int((views.status.completed_at + self.retention).timestamp())


def fold(views: JobViews | None, recorded: Recorded) -> JobViews:
    """All views of a job after one more fact. Pure but for reusing `views`."""
    fact = cast("JobFact", recorded.fact)
    if isinstance(fact, JobSubmitted):
        return JobViews(job_status.begin(fact), deadlines.project(None, fact), recorded.position)
    if views is None:
        raise ValueError(f"Job {recorded.stream_id} begins with {type(fact).__name__} at position {recorded.position}.")
    views.status = job_status.project(views.status, fact)
    views.saga = deadlines.project(views.saga, fact)
    views.position = recorded.position
    if isinstance(fact, TaskCompleted):
        views.missing.append(fact.result)
    return views


def _value(views: JobViews) -> bytes:
    return b"%d\n%b" % (views.position, document_of(views.status, views.documents))


def _ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return cast("bytes", value).decode()
