"""What `docs/errors.md` says of the lookups' codes, provoked for real: each has its own cause and its own sentence."""

import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.demo.peers import DemoPeers
from domain.address_policy import AddressPolicy
from domain.errors import ErrorCode
from events.facts import Target
from tests.peers.lookups import address, closed_port, domain, failure_of, network, running_peers
from workers import geoip, ping, rdap, reverse_dns
from workers.lookup import LookupFailed
from workers.network import PingSettings

ROW = re.compile(r"^\| `([a-z_]+)` \| [^|]+ \| ([^|]+) \| ([^|]+) \|", re.MULTILINE)
DOCUMENT = Path(__file__).parents[2] / "docs" / "errors.md"
QUIET = PingSettings(reply_timeout_s=0.0, interval_s=0.0, tcp_ports=(9,))
SAID_BY_OTHERS = {
    ErrorCode.INTERNAL_ERROR,
    ErrorCode.WORKER_CRASHED,
    ErrorCode.QUOTA_EXHAUSTED,
    ErrorCode.UPSTREAM_DOWN,
    ErrorCode.TIMED_OUT,
    ErrorCode.NOT_APPLICABLE,
    ErrorCode.CANCELLED,
}
"""`tests/unit/test_saga.py`, `test_runner.py` and `test_job_status.py` provoke these."""
DEPENDS_ON_THE_MACHINE = {ErrorCode.PROBE_NOT_PERMITTED, ErrorCode.NETWORK_UNREACHABLE}
"""`test_ping.py` provokes them where the kernel lets it."""


@dataclass(frozen=True)
class Provocation:
    look_up: Any
    target: Target
    settings: Mapping[str, Any]


PROVOCATIONS: dict[ErrorCode, Provocation] = {
    ErrorCode.ADDRESS_REFUSED: Provocation(ping.look_up, address("127.0.0.1"), {"policy": AddressPolicy()}),
    ErrorCode.ANSWER_TOO_LARGE: Provocation(rdap.look_up, domain("huge.org"), {}),
    ErrorCode.NAME_NOT_FOUND: Provocation(ping.look_up, domain("nowhere.example.com"), {}),
    ErrorCode.NAME_RESOLUTION_FAILED: Provocation(reverse_dns.look_up, address("127.0.0.7"), {}),
    ErrorCode.NO_REPLY: Provocation(ping.look_up, address("127.0.0.1"), {"ping": QUIET}),
    ErrorCode.NOT_FOUND: Provocation(rdap.look_up, domain("missing.org"), {}),
    ErrorCode.RDAP_NO_SERVER: Provocation(rdap.look_up, domain("example.museum"), {}),
    ErrorCode.TIMEOUT: Provocation(rdap.look_up, domain("slow.org"), {"http_timeout_s": 0.3}),
    ErrorCode.UNPARSABLE_ANSWER: Provocation(rdap.look_up, domain("page.org"), {}),
    ErrorCode.UPSTREAM_ERROR: Provocation(rdap.look_up, domain("broken.org"), {}),
}


@pytest.fixture(scope="module")
async def peers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[DemoPeers]:
    async with running_peers(tmp_path_factory.mktemp("peers")) as running:
        yield running


@pytest.fixture(scope="module")
async def provoked(peers: DemoPeers) -> dict[ErrorCode, LookupFailed]:
    """What each provocation really led to, by the code that it was meant to lead to."""
    found = {code: await provoke(peers, provocation) for code, provocation in PROVOCATIONS.items()}
    with closed_port() as port:
        nobody = Provocation(geoip.look_up, address("192.0.2.1"), elsewhere(f"http://127.0.0.1:{port}/json"))
        found[ErrorCode.UPSTREAM_UNREACHABLE] = await provoke(peers, nobody)
    reserved = Provocation(geoip.look_up, address("127.0.0.1"), elsewhere(peers.ip_api.url))
    found[ErrorCode.NO_LOCATION] = await provoke(peers, reserved)
    return found


async def provoke(peers: DemoPeers, provocation: Provocation) -> LookupFailed:
    async with network(peers.settings, **provocation.settings) as net:
        return await failure_of(provocation.look_up(provocation.target, net))


def elsewhere(url: str) -> dict[str, Any]:
    return {"geoip_mmdb": None, "ip_api_url": url}


def documented() -> dict[str, tuple[str, str]]:
    """Who says a code, and whether it is tried again, by the code."""
    return {code: (who, again) for code, who, again in ROW.findall(DOCUMENT.read_text(encoding="utf-8"))}


async def test_every_code_of_the_lookups_is_provoked(provoked: dict[ErrorCode, LookupFailed]) -> None:
    assert provoked.keys() == set(ErrorCode) - SAID_BY_OTHERS - DEPENDS_ON_THE_MACHINE
    assert {code: failed.code for code, failed in provoked.items()} == {code: code for code in provoked}


async def test_every_failure_has_a_sentence_of_its_own(provoked: dict[ErrorCode, LookupFailed]) -> None:
    messages = [failed.message for failed in provoked.values()]

    assert len(set(messages)) == len(messages)
    assert all(message.endswith(".") and not message.endswith("..") for message in messages)
    assert not any("Error" in message or "Traceback" in message for message in messages)


async def test_what_is_tried_again_is_what_the_documentation_says(provoked: dict[ErrorCode, LookupFailed]) -> None:
    told = documented()

    assert {code: failed.transient for code, failed in provoked.items()} == {
        code: told[code][1].startswith("transient") for code in provoked
    }
