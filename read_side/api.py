"""The query side's routes. Polling knows the views only; a test runs it with PostgreSQL and the broker stopped."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from uuid import UUID

import orjson
from aiohttp import web

from read_side.queries import JobQueries, ViewsRebuilding, ViewsUnavailable

JOB_NOT_FOUND = "Job not found"
REBUILDING = "The views are being built and may not have this job yet. Try again shortly."
UNAVAILABLE = "The views cannot be reached right now. Try again shortly."
RETRY_AFTER_S = 2

Problem = Callable[..., web.Response]
"""`app.http.problem.problem`: (status, code, message, headers) -> a problem+json response."""


@dataclass(frozen=True)
class ReadApi:
    """The routes over `queries`. `services` is the ready-made body of the list of services."""

    queries: JobQueries
    problem: Problem
    services: bytes
    data_as_string: bool = False

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/api/lookup/services", self.list_services),
            web.get("/api/lookup/{job_id}", self.get_job),
        ]

    async def list_services(self, _: web.Request) -> web.Response:
        return web.Response(body=self.services, content_type="application/json")

    async def get_job(self, request: web.Request) -> web.Response:
        job_id = _job_id(request.match_info)
        if job_id is None:
            return self.problem(404, "job_not_found", JOB_NOT_FOUND)
        try:
            answer = await self.queries.job(job_id)
        except ViewsRebuilding:
            return self.problem(503, "views_rebuilding", REBUILDING, headers={"Retry-After": str(RETRY_AFTER_S)})
        except ViewsUnavailable:
            return self.problem(503, "views_unavailable", UNAVAILABLE, headers={"Retry-After": str(RETRY_AFTER_S)})
        if answer is None:
            return self.problem(404, "job_not_found", JOB_NOT_FOUND)
        headers = {"ETag": answer.etag, "Cache-Control": "no-cache"}
        if _matches(request.headers.get("If-None-Match"), answer.etag):
            return web.Response(status=304, headers=headers)
        body = _data_as_string(answer.body) if self.data_as_string else answer.body
        return web.Response(body=body, content_type="application/json", headers=headers)


def _job_id(match_info: Mapping[str, str]) -> UUID | None:
    try:
        return UUID(match_info["job_id"])
    except ValueError:
        return None


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
