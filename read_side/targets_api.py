"""The routes to a target's history, and to what changed between two of its jobs."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote
from uuid import UUID

import orjson
from aiohttp import web

from read_side.diff import CHANGED, SAME, UNKNOWN
from read_side.history import Unanswered
from read_side.moments import position_of
from read_side.queries import ViewsRebuilding, ViewsUnavailable
from read_side.targets import Compared, Entry, Reference, TargetQueries, outcome

PAGE = 10
PAGE_MAX = 20
"""Each job of a page is compared with the one before it."""

STATUS = {
    "page_invalid": 400,
    "job_reference_invalid": 400,
    "job_not_in_history": 404,
    "nothing_to_compare": 404,
    "busy": 503,
    "history_unavailable": 503,
    "views_rebuilding": 503,
    "views_unavailable": 503,
}
"""What each refusal is in HTTP. A target that is none is 400, with the codes and sentences of a refused POST."""

RETRY_AFTER_S = 2
PAGE_INVALID = f"before must be a position, and limit a number from 1 to {PAGE_MAX}"
REFERENCE_INVALID = "from and to must each be a job id, or a position: a whole number"
REBUILDING = "The views are being built and may not have all jobs of this target yet. Try again shortly."
UNAVAILABLE = "The views cannot be reached right now. Try again shortly."

Problem = Callable[..., web.Response]
Told = TypeVar("Told")


class NoTarget(Unanswered):
    """What was asked about is no target; the domain says why."""


Canonical = Callable[[str], str]
"""The one form of a target that somebody typed. Raises `NoTarget`. The domain's rules, filled in by `app/wiring.py`."""


@dataclass(frozen=True)
class TargetApi:
    """The routes over `targets`."""

    targets: TargetQueries
    canonical: Canonical
    problem: Problem

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/api/targets/{target}/history", self.get_history),
            web.get("/api/targets/{target}/diff", self.get_diff),
        ]

    async def get_history(self, request: web.Request) -> web.Response:
        try:
            target = self.canonical(request.match_info["target"])
            before, limit = _page(request)
            page = await self._told(self.targets.history(target, before, limit))
        except Unanswered as unanswered:
            return self._refusal(unanswered)
        jobs = [_job(compared) for compared in page.jobs]
        more = f"{_address(target)}/history?before={jobs[-1]['position']}&limit={limit}" if page.more else None
        return _json({"target": target, "jobs": jobs, "next": more})

    async def get_diff(self, request: web.Request) -> web.Response:
        try:
            target = self.canonical(request.match_info["target"])
            from_, to = _reference(request, "from"), _reference(request, "to")
            compared = await self._told(self.targets.diff(target, from_, to))
        except Unanswered as unanswered:
            return self._refusal(unanswered)
        assert compared.before is not None
        return _json(
            {
                "target": target,
                "from": _named(compared.before),
                "to": _named(compared.entry),
                "outcome": outcome(compared),
                "services": [part.as_json() for part in compared.parts],
            }
        )

    async def _told(self, asked: Awaitable[Told]) -> Told:
        try:
            return await asked
        except ViewsRebuilding:
            raise Unanswered("views_rebuilding", REBUILDING) from None
        except ViewsUnavailable:
            raise Unanswered("views_unavailable", UNAVAILABLE) from None

    def _refusal(self, unanswered: Unanswered) -> web.Response:
        status = 400 if isinstance(unanswered, NoTarget) else STATUS[unanswered.code]
        headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None  # noqa: PLR2004 - Service Unavailable
        return self.problem(status, unanswered.code, unanswered.message, headers=headers)


# --- What is asked ----------------------------------------------------------------------------------------------------


def _page(request: web.Request) -> tuple[int | None, int]:
    """Before which position (None = from the newest on), and how many."""
    try:
        before = position_of(request.query["before"]) if "before" in request.query else None
        limit = position_of(request.query.get("limit", str(PAGE)))
    except ValueError:
        raise Unanswered("page_invalid", PAGE_INVALID) from None
    if not 0 < limit <= PAGE_MAX:
        raise Unanswered("page_invalid", PAGE_INVALID)
    return before, limit


def _reference(request: web.Request, name: str) -> Reference | None:
    text = request.query.get(name)
    if text is None:
        return None
    try:
        return position_of(text) if text.isdecimal() else UUID(text)
    except ValueError:
        raise Unanswered("job_reference_invalid", REFERENCE_INVALID) from None


# --- What is told -----------------------------------------------------------------------------------------------------


def _job(compared: Compared) -> dict[str, Any]:
    """An entry, and in which services the result is another than that of the completed job before it."""
    before = compared.before
    return {
        **compared.entry.told,
        "comparedWith": None if before is None else before.job_id,
        "outcome": outcome(compared),
        **{kind: [part.service for part in compared.parts if part.outcome == kind] for kind in (CHANGED, SAME, UNKNOWN)},
    }


def _named(entry: Entry) -> dict[str, Any]:
    return {key: entry.told[key] for key in ("jobId", "position", "status", "submittedAt", "completedAt")}


def _address(target: str) -> str:
    return f"/api/targets/{quote(target, safe='')}"


def _json(body: dict[str, Any]) -> web.Response:
    headers = {"Cache-Control": "no-cache"}
    return web.Response(body=orjson.dumps(body), content_type="application/json", headers=headers)
