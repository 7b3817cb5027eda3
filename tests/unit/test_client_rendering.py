"""What a job looks like on a terminal, and that nothing in it can steer the terminal."""

import io
from typing import Any

import pytest
from rich.console import Console

from app.rendering import JobView, duration_text, job_report, progress, safe, words
from tests.peers.lookup_api import ANSWERS, COMPLETED_AT, CREATED_AT, failed, skipped, succeeded, timed_out, waiting

JOB_ID = "0199c2de-7a10-7c3e-8d2f-1b5f6a7c8d9e"


def job(results: dict[str, dict[str, Any]], **changes: Any) -> JobView:
    document = {
        "jobId": JOB_ID,
        "target": "192.0.2.44",
        "targetType": "IPAddress",
        "status": "Completed",
        "createdAt": CREATED_AT,
        "completedAt": COMPLETED_AT,
        "completionPercentage": 100,
        "requestedServices": list(results),
        "results": [{"serviceType": service} | result for service, result in results.items()],
        "warnings": [],
    }
    return JobView.model_validate(document | changes)


def printed(shown: JobView, *, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal, color_system="truecolor" if terminal else None)
    console.print(job_report(shown))
    return output_of(console)


def output_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines_of(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_report_has_the_important_fields_of_every_service() -> None:
    given = job({str(service): answer for service, answer in ANSWERS.items()})

    then = lines_of(printed(given))

    assert then[0] == "192.0.2.44 IP address completed 1.3 s"
    assert "GeoIP succeeded 3 ms" in then
    assert "Place Berlin, Land Berlin, Germany" in then
    assert "Autonomous system AS64500 Example Networks" in then
    assert "Packets 4 sent, 3 received, 25 % lost" in then
    assert "Round trip 10.9 / 11.402 / 12.1 ms (min / avg / max)" in then
    assert "RDAP succeeded 412 ms attempt 2" in then
    assert "Network 192.0.2.0/24" in then
    assert "Last changed 2024-02-11T09:31:07Z" in then
    assert "Host name host44.example.net" in then


def test_events_of_a_registry_keep_their_names() -> None:
    given = job({"RDAP": succeeded({"events": [{"action": "last update of RDAP database", "date": "2025-01-20T12:00:51Z"}]})})

    then = lines_of(printed(given))

    assert then[3:] == ["Last update of RDAP database 2025-01-20T12:00:51Z"]


def test_what_is_unknown_takes_no_line() -> None:
    given = job({"GeoIP": succeeded({"ip": "192.0.2.7", "country": None, "city": None, "isp": None, "source": "iptocc"})})

    then = lines_of(printed(given))

    assert then[2:] == ["GeoIP succeeded 34 ms", "Address 192.0.2.7", "Source iptocc"]


def test_failures_say_why_in_their_own_section() -> None:
    given = job(
        {
            "Ping": failed("192.0.2.44 answered none of 4 echoes (100 % packet loss)."),
            "RDAP": timed_out(),
            "ReverseDNS": skipped("Reverse DNS lookup requires an IP address target."),
        },
        status="Failed",
    )

    then = lines_of(printed(given))

    assert then[0].endswith("failed 1.3 s")
    assert then[2:4] == ["Ping failed 2.1 s attempt 3", "192.0.2.44 answered none of 4 echoes (100 % packet loss)."]
    assert then[5:7] == ["RDAP timed out", "No answer came in time."]
    assert then[8:10] == ["ReverseDNS skipped", "Reverse DNS lookup requires an IP address target."]


def test_an_address_without_a_name_is_an_answer() -> None:
    given = job({"ReverseDNS": succeeded({"input": "192.0.2.44", "found": False, "hostName": None, "aliases": []})})

    then = lines_of(printed(given))

    assert "Host name none (the address has no PTR record)" in then


def test_data_as_json_text_reads_like_data() -> None:
    given = job({"Ping": succeeded('{"address": "192.0.2.44", "method": "tcp"}')})

    then = lines_of(printed(given))

    assert {"Address 192.0.2.44", "Method tcp"} <= set(then)


def test_a_service_that_this_client_does_not_know_shows_its_plain_fields() -> None:
    given = job({"Whois": succeeded({"registeredSince": 1999, "tags": ["a", "b"], "nested": {"deep": 1}})})

    then = lines_of(printed(given))

    assert then[3:] == ["Registered since 1999", "Tags a, b"]


def test_warnings_follow_the_answer() -> None:
    given = job({"RDAP": succeeded(None)}, warnings=["The stored result of RDAP is missing or damaged."])

    then = lines_of(printed(given))

    assert then[3] == "The answer is not at hand."
    assert then[-1] == "Warning: The stored result of RDAP is missing or damaged."


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\x00 [bold red]x[/] :bomb:\nsecond\rline"


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(job({"GeoIP": succeeded({"ip": HOSTILE, "isp": [HOSTILE]})}), id="field"),
        pytest.param(job({"RDAP": succeeded({"events": [{"action": HOSTILE, "date": HOSTILE}]})}), id="label"),
        pytest.param(job({"Whois": succeeded({HOSTILE: HOSTILE})}), id="unknown service's key"),
        pytest.param(job({"Whois": succeeded(HOSTILE)}), id="data that is text"),
        pytest.param(job({HOSTILE: failed(HOSTILE)}), id="service and message"),
        pytest.param(job({"Ping": waiting(HOSTILE)}), id="task status"),
        pytest.param(job({}, target=HOSTILE, status=HOSTILE, warnings=[HOSTILE, {"x": HOSTILE}]), id="job"),
    ],
)
def test_untrusted_text_neither_steers_the_terminal_nor_is_read_as_markup(given: JobView) -> None:
    plain, coloured = printed(given), printed(given, terminal=True)

    assert not set(plain) & set("\x1b\x07\x9b\u202e\x00\r")
    # All that is left of escapes on a terminal are our own colours.
    assert "\x1b]" not in coloured
    assert "\x1b[2J" not in coloured
    assert not set(coloured) & set("\x07\x9b\u202e\x00\r")


def test_markup_and_emoji_codes_are_shown_as_they_were_written() -> None:
    markup = "[bold red]x[/] :bomb: [link=http://example.com]y[/link]"
    given = job(
        {"GeoIP": succeeded({"isp": markup}), "Ping": failed(markup), "Whois": succeeded(markup), "[b]s[/b]": waiting()},
        target="[b]t[/b]",
        warnings=[markup],
    )

    then = printed(given)

    assert then.startswith("[b]t[/b]")
    assert then.count(markup) == 4
    assert "[b]s[/b]" in then


def test_safe_text_is_bounded() -> None:
    assert len(safe("x" * 1_000_000)) < 1_100


def test_safe_text_keeps_what_people_write() -> None:
    assert safe("bücher.de 例え café “ok”") == "bücher.de 例え café “ok”"


def test_progress_off_a_terminal_is_one_plain_line_as_each_service_ends() -> None:
    console = Console(file=io.StringIO(), width=40)
    first = job({"GeoIP": succeeded({}), "Ping": waiting()}, status="Processing")
    last = job({"GeoIP": succeeded({}), "Ping": failed("no", duration_ms=2_100)})

    with progress(console) as show:
        for view in (first, first, last):
            show(view)

    assert lines_of(output_of(console)) == ["GeoIP succeeded 34 ms", "Ping failed 2.1 s"]


def test_progress_on_a_terminal_is_live_and_leaves_nothing_behind() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)

    with progress(console) as show:
        show(job({"GeoIP": succeeded({}), "Ping": waiting()}, status="Processing"))

    drawn = output_of(console)
    assert "GeoIP" in drawn
    assert "pending" in drawn
    hidden, shown, erase_line = "\x1b[?25l", "\x1b[?25h", "\x1b[2K"
    assert drawn.startswith(hidden)
    assert drawn.index(shown) < drawn.rindex(erase_line)


@pytest.mark.parametrize(("ms", "text"), [(None, ""), (0, "0 ms"), (999, "999 ms"), (1_000, "1.0 s"), (61_250, "61.2 s")])
def test_durations_are_read_at_a_glance(ms: int | None, text: str) -> None:
    assert duration_text(ms) == text


@pytest.mark.parametrize(("name", "text"), [("TimedOut", "timed out"), ("packetsSent", "packets sent"), ("Failed", "failed")])
def test_names_become_words(name: str, text: str) -> None:
    assert words(name) == text
