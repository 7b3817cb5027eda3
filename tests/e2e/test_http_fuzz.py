"""No input to the HTTP API gives a 5xx, takes over 5 s, or is answered in other words than ours.

The service is a real process over real servers. No worker and no relay run, so that nobody is asked about what is accepted.
"""

import gzip
import json
import zlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from uuid_utils.compat import uuid7

from app.http.connection import ARRIVAL_MAX_S
from app.migrate import migrate
from tests.e2e.processes import LookupProcess
from tests.e2e.wire import ANSWER_MAX_S, Answer, Exchange, talk
from tests.servers.postgres import fresh_database
from tests.servers.valkey import RedisDatabases

GOOD = b'{"target":"example.com"}'
MEMBERS = {"type", "title", "status", "detail", "code", "error"}
MANY = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))  # The machine may be busy.


@pytest.fixture(scope="module")
async def service(
    postgres: str, valkey: RedisDatabases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LookupProcess]:
    with fresh_database(postgres) as database_url, valkey.fresh() as redis_url:
        migrate(database_url, uuid4(), {})
        env = {"LOOKUP_DATABASE_URL": database_url, "LOOKUP_REDIS_URL": redis_url}
        folder = tmp_path_factory.mktemp("fuzz")
        process = LookupProcess("write", "read", "projector", "--port", "0", folder=folder, env=env)
        try:
            await process.start()
            yield process
        finally:
            await process.stop()
        assert_kept_its_calm(folder)


def assert_kept_its_calm(folder: Path) -> None:
    """What anybody may send is nothing that an operator should be woken by."""
    told = (folder / "lookup.err").read_text(encoding="utf-8")
    assert "Traceback" not in told, told[-5_000:]
    assert " ERROR " not in told, told[-5_000:]


def request(method: str, path: str, body: bytes | None = None, *headers: bytes) -> bytes:
    length = [] if body is None else [b"Content-Length: %d" % len(body)]
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: x", b"Connection: close", *length, *headers]
    return b"\r\n".join([*lines, b"", body or b""])


def post(body: bytes, *headers: bytes) -> bytes:
    return request("POST", "/api/lookup", body, *(headers or [b"Content-Type: application/json"]))


def answer_to(service: LookupProcess, *pieces: bytes, **how: Any) -> Answer:
    """The one answer that is due."""
    exchange = talk(service.url, *pieces, **how)
    assert_in_time_and_in_our_words(exchange)
    assert len(exchange.answers) == 1
    return exchange.answers[0]


def refusal_of(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.json()["code"]


def assert_in_time_and_in_our_words(exchange: Exchange) -> None:
    assert exchange.answered_s < ANSWER_MAX_S
    for answer in exchange.answers:
        assert answer.status < 500, answer
        assert answer.headers["x-request-id"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        if answer.status >= 400 and answer.body:
            assert_a_problem(answer)


def assert_a_problem(answer: Answer) -> None:
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body.keys() == MEMBERS
    assert body["status"] == answer.status
    assert body["code"].isidentifier()
    assert body["type"] == f"urn:lookup:problem:{body['code']}"
    assert body["error"] == body["detail"]
    assert body["error"].isprintable()
    assert len(body["error"]) < 400
    assert not any(word in body["error"] for word in ("Error", "Exception", "Traceback", "aiohttp", "orjson"))


# --- Bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1_000, 30_000, 100_000])
@pytest.mark.parametrize(("before", "after"), [(b"[", b"]"), (b'{"target":', b"1}")], ids=["lists", "objects"])
def test_deep_json_is_refused(service: LookupProcess, levels: int, before: bytes, after: bytes) -> None:
    """Python's own parser raises RecursionError near 1,000 levels; what is larger than 64 KiB is not even read."""
    body = before * levels + after

    answer = answer_to(service, post(body))

    assert refusal_of(answer) == ((400, "invalid_json") if len(body) <= 65_536 else (413, "body_too_large"))


@pytest.mark.parametrize(
    "body",
    [
        b'{"target":NaN}',
        b'{"target":-Infinity}',
        b'{"target":"example.com","timeoutSeconds":NaN}',
        b'{"target":"\\ud800.com"}',
        b'{"\\udfff":1,"target":"example.com"}',
        b'{"target":"\xff.com"}',
        b'{"target":"\xed\xa0\x80.com"}',
        b"\xef\xbb\xbf" + GOOD,
        GOOD.decode().encode("utf-16"),
        GOOD.decode().encode("utf-32"),
        b"\x00" + GOOD,
        GOOD + b"\x00",
        gzip.compress(GOOD, mtime=0),
    ],
    ids=lambda body: repr(body[:40]),
)
def test_what_is_no_json_is_refused(service: LookupProcess, body: bytes) -> None:
    assert refusal_of(answer_to(service, post(body))) == (400, "invalid_json")


HUGE = [b"1" * 60_000, b"-" + b"9" * 5_000, b"1e999999999", b"1" + b"0" * 400 + b".5", b"1E-999999999"]


@pytest.mark.parametrize("number", HUGE, ids=lambda number: repr(number[:12]))
@pytest.mark.parametrize("name", [b"target", b"services", b"timeoutSeconds", b"else"])
def test_a_huge_number_is_no_trouble(service: LookupProcess, name: bytes, number: bytes) -> None:
    answer = answer_to(service, post(b'{"target":"example.com","%b":%b}' % (name, number)))

    assert answer.status in {202, 400}


@pytest.mark.parametrize("char", ["\x00", "\x1f", "\x7f", "\u2028", "\u202e", "\U0010ffff", "\ufeff"])
def test_an_odd_character_in_a_target_is_refused(service: LookupProcess, char: str) -> None:
    """PostgreSQL's text takes no NUL: nothing of the kind may reach it, nor come back in a message."""
    answer = answer_to(service, post(json.dumps({"target": f"exam{char}!ple.com"}).encode()))

    assert answer.status == 400


ODD_TARGETS = [
    *("127.0.0.1", "::1", "fe80::1%eth0", "::ffff:192.0.2.1", "0x7f000001", "2130706433", "127.1", "256.256.256.256"),
    *("1.2.3.4:80", "http://example.com/", "[::1]", "localhost", "a..com", "-a.com", "_a.com", "xn--a.com", "xn--bcher-kva.de"),
    *("☃.net", "bücher.de", "\U0001f4a9.com", "exam\u200dple.com", "example.123", "\u0661.\u0661.\u0661.\u0661"),
    *("", " ", ".", "..", "a" * 64 + ".com", "a." * 200, "\ufdfa" * 1_000, "%00", "example.com\r\nX: y"),
    *("${jndi:ldap://x}", "'; DROP TABLE stored_events; --", "../../etc/passwd"),
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(2**62, 2**200),
    st.floats(),
    st.text(max_size=30),
    st.sampled_from(ODD_TARGETS),
)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12
)
TARGETS = st.one_of(
    st.sampled_from(ODD_TARGETS),
    st.text(max_size=60),
    st.ip_addresses().map(str),
    st.from_regex(r"[a-z0-9.:%-]{1,40}", fullmatch=True),
)
NAMES_OF_SERVICES = ["GeoIP", "Ping", "RDAP", "ReverseDNS", "ping", "", "all", 0, 3, -1, 2.0, None, [], {}]
SERVICES = st.one_of(
    st.lists(st.sampled_from(NAMES_OF_SERVICES), max_size=6), st.lists(st.text(max_size=10), max_size=50), ANYTHING
)
NEARLY = st.fixed_dictionaries(
    {"target": st.one_of(TARGETS, TARGETS, ANYTHING)},
    optional={"services": SERVICES, "timeoutSeconds": st.one_of(st.floats(), st.integers(), ANYTHING), "priority": ANYTHING},
)
AS_BYTES = NEARLY.map(lambda body: json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"))


@given(body=st.one_of(NEARLY, NEARLY, ANYTHING))
@example(body={"target": "example.com", "services": ["Ping"] * 5_000})
@example(body={"target": "example.com", "services": [{"a": [[]]}]})
@example(body={"target": {"target": "example.com"}})
@MANY
def test_nearly_valid_bodies_are_accepted_or_refused(service: LookupProcess, body: Any) -> None:
    answer = answer_to(service, post(json.dumps(body).encode()))

    assert answer.status in {202, 400}


@given(body=st.one_of(st.binary(max_size=200), AS_BYTES))
@MANY
def test_any_bytes_are_accepted_or_refused(service: LookupProcess, body: bytes) -> None:
    answer = answer_to(service, post(body))

    assert answer.status in {202, 400}


ENCODINGS = ["gzip", "deflate", "br", "zstd", "compress", "x-gzip", "rot13", "gzip, gzip", "\u00e4", '"', ","]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_small_body_that_would_unpack_to_a_huge_one_stays_packed(service: LookupProcess, encoding: str) -> None:
    bomb = zlib.compress(b" " * 20_000_000) if encoding == "deflate" else gzip.compress(b" " * 20_000_000, mtime=0)

    answer = answer_to(service, post(bomb, b"Content-Type: application/json", b"Content-Encoding: " + encoding.encode()))

    assert refusal_of(answer) == (415, "content_encoding")
    assert answer.json()["error"] == "Compressed request bodies are not taken."


def test_the_second_of_two_encodings_is_seen(service: LookupProcess) -> None:
    answer = answer_to(service, post(b"x", b"Content-Encoding: identity", b"Content-Encoding: gzip"))

    assert refusal_of(answer) == (415, "content_encoding")


CHUNKED = b"POST /api/lookup HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
SERVICES_ASKED = b"GET /api/lookup/services HTTP/1.1\r\nHost: x\r\n\r\n"


def chunked(*chunks: bytes) -> bytes:
    return CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


def test_a_body_in_chunks_is_taken(service: LookupProcess) -> None:
    assert answer_to(service, chunked(GOOD[:5], GOOD[5:])).status == 202


def test_a_body_over_64_kib_is_refused_by_what_it_says(service: LookupProcess) -> None:
    """At once: nothing of it need be sent."""
    head = request("POST", "/api/lookup", None, b"Content-Length: 1000000000")

    assert refusal_of(answer_to(service, head)) == (413, "body_too_large")


def test_a_body_over_64_kib_is_refused_by_what_it_is(service: LookupProcess) -> None:
    assert refusal_of(answer_to(service, chunked(*[b" " * 1_000] * 100))) == (413, "body_too_large")


NO_CHUNKS = [b"zz\r\n" + GOOD, b"5\r\nabcdeXX", b"-5\r\nabcde\r\n", b"FFFFFFFFFFFFFFFFFFFF\r\n", b"\r\n\r\n", b"\x00"]


@pytest.mark.parametrize("body", NO_CHUNKS, ids=lambda body: repr(body[:12]))
@pytest.mark.parametrize("pause_s", [0.0, 0.1], ids=["with the head", "after it"])
def test_chunks_that_are_none_are_refused(service: LookupProcess, body: bytes, pause_s: float) -> None:
    """At once, and once: not when the time for a slow body is over."""
    exchange = talk(service.url, CHUNKED, body, pause_s=pause_s, until_closed=True)

    assert_in_time_and_in_our_words(exchange)
    assert exchange.answered_s < ARRIVAL_MAX_S
    assert [answer.status for answer in exchange.answers] == [400]


@pytest.mark.parametrize("body", NO_CHUNKS, ids=lambda body: repr(body[:12]))
def test_chunks_that_are_none_are_refused_too_when_nobody_has_looked_at_the_request_yet(
    service: LookupProcess, job_id: str, body: bytes
) -> None:
    """The body is known to be broken before its request is looked at: here, as the one before it still waits."""
    waiting = b"GET /api/lookup/%b HTTP/1.1\r\nHost: x\r\nPrefer: wait=1\r\n\r\n" % job_id.encode()

    exchange = talk(service.url, waiting, CHUNKED, body, pause_s=0.1, until_closed=True)

    assert_in_time_and_in_our_words(exchange)
    waited, refused = exchange.answers
    assert waited.status == 200
    assert refusal_of(refused) == (400, "body_broken_off")


@pytest.mark.parametrize("body", NO_CHUNKS, ids=lambda body: repr(body[:12]))
def test_chunks_that_are_none_behind_an_answer_end_the_connection(service: LookupProcess, body: bytes) -> None:
    """What is still being sent is dropped; nobody is told twice, and no operator (the fixture reads the log)."""
    head = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"

    exchange = talk(service.url, head, body, pause_s=0.1, until_closed=True)

    assert_in_time_and_in_our_words(exchange)
    assert [refusal_of(answer) for answer in exchange.answers] == [(404, "not_found")]


# --- Too slow ---------------------------------------------------------------------------------------------------------


def drop_by_drop(sent: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in sent]


HEAD, _, BODY = post(GOOD).partition(b"\r\n\r\n")
DRIPPING: dict[str, tuple[list[bytes], float, str]] = {
    "silent in the head": ([b"G"], 0, "request_too_slow"),
    "the first line, drop by drop": (drop_by_drop(b"GET /api/lookup/services HTTP/1.1\r\n"), 0.2, "request_too_slow"),
    "one header after the other": (
        [b"GET /x HTTP/1.1\r\n", *(b"X-%d: y\r\n" % number for number in range(100))],
        0.2,
        "request_too_slow",
    ),
    "silent in the body": ([post(GOOD)[:-1]], 0, "body_too_slow"),
    "the body, drop by drop": ([post(GOOD)[:-20], *drop_by_drop(GOOD[-20:-1])], 0.3, "body_too_slow"),
    "one chunk after the other": ([CHUNKED, *[b"1\r\n \r\n"] * 60], 0.2, "body_too_slow"),
    # Else who is slow in both could hold a place for twice as long.
    "half of the time for the head": ([HEAD, b"\r\n\r\n", *drop_by_drop(BODY[:-1])], ARRIVAL_MAX_S / 2, "body_too_slow"),
    "behind a whole request": ([SERVICES_ASKED + b"GET /", *drop_by_drop(b"x" * 60)], 0.2, "request_too_slow"),
}


def test_who_holds_a_request_back_is_cut_off(service: LookupProcess) -> None:
    """In a head as in a body, silent or drop by drop; all of them at the same time, and nobody else has to wait for that."""
    with ThreadPoolExecutor(len(DRIPPING)) as clients:
        dripping = {
            name: clients.submit(talk, service.url, *pieces, pause_s=pause_s, until_closed=True)
            for name, (pieces, pause_s, _) in DRIPPING.items()
        }
        assert answer_to(service, post(GOOD)).status == 202
    for name, exchange in dripping.items():
        assert_in_time_and_in_our_words(exchange.result())
        assert exchange.result().answered_s > ARRIVAL_MAX_S - 1, name
        assert refusal_of(exchange.result().answers[-1]) == (408, DRIPPING[name][2]), name


# --- The past ---------------------------------------------------------------------------------------------------------

ASKED = st.one_of(st.text(max_size=40), st.integers().map(str), st.datetimes().map(str), st.from_regex(r"[/~0-9a-zA-Z]{0,20}"))
QUERIES = st.dictionaries(st.sampled_from(["asOf", "path", "after", "limit", "minPosition"]), ASKED, min_size=1)


@given(query=QUERIES, what=st.sampled_from(["", "/history", "/why"]), known=st.booleans())
@example(query={"path": "/results/RDAP/data" + "/x" * 400}, what="/why", known=True)
@example(query={"asOf": "9999-12-31T23:59:59.999999999-23:59"}, what="", known=True)
@MANY
def test_any_question_about_the_past_is_answered_or_refused(
    service: LookupProcess, job_id: str, query: dict[str, str], what: str, *, known: bool
) -> None:
    asked = urlencode({name: value.encode(errors="replace") for name, value in query.items() if name != "minPosition" or what})

    answer = answer_to(service, request("GET", f"/api/lookup/{job_id if known else uuid4()}{what}?{asked}"))

    assert answer.status in {200, 400, 404}


@pytest.fixture(scope="module")
def job_id(service: LookupProcess) -> str:
    """A job that is open, as no worker runs."""
    return str(answer_to(service, post(GOOD)).json()["jobId"])


# --- Requests that are none, or odd ------------------------------------------------------------------------------------

MALFORMED = [
    b"\r\n\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET /\r\n\r\n",
    b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    b"GET / HTTP/2.0\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"get / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"G\xc3\x84T / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost x\r\n\r\n",
    b"GET / HTTP/1.1\r\n: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nA b: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n folded: y\r\n\r\n",
    b"GET / HTTP/1.1\r\nX: \x00\r\n\r\n",
    b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / x HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /api/lookup HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /api/lookup HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
    b"POST /api/lookup HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 40 + b"\r\n\r\n",
    b"POST /api/lookup HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    b"POST /api/lookup HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /api/lookup HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"POST /api/lookup HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
    b"POST http://%[;]@ HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x00" * 100,
    b"SSH-2.0-OpenSSH_10\r\n",
    b"*1\r\n$4\r\nPING\r\n",
]
# One that is sent but never ends cannot be told from one that is slow: see above.
REFUSED = {400, 404, 405, 408, 431}


@pytest.mark.parametrize("sent", MALFORMED, ids=lambda sent: repr(sent[:44] + sent[-20:]))
def test_what_is_not_http_is_refused(service: LookupProcess, sent: bytes) -> None:
    exchange = talk(service.url, sent)

    assert_in_time_and_in_our_words(exchange)
    assert exchange.answers, "hung up on without a word"
    assert {answer.status for answer in exchange.answers} <= REFUSED


@given(sent=st.binary(min_size=1, max_size=300).map(lambda noise: noise + b"\r\n\r\n"))
@settings(MANY, max_examples=60)
def test_any_bytes_instead_of_a_request_are_refused(service: LookupProcess, sent: bytes) -> None:
    exchange = talk(service.url, sent)

    assert_in_time_and_in_our_words(exchange)
    assert exchange.answers, "hung up on without a word"
    assert {answer.status for answer in exchange.answers} <= REFUSED


KNOWN_NAMES = [
    *("Host", "Content-Type", "Content-Length", "Transfer-Encoding", "Expect", "Connection", "Upgrade", "Accept", "Range"),
    *("Cookie", "If-None-Match", "X-Request-Id", "traceparent", "Authorization", "X-Forwarded-For", "TE", "Trailer"),
    *("Sec-WebSocket-Key", "Sec-WebSocket-Key1", "Content-Encoding", "HTTP2-Settings"),
]
KNOWN_VALUES = [
    *(
        b"",
        b"100-continue",
        b"200-maybe",
        b"upgrade",
        b"websocket",
        b"chunked",
        b"identity",
        b"close",
        b"keep-alive",
        b"0",
        b"24",
    ),
    *(b"application/json", b"text/plain", b"*", b"W/", b'"', b'W/"1-1", *', b"bytes=0-", b"\xff", b"x" * 9_000, b"h2c"),
]
NAMES = st.one_of(st.sampled_from(KNOWN_NAMES), st.from_regex(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,20}", fullmatch=True))
VALUES = st.one_of(st.binary(max_size=40), st.sampled_from(KNOWN_VALUES))
HEADERS = st.lists(st.tuples(NAMES, VALUES).map(lambda field: field[0].encode() + b": " + field[1]), max_size=6)


@given(headers=HEADERS)
@example(headers=[b"Expect: 200-maybe"])
@example(headers=[b"Expect: \x80"])
@example(headers=[b"X-%d: y" % number for number in range(200)])
@example(headers=[b"X: " + b"y" * 70_000])
@example(headers=[b"Connection: upgrade", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA"])
@example(headers=[b"Connection: upgrade", b"Upgrade: websocket"])
@MANY
def test_any_headers_leave_a_post_accepted_or_refused(service: LookupProcess, headers: list[bytes]) -> None:
    exchange = talk(service.url, request("POST", "/api/lookup", GOOD, *headers))

    assert_in_time_and_in_our_words(exchange)
    assert {answer.status for answer in exchange.answers} <= {202, 400, 408, 413, 415, 417, 431}


@given(headers=HEADERS)
@example(headers=[b'If-None-Match: "a", W/"b", *'])
@example(headers=[b'If-None-Match: """"\xff,,,,'])
@MANY
def test_any_headers_leave_a_get_answered(service: LookupProcess, headers: list[bytes]) -> None:
    for path in ("/", "/api/lookup/services"):
        exchange = talk(service.url, request("GET", path, None, *headers))

        assert_in_time_and_in_our_words(exchange)
        assert {answer.status for answer in exchange.answers} <= {200, 304, 400, 408, 413, 415, 417, 431}


METHODS = st.sampled_from(
    ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "PURGE", "M-SEARCH"]
)
KNOWN_SEGMENTS = [
    *("api", "lookup", "services", "results", "health", "live", "ready", "page.js", "..", ".", "", "%2e%2e", "%2f", "%00", "%"),
    *("%zz", "%ff", "%ed%a0%80", "*", ";", "~", "\u00e4", "\u0661", "a" * 4_000),
    *("019b7c8a-0000-7000-8000-000000000001", "0" * 32, "{" + "0" * 32 + "}", "urn:uuid:" + "0" * 32),
]
PRINTABLE = st.characters(exclude_characters=" \r\n\t\x00", exclude_categories=["Cs"])
SEGMENTS = st.one_of(st.sampled_from(KNOWN_SEGMENTS), st.text(PRINTABLE, max_size=12))
QUERIES = st.one_of(st.just(""), st.text(PRINTABLE, max_size=30).map("?".__add__))


@given(method=METHODS, segments=st.lists(SEGMENTS, max_size=5), query=QUERIES)
@example(method="GET", segments=["api", "lookup", "x" * 9_000], query="")
@example(method="GET", segments=["api", "lookup", "services"], query="?minPosition=NaN&asOf=%00&x=" + "9" * 4_000)
@example(method="OPTIONS", segments=["*"], query="")
@MANY
def test_any_address_is_answered(service: LookupProcess, method: str, segments: list[str], query: str) -> None:
    exchange = talk(service.url, request(method, "/" + "/".join(segments) + query), bodies=method != "HEAD")

    assert_in_time_and_in_our_words(exchange)
    assert {answer.status for answer in exchange.answers} <= {200, 304, 400, 404, 405, 408, 415, 431}


PIECES = st.sampled_from(
    [
        *("/", "//", "http://", "https:", "x", "::1", "99999", "-1", "*", "xn--", "a" * 300),
        *("[", "]", ":", "@", "?", "#", "%", "%ff", ".", "..", ";", "\\", "\u00e4", "\u2100", "\U0001f4a9"),
    ]
)


@given(method=METHODS, address=st.lists(PIECES, min_size=1, max_size=6).map("".join))
@example(method="GET", address="http://%[;]@")
@example(method="GET", address="http://xn--/")
@MANY
def test_any_absolute_address_is_answered(service: LookupProcess, method: str, address: str) -> None:
    """As a proxy is asked. Some of these make the parser raise what it does not know itself."""
    exchange = talk(service.url, request(method, address), bodies=method != "HEAD")

    assert_in_time_and_in_our_words(exchange)
    assert exchange.answers, "hung up on without a word"
    assert {answer.status for answer in exchange.answers} <= {200, 304, 400, 404, 405}


NOBODYS_JOBS = [uuid7(), "ffffffff-ffff-7fff-bfff-ffffffffffff", "00000000-0000-7000-8000-000000000000", uuid4()]


@pytest.mark.parametrize("job_id", NOBODYS_JOBS, ids=["now", "far ahead", "long ago", "not of ours"])
def test_a_job_of_whatever_age_that_never_was_is_not_found_in_time(service: LookupProcess, job_id: object) -> None:
    assert refusal_of(answer_to(service, request("GET", f"/api/lookup/{job_id}"))) == (404, "job_not_found")


OTHER_FORMS = [
    b"GET http://x/api/lookup/services HTTP/1.1",
    b"GET /api/lookup/services HTTP/1.0",
    b"HEAD /api/lookup/services HTTP/1.1",
]


@pytest.mark.parametrize("line", OTHER_FORMS)
def test_older_and_absolute_forms_are_understood(service: LookupProcess, line: bytes) -> None:
    exchange = talk(service.url, line + b"\r\nHost: x\r\nConnection: close\r\n\r\n", bodies=not line.startswith(b"HEAD"))

    assert [answer.status for answer in exchange.answers] == [200]


def test_requests_in_a_row_are_answered_in_a_row(service: LookupProcess) -> None:
    """One connection, sent at once. What follows that is no request is refused and ends it."""
    posted = b"POST /api/lookup HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(GOOD), GOOD)

    exchange = talk(
        service.url, SERVICES_ASKED * 40 + posted * 5 + SERVICES_ASKED, b"nonsense\r\n\r\n", pause_s=1.0, until_closed=True
    )

    assert_in_time_and_in_our_words(exchange)
    assert [answer.status for answer in exchange.answers] == [200] * 40 + [202] * 5 + [200, 400]


def test_a_client_that_asks_first_is_told_to_go_on(service: LookupProcess) -> None:
    head, _, body = post(GOOD, b"Expect: 100-continue").partition(b"\r\n\r\n")

    answer = answer_to(service, head + b"\r\n\r\n", body, pause_s=0.1)

    assert answer.status == 202


def test_any_other_expectation_is_refused_in_our_words(service: LookupProcess) -> None:
    assert refusal_of(answer_to(service, post(GOOD, b"Expect: the best"))) == (417, "expectation_failed")


@pytest.mark.parametrize("sent", [post(GOOD)[:-5], chunked(GOOD)[:-5], b"GET / HT"])
def test_who_hangs_up_in_the_middle_disturbs_nobody(service: LookupProcess, sent: bytes) -> None:
    """That nothing is said about it in the log is checked when the service stops."""
    talk(service.url, sent, give_up_s=0.2)

    assert answer_to(service, post(GOOD)).status == 202
