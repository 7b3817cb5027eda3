"""The HTTP skin of lists of jobs and of how the services fare: routes, parameters, error messages."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson
from aiohttp import web

from events.facts import Service
from projections.views import HOUR_S, STATS_HOURS_MAX
from read_side.api import (
    BEHIND,
    MIN_POSITION_INVALID,
    REACH_MAX_S,
    REBUILDING,
    RETRY_AFTER_S,
    UNAVAILABLE,
    Problem,
    preferred_wait_s,
)
from read_side.listing import LIMIT_DEFAULT, RELATIVE_ERROR, Listing, ServiceStats, Wanted
from read_side.moments import position_of
from read_side.queries import JobQueries, ViewBehind, ViewsRebuilding, ViewsUnavailable
from read_side.targets_api import Canonical, NoTarget

LIMIT_MAX = 200
STATUSES = ("Pending", "Processing", "Completed", "Failed", "Cancelled")
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}

LIMIT_INVALID = f"limit must be a whole number from 1 to {LIMIT_MAX}."
AFTER_INVALID = "after must be a position: the `next` of an earlier page."
STATUS_INVALID = f"status must be one of {', '.join(STATUSES)}."
HOURS_INVALID = f"hours must be a whole number from 1 to {STATS_HOURS_MAX}."
PARAMETER_UNKNOWN = "There is no such parameter, or it was given twice. Known ones are {known}."


@dataclass(frozen=True)
class ListingApi:
    """The routes over `listing`; `queries` waits for `minPosition`.

    `canonical` gives the canonical form of a target as typed, or raises `NoTarget`.
    """

    listing: Listing
    queries: JobQueries
    problem: Problem
    canonical: Canonical
    now: Callable[[], datetime]

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/api/lookup", self.list_jobs), web.get("/api/stats", self.tell_stats)]

    async def list_jobs(self, request: web.Request) -> web.Response:
        """Newest first."""
        wanted = self._wanted(request)
        if isinstance(wanted, web.Response):
            return wanted
        try:
            return await self._answered(self._page(wanted, preferred_wait_s(request) or REACH_MAX_S))
        except ViewBehind:
            message = BEHIND.format(position=wanted.min_position)
            return self.problem(503, "view_behind", message, headers={"Retry-After": str(RETRY_AFTER_S)})

    async def tell_stats(self, request: web.Request) -> web.Response:
        text = request.query.get("hours")
        if (unknown := self._unknown_parameter(request, "hours")) is not None:
            return unknown
        if text is None:
            return await self._answered(self._told_stats(None))
        count = _number(text, STATS_HOURS_MAX)
        if count is None:
            return self.problem(400, "hours_invalid", HOURS_INVALID)
        this_hour = int(self.now().timestamp()) // HOUR_S
        return await self._answered(self._told_stats(range(this_hour - count + 1, this_hour + 1)))

    async def _page(self, wanted: Wanted, within_s: float) -> bytes:
        if wanted.min_position:
            await self.queries.reached(wanted.min_position, within_s)
        page = await self.listing.jobs(wanted)
        if page.position < wanted.min_position:
            raise ViewBehind  # The list may be of another generation than the documents, which were waited for.
        return b'{"jobs":[%b],"next":%b,"position":%d}' % (b",".join(page.jobs), orjson.dumps(page.next), page.position)

    async def _told_stats(self, hours: Sequence[int] | None) -> bytes:
        stats, position = await self.listing.stats(hours)
        services = [_told(service, of_service) for service, of_service in stats.items()]
        told = {"services": services, "hours": None if hours is None else len(hours), "relativeError": RELATIVE_ERROR}
        return orjson.dumps({**told, "position": position})

    async def _answered(self, body: Awaitable[bytes]) -> web.Response:
        retry = {"Retry-After": str(RETRY_AFTER_S)}
        try:
            answer = await body
        except ViewsRebuilding:
            return self.problem(503, "views_rebuilding", REBUILDING, headers=retry)
        except ViewsUnavailable:
            return self.problem(503, "views_unavailable", UNAVAILABLE, headers=retry)
        return web.Response(body=answer, content_type="application/json", headers={"Cache-Control": "no-cache"})

    def _wanted(self, request: web.Request) -> Wanted | web.Response:
        """What the query asks for, or what is wrong with it."""
        query = request.query
        if (unknown := self._unknown_parameter(request, "limit", "after", "status", "target", "minPosition")) is not None:
            return unknown
        limit = _number(query.get("limit", str(LIMIT_DEFAULT)), LIMIT_MAX)
        if limit is None:
            return self.problem(400, "limit_invalid", LIMIT_INVALID)
        status = query.get("status")
        if status is not None and status not in STATUSES:
            return self.problem(400, "status_invalid", STATUS_INVALID)
        try:
            after = position_of(query["after"]) if "after" in query else None
        except ValueError:
            return self.problem(400, "after_invalid", AFTER_INVALID)
        try:
            target = self.canonical(query["target"]) if "target" in query else None
        except NoTarget as refused:
            return self.problem(400, refused.code, refused.message)
        try:
            min_position = position_of(query.get("minPosition", "0"))
        except ValueError:
            return self.problem(400, "min_position_invalid", MIN_POSITION_INVALID)
        return Wanted(limit, after, status, target, min_position)

    def _unknown_parameter(self, request: web.Request, *known: str) -> web.Response | None:
        """A filter that is misspelled would list everything."""
        if set(request.query) <= set(known) and len(request.query) == len(set(request.query)):
            return None
        return self.problem(400, "parameter_unknown", PARAMETER_UNKNOWN.format(known=", ".join(known)))


def _number(text: str, greatest: int) -> int | None:
    """A whole number from 1 to `greatest`; None for anything else."""
    if not (text.isascii() and text.isdecimal()) or len(text) > len(str(greatest)):
        return None
    return int(text) if 1 <= int(text) <= greatest else None


def _told(service: Service, stats: ServiceStats) -> dict[str, Any]:
    return {
        "service": service,
        "succeeded": stats.outcomes.get("succeeded", 0),
        "failed": stats.outcomes.get("failed", 0),
        "timedOut": stats.outcomes.get("timed_out", 0),
        "skipped": stats.outcomes.get("skipped", 0),
        "successShare": stats.success_share,
        "errors": dict(sorted(stats.errors.items())),
        "durationMs": {name: stats.duration_ms(quantile) for name, quantile in QUANTILES.items()},
    }
