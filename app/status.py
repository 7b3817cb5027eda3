"""`lookup status`: parts, positions and lag, read straight from the servers."""

from dataclasses import asdict, dataclass
from typing import Any

import psycopg
from redis.exceptions import RedisError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from app.health import projection_lag_ms, view_meta
from app.heartbeat import Heartbeat, heartbeats
from app.wiring import Wiring, utc_now
from events.store import StoreUnavailable
from write_side import checkpoints


@dataclass(frozen=True)
class Status:
    """Positions are of the log; None where a server cannot be asked. Lags are in events, and of the views in ms too."""

    log_head: int | None
    relayed_commands: int | None
    relayed_facts: int | None
    projected: int | None
    projection_lag_ms: int | None
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
    meta, lag_ms, parts = dict[str, str](), None, list[Heartbeat]()
    try:
        meta = await view_meta(wiring.redis, wiring.keys)
        lag_ms = await projection_lag_ms(wiring.redis, utc_now, wiring.keys)
        parts = await heartbeats(wiring.redis)
    except (RedisError, OSError):
        problems.append("Redis cannot be reached.")
    return Status(
        log_head=head,
        relayed_commands=relayed.get(checkpoints.COMMANDS),
        relayed_facts=relayed.get(checkpoints.FACTS),
        projected=int(meta["checkpoint"]) if "checkpoint" in meta else None,
        projection_lag_ms=lag_ms,
        generation=meta.get("generation"),
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
        console.print(f"\nviews were current {status.projection_lag_ms / 1000:.1f} s ago (generation {status.generation})")
    parts = Table("part", "state", "where", "detail", box=None, pad_edge=False)
    for part in status.parts:
        parts.add_row(part.part, part.state, f"{escape(part.host)}:{part.pid}", escape(part.detail))
    console.print()
    console.print(parts if status.parts else "No part runs.")
    for problem in status.problems:
        console.print(f"[bold]{problem}[/bold]")
