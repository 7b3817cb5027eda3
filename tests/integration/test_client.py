"""`lookup run` against a service that keeps the HTTP contract: what it sends, what it prints, how it ends."""

import asyncio
import io
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from uuid import uuid4

import pytest
from aiohttp import web
from rich.console import Console

from app.client import Exit, Stopped, open_client, run
from app.client import LookupApi as LookupClient
from events.facts import Service
from tests.peers.lookup_api import LookupApi, Refusal, failed, running_lookup_api, serving, skipped, succeeded

TARGET = "192.0.2.44"
STEP_TIMEOUT_S = 20


@pytest.fixture
async def api() -> AsyncIterator[LookupApi]:
    async with running_lookup_api(LookupApi()) as api:
        yield api


def console() -> Console:
    return Console(file=io.StringIO(), width=100)


@dataclass
class Terminal:
    out: Console = field(default_factory=console)
    err: Console = field(default_factory=console)

    async def run(
        self,
        url: str,
        target: str = TARGET,
        *services: str,
        as_json: bool = False,
        timeout_s: float = 20.0,
        attempt_s: float | None = None,
    ) -> int:
        return await run(
            target,
            services,
            base_url=url,
            as_json=as_json,
            timeout_s=timeout_s,
            out=self.out,
            err=self.err,
            attempt_s=attempt_s,
        )

    @property
    def printed(self) -> str:
        assert isinstance(self.out.file, io.StringIO)
        return self.out.file.getvalue()

    @property
    def said(self) -> str:
        assert isinstance(self.err.file, io.StringIO)
        return self.err.file.getvalue()


async def test_a_lookup_ends_with_the_answers_of_all_services(api: LookupApi) -> None:
    terminal = Terminal()

    status = await terminal.run(api.url)

    assert status == 0
    assert terminal.said == ""
    for expected in ("completed", "Berlin", "25 % lost", "EXAMPLE-NET", "host44.example.net"):
        assert expected in terminal.printed


async def test_without_services_all_are_asked_for(api: LookupApi) -> None:
    await Terminal().run(api.url)

    assert api.submissions()[0].body == {"target": TARGET, "services": None}


async def test_named_services_are_asked_for_in_their_order(api: LookupApi) -> None:
    await Terminal().run(api.url, TARGET, "rdap", "0")

    assert api.submissions()[0].body == {"target": TARGET, "services": ["rdap", "0"]}


async def test_a_bound_for_attempts_is_handed_on(api: LookupApi) -> None:
    await Terminal().run(api.url, TARGET, "GeoIP", attempt_s=2.5)

    assert api.submissions()[0].body == {"target": TARGET, "services": ["GeoIP"], "timeoutSeconds": 2.5}


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
async def test_a_bound_that_makes_no_sense_is_not_even_sent(api: LookupApi, seconds: float) -> None:
    terminal = Terminal()

    assert await terminal.run(api.url, attempt_s=seconds) == Exit.BAD_INPUT

    assert "must be a number greater than 0" in terminal.said
    assert api.submissions() == []


async def test_json_is_the_document_and_nothing_beside_it(api: LookupApi) -> None:
    terminal = Terminal()
    api.answers[TARGET] = {Service.GEOIP: succeeded({"isp": "Bücher\x9b31m & \u202eSöhne"})}

    status = await terminal.run(api.url, TARGET, "GeoIP", as_json=True)

    document = json.loads(terminal.printed)
    assert status == 0
    assert terminal.said == ""
    assert document["jobId"] == str(next(iter(api.jobs)))
    assert document["results"][0]["data"] == {"isp": "Bücher\x9b31m & \u202eSöhne"}
    assert terminal.printed.isascii()


async def test_polls_carry_the_tag_of_what_is_known(api: LookupApi) -> None:
    await Terminal().run(api.url, TARGET, "GeoIP", "Ping")

    first, *later = api.polls()
    assert first.if_none_match is None
    assert all(poll.if_none_match for poll in later)
    assert [poll.status for poll in api.polls()] == [200, 304, 200, 304, 200]


async def test_polls_grow_rarer_while_nothing_happens(api: LookupApi) -> None:
    api.ends = False

    await Terminal().run(api.url, TARGET, "GeoIP", timeout_s=3.5)

    first, *_, fifth = api.unchanged_polls()[:5]
    assert fifth.at_s - first.at_s > 1.0
    assert len(api.unchanged_polls()) < 10


async def test_a_job_without_any_answer_is_a_failure(api: LookupApi) -> None:
    terminal = Terminal()
    api.answers["example.com"] = {
        Service.PING: failed("example.com answered none of 4 echoes (100 % packet loss)."),
        Service.REVERSE_DNS: skipped("Reverse DNS lookup requires an IP address target."),
    }

    status = await terminal.run(api.url, "example.com", "Ping", "ReverseDNS")

    assert status == 1
    assert "example.com answered none of 4 echoes (100 % packet loss)." in terminal.printed
    assert "Reverse DNS lookup requires an IP address target." in terminal.printed


@pytest.mark.parametrize(
    ("target", "services", "message"),
    [
        ("nodot", (), "Domain name must contain a dot (e.g. example.com)"),
        ("256.1.1.1", (), "Invalid IP address format: '256.1.1.1'. IPv4 must have exactly 4 octets (0-255 each)."),
        (TARGET, ("whois",), "Invalid service type specified"),
        (TARGET, ("\udcff",), "Invalid service type specified"),
        ("no-utf-8-\udcff.de", (), "'no-utf-8-?'"),
    ],
)
async def test_bad_input_is_told_in_the_words_of_the_service(
    api: LookupApi, target: str, services: tuple[str, ...], message: str
) -> None:
    terminal = Terminal()

    status = await terminal.run(api.url, target, *services, as_json=True)

    assert status == 2
    assert message in terminal.said
    assert terminal.printed == ""


async def test_what_a_service_says_cannot_steer_the_terminal(api: LookupApi) -> None:
    terminal = Terminal()
    api.submit_refusals = [Refusal(400, "\x1b[2Jno [bold]way[/bold]")]

    status = await terminal.run(api.url)

    assert status == 2
    assert "\x1b" not in terminal.said
    assert "no [bold]way[/bold]" in terminal.said


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://127.0.0.1", "http://", "http://x:abc", "http://127.0.0.1:99999", ""])
async def test_an_address_that_is_none_is_bad_input(url: str) -> None:
    terminal = Terminal()

    status = await terminal.run(url)

    assert status == 2
    assert "Not the address of a service" in terminal.said


async def test_nobody_there_says_how_to_start_the_service() -> None:
    terminal = Terminal()
    async with running_lookup_api(LookupApi()) as gone:
        pass

    status = await terminal.run(gone.url)

    assert status == 3
    assert f"Nothing answers at {gone.url}." in terminal.said
    assert "make run" in terminal.said


async def test_a_service_that_is_not_ready_takes_no_job(api: LookupApi) -> None:
    terminal = Terminal()
    api.submit_refusals = [Refusal(503, "The job could not be stored right now.", retry_after_s=2)]

    status = await terminal.run(api.url)

    assert status == 3
    assert "is not ready (503). The job could not be stored right now." in terminal.said
    assert "make run" in terminal.said
    assert len(api.submissions()) == 1


async def test_a_submission_whose_answer_is_lost_is_not_sent_again(api: LookupApi) -> None:
    terminal = Terminal()
    api.submit_refusals = [Refusal(0, "")]

    status = await terminal.run(api.url)

    assert status == 3
    assert "It is not known whether the job was accepted." in terminal.said
    assert len(api.submissions()) == 1


async def test_something_else_on_the_port_is_recognised() -> None:
    terminal = Terminal()

    async def accept(_: web.Request) -> web.Response:
        return web.json_response({"id": 1}, status=202)

    async with serving([web.post("/api/lookup", accept)]) as url:
        status = await terminal.run(url)

    assert status == 3
    assert "does not answer like a lookup service (status 202)" in terminal.said


async def test_a_pause_of_the_service_is_waited_out(api: LookupApi) -> None:
    terminal = Terminal()
    api.poll_refusals = [Refusal(503, "The views are being built."), Refusal(0, ""), Refusal(502, "Bad gateway")]

    status = await terminal.run(api.url)

    assert status == 0
    assert "completed" in terminal.printed


async def test_a_service_that_is_gone_for_good_is_given_up(api: LookupApi) -> None:
    api.poll_refusals = [Refusal(0, "")] * 3
    async with open_client(api.url) as http:
        with pytest.raises(Stopped, match="Nothing answers") as stopped:
            await LookupClient(http, api.url, lost_polls_max=3).follow(uuid4(), lambda _job, _document: None)

    assert stopped.value.status == 3
    assert api.poll_refusals == []


async def test_a_job_that_is_gone_is_told(api: LookupApi) -> None:
    terminal = Terminal()
    api.poll_refusals = [Refusal(404, "Job not found")]

    status = await terminal.run(api.url)

    assert status == 3
    assert "does not know the job" in terminal.said


async def test_a_job_that_takes_too_long_can_be_looked_at_again(api: LookupApi) -> None:
    terminal = Terminal()
    api.ends = False

    async with asyncio.timeout(STEP_TIMEOUT_S / 2):
        status = await terminal.run(api.url, TARGET, "GeoIP", "Ping", timeout_s=1.0)

    job_id = next(iter(api.jobs))
    assert status == 4
    assert "has not ended within 1 s" in terminal.said
    assert f"{api.url}/#job={job_id}" in terminal.said
    assert f"curl {api.url}/api/lookup/{job_id}" in terminal.said
    assert "Berlin" in terminal.printed


async def test_ctrl_c_says_where_the_job_is_and_leaves_it_running(api: LookupApi) -> None:
    api.ends = False
    program = (
        "import asyncio, sys; from rich.console import Console; from app.client import run\n"
        "sys.exit(asyncio.run(run('192.0.2.44', [], base_url=sys.argv[1], as_json=False, timeout_s=60,"
        " out=Console(), err=Console(stderr=True))))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, api.url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(STEP_TIMEOUT_S):
            assert process.stdout is not None
            await process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, said = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()

    assert process.returncode == 130
    assert f"{api.url}/#job={next(iter(api.jobs))}" in said.decode()
    assert "Traceback" not in said.decode()


async def test_a_service_below_a_path_is_reached(api: LookupApi) -> None:
    terminal = Terminal()
    async with serving(api.routes(), path="/here") as url:
        status = await terminal.run(f"{url}/")

    assert status == 0
    assert api.submissions()[0].path == "/here/api/lookup"


async def test_an_answer_without_end_is_not_read_to_its_end() -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with suppress(ConnectionError):
            while True:
                await response.write(b" " * 65_536)
        return response

    async with serving([web.get("/api/lookup/{job_id}", endless)]) as url, open_client(url) as http:
        with pytest.raises(Stopped, match="does not answer like a lookup service"):
            await LookupClient(http, url, lost_polls_max=1).follow(uuid4(), lambda _job, _document: None)


async def test_a_proxy_of_the_environment_does_not_stand_before_this_machine(
    api: LookupApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_lookup_api(LookupApi()) as gone:
        pass
    monkeypatch.setenv("HTTP_PROXY", gone.url)
    monkeypatch.setenv("ALL_PROXY", gone.url)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)

    assert await Terminal().run(api.url, TARGET, "Ping") == 0
