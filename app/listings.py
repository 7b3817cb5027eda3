"""What `lookup jobs` and `lookup stats` do: ask over HTTP, and lay out for people what is told."""

from collections.abc import Mapping
from typing import Any

import orjson
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from app.client import LookupApi
from app.past import Question, Told
from app.rendering import duration_text, safe, safe_text, status_text


def jobs(**query: object) -> Question:
    async def ask(api: LookupApi) -> Told:
        page = orjson.loads(await api.read("/api/lookup", **query))
        return page, _page(page)

    return ask


def stats(hours: int | None) -> Question:
    async def ask(api: LookupApi) -> Told:
        told = orjson.loads(await api.read("/api/stats", hours=hours))
        return told, _numbers(told)

    return ask


def _page(page: Mapping[str, Any]) -> RenderableType:
    table = _table("submitted", "job", "status", "target")
    for job in page.get("jobs") or []:
        submitted = Text(safe(job.get("createdAt"))[:19].replace("T", " "), style="dim")
        table.add_row(submitted, safe_text(job.get("jobId")), status_text(str(job.get("status"))), safe_text(job.get("target")))
    if not table.row_count and not page.get("next"):
        return Text("There are no such jobs.")
    return Group(table, Text(f"Older jobs: --after {safe(page['next'])}", style="dim")) if page.get("next") else table


def _numbers(told: Mapping[str, Any]) -> RenderableType:
    table = _table("service", "answered", "failed", "timed out", "skipped", "success", "p50", "p90", "p99")
    for service in told.get("services") or []:
        counts = [str(service.get(name)) for name in ("succeeded", "failed", "timedOut", "skipped")]
        share, took = service.get("successShare"), service.get("durationMs") or {}
        durations = [duration_text(took.get(name)) for name in ("p50", "p90", "p99")]
        table.add_row(safe(service.get("service")), *counts, "" if share is None else f"{share:.1%}", *durations)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column not in {"target", "service"})
    return table
