"""A lookup service that follows a script: the HTTP contract over real sockets, with progress that a test can foresee.

Each poll is answered with the next frame of the job's script, so that nothing depends on the clock. A frame is served once
with its document; a poll that already has it (If-None-Match) gets one 304, and the poll after that the next frame.
"""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from time import monotonic
from typing import Any
from uuid import UUID, uuid4

from aiohttp import web

from domain.services import SERVICES, InvalidServices, parse_services
from domain.target import InvalidTarget, parse_target
from events.facts import Service, Target
from read_side.page import page_routes

Document = dict[str, Any]
CREATED_AT = "2025-11-24T10:00:00.000Z"
COMPLETED_AT = "2025-11-24T10:00:01.300Z"


def succeeded(data: object, duration_ms: int = 34, attempt: int = 1) -> Document:
    return _result("Succeeded", data=data, durationMs=duration_ms, attempt=attempt, completedAt=COMPLETED_AT)


def failed(message: str, duration_ms: int = 2100, attempt: int = 3) -> Document:
    return _result("Failed", errorMessage=message, durationMs=duration_ms, attempt=attempt, completedAt=COMPLETED_AT)


def timed_out() -> Document:
    return _result("TimedOut", errorMessage="No answer came in time.", completedAt=COMPLETED_AT)


def skipped(message: str) -> Document:
    return _result("Skipped", errorMessage=message, completedAt=COMPLETED_AT)


def waiting(status: str = "Pending") -> Document:
    return _result(status)


def _result(status: str, **known: Any) -> Document:
    empty: Document = {"data": None, "errorMessage": None, "completedAt": None, "durationMs": None, "attempt": 1}
    return {"success": status == "Succeeded", "status": status} | empty | known


ANSWERS: dict[Service, Document] = {
    Service.GEOIP: succeeded(
        {
            "ip": "192.0.2.44",
            "country": "Germany",
            "countryCode": "DE",
            "region": "BE",
            "regionName": "Land Berlin",
            "city": "Berlin",
            "zip": None,
            "lat": 52.52,
            "lon": 13.405,
            "timezone": "Europe/Berlin",
            "isp": "Example Networks GmbH",
            "org": None,
            "as": "AS64500 Example Networks",
            "source": "mmdb",
        },
        duration_ms=3,
    ),
    Service.PING: succeeded(
        {
            "target": "192.0.2.44",
            "address": "192.0.2.44",
            "packetsSent": 4,
            "packetsReceived": 3,
            "packetLoss": 25.0,
            "averageRoundtripMs": 11.402,
            "minRoundtripMs": 10.9,
            "maxRoundtripMs": 12.1,
            "method": "icmp",
            "results": [
                {"success": True, "roundtripTimeMs": 10.9, "status": "Success", "ttl": 57},
                {"success": True, "roundtripTimeMs": 11.2, "status": "Success", "ttl": 57},
                {"success": False, "roundtripTimeMs": None, "status": "TimedOut", "ttl": None},
                {"success": True, "roundtripTimeMs": 12.1, "status": "Success", "ttl": 57},
            ],
        },
        duration_ms=1034,
    ),
    Service.RDAP: succeeded(
        {
            "handle": "192.0.2.0 - 192.0.2.255",
            "name": "EXAMPLE-NET",
            "status": ["active"],
            "network": {
                "startAddress": "192.0.2.0",
                "endAddress": "192.0.2.255",
                "cidr": "192.0.2.0/24",
                "country": "DE",
                "type": "ASSIGNED PA",
                "parentHandle": None,
                "ipVersion": "v4",
            },
            "domain": None,
            "events": [
                {"action": "registration", "date": "2009-06-29T00:00:00Z"},
                {"action": "last changed", "date": "2024-02-11T09:31:07Z"},
            ],
            "raw": {
                "objectClassName": "ip network",
                "handle": "192.0.2.0 - 192.0.2.255",
                "notices": [{"title": "Terms of use"}],
            },
        },
        duration_ms=412,
        attempt=2,
    ),
    Service.REVERSE_DNS: succeeded(
        {
            "input": "192.0.2.44",
            "found": True,
            "hostName": "host44.example.net",
            "aliases": [],
            "addresses": ["192.0.2.44"],
            "queriedAtUtc": "2025-11-24T10:00:00.120000Z",
        },
        duration_ms=18,
    ),
}


@dataclass(frozen=True, slots=True)
class Exchange:
    """One answered request, as the peer saw it. `at_s` is on the monotonic clock."""

    method: str
    path: str
    status: int
    if_none_match: str | None = None
    body: object = None
    at_s: float = field(default_factory=monotonic)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that is a problem+json instead of what was asked for; status 0 hangs up without one."""

    status: int
    error: str
    retry_after_s: int | None = None


@dataclass
class LookupApi:
    """The peer's side: what it will answer, and what it was asked.

    `answers` says how each service ends, in the order in which they end, by target as typed; `ends` false = the last of
    them never does. `history` are the sentences that are told of any job. `refusals` are
    used up, one a request, before any poll (`poll_refusals`) or submission is answered.
    """

    answers: dict[str, dict[Service, Document]] = field(default_factory=dict)
    ends: bool = True
    submit_refusals: list[Refusal] = field(default_factory=list)
    poll_refusals: list[Refusal] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    history: list[str] | Refusal = field(default_factory=lambda: ["A lookup was accepted."])
    exchanges: list[Exchange] = field(default_factory=list)
    jobs: dict[UUID, "ScriptedJob"] = field(default_factory=dict)
    url: str = ""

    def polls(self) -> list[Exchange]:
        return [exchange for exchange in self.exchanges if exchange.path in {f"/api/lookup/{job_id}" for job_id in self.jobs}]

    def unchanged_polls(self) -> list[Exchange]:
        return [poll for poll in self.polls() if poll.status == HTTPStatus.NOT_MODIFIED]

    def submissions(self) -> list[Exchange]:
        return [exchange for exchange in self.exchanges if exchange.method == "POST"]

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/api/lookup", self._submit),
            web.get("/api/lookup/services", self._services),
            web.get("/api/lookup/{job_id}", self._poll),
            web.get("/api/lookup/{job_id}/history", self._history),
        ]

    async def _submit(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if self.submit_refusals:
            return self._refuse(request, self.submit_refusals.pop(0), body)
        try:
            target = parse_target(body.get("target"))
            services = parse_services(body.get("services"))
        except (InvalidTarget, InvalidServices) as invalid:
            return self._refuse(request, Refusal(400, invalid.message), body)
        job = self._new_job(target, services)
        self._note(request, 202, body)
        status_url = f"/api/lookup/{job.job_id}"
        message = "Job submitted successfully. Poll the status URL to check progress."
        accepted = {"jobId": str(job.job_id), "statusUrl": status_url, "message": message, "position": 2}
        return web.json_response(accepted, status=202, headers={"Location": status_url, "Retry-After": "1"})

    def _new_job(self, target: Target, services: tuple[Service, ...]) -> "ScriptedJob":
        endings = ANSWERS | self.answers.get(target.raw, {})
        order = [service for service in self.answers.get(target.raw, ANSWERS) if service in services]
        order += [service for service in services if service not in order]
        frames = list(_frames(target, services, {service: endings[service] for service in order}, self.warnings))
        job = ScriptedJob(uuid4(), frames if self.ends else frames[:-1])
        self.jobs[job.job_id] = job
        return job

    async def _services(self, request: web.Request) -> web.StreamResponse:
        self._note(request, 200)
        return web.json_response(
            [{"name": rule.service, "value": rule.value, "description": rule.description} for rule in SERVICES]
        )

    async def _poll(self, request: web.Request) -> web.StreamResponse:
        if self.poll_refusals:
            return self._refuse(request, self.poll_refusals.pop(0))
        job = self.jobs.get(UUID(request.match_info["job_id"]))
        if job is None:
            return self._refuse(request, Refusal(404, "Job not found"))
        etag, document = job.next_frame(request.headers.get("If-None-Match"))
        self._note(request, 304 if document is None else 200)
        headers = {"ETag": etag, "Cache-Control": "no-cache"}
        if document is None:
            return web.Response(status=304, headers=headers)
        return web.json_response(document | {"jobId": str(job.job_id)}, headers=headers)

    async def _history(self, request: web.Request) -> web.StreamResponse:
        if isinstance(self.history, Refusal):
            return self._refuse(request, self.history)
        self._note(request, 200)
        facts = [{"recordedAt": "2025-11-24T10:00:00Z", "sentence": sentence} for sentence in self.history]
        return web.json_response({"jobId": request.match_info["job_id"], "facts": facts, "next": None})

    def _refuse(self, request: web.Request, refusal: Refusal, body: object = None) -> web.Response:
        self._note(request, refusal.status, body)
        if refusal.status == 0:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        problem = {"type": "about:blank", "status": refusal.status, "detail": refusal.error, "error": refusal.error}
        headers = {} if refusal.retry_after_s is None else {"Retry-After": str(refusal.retry_after_s)}
        return web.json_response(problem, status=refusal.status, headers=headers, content_type="application/problem+json")

    def _note(self, request: web.Request, status: int, body: object = None) -> None:
        self.exchanges.append(Exchange(request.method, request.path, status, request.headers.get("If-None-Match"), body))


@dataclass
class ScriptedJob:
    """One job's frames, and where in them its readers are."""

    job_id: UUID
    frames: list[Document]
    at: int = -1
    repeated: bool = False

    def next_frame(self, if_none_match: str | None) -> tuple[str, Document | None]:
        """The tag and the document to answer with; no document = the reader has it."""
        known = if_none_match is not None and if_none_match == self._etag()
        is_last = self.at == len(self.frames) - 1
        if known and (is_last or not self.repeated):
            self.repeated = True
            return self._etag(), None
        self.at, self.repeated = min(self.at + 1, len(self.frames) - 1), False
        return self._etag(), self.frames[self.at]

    def _etag(self) -> str:
        return f'"1-{self.at + 2}"'


def _frames(
    target: Target, services: tuple[Service, ...], endings: dict[Service, Document], warnings: list[str]
) -> Iterable[Document]:
    """Nothing ended, then one service more at a time."""
    for ended in range(len(endings) + 1):
        known = dict(list(endings.items())[:ended])
        results = [{"serviceType": service} | known.get(service, waiting()) for service in services]
        yield {
            "target": target.raw,
            "targetType": target.type,
            "status": _status(results) if ended == len(endings) else "Processing",
            "createdAt": CREATED_AT,
            "completedAt": COMPLETED_AT if ended == len(endings) else None,
            "completionPercentage": 100 * ended // len(endings),
            "requestedServices": list(services),
            "results": results,
            "warnings": warnings if ended == len(endings) else [],
        }


def _status(results: list[Document]) -> str:
    return "Completed" if any(result["success"] for result in results) else "Failed"


@asynccontextmanager
async def running_lookup_api(api: LookupApi) -> AsyncIterator[LookupApi]:
    """Serves the contract, and the page beside it."""
    async with serving([*api.routes(), *page_routes()]) as api.url:
        yield api


@asynccontextmanager
async def serving(routes: Iterable[web.AbstractRouteDef], path: str = "") -> AsyncIterator[str]:
    """Serves the routes below `path`, on a free port of the loopback address; gives the URL."""
    app = web.Application()
    served = app if not path else web.Application()
    served.add_routes(routes)
    if path:
        app.add_subapp(path, served)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}{path}"
    finally:
        await runner.cleanup()
