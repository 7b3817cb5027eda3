"""Every answer that pollers ever got is given again from the log alone: all parts on a real PostgreSQL and Valkey, over HTTP.

What the lookups say, and when, is ours; everything else is the product's.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from io import StringIO
from json import loads
from typing import Any, cast
from uuid import UUID

import pytest
from aiohttp import ClientSession
from psycopg.conninfo import make_conninfo
from redis.asyncio import Redis
from rich.console import Console

from app import past
from app.migrate import APP_ROLE, READER_ROLE
from app.parts import KEEPER, PartNames, Process
from app.settings import Settings
from app.wiring import Wiring
from domain.errors import ErrorCode
from events.facts import DeadLetterDiscarded, DeferReason, Service, Target
from events.record import Cause
from events.store import AppendUnit, NewFacts, StreamHead
from tests.builders import NOW
from workers.lookup import Answer, LookUp, LookupDeferred, LookupFailed, RawAnswer, Result
from write_side.dead_letters import Keep, open_letters, stream_of

PATIENCE_S = 60.0
RAW = b"what the provider said"
CLOSED = {"Completed", "Failed", "Cancelled"}


class Found(Result):
    """An answer with something in it to find again."""

    text: str
    registrar: str | None = None


@dataclass
class Lookups:
    """What becomes of each service's tries, one after the other; the last one stands. A number is seconds to wait first."""

    plans: dict[Service, list[Any]]
    tries: dict[Service, int] = field(default_factory=dict)

    def all(self) -> dict[Service, LookUp]:
        return {service: self._of(service) for service in Service}

    def _of(self, service: Service) -> LookUp:
        async def look_up(target: Target) -> Answer[Found]:
            plan = self.plans[service]
            wait_s, ending = plan[min(self.tries.get(service, 0), len(plan) - 1)]
            self.tries[service] = self.tries.get(service, 0) + 1
            await asyncio.sleep(wait_s)
            if isinstance(ending, Exception):
                raise ending
            found = Found(text=f"{ending} about {target.canonical}", registrar="Example Registrar")
            return Answer(found, provider="rdap.example.org", parser="found/1", raw=RawAnswer({}, RAW))

        return look_up


IN_TURN: dict[Service, list[Any]] = {
    Service.GEOIP: [(0.05, "a place")],
    Service.PING: [(0.15, "a time")],
    Service.RDAP: [(0.25, "an owner")],
    Service.REVERSE_DNS: [(0.35, "a name")],
}
TRANSIENT = LookupFailed(ErrorCode.UPSTREAM_ERROR, "The source is broken.", transient=True)
IN_TROUBLE: dict[Service, list[Any]] = {
    Service.GEOIP: [(0, TRANSIENT), (0, TRANSIENT), (0.1, "a place at last")],
    Service.PING: [(30, "too late")],
    Service.RDAP: [(0, LookupDeferred(DeferReason.QUOTA, 0.4)), (0, "an owner, when it was allowed")],
    Service.REVERSE_DNS: [(0.1, LookupFailed(ErrorCode.NOT_FOUND, "It has no name here."))],
}


@dataclass
class Running:
    """A running product and a client of it."""

    url: str
    http: ClientSession
    wiring: Wiring

    async def submit(self, target: str) -> tuple[UUID, int]:
        """A job's id, and the position that its acceptance told. While the store is busy, asks again when it is told to."""
        while True:
            async with self.http.post(f"{self.url}/api/lookup", json={"target": target}) as answer:
                if answer.status == 503:
                    await asyncio.sleep(int(answer.headers["Retry-After"]))
                    continue
                assert answer.status == 202
                body = await answer.json()
                return UUID(body["jobId"]), body["position"]

    async def get(self, path: str) -> tuple[int, str, bytes]:
        async with self.http.get(f"{self.url}/api/lookup/{path}") as answer:
            return answer.status, answer.headers.get("ETag", ""), await answer.read()

    async def json(self, path: str) -> Any:
        async with self.http.get(f"{self.url}/api/lookup/{path}") as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()

    async def polled_to_its_end(self, job_id: UUID) -> dict[str, bytes]:
        """Every answer that a poller without patience gets, by its ETag: no tag ever names two of them."""
        polls: dict[str, bytes] = {}
        async with asyncio.timeout(PATIENCE_S):
            while True:
                status, etag, body = await self.get(str(job_id))
                assert status == 200, body
                assert polls.setdefault(etag, body) == body
                if any(b'"status":"%b","createdAt"' % status.encode() in body for status in CLOSED):
                    return polls


@asynccontextmanager
async def serving(database_url: str, redis_url: str, plans: dict[Service, list[Any]]) -> AsyncIterator[Running]:
    settings = Settings(
        database_url=make_conninfo(database_url, user=APP_ROLE),
        database_read_url=make_conninfo(database_url, user=READER_ROLE),
        redis_url=redis_url,
        # Ping alone is ever too late; that the machine was, must not look like it.
        timeout_s={**dict.fromkeys(Service, 20.0), Service.PING: 1.0},
    )
    wiring = Wiring(settings, lookups=Lookups(plans).all())
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    parts = PartNames(PartNames.all().names - {KEEPER}, tuple(Service))
    process = Process(wiring, parts, "127.0.0.1", 0, listening.set_result)
    task = asyncio.create_task(process.run(stop))
    try:
        async with asyncio.timeout(PATIENCE_S), ClientSession() as http:
            yield Running(await listening, http, wiring)
    finally:
        stop.set()
        await task


@pytest.mark.parametrize(
    ("plans", "polls_min"), [(IN_TURN, 4), (IN_TROUBLE, 5)], ids=["answers in turn", "retry, deferral, time-out, failure"]
)
async def test_every_poll_of_a_run_is_given_again_byte_for_byte(
    migrated_database_url: str, redis_url: str, plans: dict[Service, list[Any]], polls_min: int
) -> None:
    async with serving(migrated_database_url, redis_url, plans) as service:
        job_id, accepted = await service.submit("8.8.8.44")
        other, _ = await service.submit("8.8.8.45")
        polls = await service.polled_to_its_end(job_id)
        await service.polled_to_its_end(other)

        await given_again(service, job_id, polls)
        async with Redis.from_url(redis_url) as redis:
            await redis.flushall()
            await given_again(service, job_id, polls)
        history = await service.json(f"{job_id}/history")

    assert len(polls) >= polls_min, "too few states were seen to say much"
    assert accepted == max(fact["position"] for fact in history["facts"] if fact["actor"] == "anonymous")


async def given_again(service: Running, job_id: UUID, polls: dict[str, bytes]) -> None:
    """By the position in its ETag, and by the time at which its last fact was recorded."""
    recorded = {fact["position"]: fact["recordedAt"] for fact in (await service.json(f"{job_id}/history"))["facts"]}
    for etag, body in polls.items():
        position = int(etag.strip('"').split("-")[1])
        assert await service.get(f"{job_id}?asOf={position}") == (200, etag, body)
        if recorded[position] not in {at for later, at in recorded.items() if later > position}:
            assert await service.get(f"{job_id}?asOf={recorded[position]}") == (200, etag, body)


async def test_the_history_of_a_run_tells_all_of_it(migrated_database_url: str, redis_url: str) -> None:
    async with serving(migrated_database_url, redis_url, IN_TROUBLE) as service:
        job_id, _ = await service.submit("8.8.8.44")
        polls = await service.polled_to_its_end(job_id)
        await discarded_letter(service.wiring, job_id)
        facts = (await service.json(f"{job_id}/history"))["facts"]
        stored = (await service.wiring.store.read([job_id]))[job_id]
        why = {name: await service.json(f"{job_id}/why?path=/results/{name}/status") for name in Service}
        registrar = await service.json(f"{job_id}/why?path=/results/RDAP/data/registrar")

    sentences = " ".join(fact["sentence"] for fact in facts)
    own = [fact for fact in facts if fact["streamId"] == str(job_id)]
    assert [fact["version"] for fact in own] == [row.stream_version for row in stored]
    assert [fact["hash"] for fact in own] == [row.state.split(b"\n")[2].decode() for row in stored]
    assert len({fact["correlationId"] for fact in own}) == 1
    assert facts[0]["sentence"].startswith("A lookup of 8.8.8.44 by GeoIP, Ping, RDAP and ReverseDNS was accepted")
    for said in (
        "GeoIP was dispatched again as attempt 2",
        "Ping brought no answer in time (attempt 2).",
        "(attempt 2, by rdap.example.org).",
        "RDAP was put off until",
        "RDAP was dispatched again, still as attempt 1",
        "(attempt 1, not_found): It has no name here.",
        "was discarded by erin: nobody needs it.",
        "The job was completed: 2 answered, 1 failed and 1 timed out.",
    ):
        assert said in sentences
    assert {name: reason["fact"]["type"] for name, reason in why.items()} == {
        "GeoIP": "TaskCompleted",
        "Ping": "TaskTimedOut",
        "RDAP": "TaskCompleted",
        "ReverseDNS": "TaskFailed",
    }
    assert (registrar["value"], registrar["source"], registrar["attempt"]) == ("Example Registrar", "live", 1)
    assert registrar["worker"].startswith("RDAP@")
    assert (registrar["provider"], registrar["parser"]) == ("rdap.example.org", "found/1")
    assert registrar["raw"]["sha256"] == sha256(RawAnswer({}, RAW).stored()).hexdigest()
    assert polls


async def test_the_command_shows_tells_and_explains(migrated_database_url: str, redis_url: str) -> None:
    async with serving(migrated_database_url, redis_url, IN_TURN) as service:
        job_id, position = await service.submit("8.8.8.44")
        await service.polled_to_its_end(job_id)
        path = "/results/RDAP/data/registrar"
        now = await printed(service, past.show(str(job_id), None))
        then = await printed(service, past.show(str(job_id), str(position)))
        history = await printed(service, past.history(str(job_id)))
        reason = await printed(service, past.why(str(job_id), path, None))
        as_json = await printed(service, past.why(str(job_id), path, None), as_json=True)
        before = await printed(service, past.show(str(job_id), "0"))
        wrong = await printed(service, past.why(str(job_id), "status", None))

    assert (now[0], then[0], history[0], reason[0]) == (0, 0, 0, 0)
    assert "completed" in now[1]
    assert "processing" in then[1]
    assert "A lookup of 8.8.8.44 by GeoIP, Ping, RDAP and ReverseDNS was accepted" in history[1]
    for said in ("Example Registrar", "rdap.example.org", "found/1", "RDAP@", "TaskCompleted at position", "RDAP answered in"):
        assert said in reason[1]
    assert loads(as_json[1])["value"] == "Example Registrar"
    assert (before[0], before[1]) == (1, "")
    assert "it did not exist yet." in before[2]
    assert wrong[0] == 2
    assert "JSON pointer" in wrong[2]


async def printed(service: Running, question: past.Question, *, as_json: bool = False) -> tuple[int, str, str]:
    """Exit status, what was printed, and what was said beside it."""
    out, err = (Console(file=StringIO(), width=200) for _ in range(2))
    status = await past.printed(question, base_url=service.url, as_json=as_json, out=out, err=err)
    texts = [cast("StringIO", console.file).getvalue() for console in (out, err)]
    return status, texts[0], texts[1]


async def discarded_letter(wiring: Wiring, job_id: UUID) -> None:
    """As an operator would leave it who discarded a letter of the job."""
    letter = Keep("message 1", "lookup.outcomes", "unparsable", b"{", {}, job_id, None, None, None, None, datetime.now(UTC))
    assert wiring.settings.database_url is not None
    async with open_letters(wiring.settings.database_url) as letters:
        await letters.keep([letter])
    fact = DeadLetterDiscarded(
        letter_id=1, queue="lookup.outcomes", job_id=job_id, by="erin", reason="nobody needs it", discarded_at=NOW
    )
    unit = AppendUnit([NewFacts(stream_of("message 1"), StreamHead(), [fact])], Cause("erin", UUID(int=9)))
    await wiring.store.append(unit)


async def test_who_was_told_a_position_reads_what_happened_up_to_it(migrated_database_url: str, redis_url: str) -> None:
    async with serving(migrated_database_url, redis_url, IN_TURN) as service:
        for number in range(8):
            job_id, position = await service.submit(f"8.8.8.{number}")
            status, etag, body = await service.get(f"{job_id}?minPosition={position}")
            assert status == 200, body
            assert int(etag.strip('"').split("-")[1]) >= position
