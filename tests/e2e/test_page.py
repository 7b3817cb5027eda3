"""The page in a real browser: what a person sees, whatever the answers hold.

`check_page` asks nothing of the service but its HTTP contract, so that any deployment can be put behind it.
"""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.async_api import Browser, ConsoleMessage, Page, Playwright, Request, Route, async_playwright, expect

from events.facts import Service
from tests.peers.lookup_api import LookupApi, Refusal, failed, running_lookup_api, skipped, succeeded, timed_out
from tests.servers.chromium import find_chromium

STEP_TIMEOUT_MS = 20_000
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CLOSED = re.compile("Completed|Failed")
ENDED = re.compile("Succeeded|Failed|TimedOut|Skipped")
TARGET = "192.0.2.44"
TRY = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await _launch(playwright)
        try:
            yield browser
        finally:
            await browser.close()


async def _launch(playwright: Playwright) -> Browser:
    return await playwright.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_ARGUMENTS)


@pytest.fixture
async def api() -> AsyncIterator[LookupApi]:
    async with running_lookup_api(LookupApi()) as api:
        yield api


@dataclass
class Visit:
    """A page that is watched: what it logged, and whom it asked."""

    page: Page
    base_url: str
    complaints: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def watch(self) -> None:
        self.page.on("console", self._logged)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._asked)

    def _logged(self, message: ConsoleMessage) -> None:
        # The browser itself notes each answer of 400 and above; whether the page copes with those, the tests look at.
        is_note_of_browser = message.text.startswith("Failed to load resource") and "/api/lookup" in message.location["url"]
        if message.type in {"error", "warning"} and not is_note_of_browser:
            self.complaints.append(message.text)

    def _asked(self, request: Request) -> None:
        self.hosts.add(urlsplit(request.url).netloc)

    async def look_up(self, target: str) -> None:
        await self.page.get_by_label("IP address or domain").fill(target)
        await self.page.get_by_role("button", name="Look up").click()

    async def see_it_closed(self, target: str) -> None:
        await expect(self.page.locator("#job-target")).to_have_text(target)
        await expect(self.page.locator("#job-status")).to_have_attribute("data-status", CLOSED)

    def card(self, service: str) -> "Card":
        return Card(self.page, service)


@dataclass(frozen=True)
class Card:
    page: Page
    service: str

    async def has(self, *texts: str) -> None:
        card = self.page.get_by_role("article", name=self.service, exact=True)
        for text in texts:
            await expect(card).to_contain_text(text)

    async def has_ended(self) -> None:
        card = self.page.get_by_role("article", name=self.service, exact=True)
        await expect(card.locator(".status")).to_have_attribute("data-status", ENDED)
        await expect(card.locator(".status")).not_to_be_empty()


@asynccontextmanager
async def visit(browser: Browser, base_url: str, fragment: str = "", width: int = 1100) -> AsyncIterator[Visit]:
    """Opens the page, and holds it to its promises at the end: no complaint of the browser, no other host."""
    context = await browser.new_context(viewport={"width": width, "height": 900}, locale="en-GB", timezone_id="UTC")
    context.set_default_timeout(STEP_TIMEOUT_MS)
    expect.set_options(timeout=STEP_TIMEOUT_MS)
    try:
        seen = Visit(await context.new_page(), base_url)
        seen.watch()
        await seen.page.goto(f"{base_url}/{fragment}")
        yield seen
        assert seen.complaints == []
        assert seen.hosts == {urlsplit(base_url).netloc}
    finally:
        await context.close()


async def check_page(browser: Browser, base_url: str, target: str = "127.0.0.1") -> None:
    """A person's way through the page of any deployment: an error, a lookup, its end, a reload, the JSON."""
    async with visit(browser, base_url) as seen:
        await expect(seen.page.get_by_role("checkbox")).to_have_count(4)

        await seen.look_up("nodot")
        await expect(seen.page.get_by_role("alert").filter(has_text="must contain a dot")).to_be_visible()

        await seen.look_up(target)
        await seen.see_it_closed(target)
        for service in Service:
            await seen.card(service).has_ended()
        assert re.search(r"#job=[0-9a-f-]{36}$", seen.page.url)

        await seen.page.reload()
        await seen.see_it_closed(target)

        await seen.page.get_by_text("History", exact=True).click()
        await expect(seen.page.get_by_role("list", name="What happened").get_by_role("listitem").first).to_contain_text(
            "accepted"
        )

        address = await seen.page.get_by_role("link", name="JSON document").get_attribute("href")
        document = await seen.page.request.get(f"{base_url}/{address}")
        assert (await document.json())["target"] == target


async def test_a_person_finds_the_way(browser: Browser, api: LookupApi) -> None:
    await check_page(browser, api.url)


async def test_every_answer_is_shown(browser: Browser, api: LookupApi) -> None:
    async with visit(browser, api.url) as seen:
        await seen.look_up(TARGET)
        await seen.see_it_closed(TARGET)

        await seen.card("GeoIP").has("Succeeded", "3 ms", "attempt 1", "Land Berlin", "AS64500 Example Networks")
        await seen.card("Ping").has("Packet loss25 %", "11.402 ms", "TimedOut")
        await seen.card("RDAP").has("attempt 2", "192.0.2.0/24", "last changed", "2024-02-11T09:31:07Z")
        await seen.card("ReverseDNS").has("host44.example.net")
        await expect(seen.page.locator("#job-summary")).to_have_text("Completed: 4 succeeded.")


async def test_answers_arrive_one_by_one(browser: Browser, api: LookupApi) -> None:
    api.ends = False
    async with visit(browser, api.url) as seen:
        await seen.look_up(TARGET)

        await seen.card("RDAP").has("Succeeded", "EXAMPLE-NET")
        await seen.card("ReverseDNS").has("Pending")
        await expect(seen.page.locator("#job-status")).to_have_text("Processing")
        await expect(seen.page.locator("#job-summary")).to_have_text("3 of 4 services have ended.")
        assert await seen.page.get_by_role("progressbar").evaluate("bar => bar.value") == 75


async def test_polls_carry_the_tag_and_end_with_the_job(browser: Browser, api: LookupApi) -> None:
    async with visit(browser, api.url) as seen:
        await seen.look_up(TARGET)
        await seen.see_it_closed(TARGET)

    statuses = [poll.status for poll in api.polls()]
    assert statuses == [200, 304] * 4 + [200]
    assert all(poll.if_none_match for poll in api.polls()[1:])


async def test_polls_grow_rarer_while_nothing_happens(browser: Browser, api: LookupApi) -> None:
    api.ends = False
    async with visit(browser, api.url) as seen:
        for service in ("GeoIP", "Ping", "RDAP"):
            await seen.page.get_by_role("checkbox", name=service).uncheck()
        async with seen.page.expect_response(lambda _: len(api.unchanged_polls()) >= 5):
            await seen.look_up(TARGET)

    first, *_, fifth = api.unchanged_polls()[:5]
    assert fifth.at_s - first.at_s > 2.0


async def test_failures_say_why_in_words(browser: Browser, api: LookupApi) -> None:
    api.answers["example.com"] = {
        Service.GEOIP: failed("ip-api.com could not be reached."),
        Service.PING: failed("example.com answered none of 4 echoes (100 % packet loss)."),
        Service.RDAP: timed_out(),
        Service.REVERSE_DNS: skipped("Reverse DNS lookup requires an IP address target."),
    }
    async with visit(browser, api.url) as seen:
        await seen.look_up("example.com")
        await seen.see_it_closed("example.com")

        await seen.card("Ping").has("Failed", "2.1 s", "attempt 3", "example.com answered none of 4 echoes")
        await seen.card("RDAP").has("Timed out", "No answer came in time.")
        await seen.card("ReverseDNS").has("Skipped", "Reverse DNS lookup requires an IP address target.")
        await expect(seen.page.locator("#job-summary")).to_have_text(
            "No service had an answer: 2 failed, 1 timed out, 1 skipped."
        )


async def test_warnings_are_shown(browser: Browser, api: LookupApi) -> None:
    api.warnings = ["The stored result of RDAP is missing or damaged."]
    api.answers[TARGET] = {Service.RDAP: succeeded(None)}
    async with visit(browser, api.url) as seen:
        await seen.look_up(TARGET)
        await seen.see_it_closed(TARGET)

        await expect(seen.page.locator("#job-warnings")).to_have_text("The stored result of RDAP is missing or damaged.")
        await seen.card("RDAP").has("The answer is not at hand.")


async def test_only_the_ticked_services_are_asked(browser: Browser, api: LookupApi) -> None:
    async with visit(browser, api.url) as seen:
        await seen.page.get_by_role("checkbox", name="GeoIP").uncheck()
        await seen.page.get_by_role("checkbox", name="RDAP").uncheck()
        await seen.look_up(TARGET)
        await seen.see_it_closed(TARGET)

        await expect(seen.page.get_by_role("article")).to_have_count(2)
    assert api.submissions()[0].body == {"target": TARGET, "services": ["Ping", "ReverseDNS"]}


async def test_no_service_ticked_is_told_beside_the_services(browser: Browser, api: LookupApi) -> None:
    async with visit(browser, api.url) as seen:
        await expect(seen.page.get_by_role("checkbox")).to_have_count(4)
        for box in await seen.page.get_by_role("checkbox").all():
            await box.uncheck()
        await seen.look_up(TARGET)

        await expect(seen.page.locator("#services-error")).to_have_text("Choose at least one service.")
    assert api.submissions() == []


async def test_a_bad_target_is_told_beside_the_field_and_forgotten_on_typing(browser: Browser, api: LookupApi) -> None:
    async with visit(browser, api.url) as seen:
        target = seen.page.get_by_label("IP address or domain")
        await seen.look_up("256.1.1.1")

        await expect(seen.page.locator("#target-error")).to_contain_text("Invalid IP address format: '256.1.1.1'.")
        await expect(target).to_have_attribute("aria-invalid", "true")
        await expect(target).to_be_focused()

        await target.press_sequentially("2")
        await expect(seen.page.locator("#target-error")).to_be_empty()
        await expect(target).not_to_have_attribute("aria-invalid", "true")


async def test_markup_in_an_error_is_text(browser: Browser, api: LookupApi) -> None:
    api.submit_refusals = [Refusal(400, f"Invalid target: '{TRY}'")]
    async with visit(browser, api.url) as seen:
        await seen.look_up(TRY)

        await expect(seen.page.locator("#target-error")).to_have_text(f"Invalid target: '{TRY}'")
        await expect(seen.page).to_have_title("Distributed Lookup")


async def test_markup_in_an_answer_is_text(browser: Browser, api: LookupApi) -> None:
    hostile = {TRY: TRY, "list": [TRY], "rows": [{TRY: TRY}], "part": {"deep": {TRY: TRY}}, "raw": {TRY: TRY}}
    api.answers[TARGET] = {Service.RDAP: succeeded(hostile), Service.PING: failed(TRY), Service.GEOIP: succeeded(TRY)}
    api.warnings = [TRY]
    async with visit(browser, api.url) as seen:
        await seen.look_up(TARGET)
        await seen.see_it_closed(TARGET)
        await seen.page.get_by_text("Raw document").click()

        for service in ("GeoIP", "Ping", "RDAP"):
            await seen.card(service).has(TRY)
        await expect(seen.page.locator("pre")).to_contain_text("<img src=x")
        await expect(seen.page.locator("main img, main script")).to_have_count(0)
        await expect(seen.page).to_have_title(f"{TARGET} – Distributed Lookup")  # noqa: RUF001 - as a title is set


async def test_a_script_in_the_page_would_not_run(browser: Browser, api: LookupApi) -> None:
    """The second line of defence: were a text ever taken for markup, the content policy stops it."""
    async with visit(browser, api.url) as seen:
        await seen.page.evaluate("markup => { document.querySelector('main').insertAdjacentHTML('beforeend', markup); }", TRY)

        await expect(seen.page.locator("main img")).to_have_count(1)
        await expect(seen.page).to_have_title("Distributed Lookup")
        refusals, seen.complaints = seen.complaints, []
        assert any("Content Security Policy" in refusal for refusal in refusals)


async def test_the_raw_document_is_folded_until_it_is_asked_for(browser: Browser, api: LookupApi) -> None:
    async with visit(browser, api.url) as seen:
        await seen.look_up(TARGET)
        await seen.see_it_closed(TARGET)

        document = seen.page.get_by_text('"objectClassName": "ip network"')
        await expect(document).to_have_count(0)
        await seen.page.get_by_text("Raw document").press("Enter")
        await expect(document).to_be_visible()


async def test_the_history_is_told_when_it_is_asked_for(browser: Browser, api: LookupApi) -> None:
    api.history = ["A lookup was accepted.", f"Ping answered {TRY}."]
    async with visit(browser, api.url) as seen:
        await seen.look_up(TARGET)
        await seen.see_it_closed(TARGET)
        assert not any(exchange.path.endswith("/history") for exchange in api.exchanges)
        await seen.page.get_by_text("History", exact=True).press("Enter")

        lines = seen.page.get_by_role("list", name="What happened, in order").get_by_role("listitem")
        await expect(lines).to_have_text(["10:00:00A lookup was accepted.", f"10:00:00Ping answered {TRY}."])
        await expect(seen.page.locator("main img, main script")).to_have_count(0)

        await seen.look_up("example.com")
        await seen.see_it_closed("example.com")
        await expect(lines).to_have_count(0)


async def test_a_history_that_cannot_be_told_now_says_why(browser: Browser, api: LookupApi) -> None:
    api.history = Refusal(503, "The log cannot be read right now. Try again shortly.", retry_after_s=5)
    async with visit(browser, api.url) as seen:
        await seen.look_up(TARGET)
        await seen.see_it_closed(TARGET)
        await seen.page.get_by_text("History", exact=True).click()

        await expect(seen.page.locator("#history-note")).to_have_text("The log cannot be read right now. Try again shortly.")


async def test_back_and_forth_between_two_jobs(browser: Browser, api: LookupApi) -> None:
    async with visit(browser, api.url) as seen:
        for target in (TARGET, "example.com"):
            await seen.look_up(target)
            await seen.see_it_closed(target)

        await seen.page.go_back()
        await seen.see_it_closed(TARGET)


async def test_a_job_that_is_unknown_is_told(browser: Browser, api: LookupApi) -> None:
    async with visit(browser, api.url, "#job=0199c2de-7a10-7c3e-8d2f-1b5f6a7c8d9e") as seen:
        await expect(seen.page.get_by_text("There is no such job.")).to_be_visible()
        await expect(seen.page.locator("#job")).to_be_hidden()


async def test_a_pause_of_the_service_is_told_and_waited_out(browser: Browser, api: LookupApi) -> None:
    api.poll_refusals = [Refusal(503, "The views are being built.", retry_after_s=1)]
    async with visit(browser, api.url) as seen:
        await seen.look_up(TARGET)

        await expect(seen.page.locator("#notice")).to_have_text("The views are being built. Still trying.")
        await seen.see_it_closed(TARGET)
        await expect(seen.page.locator("#notice")).to_be_hidden()


async def test_a_service_that_takes_no_jobs_is_told(browser: Browser, api: LookupApi) -> None:
    api.submit_refusals = [Refusal(503, "The job could not be stored right now. Nothing was accepted; try again shortly.")]
    async with visit(browser, api.url) as seen:
        await seen.look_up(TARGET)

        await expect(seen.page.locator("#form-error")).to_contain_text("Nothing was accepted; try again shortly.")
        await expect(seen.page.get_by_role("button", name="Look up")).to_be_enabled()


async def test_a_service_that_is_gone_is_told(browser: Browser) -> None:
    async with running_lookup_api(LookupApi()) as api, visit(browser, api.url) as seen:

        async def hang_up(route: Route) -> None:
            await route.abort("connectionrefused")

        await expect(seen.page.get_by_role("checkbox")).to_have_count(4)
        await seen.page.route("**/api/lookup", hang_up)
        await seen.look_up(TARGET)

        await expect(seen.page.locator("#form-error")).to_contain_text("The service cannot be reached.")


async def test_the_whole_way_works_by_keyboard(browser: Browser, api: LookupApi) -> None:
    async with visit(browser, api.url) as seen:
        await expect(seen.page.get_by_role("checkbox")).to_have_count(4)
        await expect(seen.page.get_by_label("IP address or domain")).to_be_focused()
        await seen.page.keyboard.type(TARGET)
        for _ in range(2):
            await seen.page.keyboard.press("Tab")
        await expect(seen.page.get_by_role("checkbox", name="GeoIP")).to_be_focused()
        await seen.page.keyboard.press("Space")
        await seen.page.keyboard.press("Enter")
        await seen.see_it_closed(TARGET)

        await expect(seen.page.get_by_role("article")).to_have_count(3)


async def test_nothing_is_cut_off_on_a_narrow_screen(browser: Browser, api: LookupApi) -> None:
    endless = "x" * 400
    api.answers[TARGET] = {Service.GEOIP: succeeded({"isp": endless}), Service.PING: failed(endless)}
    async with visit(browser, api.url, width=320) as seen:
        await seen.look_up(TARGET)
        await seen.see_it_closed(TARGET)

        assert await seen.page.evaluate("document.documentElement.scrollWidth") == 320


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/page.css", "text/css; charset=utf-8"),
        ("/page.js", "text/javascript; charset=utf-8"),
        ("/page.svg", "image/svg+xml; charset=utf-8"),
    ],
)
async def test_files_of_the_page_are_guarded_and_revalidated(api: LookupApi, path: str, kind: str) -> None:
    async with httpx.AsyncClient(base_url=api.url, trust_env=False) as http:
        first = await http.get(path)
        again = await http.get(path, headers={"If-None-Match": first.headers["ETag"]})

    assert first.headers["Content-Type"] == kind
    assert first.headers["Content-Security-Policy"] == "default-src 'self'; frame-ancestors 'none'; base-uri 'none'"
    assert first.headers["X-Content-Type-Options"] == "nosniff"
    assert first.headers["Cache-Control"] == "no-cache"
    assert (again.status_code, again.content) == (304, b"")
