"""How far the views are behind the log, and from when on that is an alarm: one judgement, in the same words for everybody.

The watch (`app/watch.py`), the doctor, readiness, metrics and `lookup status` tell what is said here.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

from redis.asyncio import Redis

from events.record import StoredFact, envelope_of
from events.store import HistoryReader

NOTE_KEY = "watch:views"
NOTE_GOOD_FOR = timedelta(seconds=5)
NO_VIEWS = "There are no views, though the log has facts."
NO_REDIS = "The views cannot be reached: Redis does not answer."


@dataclass(frozen=True, slots=True)
class Patience:
    """`stalled_after`: so long a fact may wait for the views. `canary_idle`: so long nothing need be appended."""

    stalled_after: timedelta
    canary_idle: timedelta


@dataclass(frozen=True, slots=True)
class Reached:
    """How far somebody has come along the log, and since when the first fact behind that waits (None: nothing waits)."""

    position: int
    waiting_since: datetime | None


async def reached(store: HistoryReader, position: int) -> Reached:
    """Raises `StoreUnavailable`."""
    waiting = await store.read_all(position, 1)
    return Reached(position, recorded_at(waiting[0]) if waiting else None)


def recorded_at(stored: StoredFact) -> datetime:
    """A fact that cannot be read stops whoever comes to it, since ever."""
    try:
        return datetime.fromisoformat(envelope_of(stored.state)["recorded_at"])
    except (ValueError, KeyError):
        return datetime.fromtimestamp(0, tz=UTC)


# --- The words --------------------------------------------------------------------------------------------------------


def behind(who: Reached, log_head: int, now: datetime, after: timedelta, *, moves: bool) -> str | None:
    """What is wrong with who is behind the log for longer than he may be."""
    if who.waiting_since is None or now - who.waiting_since <= after:
        return None
    how = "It moves, but is" if moves else "It stands still"
    waits_s = (now - who.waiting_since).total_seconds()
    return f"{how} at position {who.position} of {log_head}; the next fact has waited {waits_s:.0f} s."


def forsaken(checked_at: datetime, now: datetime, after: timedelta) -> str | None:
    """What is wrong with views that nobody looks after, also when nothing happens."""
    if now - checked_at <= after:
        return None
    return f"No projector leads: nobody has looked after the views since {checked_at:%F %T} UTC."


def of_another_log(position: int) -> str:
    return f"The views stand at a fact of position {position} that is not in this log."


# --- What the watch tells ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Note:
    """What the watch saw last, in Redis for everybody who cannot ask the log. Times are Unix times in ms.

    `waiting_ms` is since when the first fact behind the views waits (None: nothing does), `moved_ms` when they were last seen
    to move. `alarm` is empty while all is well. `canary_ms` is how long the last canary took to come back.
    """

    at_ms: int
    log_head: int | None
    position: int
    waiting_ms: int | None
    moved_ms: int | None
    alarm: str
    canary_ms: int | None

    def is_fresh(self, now: datetime) -> bool:
        """Whether the watch that wrote it can be taken to be alive."""
        return ms(now) - self.at_ms <= NOTE_GOOD_FOR / timedelta(milliseconds=1)

    @property
    def lag_events(self) -> int | None:
        """By positions: holes in them count."""
        return None if self.log_head is None else max(0, self.log_head - self.position)


async def leave(redis: Redis, note: Note) -> None:
    """Raises `RedisError` or `OSError`."""
    await redis.set(NOTE_KEY, json.dumps(asdict(note)))


async def last_note(redis: Redis) -> Note | None:
    """However old. None where no watch of this version ever ran. Raises `RedisError` or `OSError`."""
    found = await redis.get(NOTE_KEY)
    try:
        return None if found is None else Note(**json.loads(found))
    except (ValueError, TypeError):
        return None


def at_of(meta: Mapping[str, str], name: str) -> datetime:
    """A time of the views' meta, the epoch where there is none."""
    return datetime.fromtimestamp(int(meta.get(name) or 0) / 1000, tz=UTC)


def ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)
