"""`lookup doctor` as an operator runs it: beside a service at work, and after something broke."""

import asyncio
import json
import os
import pwd
import signal
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
from redis.asyncio import Redis

from app.doctor.consultation import consult
from app.doctor.findings import Report
from app.settings import Settings
from app.wiring import Wiring
from events.record import envelope_of
from tests.e2e.journey import Client, client_of
from tests.e2e.processes import Finished, LookupProcess, lookup
from tests.e2e.served import NEIGHBOURS, Served
from tests.servers.valkey import RedisDatabases

JOBS = 60
LOOKS_MIN = 2
NOTICED_S = 60.0
SHORT_LIVED = {"LOOKUP_INTERACTIVE_LIFETIME_S": "4"}

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
async def up(tmp_path_factory: pytest.TempPathFactory, peers: Served) -> AsyncIterator[LookupProcess]:
    """A running `lookup up`; works in a folder with its data in `data`."""
    process = LookupProcess(
        "up", "--port", "0", "--data-dir", "data", folder=tmp_path_factory.mktemp("up"), env=peers.environment()
    )
    try:
        await process.start()
        yield process
    finally:
        await process.stop()


async def doctor(up: LookupProcess, *words: str) -> Finished:
    return await lookup("doctor", *words, "--data-dir", "data", cwd=up.folder)


def report_of(told: Finished) -> dict[str, Any]:
    assert told.err == ""
    report: dict[str, Any] = json.loads(told.out)
    return report


async def test_a_fresh_installation_is_healthy(up: LookupProcess) -> None:
    told = await doctor(up)

    assert (told.code, told.err) == (0, "")
    assert "Nothing is broken." in told.out


async def test_a_service_at_work_is_healthy_whenever_it_is_looked_at(up: LookupProcess) -> None:
    async with client_of(up.url, up.url) as client:
        at_work = asyncio.create_task(keep_busy(client))
        looks: list[Finished] = []
        while not at_work.done() or len(looks) < LOOKS_MIN:
            looks.append(await doctor(up, "--json"))
        await at_work
    last = report_of(await doctor(up, "--json"))

    assert [(look.code, report_of(look)["findings"]) for look in looks] == [(0, [])] * len(looks)
    assert any(report_of(look)["examined"]["jobs"] < JOBS for look in looks), "nothing was under way at any look"
    assert (last["healthy"], last["examined"]["jobs"], last["examined"]["views"]) == (True, JOBS, JOBS)
    assert last["examined"]["results"] == 4 * JOBS


async def keep_busy(client: Client) -> None:
    job_ids = []
    for number in range(JOBS):
        job_ids.append(await client.submit(f"127.0.{NEIGHBOURS[number]}.1"))
        await asyncio.sleep(0.1)
    await asyncio.gather(*(client.follow(job_id) for job_id in job_ids))


async def test_what_is_broken_is_told_with_what_to_do_and_mended_when_asked(up: LookupProcess) -> None:
    note = json.loads((up.folder / "data" / "servers.json").read_text(encoding="utf-8"))
    async with client_of(up.url, up.url) as client, Redis.from_url(note["redis_url"]) as redis:
        shown = await client.look_up("127.0.0.1", ["GeoIP"])
        (key,) = [key async for key in redis.scan_iter(f"views:*:job_status:{shown['jobId']}")]
        right: Any = await redis.get(key)
        await redis.set(key, right.replace(b"Completed", b"Failed"), keepttl=True)
        await redis.set("views:{0}:left-behind", "1")

        told = await doctor(up)
        mended = await doctor(up, "--fix", "--reason", "Somebody edited it.")
        after = await doctor(up)

        assert told.code == 1
        assert f"{shown['jobId']}: It differs in status." in told.out
        assert "views:{0}:left-behind: It belongs to nothing that this program knows." in told.out
        assert "2 findings." in told.out
        assert (mended.code, "2 findings were mended." in mended.out) == (0, True)
        assert (after.code, await redis.get(key)) == (0, right)


async def test_what_dies_is_named_and_a_job_that_nobody_ended_is_ended(
    tmp_path: Path, peers: Served, migrated_database_url: str, valkey: RedisDatabases
) -> None:
    """No worker, nobody who watches over deadlines, and the projector is killed."""
    with valkey.fresh() as redis_url:
        env = {
            "LOOKUP_DATABASE_URL": migrated_database_url,
            "LOOKUP_REDIS_URL": redis_url,
            **peers.environment(),
            **SHORT_LIVED,
        }
        service = LookupProcess("write", "relay", "read", "--port", "0", folder=tmp_path, env=env, name="service")
        projector = LookupProcess("projector", folder=tmp_path, env=env, name="projector")
        try:
            url = await service.start()
            projector.launch()
            async with client_of(url, url) as client:
                job_id = await client.submit("127.0.0.1", ["GeoIP"])
                await shows(client, job_id, "Processing")
                projector.send(signal.SIGKILL)
                await projector.ended()
                await examined_until(env, {"job past its deadline": 1, "no projector": 1})

                mended = await lookup("doctor", "--fix", "--json", cwd=tmp_path, env=env)
                projector.launch()
                await examined_until(env, {})
                await shows(client, job_id, "Failed")
        finally:
            await projector.stop()
            await service.stop()

    told = report_of(mended)
    assert (mended.code, told["healthy"]) == (1, False)
    assert {"job past its deadline": job_id}.items() <= {f["check"]: f["about"] for f in told["findings"]}.items()
    assert [did["about"] for did in told["mended"]] == [job_id]
    user = pwd.getpwuid(os.geteuid()).pw_name
    decided = [cause for cause in causes(migrated_database_url) if cause[0].startswith("doctor:")]
    assert decided == [(f"doctor:{user}", "lookup doctor found: job past its deadline.")] * 2


async def shows(client: Client, job_id: str, status: str) -> None:
    async with asyncio.timeout(NOTICED_S):
        while True:
            answer = await client.get(f"/api/lookup/{job_id}")
            if answer.status == 200 and answer.document["status"] == status:
                return
            await asyncio.sleep(0.1)


async def examined_until(env: Mapping[str, str], counts: Mapping[str, int]) -> Report:
    """Looks until just this is found; gives the report."""
    wiring = Wiring(Settings(database_url=env["LOOKUP_DATABASE_URL"], redis_url=env["LOOKUP_REDIS_URL"]))
    try:
        async with asyncio.timeout(NOTICED_S):
            while True:
                report = await consult(wiring, second_look_after_s=1.0)
                assert report.unexamined == {}
                if report.counts == counts:
                    return report
    finally:
        await wiring.aclose()


def causes(database_url: str) -> list[tuple[str, str]]:
    """Who decided the facts that somebody gave a reason for, and the reason."""
    with psycopg.connect(database_url) as database:
        states = database.execute("SELECT state FROM stored_events ORDER BY notification_id").fetchall()
    envelopes = [envelope_of(bytes(state)) for (state,) in states]
    return [(envelope["actor"], envelope["reason"]) for envelope in envelopes if "reason" in envelope]
