"""What a client lives through: every promise of the HTTP API, kept on whichever deployment is behind the two URLs."""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import aiohttp
from uuid_utils.compat import uuid7

from tests.e2e.served import NEIGHBOURS

Document = dict[str, Any]

ALL = ["GeoIP", "Ping", "RDAP", "ReverseDNS"]
JOB_KEYS = [
    "jobId",
    "target",
    "targetType",
    "status",
    "createdAt",
    "completedAt",
    "completionPercentage",
    "requestedServices",
    "results",
    "warnings",
]
RESULT_KEYS = ["serviceType", "success", "status", "data", "errorCode", "errorMessage", "completedAt", "durationMs", "attempt"]
PROBLEM_KEYS = ["type", "title", "status", "detail", "code", "error"]
ENDED = {"Succeeded", "Failed", "TimedOut", "Skipped"}
CLOSED = {"Completed", "Failed", "Cancelled"}
SUBMITTED = "Job submitted successfully. Poll the status URL to check progress."
NEEDS_AN_ADDRESS = "Reverse DNS lookup requires an IP address target."
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z")
FOLLOW_S = 45.0
READY_S = 30.0
POLL_S = 0.05


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    document: Any


@dataclass
class Client:
    """A client of the two sides of the API. `finished` collects the final document of each job that was followed."""

    http: aiohttp.ClientSession
    write_url: str
    read_url: str
    finished: dict[str, Document] = field(default_factory=dict)

    async def post(self, body: Any) -> Answer:
        return await self.ask("POST", f"{self.write_url}/api/lookup", json=body)

    async def get(self, path: str, etag: str | None = None) -> Answer:
        return await self.ask("GET", self.read_url + path, headers={"If-None-Match": etag} if etag else {})

    async def submit(self, target: str, services: Sequence[Any] | None = None) -> str:
        """The id of the accepted job. While the store is busy, asks again when it is told to."""
        body = {"target": target} | ({} if services is None else {"services": services})
        async with asyncio.timeout(FOLLOW_S):
            answer = await self.post(body)
            while answer.status == 503:
                await asyncio.sleep(int(answer.headers["Retry-After"]))
                answer = await self.post(body)
        assert answer.status == 202, answer
        return str(answer.document["jobId"])

    async def follow(self, job_id: str) -> Document:
        """Polls as a client should, until the job is closed; checks what must hold of every answer on the way."""
        etag: str | None = None
        last: Document | None = None
        async with asyncio.timeout(FOLLOW_S):
            while last is None or last["status"] not in CLOSED:
                answer = await self.get(f"/api/lookup/{job_id}", etag)
                if answer.status == 304:
                    assert answer.headers["ETag"] == etag
                    assert answer.document is None
                    await asyncio.sleep(POLL_S)
                    continue
                assert answer.status == 200, answer
                check_document(answer.document)
                check_progress(last, answer.document)
                assert answer.headers["ETag"] != etag, "another entity tag for the same document"
                etag, last = answer.headers["ETag"], answer.document
        assert etag is not None
        assert (await self.get(f"/api/lookup/{job_id}", etag)).status == 304
        self.finished[job_id] = last
        return last

    async def look_up(self, target: str, services: Sequence[Any] | None = None) -> Document:
        return await self.follow(await self.submit(target, services))

    async def ready(self, url: str) -> Answer:
        """The first readiness answer of a side that is not 503."""
        async with asyncio.timeout(READY_S):
            while True:
                answer = await self.ask("GET", f"{url}/health/ready")
                if answer.status != 503:
                    return answer
                await asyncio.sleep(POLL_S)

    async def ask(self, method: str, url: str, **how: Any) -> Answer:
        async with self.http.request(method, url, **how) as response:
            body = await response.read()
            return Answer(response.status, response.headers, await response.json(content_type=None) if body else None)


@asynccontextmanager
async def client_of(write_url: str, read_url: str) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as http:
        yield Client(http, write_url, read_url)


async def journey(client: Client) -> None:
    """All of it, in the order in which somebody would try things out."""
    await _health(client)
    await _services(client)
    await _refusals(client)
    await _acceptance(client)
    await _an_ipv4_address(client)
    await _an_ipv6_address(client)
    await _a_domain(client)
    await _services_in_any_spelling(client)
    await _what_was_typed_is_kept(client)
    await _all_failed(client)
    await _nothing_to_ask(client)
    await _some_failed(client)
    await _no_hasty_404(client)
    await _unknown_jobs(client)


async def _health(client: Client) -> None:
    for url in (client.write_url, client.read_url):
        ready = await client.ready(url)
        assert ready.document["status"] == "ready"
        assert set(ready.document["checks"].values()) == {"ok"}
        live = await client.ask("GET", f"{url}/health/live")
        assert (live.status, live.document) == (200, {"status": "alive"})


async def _services(client: Client) -> None:
    answer = await client.get("/api/lookup/services")

    assert answer.status == 200
    assert [list(service.items()) for service in answer.document] == [
        [("name", "GeoIP"), ("value", 0), ("description", "Geographic location and ISP information")],
        [("name", "Ping"), ("value", 1), ("description", "Network reachability and latency check")],
        [("name", "RDAP"), ("value", 2), ("description", "Registration data via RDAP protocol")],
        [("name", "ReverseDNS"), ("value", 3), ("description", "Reverse DNS lookup (PTR record)")],
    ]


async def _refusals(client: Client) -> None:
    refused: dict[str, list[Any]] = {
        "Target is required": [{}, {"target": None}, {"target": "  "}, {"target": 8}],
        "Invalid IP address format: '256.1.1.1'. IPv4 must have exactly 4 octets (0-255 each).": [{"target": "256.1.1.1"}],
        "Domain name must contain a dot (e.g. example.com)": [{"target": "localhost"}],
        "Services must be a list/array of ServiceType": [{"target": "127.0.0.1", "services": "Ping"}],
        "At least one service must be specified if services is provided": [{"target": "127.0.0.1", "services": []}],
        "Maximum 10 services can be requested at once": [{"target": "127.0.0.1", "services": [0] * 11}],
        "Duplicate services are not allowed": [{"target": "127.0.0.1", "services": [0, "GeoIP"]}],
        "Invalid service type specified": [{"target": "127.0.0.1", "services": ["Whois"]}],
        'The request body must be a JSON object like {"target": "example.com"}': ["127.0.0.1", ["127.0.0.1"]],
    }
    for message, bodies in refused.items():
        for body in bodies:
            check_problem(await client.post(body), 400, message)


async def _acceptance(client: Client) -> None:
    answer = await client.post({"target": "127.0.0.1"})

    job_id = answer.document["jobId"]
    assert answer.status == 202
    assert UUID(job_id).version == 7
    assert list(answer.document) == ["jobId", "statusUrl", "message", "position"]
    assert answer.document["statusUrl"] == answer.headers["Location"] == f"/api/lookup/{job_id}"
    assert answer.document["message"] == SUBMITTED
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.headers["Content-Type"].startswith("application/json")

    first = await client.get(answer.headers["Location"])
    assert first.status == 200
    assert _position(first) >= answer.document["position"]
    await client.follow(job_id)
    last = await client.get(answer.headers["Location"])
    assert _position(last) > answer.document["position"]


async def _an_ipv4_address(client: Client) -> None:
    job = await client.look_up("127.0.0.1")

    place, echoes, registration, name = _data(job)
    assert (job["targetType"], job["status"], job["requestedServices"]) == ("IPAddress", "Completed", ALL)
    assert (place["ip"], place["city"], place["as"]) == ("127.0.0.1", "Loopback City", "AS64500 Demo Networks")
    assert (echoes["address"], echoes["packetsReceived"], len(echoes["results"])) == ("127.0.0.1", 4, 4)
    assert (registration["handle"], registration["network"]["cidr"]) == ("DEMO-127.0.0.0", "127.0.0.0/24")
    assert (name["found"], name["hostName"], name["addresses"]) == (True, "loopback.example.net", ["127.0.0.1"])


async def _an_ipv6_address(client: Client) -> None:
    job = await client.look_up("::1")

    place, echoes, registration, name = _data(job)
    assert (job["targetType"], job["status"]) == ("IPAddress", "Completed")
    assert (place["ip"], place["city"]) == ("::1", "Loopback City")
    assert (echoes["address"], echoes["packetsReceived"]) == ("::1", 4)
    assert (registration["handle"], registration["network"]["ipVersion"]) == ("DEMO-::", "v6")
    assert (name["input"], name["hostName"]) == ("::1", "loopback6.example.net")


async def _a_domain(client: Client) -> None:
    job = await client.look_up("example.com")

    place, echoes, registration, name = _data(job)
    skipped = job["results"][3]
    assert (job["targetType"], job["status"], job["completionPercentage"]) == ("Domain", "Completed", 100)
    assert (place["ip"], echoes["target"], registration["name"]) == ("127.0.0.1", "example.com", "example.com")
    assert registration["domain"]["registrar"] == "Made-up Registrar B.V."
    assert (name, skipped["status"], skipped["success"]) == (None, "Skipped", False)
    assert skipped["errorMessage"] == NEEDS_AN_ADDRESS


async def _services_in_any_spelling(client: Client) -> None:
    job = await client.look_up("127.0.0.1", [3, "pInG", "0"])

    assert job["requestedServices"] == ["ReverseDNS", "Ping", "GeoIP"]
    assert [result["serviceType"] for result in job["results"]] == ["ReverseDNS", "Ping", "GeoIP"]


async def _what_was_typed_is_kept(client: Client) -> None:
    job = await client.look_up("EXAMPLE.com.", ["RDAP"])

    assert job["target"] == "EXAMPLE.com."
    assert _data(job)[0]["name"] == "example.com"


async def _all_failed(client: Client) -> None:
    job = await client.look_up("missing.org", ["RDAP", "ReverseDNS"])

    assert (job["status"], job["completionPercentage"]) == ("Failed", 100)
    assert [(result["status"], result["errorMessage"]) for result in job["results"]] == [
        ("Failed", "The registry has no registration data for this target."),
        ("Skipped", NEEDS_AN_ADDRESS),
    ]


async def _nothing_to_ask(client: Client) -> None:
    """Closed by the very decision that took it on."""
    job = await client.look_up("example.com", ["ReverseDNS"])

    assert (job["status"], job["results"][0]["status"]) == ("Failed", "Skipped")


async def _some_failed(client: Client) -> None:
    job = await client.look_up("missing.org", ["RDAP", "GeoIP"])

    assert job["status"] == "Completed"
    assert [result["status"] for result in job["results"]] == ["Failed", "Succeeded"]


async def _no_hasty_404(client: Client) -> None:
    """A client that polls at once never hears that its job does not exist."""
    job_ids = []
    for neighbour in NEIGHBOURS[:100]:
        job_ids.append(await client.submit(f"127.0.{neighbour}.1", ["GeoIP"]))
        first = await client.get(f"/api/lookup/{job_ids[-1]}")
        assert first.status == 200, first
    for job_id in job_ids:
        assert (await client.follow(job_id))["status"] == "Completed"


async def _unknown_jobs(client: Client) -> None:
    long_ago = UUID(int=(1_700_000_000_000 << 80) | (7 << 76) | (2 << 62) | 4711)
    for unknown in (long_ago, uuid4(), "garbage", "0", uuid7()):
        check_problem(await client.get(f"/api/lookup/{unknown}"), 404, "Job not found")


def check_document(job: Document) -> None:
    """What holds of every document, finished or not."""
    assert list(job) == JOB_KEYS
    assert TIME.fullmatch(job["createdAt"])
    assert [result["serviceType"] for result in job["results"]] == job["requestedServices"]
    assert job["warnings"] == []
    for result in job["results"]:
        _check_result(result)
    ended = sum(result["status"] in ENDED for result in job["results"])
    assert job["completionPercentage"] == 100 * ended // len(job["results"])
    assert (job["status"] in CLOSED) == (job["completedAt"] is not None)
    if job["status"] in CLOSED:
        assert job["status"] == ("Completed" if any(result["success"] for result in job["results"]) else "Failed")
        assert _at(job["createdAt"]) <= max(_at(result["completedAt"]) for result in job["results"]) <= _at(job["completedAt"])
    else:
        assert job["status"] in {"Pending", "Processing"}


def check_progress(earlier: Document | None, later: Document) -> None:
    """Nothing that was told is taken back."""
    if earlier is None:
        return
    assert later["completionPercentage"] >= earlier["completionPercentage"]
    for before, after in zip(earlier["results"], later["results"], strict=True):
        assert before["status"] not in ENDED or after == before


def check_problem(answer: Answer, status: int, message: str) -> None:
    """RFC 9457, and `error` for clients of the older service."""
    assert (answer.status, answer.document["error"]) == (status, message)
    assert answer.headers["Content-Type"].startswith("application/problem+json")
    assert list(answer.document) == PROBLEM_KEYS
    assert (answer.document["status"], answer.document["detail"]) == (status, message)


def _check_result(result: Document) -> None:
    assert list(result) == RESULT_KEYS
    assert result["success"] == (result["status"] == "Succeeded") == (result["data"] is not None)
    assert result["status"] in ENDED | {"Pending", "Deferred"}
    assert (result["status"] in ENDED) == (result["completedAt"] is not None)
    assert (result["errorCode"] is None) == (result["errorMessage"] is None)
    assert (result["errorMessage"] is not None) == (result["status"] in ENDED - {"Succeeded"})
    assert result["attempt"] >= 1
    if result["status"] in {"Succeeded", "Failed"}:
        assert result["durationMs"] >= 0
    if result["completedAt"] is not None:
        assert TIME.fullmatch(result["completedAt"])


def _data(job: Document) -> list[Any]:
    return [result["data"] for result in job["results"]]


def _position(answer: Answer) -> int:
    found = re.fullmatch(r'"\d+-(\d+)"', answer.headers["ETag"])
    assert found is not None, answer.headers["ETag"]
    return int(found[1])


def _at(text: str) -> datetime:
    return datetime.fromisoformat(text)
