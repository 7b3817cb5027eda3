"""`lookup status`: parts, positions and lag, read straight from the servers."""

from dataclasses import asdict, dataclass
from typing import Any

import psycopg
from redis.exceptions import RedisError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from app.health import NOTHING_SEEN, look_at_views
from app.heartbeat import Heartbeat, heartbeats
from app.wiring import Wiring, utc_now
from events.store import StoreUnavailable
from write_side import checkpoints


@dataclass(frozen=True)
class Status:
    """Positions are of the log; None where a server cannot be asked, or nobody knows. What is wrong is told in `problems`."""

    log_head: int | None
    relayed_commands: int | None
    relayed_facts: int | None
    projected: int | None
    lag_events: int | None
    projection_lag_ms: int | None
    moved_ms_ago: int | None
    canary_ms: int | None
    generation: str | None
    parts: list[Heartbeat]
    problems: list[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


async def status_of(wiring: Wiring) -> Status:
    """Asks PostgreSQL and Redis; what does not answer becomes a problem in words."""
    problems: list[str] = []
    head, relayed = None, dict[str, int]()
    try:
        head = await wiring.store.head()
        relayed = await checkpoints.relayed_positions(wiring.settings.database_url or "")
    except (StoreUnavailable, psycopg.Error):
        problems.append("The database cannot be reached, or `lookup migrate` has not been run.")
    views, parts = NOTHING_SEEN, list[Heartbeat]()
    try:
        views = await look_at_views(wiring.redis, utc_now(), wiring.keys)
        parts = await heartbeats(wiring.redis)
        alarm = views.alarm(wiring.settings.patience.stalled_after)
        if alarm is not None:
            problems.append(f"The views: {alarm.rstrip('.')}.")
    except (RedisError, OSError):
        problems.append("Redis cannot be reached.")
    projected = None if views.generation is None else views.position
    return Status(
        log_head=head,
        relayed_commands=relayed.get(checkpoints.COMMANDS),
        relayed_facts=relayed.get(checkpoints.FACTS),
        projected=projected,
        lag_events=None if head is None or projected is None else max(0, head - projected),
        projection_lag_ms=views.lag_ms,
        moved_ms_ago=views.moved_ms_ago,
        canary_ms=None if views.note is None else views.note.canary_ms,
        generation=views.generation,
        parts=parts,
        problems=problems,
    )


def print_status(status: Status, console: Console) -> None:
    positions = Table("position of", "value", "behind", box=None, pad_edge=False)
    rows = {
        "log": status.log_head,
        "relay: commands": status.relayed_commands,
        "relay: facts": status.relayed_facts,
        "projector": status.projected,
    }
    for name, value in rows.items():
        behind = "" if value is None or status.log_head is None else str(max(0, status.log_head - value))
        positions.add_row(name, "unknown" if value is None else str(value), behind)
    console.print(positions)
    if status.projection_lag_ms is not None:
        console.print(f"\nviews were current {_s(status.projection_lag_ms)} ago (generation {status.generation})")
    if status.moved_ms_ago is not None:
        console.print(f"views last moved {_s(status.moved_ms_ago)} ago")
    if status.canary_ms is not None:
        console.print(f"the last canary took {_s(status.canary_ms)} from the log to the views")
    parts = Table("part", "state", "where", "detail", box=None, pad_edge=False)
    for part in status.parts:
        parts.add_row(part.part, part.state, f"{escape(part.host)}:{part.pid}", escape(part.detail))
    console.print()
    console.print(parts if status.parts else "No part runs.")
    for problem in status.problems:
        console.print(f"[bold]{problem}[/bold]")


def _s(ms: int) -> str:
    return f"{ms / 1000:.1f} s"
