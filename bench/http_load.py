"""The client of our contender: HTTP over loopback, as cheap as can be, since it shares the processors with what it measures.

Every single job is seen to be Completed, with four results, by a GET.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import orjson

from bench.children import BenchFailed
from bench.load import Load, Measured, Stopwatch

CHECKERS = 8
POLL_S = 0.02
"""Between two looks at the same unfinished job, under load."""
HEADERS_END = b"\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: bytes
    body: bytes

    def header(self, name: bytes) -> bytes | None:
        _, found, rest = self.headers.partition(b"\r\n" + name + b": ")
        return rest.partition(b"\r\n")[0] if found else None


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, kept alive: a request, then its answer. Knows just what our server sends."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._answer: asyncio.Future[Answer] | None = None
        self._transport: asyncio.Transport | None = None

    async def ask(self, request: bytes) -> Answer:
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(HEADERS_END)
        if end < 0 or self._answer is None:
            return
        headers = bytes(self._received[: end + 2])
        answer = Answer(int(headers[9:12]), headers, b"")
        end += len(HEADERS_END)
        size = int(answer.header(b"Content-Length") or 0) if answer.status != 304 else 0
        if len(self._received) >= end + size:
            body = bytes(self._received[end : end + size])
            del self._received[: end + size]
            self._answer.set_result(Answer(answer.status, headers, body))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            lost = BenchFailed("The server closed a connection.")
            lost.__cause__ = exc
            self._answer.set_exception(lost)


@asynccontextmanager
async def connections(url: str, count: int) -> AsyncIterator[list[Connection]]:
    address = urlsplit(url)
    assert address.hostname is not None
    assert address.port is not None
    loop = asyncio.get_running_loop()
    opened = [(await loop.create_connection(Connection, address.hostname, address.port))[1] for _ in range(count)]
    try:
        yield opened
    finally:
        for connection in opened:
            connection.close()


async def measure(load: Load, write_url: str, read_url: str) -> Measured:
    """Single jobs one after the other, then `load.jobs` at once."""
    async with AsyncExitStack() as stack:
        submitters = await stack.enter_async_context(connections(write_url, load.submitters))
        checkers = await stack.enter_async_context(connections(read_url, CHECKERS))
        targets = _targets()
        for _ in range(load.warm_up):
            await _single_ms(submitters[0], checkers[0], next(targets), load.job_timeout_s)
        single_ms = [
            await _single_ms(submitters[0], checkers[0], next(targets), load.job_timeout_s) for _ in range(load.singles)
        ]
        watch = Stopwatch()
        await _many(load, submitters, checkers, targets)
        return watch.stop(load.jobs, single_ms)


async def _single_ms(submitter: Connection, checker: Connection, target: str, timeout_s: float) -> float:
    """From handing a job in to its whole answer. The client waits (`Prefer: wait`): one that polls measures its own polling."""
    started_at = time.perf_counter()
    path = await _submit(submitter, target)
    preference = b"Prefer: wait=%d\r\n" % timeout_s
    while not is_completed(path, (await checker.ask(b"GET %b HTTP/1.1\r\nHost: bench\r\n%b\r\n" % (path, preference))).body):
        if time.perf_counter() - started_at > timeout_s:
            raise BenchFailed(f"{path.decode()} was not Completed within {timeout_s:.0f} s.")
    return 1000 * (time.perf_counter() - started_at)


async def _many(load: Load, submitters: list[Connection], checkers: list[Connection], targets: Iterator[str]) -> None:
    accepted: asyncio.Queue[bytes | None] = asyncio.Queue()
    room = asyncio.Semaphore(load.unfinished_max)
    left = iter(range(load.jobs))

    async def submit(connection: Connection) -> None:
        for _ in left:
            await room.acquire()
            accepted.put_nowait(await _submit(connection, next(targets)))

    async def check(connection: Connection) -> None:
        while (path := await accepted.get()) is not None:
            await _seen_completed(connection, path, load.job_timeout_s)
            room.release()

    async with asyncio.TaskGroup() as checking:
        for connection in checkers:
            checking.create_task(check(connection))
        async with asyncio.TaskGroup() as submitting:
            for connection in submitters:
                submitting.create_task(submit(connection))
        for _ in checkers:
            accepted.put_nowait(None)


async def _submit(connection: Connection, target: str) -> bytes:
    """Hand a job in; gives its path."""
    body = b'{"target":"%b"}' % target.encode()
    answer = await connection.ask(
        b"POST /api/lookup HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (len(body), body)
    )
    path = answer.header(b"Location")
    if answer.status != 202 or path is None:
        raise BenchFailed(f"A job was not accepted: {answer.status} {answer.body.decode(errors='replace')}")
    return path


async def _seen_completed(connection: Connection, path: bytes, timeout_s: float) -> None:
    """Poll until the job is Completed, and check that it is whole."""
    give_up_at = time.monotonic() + timeout_s
    etag = b""
    while time.monotonic() < give_up_at:
        condition = b"If-None-Match: %b\r\n" % etag if etag else b""
        answer = await connection.ask(b"GET %b HTTP/1.1\r\nHost: bench\r\n%b\r\n" % (path, condition))
        if answer.status == 200 and is_completed(path, answer.body):
            return
        if answer.status not in {200, 304, 503}:
            raise BenchFailed(f"{path.decode()} answered {answer.status}: {answer.body.decode(errors='replace')}")
        etag = answer.header(b"ETag") or b""
        await asyncio.sleep(POLL_S)
    raise BenchFailed(f"{path.decode()} was not Completed within {timeout_s:.0f} s.")


def is_completed(path: bytes, body: bytes) -> bool:
    """Whether a job has ended. Raises `BenchFailed` when it did not end with four good results."""
    job = orjson.loads(body)
    if job["status"] == "Processing":
        return False
    whole = job["status"] == "Completed" and len(job["results"]) == 4
    if not whole or not all(result["success"] and result["data"] for result in job["results"]):
        raise BenchFailed(f"{path.decode()} ended, and not well: {body.decode()}")
    return True


def _targets() -> Iterator[str]:
    """Public addresses, none twice in a run; nobody is asked about them."""
    number = 0
    while True:
        number += 1
        yield f"8.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
