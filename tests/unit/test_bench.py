"""The bench counts what it claims to count."""

import asyncio
import os
import subprocess
import sys
from typing import Any

import orjson
import pytest

from bench.children import BenchFailed
from bench.http_load import Connection, is_completed
from bench.load import Measured
from bench.processor_time import processor_seconds
from bench.report import Run, figures_of
from bench.servers import Transport

GOOD = {"success": True, "data": {"answered": True}}


def job(status: str, *results: dict[str, Any]) -> bytes:
    return orjson.dumps({"status": status, "results": results})


def test_only_a_job_with_four_good_results_counts() -> None:
    assert is_completed(b"/job", job("Completed", GOOD, GOOD, GOOD, GOOD))
    assert not is_completed(b"/job", job("Processing", GOOD))


@pytest.mark.parametrize(
    "body",
    [
        job("Failed", GOOD, GOOD, GOOD, GOOD),
        job("Completed", GOOD, GOOD, GOOD),
        job("Completed", GOOD, GOOD, GOOD, GOOD | {"success": False}),
        job("Completed", GOOD, GOOD, GOOD, GOOD | {"data": None}),
    ],
)
def test_a_job_that_is_not_whole_ends_the_bench(body: bytes) -> None:
    with pytest.raises(BenchFailed):
        is_completed(b"/job", body)


async def test_answers_are_read_whole_however_they_arrive() -> None:
    """A server that sends its answer byte by byte, twice on one connection, the second time without a body."""
    answers = [b"HTTP/1.1 200 OK\r\nETag: 7\r\nContent-Length: 5\r\n\r\nhello", b"HTTP/1.1 304 Not Modified\r\nETag: 7\r\n\r\n"]

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await reader.readuntil(b"\r\n\r\n")
            for byte in answer:
                writer.write(bytes([byte]))
                await asyncio.sleep(0)
        writer.close()

    async with await asyncio.start_server(drip, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        _, connection = await asyncio.get_running_loop().create_connection(Connection, host, port)
        first = await connection.ask(b"GET /1 HTTP/1.1\r\n\r\n")
        second = await connection.ask(b"GET /1 HTTP/1.1\r\n\r\n")
        connection.close()

    assert (first.status, first.header(b"ETag"), first.body) == (200, b"7", b"hello")
    assert (second.status, second.header(b"ETag"), second.body) == (304, b"7", b"")


def test_processor_time_is_that_of_the_programs_that_were_started() -> None:
    work = "import time\nwhile time.process_time() < 0.2: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        seconds = processor_seconds(os.getpid())
        child.communicate(b"\n")

    assert max(seconds.values()) >= 0.15  # The kernel counts in hundredths of a second.


def test_figures_are_medians_of_the_rounds() -> None:
    runs = [
        Run(number, Transport.REDIS, "ours", Measured(100, seconds, [1.0, 2.0, 9.0], {"postgres": seconds / 10}))
        for number, seconds in enumerate((1.0, 4.0, 2.0), start=1)
    ]

    (ours,) = figures_of(runs)

    assert (ours.jobs_per_s, ours.jobs_per_s_min, ours.jobs_per_s_max) == (50.0, 25.0, 100.0)
    assert ours.p50_ms == 2.0
    assert ours.processor_ms == {"postgres": 2.0}
