"""Metrics: plain integers in, Prometheus' text out, and nothing that grows with what is asked of the service."""

import re
from collections.abc import Mapping

import pytest
from aiohttp import ClientSession

from app.http.serving import serving
from app.metrics import CONTENT_TYPE, COUNTED, Counters, Family, Looking, Reading, exposition, metrics_routes
from events.store import StoreUnavailable
from tests.builders import GEOIP, PING
from workers.runner import WorkerCounters
from write_side.gather import GatherCounters

COMMENT = re.compile(r"# (HELP|TYPE) [a-z_]+ .+")
SAMPLE = re.compile(r'[a-z_]+(\{[a-z_]+="[^"\\]*"(,[a-z_]+="[^"\\]*")*\})? -?[0-9.e+-]+')


async def scraped(looks: list[Looking], readings: Mapping[str, Reading]) -> str:
    async with serving(metrics_routes(looks, readings), "127.0.0.1", 0) as url, ClientSession() as http:
        answer = await http.get(f"{url}/metrics")
        assert (answer.status, answer.headers["Content-Type"]) == (200, CONTENT_TYPE)
        text = await answer.text()
    for line in text.splitlines():
        assert COMMENT.fullmatch(line) or SAMPLE.fullmatch(line), line
    return text


def test_each_counter_is_a_value_of_its_familys_label() -> None:
    counters = Counters()
    counters.of(GatherCounters).recorded += 3
    counters.of(GatherCounters).ignored += 2

    assert exposition(counters.look()).decode().splitlines() == [
        "# HELP lookup_outcomes_total Outcomes of tasks that arrived, by what became of them.",
        "# TYPE lookup_outcomes_total counter",
        'lookup_outcomes_total{result="recorded"} 3',
        'lookup_outcomes_total{result="ignored"} 2',
        'lookup_outcomes_total{result="unreadable"} 0',
        'lookup_outcomes_total{result="refused"} 0',
    ]


def test_the_workers_of_a_process_share_a_family() -> None:
    """The format knows a name once: a second TYPE line would make Prometheus refuse the whole scrape."""
    counters = Counters()
    counters.of(WorkerCounters, PING).reported += 1
    counters.of(WorkerCounters, GEOIP).handed_back += 7

    lines = exposition(counters.look()).decode().splitlines()

    assert [line for line in lines if "TYPE" in line] == ["# TYPE lookup_worker_items_total counter"]
    assert 'lookup_worker_items_total{service="Ping",result="reported"} 1' in lines
    assert 'lookup_worker_items_total{service="GeoIP",result="handed_back"} 7' in lines


def test_counters_outlive_the_part_that_counts() -> None:
    counters = Counters()
    counters.of(GatherCounters).ignored += 1

    counters.of(GatherCounters).ignored += 1

    assert counters.of(GatherCounters).ignored == 2
    assert counters.of(WorkerCounters, PING) is not counters.of(WorkerCounters, GEOIP)


def test_no_two_classes_share_a_name() -> None:
    assert len({name for name, _, _ in COUNTED.values()}) == len(COUNTED)


async def test_a_scrape_tells_what_is_known_here_and_what_servers_say() -> None:
    async def head() -> list[Family]:
        return [Family("lookup_log_position", "gauge", "Where it stands.", "", {"": 2**53 + 1})]

    text = await scraped([Counters().look], {"log": head})

    assert f"\nlookup_log_position {2**53 + 1}\n" in text
    assert '\nlookup_reading_up{reading="log"} 1.0\n' in text
    assert "\nprocess_cpu_seconds_total " in text


@pytest.mark.parametrize("error", [StoreUnavailable(), OSError(), TimeoutError()])
async def test_what_cannot_be_asked_is_missing_and_said_to_be(error: Exception) -> None:
    """A number that is made up, or kept from before, would hide the outage that it was made to show."""

    async def head() -> list[Family]:
        raise error

    text = await scraped([], {"log": head})

    assert "lookup_log_position" not in text
    assert '\nlookup_reading_up{reading="log"} 0.0\n' in text
