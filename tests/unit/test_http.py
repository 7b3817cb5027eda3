"""Both applications over a real socket: what is accepted, what is refused and in which words, and what no body can do."""

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import orjson
import pytest
from aiohttp import ClientResponse, ClientSession, web
from redis.asyncio import Redis
from uuid_utils.compat import uuid7

from app.http.middlewares import NOT_JSON, request_id_of
from app.http.problem import problem
from app.http.serving import serving
from app.wiring import _services_body
from domain.address_policy import AddressPolicy
from events.facts import JobFailed, JobSubmitted, TargetType, TasksDispatched, TaskSkipped
from events.memory import MemoryStore
from events.record import envelope_of, read
from events.store import AppendUnit, EventStore, OutcomeUnknown, StoreUnavailable, StreamHead
from read_side.api import ReadApi
from read_side.queries import JobQueries
from tests.builders import LIFETIME, NOW, PING, REVERSE_DNS, RULES, Clock, memory_store
from tests.peers.lookups import closed_port
from write_side.api import WriteApi
from write_side.sagas import Sagas
from write_side.submit import Submitter

SUBMITTED = "Job submitted successfully. Poll the status URL to check progress."
NOT_AN_OBJECT = 'The request body must be a JSON object like {"target": "example.com"}'
ALL_FOUR = ("GeoIP", "Ping", "RDAP", "ReverseDNS")


class Broken:
    """A store whose appends end in a given way."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def append(self, _: AppendUnit) -> Sequence[StreamHead]:
        raise self.error


@dataclass
class Service:
    """Both applications on one loopback port, as `lookup up` mounts them, over a store in memory and no Redis at all."""

    url: str
    http: ClientSession
    store: MemoryStore

    async def post(self, body: Any, **headers: str) -> ClientResponse:
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        return await self.http.post(f"{self.url}/api/lookup", data=data, headers=headers)

    async def refusal(self, body: Any, **headers: str) -> tuple[int, str, str]:
        """Status, code and message of a refused request, whose shape is checked on the way."""
        return await refusal_of(await self.post(body, **headers))

    async def submitted(self, body: Any) -> JobSubmitted:
        """The fact that an accepted request led to."""
        answer = await self.post(body)
        assert answer.status == 202, await answer.text()
        job_id = UUID((await answer.json())["jobId"])
        fact = read((await self.store.read([job_id]))[job_id][0]).fact
        assert isinstance(fact, JobSubmitted)
        return fact


async def refusal_of(answer: ClientResponse) -> tuple[int, str, str]:
    assert answer.content_type == "application/problem+json"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    body = await answer.json()
    assert body.keys() == {"type", "title", "status", "detail", "code", "error"}
    assert body["status"] == answer.status
    assert body["type"] == f"urn:lookup:problem:{body['code']}"
    assert body["title"] == answer.reason
    assert body["error"] == body["detail"]
    return answer.status, body["code"], body["error"]


def both_applications(store: EventStore, redis: Redis) -> AbstractAsyncContextManager[str]:
    """Served as the product serves them; gives the address."""
    submitter = Submitter(Sagas(store), AddressPolicy(), RULES, Clock(), uuid7, "default")
    queries = JobQueries(redis, Clock())

    async def break_down(_: web.Request) -> web.Response:
        raise KeyError("password=hunter2")

    routes = [
        *WriteApi(submitter, problem, uuid7, request_id_of).routes(),
        *ReadApi(queries, problem, _services_body()).routes(),
        web.get("/broken", break_down),
    ]
    return serving(routes, "127.0.0.1", 0)


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    store = memory_store()
    with closed_port() as port:
        redis = Redis(port=port)
        async with both_applications(store, redis) as url, ClientSession() as http:
            yield Service(url, http, store)
        await redis.aclose()


async def answer_over(store: Any) -> dict[str, Any]:
    """How the service answers a good request when its store ends like this."""
    async with both_applications(store, Redis()) as url, ClientSession() as http:
        answer = await http.post(f"{url}/api/lookup", json={"target": "example.com"})
        assert answer.status == 503
        assert answer.content_type == "application/problem+json"
        assert answer.headers["Retry-After"] == "2"
        body: dict[str, Any] = await answer.json()
        return body


# --- Accepted ---------------------------------------------------------------------------------------------------------


async def test_an_accepted_job_is_answered_with_its_address_and_position(service: Service) -> None:
    answer = await service.post({"target": "example.com"})

    body = await answer.json()
    job_id = UUID(body["jobId"])
    assert answer.status == 202
    assert answer.content_type == "application/json"
    assert body == {
        "jobId": str(job_id),
        "statusUrl": f"/api/lookup/{job_id}",
        "message": SUBMITTED,
        "position": await service.store.head(),
    }
    assert answer.headers["Location"] == f"/api/lookup/{job_id}"
    assert answer.headers["Retry-After"] == "1"
    assert job_id.version == 7


async def test_an_accepted_job_is_in_the_log_before_it_is_answered(service: Service) -> None:
    answer = await service.post({"target": "example.com", "services": ["Ping", "ReverseDNS"]})

    job_id = UUID((await answer.json())["jobId"])
    facts = [read(stored).fact for stored in (await service.store.read([job_id]))[job_id]]
    assert [type(fact) for fact in facts] == [JobSubmitted, TasksDispatched, TaskSkipped]
    submitted, dispatched, skipped = facts
    assert isinstance(submitted, JobSubmitted)
    assert isinstance(dispatched, TasksDispatched)
    assert isinstance(skipped, TaskSkipped)
    assert (submitted.services, submitted.requested_by, submitted.tenant) == ((PING, REVERSE_DNS), "127.0.0.1", "default")
    assert (submitted.submitted_at, submitted.expires_at) == (NOW, NOW + LIFETIME)
    assert [task.service for task in dispatched.tasks] == [PING]
    assert (skipped.service, skipped.message) == (REVERSE_DNS, "Reverse DNS lookup requires an IP address target.")


async def test_a_target_that_no_service_may_be_asked_about_is_a_job_that_fails_at_once(service: Service) -> None:
    answer = await service.post({"target": "10.0.0.1", "services": ["Ping"]})

    assert answer.status == 202
    job_id = UUID((await answer.json())["jobId"])
    *_, last = (await service.store.read([job_id]))[job_id]
    assert isinstance(read(last).fact, JobFailed)


@pytest.mark.parametrize(
    ("target", "canonical", "kind"),
    [
        ("8.8.8.8", "8.8.8.8", TargetType.IP_ADDRESS),
        (" 8.8.8.8 ", "8.8.8.8", TargetType.IP_ADDRESS),
        ("2001:db8::1", "2001:db8::1", TargetType.IP_ADDRESS),
        ("::1", "::1", TargetType.IP_ADDRESS),
        ("::", "::", TargetType.IP_ADDRESS),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.1", TargetType.IP_ADDRESS),
        ("fe80::1%eth0", "fe80::1%eth0", TargetType.IP_ADDRESS),
        ("example.com", "example.com", TargetType.DOMAIN),
        ("EXAMPLE.com", "example.com", TargetType.DOMAIN),
        ("a.co", "a.co", TargetType.DOMAIN),
        ("example.com.", "example.com", TargetType.DOMAIN),
        ("example.de", "example.de", TargetType.DOMAIN),
        ("example.cafe", "example.cafe", TargetType.DOMAIN),
        ("b\u00fccher.de", "xn--bcher-kva.de", TargetType.DOMAIN),
        ("\uff11\uff12\uff17.\u2460.1.1", "127.1.1.1", TargetType.IP_ADDRESS),
    ],
)
async def test_a_target_is_accepted_and_kept_in_both_forms(
    service: Service, target: str, canonical: str, kind: TargetType
) -> None:
    fact = await service.submitted({"target": target})

    assert fact.target.model_dump() == {"raw": target, "canonical": canonical, "type": kind}
    assert fact.target_type is kind


@pytest.mark.parametrize(
    ("services", "expected"),
    [
        (None, ALL_FOUR),
        (["Ping"], ("Ping",)),
        ([3, 0], ("ReverseDNS", "GeoIP")),
        (["2", "1"], ("RDAP", "Ping")),
        (["rdap", "GEOIP", "reversedns", "pInG"], ("RDAP", "GeoIP", "ReverseDNS", "Ping")),
    ],
)
async def test_services_may_be_numbers_digits_or_names_in_any_case(
    service: Service, services: object, expected: Sequence[str]
) -> None:
    fact = await service.submitted({"target": "8.8.8.8", "services": services})

    assert fact.services == tuple(expected)


async def test_without_services_all_four_are_asked_in_order(service: Service) -> None:
    assert (await service.submitted({"target": "8.8.8.8"})).services == ALL_FOUR


# --- Refused, in these words ------------------------------------------------------------------------------------------

REQUIRED = "Target is required"
NO_DOT = "Domain name must contain a dot (e.g. example.com)"


def not_an_address(target: str) -> str:
    return f"Invalid IP address format: '{target}'. IPv4 must have exactly 4 octets (0-255 each)."


@pytest.mark.parametrize("body", [{}, {"target": None}, {"target": ""}, {"target": " \t\n"}])
@pytest.mark.parametrize("also", [{}, {"services": []}], ids=["alone", "with empty services"])
async def test_a_target_is_required(service: Service, body: dict[str, Any], also: dict[str, Any]) -> None:
    assert await service.refusal(body | also) == (400, "target_required", REQUIRED)


@pytest.mark.parametrize("target", [8, 8.8, True, ["8.8.8.8"], {"target": "8.8.8.8"}])
async def test_a_target_that_is_not_text_is_none(service: Service, target: object) -> None:
    assert await service.refusal({"target": target}) == (400, "target_required", REQUIRED)


@pytest.mark.parametrize(
    "target",
    [
        *("1.2.3", "1.2.3.4.5", "256.1.1.1", "1.2.3.999", "1", "1.", "127.1", "2130706433", "0177.0.0.1", "010.8.8.8"),
        *("0x7f000001", "8.8.8.8.", "1..2.3", "00.0.0.0"),
    ],
)
async def test_another_spelling_of_an_ipv4_address_is_refused(service: Service, target: str) -> None:
    assert await service.refusal({"target": target}) == (400, "invalid_ip", not_an_address(target))


@pytest.mark.parametrize("target", ["localhost", "com", "b\u00fccher", "a-b"])
async def test_a_domain_needs_a_dot(service: Service, target: str) -> None:
    assert await service.refusal({"target": target}) == (400, "domain_no_dot", NO_DOT)


@pytest.mark.parametrize(
    ("target", "code", "message"),
    [
        ("a." * 126 + "com", "domain_too_long", "Domain name is too long: at most 253 characters are allowed"),
        ("a..com", "label_empty", "Domain name must not contain an empty label (two dots in a row, or a leading dot)"),
        (".com.de", "label_empty", "Domain name must not contain an empty label (two dots in a row, or a leading dot)"),
        ("a" * 64 + ".com", "label_too_long", f"Domain label is too long: '{'a' * 64}'. At most 63 characters are allowed."),
        ("exa!mple.com", "label_invalid", "Invalid domain label: 'exa!mple'. Only letters, digits and hyphens are allowed."),
        ("-a.com", "label_hyphen", "Invalid domain label: '-a'. It must not start or end with a hyphen."),
        ("a-.com", "label_hyphen", "Invalid domain label: 'a-'. It must not start or end with a hyphen."),
        ("a_b.com", "label_underscore", "Invalid domain label: 'a_b'. Underscores are not allowed."),
        ("a b.com", "label_space", "Invalid domain label: 'a b'. Spaces are not allowed."),
        ("example.123", "tld_numeric", "Invalid TLD: '123'. Top-level domain cannot be all numeric."),
        ("0x7F.0x0.0x0.0x1", "tld_hexadecimal", "Invalid TLD: '0x1'. Top-level domain cannot be a hexadecimal number."),
    ],
)
async def test_each_bad_name_has_its_own_message(service: Service, target: str, code: str, message: str) -> None:
    assert await service.refusal({"target": target}) == (400, code, message)


@pytest.mark.parametrize(
    ("services", "code", "message"),
    [
        ([], "services_empty", "At least one service must be specified if services is provided"),
        (["Ping"] * 11, "services_too_many", "Maximum 10 services can be requested at once"),
        (list(range(11)), "services_too_many", "Maximum 10 services can be requested at once"),
        ([0, "GeoIP"], "services_duplicate", "Duplicate services are not allowed"),
        (["ping", "PING"], "services_duplicate", "Duplicate services are not allowed"),
        ([1, 1, 77], "services_duplicate", "Duplicate services are not allowed"),
        (["Whois"], "services_unknown", "Invalid service type specified"),
        ([4], "services_unknown", "Invalid service type specified"),
        ([-1], "services_unknown", "Invalid service type specified"),
        ([True], "services_unknown", "Invalid service type specified"),
        ([1.0], "services_unknown", "Invalid service type specified"),
        ([None], "services_unknown", "Invalid service type specified"),
        ([["Ping"]], "services_unknown", "Invalid service type specified"),
        ([{}], "services_unknown", "Invalid service type specified"),
        ([10**18, 2**63], "services_unknown", "Invalid service type specified"),
        ("Ping", "services_not_a_list", "Services must be a list/array of ServiceType"),
        (1, "services_not_a_list", "Services must be a list/array of ServiceType"),
        (False, "services_not_a_list", "Services must be a list/array of ServiceType"),
        ({"0": "Ping"}, "services_not_a_list", "Services must be a list/array of ServiceType"),
    ],
)
async def test_services_are_refused_in_the_order_of_the_checks(
    service: Service, services: object, code: str, message: str
) -> None:
    assert await service.refusal({"target": "example.com", "services": services}) == (400, code, message)


@pytest.mark.parametrize("seconds", [0.25, 3, 10, 1e300, 10**18, 2**64 - 1])
async def test_a_request_may_bound_its_attempts(service: Service, seconds: float) -> None:
    fact = await service.submitted({"target": "8.8.8.8", "timeoutSeconds": seconds})

    assert fact.options == {"timeout_s": repr(float(seconds))}
    assert fact.expires_at == NOW + min(LIFETIME, timedelta(seconds=10 + 2 * min(seconds, 1000)))


@pytest.mark.parametrize("nothing", [{}, {"timeoutSeconds": None}])
async def test_a_request_need_not_bound_its_attempts(service: Service, nothing: dict[str, Any]) -> None:
    assert (await service.submitted({"target": "8.8.8.8"} | nothing)).options == {}


@pytest.mark.parametrize("seconds", [0, -1, -0.0, -1e-9, "5", "", True, False, [5], {"s": 5}])
async def test_a_bound_that_makes_no_sense_is_refused(service: Service, seconds: object) -> None:
    refused = await service.refusal({"target": "8.8.8.8", "timeoutSeconds": seconds})

    assert refused == (400, "timeout_invalid", "timeoutSeconds must be a number greater than 0")


@pytest.mark.parametrize("text", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"1" + b"0" * 400])
async def test_a_bound_that_is_no_finite_number_is_refused(service: Service, text: bytes) -> None:
    status, code, _ = await service.refusal(b'{"target": "8.8.8.8", "timeoutSeconds": ' + text + b"}")

    assert (status, code) in {(400, "invalid_json"), (400, "timeout_invalid")}


async def test_the_target_is_judged_before_the_services(service: Service) -> None:
    assert (await service.refusal({"target": "localhost", "services": []}))[1] == "domain_no_dot"


async def test_a_refused_request_leaves_no_trace(service: Service) -> None:
    for body in ({}, {"target": "1.2.3"}, {"target": "example.com", "services": []}, b"nonsense"):
        assert (await service.refusal(body))[0] == 400

    assert await service.store.head() == 0


# --- Bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"nonsense",
        b"null",
        b"1",
        b"true",
        b'"example.com"',
        b'["example.com"]',
        b'{"target":NaN}',
        b'{"target":"example.com","x":Infinity}',
        b"{'target':'example.com'}",
        b'{"target":"example.com",}',
        b'{"target":"example.com"}{}',
        b'\xef\xbb\xbf{"target":"example.com"}',
        b'{"target":"\xff.com"}',
        b'{"target":"\xed\xa0\x80.com"}',
        b'{"target":"\\ud800.com"}',
        b'{"target":"example.com","\\udfff":1}',
        b'{"target":"a\x00b.com"}',
        b"[" * 60_000,
        b'{"target":' * 6_000,
        b'{"target":"example.com","x":' + b"[" * 2_000 + b"]" * 2_000 + b"}",
        '{"target":"example.com"}'.encode("utf-16"),
    ],
    ids=lambda body: repr(body[:40]),
)
async def test_what_is_no_json_object_is_refused(service: Service, body: bytes) -> None:
    assert await service.refusal(body) == (400, "invalid_json", NOT_AN_OBJECT)


async def test_a_body_of_64_kib_is_taken_and_one_byte_more_is_not(service: Service) -> None:
    start, end = b'{"target":"example.com","x":"', b'"}'
    fits = start + b"x" * (65_536 - len(start) - len(end)) + end

    assert (await service.post(fits)).status == 202
    expected = (413, "body_too_large", "The request body may have 65536 bytes at most.")
    assert await service.refusal(fits + b" ") == expected


async def test_a_body_that_tells_no_length_is_bounded_too(service: Service) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield b" " * 1_000

    answer = await service.http.post(f"{service.url}/api/lookup", data=endless())

    assert (await refusal_of(answer))[:2] == (413, "body_too_large")


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "GZIP", "rot13", "gzip, gzip", "identity, gzip", ""])
async def test_a_compressed_body_is_not_taken_and_not_unpacked(service: Service, encoding: str) -> None:
    bomb = gzip.compress(b" " * 10_000_000) if encoding != "deflate" else zlib.compress(b" " * 10_000_000)

    refusal = await service.refusal(bomb, **{"Content-Encoding": encoding})

    assert refusal == (415, "content_encoding", "Compressed request bodies are not taken.")
    assert await service.store.head() == 0


async def test_a_body_that_is_said_not_to_be_compressed_is_taken(service: Service) -> None:
    assert (await service.post({"target": "example.com"}, **{"Content-Encoding": "identity"})).status == 202


async def test_a_repeated_key_counts_as_its_last_value(service: Service) -> None:
    fact = await service.submitted(b'{"target":"1.2.3","target":"example.com"}')

    assert fact.target.model_dump()["raw"] == "example.com"


async def test_what_is_not_ours_in_a_body_is_passed_over(service: Service) -> None:
    assert (await service.post({"target": "example.com", "color": "blue", "services": None})).status == 202


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "application/json; charset=utf-8",
        "Application/JSON;charset=UTF-8",
        "application/vnd.api+json",
        "application/octet-stream",
        "",
    ],
)
async def test_a_body_that_may_be_json_is_taken(service: Service, kind: str) -> None:
    """Clients of the older service say nothing of its kind, which application/octet-stream is another word for."""
    assert (await service.post({"target": "example.com"}, **{"Content-Type": kind})).status == 202


async def test_a_body_whose_kind_is_not_told_is_taken(service: Service) -> None:
    assert (await raw_request(service.url, b"")).startswith(b"HTTP/1.1 202 ")


@pytest.mark.parametrize(
    "kind",
    [
        "application/x-www-form-urlencoded",
        "text/plain",
        "text/plain;application/json",
        "multipart/form-data",
        "text/json",
        "json",
    ],
)
async def test_a_body_that_says_to_be_something_else_is_refused_with_what_to_type(service: Service, kind: str) -> None:
    """`curl -d` says that it is a form unless told otherwise; a page of another site could send a form behind your back."""
    assert await service.refusal({"target": "example.com"}, **{"Content-Type": kind}) == (415, "content_type", NOT_JSON)
    assert "-H 'Content-Type: application/json'" in NOT_JSON
    assert await service.store.head() == 0


# --- Headers ----------------------------------------------------------------------------------------------------------


async def test_a_well_formed_request_id_is_kept_in_answer_and_log(service: Service) -> None:
    answer = await service.post({"target": "example.com"}, **{"X-Request-Id": "req-1.a_B"})

    assert answer.headers["X-Request-Id"] == "req-1.a_B"
    (stored, *_) = await service.store.read_all(0, 1)
    assert envelope_of(stored.state)["request_id"] == "req-1.a_B"


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "a\u00e4", "<script>"])
async def test_any_other_request_id_is_replaced(service: Service, given: str) -> None:
    answer = await service.post({"target": "example.com"}, **{"X-Request-Id": given})

    assert UUID(answer.headers["X-Request-Id"]).version == 7


async def test_a_trace_is_taken_on(service: Service) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    await service.post({"target": "example.com"}, traceparent=trace)

    (stored, *_) = await service.store.read_all(0, 1)
    assert envelope_of(stored.state)["traceparent"] == trace


@pytest.mark.parametrize(
    "trace",
    [
        "nonsense",
        '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01","subject":"x',
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-0AF7651916CD43DD8448EB211C80319C-B7AD6B7169203331-01",
        "x" * 5_000,
        "tr\u00e4ce",
    ],
)
async def test_a_trace_that_is_none_is_passed_over(service: Service, trace: str) -> None:
    """W3C Trace Context section 3.2: a vendor that cannot parse the header ignores it. The job is taken on all the same."""
    answer = await service.post({"target": "example.com"}, traceparent=trace)

    assert answer.status == 202
    (stored, *_) = await service.store.read_all(0, 1)
    assert "traceparent" not in envelope_of(stored.state)


async def test_bytes_that_are_no_text_in_a_header_break_nothing(service: Service) -> None:
    answer = await raw_request(service.url, b"traceparent: \xff\xfe\r\nX-Request-Id: \xff\r\n")

    assert answer.startswith(b"HTTP/1.1 202 ")


async def raw_request(url: str, headers: bytes) -> bytes:
    """A request that no client library would send."""
    host, _, port = url.removeprefix("http://").partition(":")
    async with asyncio.timeout(5):
        reader, writer = await asyncio.open_connection(host, int(port))
        body = b'{"target":"example.com"}'
        head = b"POST /api/lookup HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n" % len(body)
        writer.write(head + headers + b"\r\n" + body)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    return answer


# --- What is down -----------------------------------------------------------------------------------------------------


async def test_a_store_that_is_down_accepts_nothing_and_says_so() -> None:
    body = await answer_over(Broken(StoreUnavailable()))

    assert body["code"] == "store_unavailable"
    assert body["error"] == "The job could not be stored right now. Nothing was accepted; try again shortly."
    assert "jobId" not in body


async def test_a_doubtful_commit_is_called_doubtful() -> None:
    """Whoever asked must be able to find out: the answer names the job that may have been taken on."""
    body = await answer_over(Broken(OutcomeUnknown()))

    assert body["code"] == "outcome_unknown"
    assert body["error"].startswith("The connection to the store broke while the job was being stored. It may or may not")
    assert body["statusUrl"] == f"/api/lookup/{UUID(body['jobId'])}"


async def test_views_that_cannot_be_reached_are_no_missing_job(service: Service) -> None:
    answer = await service.http.get(f"{service.url}/api/lookup/{uuid7()}")

    assert answer.headers["Retry-After"] == "2"
    assert (await refusal_of(answer))[:2] == (503, "views_unavailable")


async def test_an_error_of_ours_is_told_in_our_words_only(service: Service) -> None:
    answer = await service.http.get(f"{service.url}/broken")

    assert await refusal_of(answer) == (500, "internal_error", "Something broke on our side. The service's log says more.")
    assert "hunter2" not in await answer.text()


# --- The rest of the routes -------------------------------------------------------------------------------------------


async def test_the_services_are_listed_in_order(service: Service) -> None:
    answer = await service.http.get(f"{service.url}/api/lookup/services")

    assert answer.content_type == "application/json"
    assert await answer.json() == [
        {"name": "GeoIP", "value": 0, "description": "Geographic location and ISP information"},
        {"name": "Ping", "value": 1, "description": "Network reachability and latency check"},
        {"name": "RDAP", "value": 2, "description": "Registration data via RDAP protocol"},
        {"name": "ReverseDNS", "value": 3, "description": "Reverse DNS lookup (PTR record)"},
    ]


@pytest.mark.parametrize("job_id", ["1", "not-an-id", "00000000-0000-7000-8000-00000000000g", "..%2f", "%00"])
async def test_an_id_that_is_none_is_a_job_that_is_not_found(service: Service, job_id: str) -> None:
    answer = await service.http.get(f"{service.url}/api/lookup/{job_id}")

    assert await refusal_of(answer) == (404, "job_not_found", "Job not found")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/api/lookup", 405, "method_not_allowed"),
        ("PUT", "/api/lookup", 405, "method_not_allowed"),
        ("DELETE", "/api/lookup/019b7c8a-0000-7000-8000-000000000001", 405, "method_not_allowed"),
    ],
)
async def test_wrong_addresses_and_methods_are_problems_too(
    service: Service, method: str, path: str, status: int, code: str
) -> None:
    answer = await service.http.request(method, service.url + path)

    assert (await refusal_of(answer))[:2] == (status, code)
    if status == 405:
        assert answer.headers["Allow"]
