"""What a scrape asks the servers: how far log, relay and views have come, how many dead letters wait. One reading a server."""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta

from redis.asyncio import Redis

from app.health import look_at_views
from app.metrics import Family, Looking, Reading
from app.watch import Watched
from events.store import EventStore, StoreUnavailable
from projections.views import Keys
from write_side import checkpoints, dead_letters
from write_side.dead_letters import LetterState

HEAD_S = 1.0


def log_reading(store: EventStore) -> Reading:
    async def read() -> list[Family]:
        return [_gauge("lookup_log_position", "Position of the last fact in the log.", await store.head())]

    return read


def relay_reading(database_url: str) -> Reading:
    async def read() -> list[Family]:
        positions = await checkpoints.relayed_positions(database_url)
        return [Family("lookup_relay_position", "gauge", "Up to where the relay has published the log.", "what", positions)]

    return read


def dead_letters_reading(database_url: str) -> Reading:
    async def read() -> list[Family]:
        samples = dict.fromkeys((state.value for state in LetterState), 0)
        for count in await dead_letters.counts(database_url):
            samples[count.state.value] += count.count
        return [Family("lookup_dead_letters", "gauge", "Dead letters in the table, by what was decided.", "state", samples)]

    return read


def projection_reading(
    redis: Redis, now: Callable[[], datetime], keys: Keys, stalled_after: timedelta, store: EventStore | None
) -> Reading:
    """Needs no projector to be alive. What nobody knows is missing: the lag in seconds, while the views have not been built
    whole; the lag in events without `store`, the age of the last move and the canary, while no watch is alive.
    """

    async def read() -> list[Family]:
        seen = await look_at_views(redis, now(), keys)
        head = await _head(store) if store is not None else seen.note.log_head if seen.note is not None else None
        values = {
            PROJECTED: seen.position,
            LAG_EVENTS: None if head is None else max(0, head - seen.position),
            LAG_SECONDS: _seconds(seen.lag_ms),
            LAST_MOVED: _seconds(seen.moved_ms_ago),
            STALLED: float(seen.alarm(stalled_after) is not None),
            ROUND_TRIP: _seconds(None if seen.note is None else seen.note.canary_ms),
        }
        return [_gauge(name, MEANINGS[name], value) for name, value in values.items() if value is not None]

    return read


PROJECTED, LAG_EVENTS, LAG_SECONDS, LAST_MOVED, STALLED, ROUND_TRIP = (
    "lookup_projection_position",
    "lookup_projection_lag_events",
    "lookup_projection_lag_seconds",
    "lookup_projection_last_moved_seconds",
    "lookup_projection_stalled",
    "lookup_canary_round_trip_seconds",
)
MEANINGS = {
    PROJECTED: "Up to where views show the log.",
    LAG_EVENTS: "So many facts of the log the views do not show yet, by positions.",
    LAG_SECONDS: "How long ago the views were last known to show all of the log.",
    LAST_MOVED: "How long ago the views were last seen to move.",
    STALLED: "Whether the views stand still, are far behind, or are not there: the alarm.",
    ROUND_TRIP: "How long the last canary took from the log to the views.",
}


async def _head(store: EventStore) -> int | None:
    """The views can be told of while the log does not answer."""
    try:
        async with asyncio.timeout(HEAD_S):
            return await store.head()
    except (StoreUnavailable, TimeoutError):
        return None


def watch_look(watched: Watched) -> Looking:
    """What the watch of this process says, also while Redis does not answer."""

    def look() -> list[Family]:
        return [
            _gauge("lookup_watch_alarm", "Whether the watch of this process has raised the alarm.", float(bool(watched.alarm)))
        ]

    return look


def _seconds(ms: int | None) -> float | None:
    return None if ms is None else ms / 1000


def _gauge(name: str, meaning: str, value: float) -> Family:
    return Family(name, "gauge", meaning, "", {"": value})
