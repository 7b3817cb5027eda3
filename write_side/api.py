"""The command side's routes: take a request apart, hand it to `submit`, say what became of it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

import orjson
from aiohttp import web

from domain.options import InvalidOption, parse_timeout_s
from domain.services import InvalidServices, parse_services
from domain.target import InvalidTarget, parse_target
from events.record import Cause
from events.store import OutcomeUnknown, StoreUnavailable
from write_side.submit import Submitter

SUBMITTED = "Job submitted successfully. Poll the status URL to check progress."
NOT_AN_OBJECT = 'The request body must be a JSON object like {"target": "example.com"}'
STORE_UNAVAILABLE = "The job could not be stored right now. Nothing was accepted; try again shortly."
OUTCOME_UNKNOWN = (
    "The connection to the store broke while the job was being stored. It may or may not have been accepted:"
    " `statusUrl` will tell."
)
RETRY_AFTER_S = 2
POLL_AFTER_S = 1
ANONYMOUS = "anonymous"
"""The actor in an envelope, which is never erased. The client's address goes into `requested_by`, which is erasable.

Nobody is authenticated yet: what a client says of itself would be no evidence, so it is not asked, and there is no key id.
"""
ASKED = "asked over HTTP"

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)
"""W3C Trace Context section 3.2.2. What does not look like one is passed over, as section 3.2 asks."""

Problem = Callable[..., web.Response]
"""`app.http.problem.problem`: (status, code, message, headers) -> a problem+json response."""


@dataclass(frozen=True)
class WriteApi:
    """The routes over `submitter`."""

    submitter: Submitter
    problem: Problem
    new_id: Callable[[], UUID]
    request_id_of: Callable[[web.Request], str | None]

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/api/lookup", self.submit)]

    async def submit(self, request: web.Request) -> web.Response:
        body = _object_of(await request.read())
        if body is None:
            return self.problem(400, "invalid_json", NOT_AN_OBJECT)
        try:
            target = parse_target(body.get("target"))
            services = parse_services(body.get("services"))
            timeout_s = parse_timeout_s(body.get("timeoutSeconds"))
        except (InvalidTarget, InvalidServices, InvalidOption) as invalid:
            return self.problem(400, invalid.code, invalid.message)
        cause = Cause(
            actor=ANONYMOUS,
            correlation_id=self.new_id(),
            request_id=self.request_id_of(request),
            reason=ASKED,
            traceparent=_traceparent_of(request.headers.get("traceparent", "")),
        )
        job_id = self.new_id()
        try:
            accepted = await self.submitter.submit(
                job_id, target, services, cause, requested_by=request.remote, timeout_s=timeout_s
            )
        except StoreUnavailable:
            return self.problem(503, "store_unavailable", STORE_UNAVAILABLE, headers={"Retry-After": str(RETRY_AFTER_S)})
        except OutcomeUnknown:
            headers = {"Retry-After": str(RETRY_AFTER_S)}
            where = {"jobId": job_id, "statusUrl": _status_url(job_id)}
            return self.problem(503, "outcome_unknown", OUTCOME_UNKNOWN, headers=headers, members=where)
        return _accepted(accepted.job_id, accepted.position)


def _accepted(job_id: UUID, position: int) -> web.Response:
    status_url = _status_url(job_id)
    body = {"jobId": job_id, "statusUrl": status_url, "message": SUBMITTED, "position": position}
    headers = {"Location": status_url, "Retry-After": str(POLL_AFTER_S)}
    return web.Response(status=202, body=orjson.dumps(body), content_type="application/json", headers=headers)


def _traceparent_of(header: str) -> str | None:
    return header if _TRACEPARENT.fullmatch(header) else None


def _object_of(body: bytes) -> dict[str, object] | None:
    """The request's JSON object, else None. orjson refuses NaN, invalid UTF-8, lone surrogates and deep nesting."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _status_url(job_id: UUID) -> str:
    return f"/api/lookup/{job_id}"
