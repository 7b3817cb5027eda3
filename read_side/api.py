"""The query side's routes: poll, or with `Prefer: wait=10` wait for the end.

They know the views only; a test runs them with PostgreSQL and the broker stopped. The past is for `history_api.py`.
"""

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from uuid import UUID

import orjson
from aiohttp import web

from read_side.history import Unanswered
from read_side.history_api import HistoryApi
from read_side.moments import position_of
from read_side.queries import Answer, JobQueries, ViewBehind, ViewsRebuilding, ViewsUnavailable

JOB_NOT_FOUND = "Job not found"
REBUILDING = "The views are being built and may not have this job yet. Try again shortly."
UNAVAILABLE = "The views cannot be reached right now. Try again shortly."
BEHIND = "The views have not come as far as position {position} yet. Try again shortly."
MIN_POSITION_INVALID = "minPosition must be a position: a whole number, as `position` of an accepted job or in an ETag."
RETRY_AFTER_S = 2
WAIT_MAX_S = 30
REACH_MAX_S = 5
"""So long a reader waits for `minPosition`, unless it says with `Prefer: wait` how long it would."""

_WAIT = re.compile(r"(?:^|,)\s*wait\s*=\s*\"?(\d{1,4})\"?\s*(?:[,;]|$)", re.ASCII | re.IGNORECASE)
"""The preference `wait` (RFC 7240 section 4.3), in whole seconds. What is none is passed over, as section 2 asks."""

Problem = Callable[..., web.Response]
"""`app.http.problem.problem`: (status, code, message, headers) -> a problem+json response."""


@dataclass(frozen=True)
class ReadApi:
    """The routes over `queries`. `services` is the ready-made body of the list of services."""

    queries: JobQueries
    problem: Problem
    services: bytes
    data_as_string: bool = False
    history: HistoryApi | None = None

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/api/lookup/services", self.list_services),
            web.get("/api/lookup/{job_id}", self.get_job),
            *(self.history.routes() if self.history else ()),
        ]

    async def list_services(self, _: web.Request) -> web.Response:
        return web.Response(body=self.services, content_type="application/json")

    async def get_job(self, request: web.Request) -> web.Response:
        job_id = _job_id(request.match_info)
        if job_id is None:
            return self.problem(404, "job_not_found", JOB_NOT_FOUND)
        if self.history is not None and "asOf" in request.query:
            return await self._get_past(request, job_id, self.history)
        wait_s = preferred_wait_s(request)
        try:
            min_position = position_of(request.query.get("minPosition", "0"))
        except ValueError:
            return self.problem(400, "min_position_invalid", MIN_POSITION_INVALID)
        try:
            answer = await self._answer(job_id, min_position, wait_s)
        except ViewBehind:
            message = BEHIND.format(position=min_position)
            return self.problem(503, "view_behind", message, headers={"Retry-After": str(RETRY_AFTER_S)})
        except ViewsRebuilding:
            return self.problem(503, "views_rebuilding", REBUILDING, headers={"Retry-After": str(RETRY_AFTER_S)})
        except ViewsUnavailable:
            return self.problem(503, "views_unavailable", UNAVAILABLE, headers={"Retry-After": str(RETRY_AFTER_S)})
        if answer is None:
            return self.problem(404, "job_not_found", JOB_NOT_FOUND)
        return self._document(request, answer, {"Preference-Applied": f"wait={wait_s}"} if wait_s else {})

    async def _get_past(self, request: web.Request, job_id: UUID, history: HistoryApi) -> web.Response:
        try:
            return self._document(request, await history.as_of(job_id, request.query["asOf"]), {})
        except Unanswered as unanswered:
            return history.refusal(unanswered)

    def _document(self, request: web.Request, answer: Answer, more_headers: Mapping[str, str]) -> web.Response:
        headers = {"ETag": answer.etag, "Cache-Control": "no-cache", **more_headers}
        if _matches(request.headers.get("If-None-Match"), answer.etag):
            return web.Response(status=304, headers=headers)
        body = _data_as_string(answer.body) if self.data_as_string else answer.body
        return web.Response(body=body, content_type="application/json", headers=headers)

    async def _answer(self, job_id: UUID, min_position: int, wait_s: int) -> Answer | None:
        """What the views say of a job, once they show all up to a position; all waiting together takes `wait_s` at most."""
        clock = asyncio.get_running_loop().time
        until = clock() + wait_s
        if min_position:
            await self.queries.reached(min_position, wait_s or REACH_MAX_S)
        return await (self.queries.ended_job(job_id, until - clock()) if wait_s else self.queries.job(job_id))


def _job_id(match_info: Mapping[str, str]) -> UUID | None:
    try:
        return UUID(match_info["job_id"])
    except ValueError:
        return None


def preferred_wait_s(request: web.Request) -> int:
    """How many seconds a client would rather wait than ask again; 0 when it said nothing of it."""
    found = _WAIT.search(",".join(request.headers.getall("Prefer", [])))
    return min(int(found[1]), WAIT_MAX_S) if found else 0


def _matches(if_none_match: str | None, etag: str) -> bool:
    """Weak comparison, as If-None-Match wants it (RFC 9110 section 13.1.2)."""
    if if_none_match is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or etag in tags


def _data_as_string(body: bytes) -> bytes:
    """The older service's shape: each result's data as JSON text."""
    document = orjson.loads(body)
    for result in document["results"]:
        if result["data"] is not None:
            result["data"] = orjson.dumps(result["data"]).decode()
    return orjson.dumps(document)
