"""The watch over the views: it needs no projector to be alive to notice that they stand still, and raises the alarm `stalled`.

It looks at the log's head and at the views' checkpoint, and when nothing is appended for a while it sends a canary down the
whole way: log, relay, bus, projector, Redis. What it sees it leaves in Redis, for readiness, metrics and `lookup status`.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from redis.asyncio import Redis
from redis.exceptions import RedisError

from app import lag
from app.lag import Note, Patience, Reached
from events.store import EventStore, OutcomeUnknown, StoreUnavailable
from write_side.canary import Canary

LOOKS_PER_PATIENCE = 10
LOOK_EVERY_MAX_S = 1.0
CANARY_LOOK_S = 0.02
SEEN_AGAIN = 0.2
"""What has taken too long already is an alarm if it is still so after this share of our patience."""

log = logging.getLogger(__name__)

ViewMeta = Callable[[], Awaitable[Mapping[str, str]]]
"""What is known of the live views (`app/health.py:view_meta`). May raise `RedisError` or `OSError`."""


@dataclass(slots=True)
class Watched:
    """What the watch has seen. It belongs to the process: the part may be started again.

    `canary` is the one under way: its position, and when it was sent. `canary_ms` is how long the last one took.
    """

    began_at: datetime
    log_head: int | None = None
    appended_at: datetime | None = None
    position: int = 0
    moved_at: datetime | None = None
    waiting_since: datetime | None = None
    wrong_since: datetime | None = None
    alarm: str = ""
    alarm_since: datetime | None = None
    canary: tuple[int, datetime] | None = None
    canary_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Sight:
    """One look. `views` is None when Redis does not answer, empty without views; `log_head` None when the log does not."""

    at: datetime
    views: Mapping[str, str] | None
    log_head: int | None
    log_id: str
    reached: Reached


@dataclass(frozen=True, slots=True)
class Wrong:
    """What is wrong with the views, and how much longer it may be so."""

    sentence: str
    bearable: timedelta


@dataclass
class Watch:
    """Runs until cancelled. Neither log nor Redis need answer: then that is what it tells."""

    store: EventStore
    redis: Redis
    view_meta: ViewMeta
    patience: Patience
    now: Callable[[], datetime]
    new_id: Callable[[], UUID]
    watched: Watched

    def __post_init__(self) -> None:
        self._canary = Canary(self.store, self.now, self.new_id)

    @property
    def look_every_s(self) -> float:
        return min(LOOK_EVERY_MAX_S, self.patience.stalled_after.total_seconds() / LOOKS_PER_PATIENCE)

    async def run(self) -> None:
        with suppress(RedisError, OSError):
            self._remember(await lag.last_note(self.redis))
        while True:
            sight = await self.look()
            if self._is_idle(sight):
                await self._send_canary()
            await self._pause()

    async def look(self) -> Sight:
        """See how far log and views are, judge it, tell it."""
        sight = await self._see()
        self._note_moves(sight)
        self._judge(sight)
        with suppress(RedisError, OSError):
            await lag.leave(self.redis, self._note(sight))
        return sight

    async def _see(self) -> Sight:
        views: Mapping[str, str] | None = None
        with suppress(RedisError, OSError):
            views = await self.view_meta()
        # The log after the views: it has all that they show.
        position = self.watched.position if views is None else int(views.get("checkpoint", 0))
        try:
            head, log_id = await self.store.head(), str(await self.store.log_id())
            return Sight(self.now(), views, head, log_id, await lag.reached(self.store, position))
        except StoreUnavailable:
            return Sight(self.now(), views, None, "", Reached(position, self.watched.waiting_since))

    def _note_moves(self, sight: Sight) -> None:
        watched, position = self.watched, sight.reached.position
        if position != watched.position:
            watched.position, watched.moved_at = position, sight.at
        if sight.log_head is not None and sight.log_head != watched.log_head:
            watched.log_head, watched.appended_at = sight.log_head, sight.at
        watched.waiting_since = sight.reached.waiting_since
        if watched.canary is not None and position >= watched.canary[0]:
            watched.canary_ms = lag.ms(sight.at) - lag.ms(watched.canary[1])
            watched.canary = None

    # --- the alarm ----------------------------------------------------------------------------------------------------

    def _judge(self, sight: Sight) -> None:
        """An alarm is told once when it begins and once when it is over."""
        watched, wrong = self.watched, what_is_wrong(sight, self.watched, self.patience)
        if wrong is None:
            if watched.alarm_since is not None:
                log.info("Alarm `stalled` is over after %.0f s.", (sight.at - watched.alarm_since).total_seconds())
            watched.wrong_since, watched.alarm_since, watched.alarm = None, None, ""
            return
        watched.wrong_since = watched.wrong_since or sight.at
        if watched.alarm_since is None:
            # After a start, the views are given time to be caught up.
            if sight.at < max(watched.wrong_since + wrong.bearable, watched.began_at + self.patience.stalled_after):
                return
            log.error("Alarm `stalled`: %s", wrong.sentence)
            watched.alarm_since = sight.at
        watched.alarm = wrong.sentence

    def _note(self, sight: Sight) -> Note:
        watched = self.watched
        return Note(
            at_ms=lag.ms(sight.at),
            log_head=watched.log_head,
            position=watched.position,
            waiting_ms=None if watched.waiting_since is None else lag.ms(watched.waiting_since),
            moved_ms=None if watched.moved_at is None else lag.ms(watched.moved_at),
            alarm=watched.alarm,
            canary_ms=watched.canary_ms,
        )

    def _remember(self, note: Note | None) -> None:
        """When the views last moved is not forgotten by a watch that is started anew."""
        if note is not None and note.moved_ms is not None and self.watched.moved_at is None:
            self.watched.position = note.position
            self.watched.moved_at = datetime.fromtimestamp(note.moved_ms / 1000, tz=UTC)

    # --- the canary ---------------------------------------------------------------------------------------------------

    def _is_idle(self, sight: Sight) -> bool:
        """Nothing was appended for a while, and nothing waits for the views: a fact that waits proves as much as a canary."""
        appended_at = self.watched.appended_at
        if sight.log_head is None or appended_at is None or sight.reached.waiting_since is not None:
            return False
        return sight.at - appended_at >= self.patience.canary_idle

    async def _send_canary(self) -> None:
        sent_at = self.now()
        with suppress(StoreUnavailable, OutcomeUnknown):
            position = await self._canary.send()
            if position is not None:
                self.watched.canary = (position, sent_at)

    async def _pause(self) -> None:
        """Until the next look; a canary that is under way is looked for all the time, to know how long it takes."""
        clock = asyncio.get_running_loop().time
        until = clock() + self.look_every_s
        while self.watched.canary is not None and clock() < until:
            await asyncio.sleep(CANARY_LOOK_S)
            with suppress(RedisError, OSError):
                meta = await self.view_meta()
                if int(meta.get("checkpoint", 0)) >= self.watched.canary[0]:
                    return
        await asyncio.sleep(max(0.0, until - clock()))


def what_is_wrong(sight: Sight, watched: Watched, patience: Patience) -> Wrong | None:
    """What one look says of the views. Whether it is an alarm is a matter of how long it stays so."""
    after = patience.stalled_after
    if sight.views is None:
        return Wrong(lag.NO_REDIS, after)
    if not sight.views.get("generation"):
        return Wrong(lag.NO_VIEWS, after) if sight.log_head else None
    position = sight.reached.position
    if sight.log_head is not None and (sight.views.get("log_id") != sight.log_id or position > sight.log_head):
        return Wrong(lag.of_another_log(position), after)
    moves = watched.moved_at is not None and sight.at - watched.moved_at <= after
    sentence = lag.behind(sight.reached, sight.log_head or position, sight.at, after, moves=moves)
    sentence = sentence or lag.forsaken(lag.at_of(sight.views, "checked_ms"), sight.at, after)
    return None if sentence is None else Wrong(sentence, after * SEEN_AGAIN)
