"""A target's history and what changed, over HTTP: a real Redis as a real projector leaves it, and the log behind it."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from urllib.parse import quote
from uuid import UUID

import orjson
import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from redis.asyncio import Redis
from rich.console import Console
from yarl import URL

from app import target_client
from app.http.middlewares import with_problems, with_request_id
from app.http.problem import problem
from app.wiring import _canonical_target
from events.facts import JobFact, Service, Target
from events.memory import MemoryBus, MemoryStore
from events.store import AppendUnit, NewFacts, StreamHead
from projections import job_status
from projections.projector import Projector
from projections.view_store import RedisViews
from projections.views import JOB_STATUS, TARGET_HISTORY, Keys, target_key
from read_side import targets as module
from read_side.history import JobHistory
from read_side.targets import TargetQueries
from read_side.targets_api import TargetApi
from results.documents import MemoryDocuments
from tests.builders import (
    ADDRESS,
    CAUSE,
    DOMAIN,
    PING,
    RDAP,
    RULES,
    completed,
    counts,
    dispatched,
    failed,
    job_completed,
    job_failed,
    memory_store,
    submitted,
)
from tests.diff_documents import Document, edited, gtld_domain, network, ping, rdap_result
from tests.peers.lookup_api import serving
from tests.peers.lookups import closed_port

KEYS = Keys()
PATIENCE_S = 20.0
REGISTERED = rdap_result(network())
RENAMED = rdap_result(edited(network(), name="OTHER-NET", entities=lambda entities: entities[::-1]))
FAST, SLOW = ping(18.0, 18.1), ping(95.0, 96.0)


def _utc_now() -> datetime:
    return datetime.now(UTC)


def job_id(number: int) -> UUID:
    return UUID(int=(7 << 76) | (2 << 62) | number)


@dataclass
class Asked:
    """Jobs about targets, the views of them, and the log that they come from."""

    redis: Redis
    store: MemoryStore = field(default_factory=lambda: memory_store(_utc_now))
    documents: MemoryDocuments = field(default_factory=MemoryDocuments)
    with_log: bool = True
    jobs: int = 0

    async def job(self, results: Mapping[Service, Document | None], target: Target = ADDRESS, *, ended: bool = True) -> UUID:
        """A job with these results, None for a lookup that failed."""
        self.jobs += 1
        job, when = job_id(self.jobs), _utc_now()
        facts: list[JobFact] = [
            submitted(*results, job_id=job, target=target, when=when),
            dispatched(*results, job_id=job, when=when),
        ]
        for service, document in results.items():
            body = orjson.dumps(document)
            if document is not None:
                await self.documents.put(job, body)
            facts.append(failed(service, job_id=job) if document is None else completed(service, job_id=job, document=body))
        found = sum(document is not None for document in results.values())
        tally = counts(succeeded=found, failed=len(results) - found)
        facts.append(
            job_completed(tally, job_id=job, when=when) if found else job_failed(tally, job_id=job, reason="none", when=when)
        )
        await self.store.append(AppendUnit([NewFacts(job, StreamHead(), facts if ended else facts[:2])], CAUSE))
        return job

    async def projected(self) -> None:
        leader = Projector(
            RedisViews(self.redis), self.store, self.documents, MemoryBus(), RULES, timedelta(hours=24), _utc_now
        )
        async with asyncio.timeout(PATIENCE_S):
            await leader._become_leader()
        leader._log_id = str(await self.store.log_id())
        await leader._take_over()
        await leader.catch_up()

    def queries(self) -> TargetQueries:
        return TargetQueries(self.redis, self._past() if self.with_log else None)

    def _past(self) -> JobHistory:
        async def nobody(_: UUID) -> list[UUID]:
            return []

        return JobHistory(self.store, self.documents, job_status.fold, job_status.VIEW.version, nobody, _utc_now)

    async def generation(self, view: str = JOB_STATUS) -> str:
        return cast("bytes", await self.redis.hget(KEYS.live, view) or b"").decode()

    async def forget(self, job: UUID) -> None:
        """What time does to a job's document in the views."""
        assert await self.redis.delete(KEYS.job(await self.generation(), job)) == 1

    def routes(self) -> list[web.RouteDef]:
        return TargetApi(self.queries(), _canonical_target, problem).routes()

    async def get(self, path: str) -> tuple[int, Any]:
        application = web.Application(middlewares=[with_request_id, with_problems])
        application.add_routes(self.routes())
        async with TestServer(application) as server, ClientSession() as client:
            url = server.make_url("").join(URL(path, encoded=True))
            async with client.get(url) as answer:
                return answer.status, orjson.loads(await answer.read())

    async def told(self, path: str) -> Any:
        status, body = await self.get(path)
        assert status == 200, body
        return body


@pytest.fixture
async def asked(redis_url: str) -> AsyncIterator[Asked]:
    async with Redis.from_url(redis_url) as redis:
        yield Asked(redis)


HISTORY, DIFF = f"/api/targets/{ADDRESS.canonical}/history", f"/api/targets/{ADDRESS.canonical}/diff"


def changed(diff: Any) -> dict[str, list[tuple[str, str]]]:
    """Kind and path of each change, by service."""
    return {part["service"]: [(change["kind"], change["path"]) for change in part["changes"]] for part in diff["services"]}


# --- History ----------------------------------------------------------------------------------------------------------


async def test_the_newest_comes_first_and_says_what_changed_since_the_completed_one_before(asked: Asked) -> None:
    first = await asked.job({PING: FAST, RDAP: REGISTERED})
    await asked.job({PING: None, RDAP: None})
    second = await asked.job({PING: SLOW, RDAP: REGISTERED})
    third = await asked.job({PING: SLOW, RDAP: None})
    await asked.job({PING: FAST}, ended=False)
    await asked.job({PING: FAST}, DOMAIN)
    await asked.projected()

    told = await asked.told(HISTORY)

    jobs = told["jobs"]
    assert (told["target"], told["next"]) == (ADDRESS.canonical, None)
    assert [job["status"] for job in jobs] == ["Pending", "Completed", "Completed", "Failed", "Completed"]
    assert [job["comparedWith"] for job in jobs] == [None, str(second), str(first), str(first), None]
    assert [job["outcome"] for job in jobs] == [None, "unknown", "changed", "unknown", None]
    assert [(job["changed"], job["same"], job["unknown"]) for job in jobs] == [
        ([], [], []),
        ([], ["Ping"], ["RDAP"]),
        (["Ping"], ["RDAP"], []),
        ([], [], ["Ping", "RDAP"]),
        ([], [], []),
    ]
    assert jobs[1]["jobId"] == str(third)
    assert [job["position"] for job in jobs] == sorted((job["position"] for job in jobs), reverse=True)


async def test_pages_follow_each_other_without_a_gap_and_compare_across_their_border(asked: Asked) -> None:
    jobs = [await asked.job({PING: FAST if number % 2 else SLOW}) for number in range(7)]
    await asked.projected()

    seen, path = [], f"{HISTORY}?limit=3"
    while path:
        page = await asked.told(path)
        seen += page["jobs"]
        path = page["next"]

    assert [job["jobId"] for job in seen] == [str(job) for job in reversed(jobs)]
    assert [job["changed"] for job in seen] == [["Ping"]] * 6 + [[]]


async def test_without_their_documents_only_the_same_bytes_are_known_to_be_the_same(asked: Asked) -> None:
    first = await asked.job({PING: FAST, RDAP: REGISTERED})
    await asked.job({PING: SLOW, RDAP: REGISTERED})
    await asked.projected()
    await asked.forget(first)

    newest = (await asked.told(HISTORY))["jobs"][0]

    assert (newest["changed"], newest["same"], newest["unknown"]) == ([], ["RDAP"], ["Ping"])


async def test_a_target_is_found_however_it_is_typed_and_one_that_nobody_asked_about_is_empty(asked: Asked) -> None:
    job = await asked.job({PING: FAST}, DOMAIN)
    await asked.projected()

    for typed in ("example.com", "EXAMPLE.com", "example.com.", quote(" \uff45xample.com ")):
        told = await asked.told(f"/api/targets/{typed}/history")
        assert (told["target"], [entry["jobId"] for entry in told["jobs"]]) == ("example.com", [str(job)])
    assert (await asked.told("/api/targets/2001:0db8::0/history"))["jobs"] == []
    assert (await asked.told(f"/api/targets/{quote('fe80::1%eth0')}/history"))["target"] == "fe80::1%eth0"


# --- Diff -------------------------------------------------------------------------------------------------------------


async def test_the_last_two_completed_jobs_are_compared_field_by_field(asked: Asked) -> None:
    await asked.job({PING: FAST, RDAP: RENAMED})
    first = await asked.job({PING: FAST, RDAP: REGISTERED})
    await asked.job({PING: None, RDAP: None})
    second = await asked.job({PING: SLOW, RDAP: RENAMED})
    await asked.job({PING: FAST}, ended=False)
    await asked.projected()

    diff = await asked.told(DIFF)

    assert (diff["from"]["jobId"], diff["to"]["jobId"], diff["outcome"]) == (str(first), str(second), "changed")
    assert changed(diff) == {
        "Ping": [("changed", "/averageRoundtripMs"), ("changed", "/minRoundtripMs")],
        "RDAP": [("changed", "/name")],
    }
    assert diff["services"][0]["changes"][0] == {
        "path": "/averageRoundtripMs",
        "kind": "changed",
        "from": 18.05,
        "to": 95.5,
        "note": "near to continental",
    }
    rdap = diff["services"][1]
    order = {"rule": "/raw/entities", "why": "Entities have no order; the registrar is told above.", "count": 1}
    assert order in rdap["ignoredBy"]
    assert rdap["ignored"] == sum(rule["count"] for rule in rdap["ignoredBy"]) == 2


async def test_jobs_are_named_by_id_or_position_in_any_order(asked: Asked) -> None:
    jobs = [await asked.job({RDAP: document}) for document in (REGISTERED, RENAMED, REGISTERED)]
    await asked.projected()
    positions = [job["position"] for job in reversed((await asked.told(HISTORY))["jobs"])]

    for from_, to, expected in (
        (jobs[0], jobs[1], (0, 1)),
        (positions[2], jobs[0], (2, 0)),
        (positions[0], positions[2], (0, 2)),
        (positions[1] - 1, positions[1] + 1, (0, 1)),
    ):
        diff = await asked.told(f"{DIFF}?from={from_}&to={to}")
        assert (diff["from"]["position"], diff["to"]["position"]) == tuple(positions[at] for at in expected)
    assert (await asked.told(f"{DIFF}?to={jobs[1]}"))["from"]["jobId"] == str(jobs[0])
    assert (await asked.told(f"{DIFF}?from={jobs[0]}"))["to"]["jobId"] == str(jobs[2])
    assert (await asked.told(f"{DIFF}?from={jobs[0]}"))["outcome"] == "same"


async def test_a_document_that_the_views_show_no_more_is_folded_from_the_log(asked: Asked) -> None:
    first = await asked.job({RDAP: REGISTERED})
    await asked.job({RDAP: RENAMED})
    await asked.projected()
    await asked.forget(first)

    assert changed(await asked.told(DIFF)) == {"RDAP": [("changed", "/name")]}

    asked.with_log = False
    status, body = await asked.get(DIFF)
    assert (status, body["code"]) == (503, "history_unavailable")


async def test_what_was_erased_everywhere_is_unknown(asked: Asked) -> None:
    first = await asked.job({RDAP: REGISTERED})
    await asked.projected()
    asked.documents = MemoryDocuments()
    await asked.job({RDAP: RENAMED})
    await asked.projected()
    await asked.forget(first)

    diff = await asked.told(DIFF)

    assert (diff["outcome"], changed(diff)) == ("unknown", {"RDAP": []})
    assert diff["services"][0]["unknown"] == {"from": "result_gone", "to": None}


async def test_a_job_that_the_log_has_forgotten_too_is_known_by_its_digests_only(asked: Asked) -> None:
    first = await asked.job({PING: FAST, RDAP: REGISTERED})
    await asked.job({PING: SLOW, RDAP: REGISTERED})
    await asked.projected()
    await asked.forget(first)
    asked.store = memory_store(_utc_now)

    diff = await asked.told(DIFF)

    assert {part["service"]: part["outcome"] for part in diff["services"]} == {"Ping": "unknown", "RDAP": "same"}


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/api/targets/nodot/history", 400, "domain_no_dot"),
        ("/api/targets/1.2.3/diff", 400, "invalid_ip"),
        (f"{HISTORY}?before=x", 400, "page_invalid"),
        (f"{HISTORY}?limit=0", 400, "page_invalid"),
        (f"{HISTORY}?limit=21", 400, "page_invalid"),
        (f"{DIFF}?from=first", 400, "job_reference_invalid"),
        (f"{DIFF}?to=99999999999999999999", 400, "job_reference_invalid"),
        (f"{DIFF}?to=0193a3a4-7d5e-7c1f-9b11-2f6d1b0c4a55", 404, "job_not_in_history"),
        (f"{DIFF}?from=0", 404, "job_not_in_history"),
        ("/api/targets/example.org/diff", 404, "nothing_to_compare"),
        ("/api/targets/example.com/diff", 404, "nothing_to_compare"),
    ],
)
async def test_a_refusal_says_why_with_a_stable_code(asked: Asked, path: str, status: int, code: str) -> None:
    await asked.job({PING: FAST})
    await asked.job({PING: FAST})
    await asked.job({PING: FAST}, DOMAIN)
    await asked.projected()

    found, body = await asked.get(path)

    assert (found, body["code"]) == (status, code)
    assert body["error"]


async def test_a_job_of_another_target_is_not_in_this_ones_history(asked: Asked) -> None:
    await asked.job({PING: FAST})
    other = await asked.job({PING: FAST}, DOMAIN)
    await asked.projected()

    status, body = await asked.get(f"{DIFF}?from={other}")

    assert (status, body["code"]) == (404, "job_not_in_history")


async def test_views_that_are_being_built_or_out_of_reach_say_so(asked: Asked) -> None:
    status, body = await asked.get(HISTORY)
    assert (status, body["code"]) == (503, "views_rebuilding")

    with closed_port() as port:
        nowhere = Redis(host="127.0.0.1", port=port, socket_connect_timeout=1.0)
        for path in (HISTORY, DIFF):
            status, body = await Asked(nowhere).get(path)
            assert (status, body["code"]) == (503, "views_unavailable")
        await nowhere.aclose()


async def test_only_so_many_comparisons_are_taken_on(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    await asked.job({RDAP: REGISTERED})
    await asked.job({RDAP: RENAMED})
    await asked.projected()
    monkeypatch.setattr(module, "ASKERS_MAX", 0)

    status, body = await asked.get(DIFF)

    assert (status, body["code"]) == (503, "busy")


# --- The commands -----------------------------------------------------------------------------------------------------


@dataclass
class Terminal:
    """A wide terminal that remembers."""

    out: Console = field(default_factory=lambda: Console(file=io.StringIO(), width=160))
    err: Console = field(default_factory=lambda: Console(file=io.StringIO(), width=160))

    @property
    def printed(self) -> str:
        return cast("io.StringIO", self.out.file).getvalue()

    @property
    def said(self) -> str:
        return cast("io.StringIO", self.err.file).getvalue()


async def test_the_commands_print_tables_for_people_and_the_document_for_scripts(asked: Asked) -> None:
    hostile = rdap_result(edited(network(), name="\x1b[2J\u202eNET", remarks__0__description__0="\x1b[2J\u202eOther"))
    first = await asked.job({PING: FAST, RDAP: REGISTERED})
    second = await asked.job({PING: SLOW, RDAP: hostile})
    third = await asked.job({PING: SLOW, RDAP: None})
    await asked.projected()
    listing, older, compared, as_json = Terminal(), Terminal(), Terminal(), Terminal()

    async with serving(asked.routes()) as url:
        target = ADDRESS.canonical
        plain: dict[str, Any] = {"base_url": url, "as_json": False}
        codes = [
            await target_client.history(target, None, 2, **plain, out=listing.out, err=listing.err),
            await target_client.history(target, 1, 2, **plain, out=older.out, err=older.err),
            await target_client.diff(target, str(first), str(second), **plain, out=compared.out, err=compared.err),
            await target_client.diff(target, None, None, base_url=url, as_json=True, out=as_json.out, err=as_json.err),
        ]

    assert codes == [0, 0, 0, 0]
    rows = {line.split()[3]: line for line in listing.printed.splitlines() if "completed" in line}
    assert rows[str(second)].split()[-2:] == ["Ping,", "RDAP"]
    assert rows[str(third)].split()[-2:] == ["nothing", "RDAP"]
    assert "Older jobs: --before" in listing.printed
    assert "Nobody has asked" in older.printed
    lines = [" ".join(line.split()) for line in compared.printed.splitlines()]
    assert "~ /averageRoundtripMs 18.05 -> 95.5 (near to continental)" in lines
    assert "~ /name EXAMPLE-NET -> [2JNET" in lines
    assert "~ /raw/remarks/0/description/0 Example Hosting -> \ufffd[2J\ufffdOther (description)" in lines
    assert json.loads(as_json.printed)["services"][1]["unknown"] == {"from": None, "to": "failed"}
    for terminal in (listing, older, compared, as_json):
        assert terminal.said == ""
        assert not {"\x1b", "\u202e"} & set(terminal.printed)


async def test_the_commands_say_the_services_own_sentence_and_end_as_documented(asked: Asked) -> None:
    await asked.job({PING: FAST})
    await asked.projected()

    async with serving(asked.routes()) as url:
        for target, from_, code, sentence in (
            (ADDRESS.canonical, None, 1, "No job about this target completed before that one."),
            (ADDRESS.canonical, "first", 2, "from and to must each be a job id, or a position: a whole number"),
            ("no dot", None, 2, "Domain name must contain a dot"),
        ):
            terminal = Terminal()
            ended = await target_client.diff(
                target, from_, None, base_url=url, as_json=False, out=terminal.out, err=terminal.err
            )
            assert (ended, terminal.printed) == (code, "")
            assert sentence in terminal.said


# --- Where it lies ----------------------------------------------------------------------------------------------------


async def test_a_targets_history_is_one_key_that_does_not_name_it(asked: Asked) -> None:
    await asked.job({RDAP: rdap_result(gtld_domain())}, DOMAIN)
    await asked.projected()

    keys = [key.decode() async for key in asked.redis.scan_iter(match=f"{KEYS.prefix}*:{TARGET_HISTORY}:*")]

    assert keys == [KEYS.key(await asked.generation(TARGET_HISTORY), TARGET_HISTORY, target_key("example.com"))]
    assert "example" not in keys[0]
    members: Any = await asked.redis.zrange(keys[0], 0, -1)
    assert len(members) == 1
    assert b"example" not in members[0].lower()
