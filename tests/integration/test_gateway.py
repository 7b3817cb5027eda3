"""The gateway's own configuration file, run by a real HAProxy on loopback in front of two small servers."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import dns.flags
import dns.message
import dns.rrset
import pytest
from aiohttp import web

from tests.e2e.compose_harness import REPOSITORY, free_port, program

CONFIGURATION = REPOSITORY / "deploy" / "gateway" / "haproxy.cfg"
BODY_BYTES_MAX = 64 * 1024
WAIT_S = 15.0
POLL_S = 0.05


@dataclass
class Side:
    """A stand-in for one HTTP part: answers with what it saw, streams when told to, and can break off."""

    name: str
    host: str = "127.0.0.1"
    port: int = field(default_factory=free_port)
    broken_off: int = 0
    second_event: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Side"]:
        application = web.Application(client_max_size=10 * BODY_BYTES_MAX)
        application.router.add_get("/events", self._stream)
        application.router.add_route("*", "/api/lookup/break-off", self._break_off)
        application.router.add_get("/silent", self._stay_silent)
        application.router.add_route("*", "/{path:.*}", self._echo)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, self.host, self.port).start()
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _echo(self, request: web.Request) -> web.Response:
        headers: dict[str, list[str]] = {}
        for name, value in request.headers.items():
            headers.setdefault(name.lower(), []).append(value)
        body_bytes = len(await request.read())
        seen = {"side": self.name, "host": self.host, "path": request.raw_path, "headers": headers, "bodyBytes": body_bytes}
        return web.json_response(seen, headers={"X-Side": self.name, "X-Seen-Path": request.raw_path})

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"id: 1\n\n")
        async with asyncio.timeout(WAIT_S):
            await self.second_event.wait()
        await response.write(b"id: 2\n\n")
        return response

    async def _break_off(self, request: web.Request) -> web.Response:
        self.broken_off += 1
        assert request.transport
        request.transport.abort()
        return web.Response()

    async def _stay_silent(self, _: web.Request) -> web.Response:
        await asyncio.sleep(WAIT_S)
        return web.Response()


@pytest.fixture(scope="session")
def haproxy() -> str:
    """HAProxy, installed when it is missing and can be. Its absence is a failure with the line to type, never a skip."""
    apt_get = program("apt-get")
    if program("haproxy") is None and apt_get and os.geteuid() == 0:
        surroundings = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", "haproxy"]):
            subprocess.run([apt_get, *words], env=surroundings, capture_output=True, check=True, timeout=100)
    found = program("haproxy")
    if found is None:
        pytest.fail("The gateway's tests need HAProxy 2.6 or later: sudo apt-get install haproxy")
    return found


@asynccontextmanager
async def gateway(
    haproxy: str, folder: Path, variables: Mapping[str, str], configuration: Path = CONFIGURATION
) -> AsyncIterator[str]:
    """HAProxy with the given variables; its base URL."""
    listen = f"127.0.0.1:{free_port()}"
    environment = _all_variables({**variables, "GATEWAY_LISTEN": listen})
    process = _started([haproxy, "-db", "-f", str(configuration)], environment, folder / "gateway.log")
    try:
        await _until_open(listen, process)
        yield f"http://{listen}"
    finally:
        process.terminate()
        process.wait(timeout=WAIT_S)


def _all_variables(given: Mapping[str, str]) -> dict[str, str]:
    """Nothing listens on port 1: a side that a test does not give is down."""
    return {"GATEWAY_DNS": "127.0.0.11:53", "WRITE_SERVER": "127.0.0.1:1", "READ_SERVER": "127.0.0.1:1", **given}


def _started(command: list[str], environment: dict[str, str], log_path: Path) -> subprocess.Popen[bytes]:
    with log_path.open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


async def _until_open(address: str, process: subprocess.Popen[bytes]) -> None:
    host, _, port = address.partition(":")
    async with asyncio.timeout(WAIT_S):
        while True:
            assert process.poll() is None, "HAProxy ended at once"
            try:
                _, writer = await asyncio.open_connection(host, int(port))
            except ConnectionRefusedError:
                await asyncio.sleep(POLL_S)
            else:
                writer.close()
                await writer.wait_closed()
                return


@pytest.fixture(scope="module")
async def write_side() -> AsyncIterator[Side]:
    async with Side("write").running() as side:
        yield side


@pytest.fixture(scope="module")
async def read_side() -> AsyncIterator[Side]:
    async with Side("read").running() as side:
        yield side


@pytest.fixture(scope="module")
async def base_url(
    haproxy: str, write_side: Side, read_side: Side, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[str]:
    servers = {"WRITE_SERVER": f"127.0.0.1:{write_side.port}", "READ_SERVER": f"127.0.0.1:{read_side.port}"}
    async with gateway(haproxy, tmp_path_factory.mktemp("gateway"), servers) as url:
        yield url


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WAIT_S)) as session:
        yield session


def test_haproxy_accepts_the_configuration_without_a_warning(haproxy: str) -> None:
    environment = _all_variables({"GATEWAY_LISTEN": "127.0.0.1:8080", "WRITE_SERVER": "write:8081", "READ_SERVER": "read:8082"})

    then = subprocess.run(
        [haproxy, "-c", "-dW", "-f", str(CONFIGURATION)], env=environment, capture_output=True, check=False, timeout=30
    )

    assert (then.returncode, then.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("method", "path", "side"),
    [
        ("POST", "/api/lookup", "write"),
        ("POST", "/api/lookup?x=1", "write"),
        ("DELETE", "/api/lookup/0198c0de", "write"),
        ("GET", "/api/lookup/0198c0de", "read"),
        ("GET", "/api/lookup/0198c0de?minPosition=7", "read"),
        ("HEAD", "/api/lookup/0198c0de", "read"),
        ("GET", "/api/lookup/services", "read"),
        ("GET", "/api/lookup", "read"),
        ("GET", "/", "read"),
        ("GET", "/health/live", "read"),
        ("GET", "/health/ready", "read"),
        ("POST", "/api/lookups", "read"),
        ("POST", "/", "read"),
    ],
)
async def test_what_changes_a_job_goes_to_write_and_all_else_to_read(
    client: aiohttp.ClientSession, base_url: str, method: str, path: str, side: str
) -> None:
    async with client.request(method, f"{base_url}{path}") as response:
        assert (response.status, response.headers["X-Side"], response.headers["X-Seen-Path"]) == (200, side, path)


async def test_the_health_of_write_has_a_path_of_its_own(client: aiohttp.ClientSession, base_url: str) -> None:
    async with client.get(f"{base_url}/write/health/ready?verbose=1") as response:
        seen = await response.json()

    assert (seen["side"], seen["path"]) == ("write", "/health/ready?verbose=1")


@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS", "TRACE"])
async def test_other_methods_are_refused_in_our_words(client: aiohttp.ClientSession, base_url: str, method: str) -> None:
    async with client.request(method, f"{base_url}/api/lookup") as response:
        assert response.headers["Allow"] == "GET, HEAD, POST, DELETE"
        await _assert_problem(response, 405, "Only GET, HEAD, POST and DELETE are understood.")


async def test_forwarded_headers_are_the_gateways_own_statement(client: aiohttp.ClientSession, base_url: str) -> None:
    """A client that could choose its address would choose its rate limit."""
    claimed = {
        "X-Forwarded-For": "203.0.113.9",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "elsewhere.example",
        "Forwarded": "for=203.0.113.9",
    }

    async with client.get(f"{base_url}/", headers=claimed) as response:
        seen = (await response.json())["headers"]

    assert seen["x-forwarded-for"] == ["127.0.0.1"]
    assert seen["x-forwarded-proto"] == ["http"]
    assert seen["x-forwarded-host"] == [base_url.removeprefix("http://")]
    assert "forwarded" not in seen


async def test_a_request_id_is_kept_and_returned(client: aiohttp.ClientSession, base_url: str) -> None:
    async with client.post(f"{base_url}/api/lookup", headers={"X-Request-Id": "order-7.a_B"}) as response:
        seen = (await response.json())["headers"]

    assert seen["x-request-id"] == ["order-7.a_B"]
    assert response.headers.getall("X-Request-Id") == ["order-7.a_B"]


@pytest.mark.parametrize(
    "claimed",
    [[], [("X-Request-Id", "a"), ("X-Request-Id", "b")], [("X-Request-Id", "a" * 65)], [("X-Request-Id", 'x","status":200')]],
    ids=["none", "two", "long", "unclean"],
)
async def test_a_request_id_is_made_where_the_client_gives_no_good_one(
    client: aiohttp.ClientSession, base_url: str, claimed: list[tuple[str, str]]
) -> None:
    async with client.get(f"{base_url}/", headers=claimed) as response:
        (seen,) = (await response.json())["headers"]["x-request-id"]

    assert len(seen) == len("5f2b1c1e-0000-4000-8000-000000000000")
    assert response.headers.getall("X-Request-Id") == [seen]


async def _in_chunks(body_bytes: int) -> AsyncIterator[bytes]:
    for start in range(0, body_bytes, 8192):
        yield b"x" * min(8192, body_bytes - start)


@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
async def test_a_body_of_64_kib_passes(client: aiohttp.ClientSession, base_url: str, chunked: bool) -> None:
    body: Any = _in_chunks(BODY_BYTES_MAX) if chunked else b"x" * BODY_BYTES_MAX

    async with client.post(f"{base_url}/api/lookup", data=body) as response:
        assert (response.status, (await response.json())["bodyBytes"]) == (200, BODY_BYTES_MAX)


@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
async def test_one_byte_more_is_refused_before_it_reaches_a_part(
    client: aiohttp.ClientSession, base_url: str, chunked: bool
) -> None:
    body: Any = _in_chunks(BODY_BYTES_MAX + 1) if chunked else b"x" * (BODY_BYTES_MAX + 1)

    async with client.post(f"{base_url}/api/lookup", data=body) as response:
        await _assert_problem(response, 413, "A request body may have at most 65536 bytes.")


async def test_a_body_that_does_not_arrive_in_time_is_refused_by_the_gateway(
    base_url: str, write_side: Side, read_side: Side
) -> None:
    """A slow sender holds a place here and none in a part."""
    async with asyncio.timeout(WAIT_S):
        host, _, port = base_url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /api/lookup HTTP/1.1\r\nHost: x\r\nContent-Length: 24\r\n\r\n{")
        answer = await reader.readuntil(b"}")
        writer.close()

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_too_slow"' in answer


async def test_events_pass_one_by_one(client: aiohttp.ClientSession, base_url: str, read_side: Side) -> None:
    """The second event is only sent once the first has arrived, so a buffer in between would wait for ever."""
    async with client.get(f"{base_url}/events") as response:
        first = await response.content.readuntil(b"\n\n")
        read_side.second_event.set()
        second = await response.content.readuntil(b"\n\n")

    assert (first, second) == (b"id: 1\n\n", b"id: 2\n\n")


async def test_a_side_that_is_down_leaves_the_other_alone(
    client: aiohttp.ClientSession, haproxy: str, read_side: Side, tmp_path: Path
) -> None:
    async with gateway(haproxy, tmp_path, {"READ_SERVER": f"127.0.0.1:{read_side.port}"}) as url:
        async with client.post(f"{url}/api/lookup") as refused:
            assert refused.headers["Retry-After"] == "2"
            assert refused.headers["X-Request-Id"]
            await _assert_problem(
                refused, 503, "The service is not available right now. The request was not carried out; try again shortly."
            )
        async with client.get(f"{url}/api/lookup/0198c0de") as answered:
            assert answered.status == 200


async def test_a_request_that_broke_off_is_not_sent_again(
    client: aiohttp.ClientSession, base_url: str, write_side: Side
) -> None:
    async with client.post(f"{base_url}/api/lookup/break-off") as response:
        await _assert_problem(
            response, 502, "The service broke off before it answered. It is not known whether the request was carried out."
        )

    assert write_side.broken_off == 1


async def test_a_silent_part_is_given_up_in_our_words(
    client: aiohttp.ClientSession, haproxy: str, read_side: Side, tmp_path: Path
) -> None:
    impatient = tmp_path / "haproxy.cfg"
    impatient.write_text(CONFIGURATION.read_text(encoding="utf-8").replace("timeout server 60s", "timeout server 300ms"))

    servers = {"READ_SERVER": f"127.0.0.1:{read_side.port}"}
    async with gateway(haproxy, tmp_path, servers, impatient) as url, client.get(f"{url}/silent") as response:
        await _assert_problem(
            response, 504, "The service did not answer in time. It is not known whether the request was carried out."
        )


async def test_a_container_that_comes_back_elsewhere_is_found(
    client: aiohttp.ClientSession, haproxy: str, tmp_path: Path
) -> None:
    """Compose's name server gives a recreated container's new address; the gateway is not restarted for it."""
    first = Side("read", host="127.0.0.2")
    second = Side("read", host="127.0.0.3", port=first.port)
    names = {"read": first.host}

    async with _name_server(names) as address, first.running(), second.running():
        servers = {"GATEWAY_DNS": address, "READ_SERVER": f"read:{first.port}"}
        async with gateway(haproxy, tmp_path, servers) as url:
            await _until_answered_by(client, url, first.host)
            names["read"] = second.host
            await _until_answered_by(client, url, second.host)


async def _until_answered_by(client: aiohttp.ClientSession, url: str, host: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            async with client.get(f"{url}/") as response:
                if response.status == 200 and (await response.json())["host"] == host:
                    return
            await asyncio.sleep(POLL_S)


@dataclass
class _Names(asyncio.DatagramProtocol):
    """Answers A questions from a table, as compose's name server does, and AAAA with nothing."""

    addresses: Mapping[str, str]
    transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        question = dns.message.from_wire(data)
        answer = dns.message.make_response(question)
        asked = question.question[0]
        address = self.addresses.get(asked.name.to_text(omit_final_dot=True))
        if address and asked.rdtype == dns.rdatatype.A:
            answer.answer.append(dns.rrset.from_text(asked.name, 1, "IN", "A", address))
        self.transport.sendto(answer.to_wire(), addr)


@asynccontextmanager
async def _name_server(addresses: Mapping[str, str]) -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: _Names(addresses), local_addr=("127.0.0.1", 0))
    host, port = transport.get_extra_info("sockname")
    try:
        yield f"{host}:{port}"
    finally:
        transport.close()


async def _assert_problem(response: aiohttp.ClientResponse, status: int, message: str) -> None:
    problem = await response.json(content_type="application/problem+json")

    assert response.status == status
    assert (problem["type"], problem["status"]) == (f"urn:lookup:problem:{problem['code']}", status)
    assert problem["title"]
    assert problem["detail"] == problem["error"] == message
