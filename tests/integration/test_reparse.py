"""`lookup reparse` on real servers: a poller sees the corrected document, and a rebuild gives the same bytes."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
import pytest
from uuid_utils.compat import uuid7

from app import reparse as module
from app.cli import app
from app.settings import Settings
from app.status import status_of
from app.wiring import Wiring, utc_now
from events.ending import end
from events.store import AppendUnit, NewFacts, StreamHead
from read_side.queries import JobQueries
from tests.builders import CAUSE, RDAP, completed, counts, dispatched, job_completed, submitted
from workers import rdap
from workers.lookup import RawAnswer
from write_side.corrections import Reader
from write_side.retention import SomebodyElseSeals, open_retention_table

PATIENCE_S = 20.0
BODY = (
    b'{"objectClassName": "domain", "handle": "D-1", "ldhName": "example.com", "entities": '
    b'[{"roles": ["registrar"], "handle": "R-77", "publicIds": [{"type": "IANA Registrar ID", "identifier": "77"}]}]}'
)
RAW = RawAnswer({"asked": "example.com", "kind": "domain"}, BODY)


def better(stored: bytes) -> bytes:
    """A parser that has learned to read something."""
    document = orjson.loads(rdap.parse(RawAnswer.of(stored)).model_dump_json())
    document["domain"]["registrar"] = "Example Registrar"
    return orjson.dumps(document)


class Place:
    """A job that ended, in a log with relay and projector at work on it."""

    def __init__(self, database_url: str, redis_url: str, folder: Path) -> None:
        self.wiring = Wiring(Settings(database_url=database_url, redis_url=redis_url, data_dir=folder))
        self._at_work: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._at_work = [asyncio.create_task(part()) for part in (self.wiring.relay, self.wiring.projector)]

    async def stop(self) -> None:
        await end(self._at_work, PATIENCE_S)

    async def job(self) -> UUID:
        job_id, now = uuid7(), datetime.now(UTC)
        documents = await self.wiring.documents()
        answer = rdap.PARSER.read(RAW, "rdap.example.net")
        result = await documents.put(job_id, answer.result.model_dump_json().encode())
        raw = await documents.put(job_id, RAW.stored(), shown=False)
        told = completed(RDAP, job_id=job_id, when=now).model_copy(update={"result": result, "raw": raw, "parser": "rdap/1"})
        facts = [
            submitted(RDAP, job_id=job_id, when=now),
            dispatched(RDAP, job_id=job_id, when=now),
            told,
            job_completed(counts(succeeded=1), job_id=job_id, when=now),
        ]
        await self.wiring.store.append(AppendUnit([NewFacts(job_id, StreamHead(), facts)], CAUSE))
        return job_id

    async def settled(self) -> None:
        """Wait until the views have come to the end of the log."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                status = await status_of(self.wiring)
                if {status.relayed_facts, status.projected} == {status.log_head}:
                    return
                await asyncio.sleep(0.02)

    async def polled(self, job_id: UUID) -> tuple[bytes, str]:
        """Document and ETag."""
        queries = JobQueries(self.wiring.redis, utc_now, self.wiring.keys)
        await queries.start()
        try:
            found = await queries.job(job_id)
        finally:
            await queries.stop()
        assert found is not None
        return found.body, found.etag

    async def looked(self, **wish: Any) -> dict[str, Any]:
        return await module._run(Wiring(self.wiring.settings), module.Wish(RDAP, **wish))


@pytest.fixture
async def place(migrated_database_url: str, redis_url: str, tmp_path: Path) -> AsyncIterator[Place]:
    place = Place(migrated_database_url, redis_url, tmp_path)
    place.start()
    yield place
    await place.stop()
    await place.wiring.aclose()


async def test_a_poller_sees_what_was_corrected_and_a_rebuild_gives_the_same_bytes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await place.job()
    await place.settled()
    first, first_etag = await place.polled(job_id)
    monkeypatch.setitem(module.READERS, "rdap", Reader("rdap", 2, better))

    dry = await place.looked()
    await place.settled()
    assert await place.polled(job_id) == (first, first_etag)
    told = await place.looked(reason="the registrar was not read", actor="alice")
    await place.settled()

    assert (dry["counts"]["changed"], dry["corrected"], told["corrected"]) == (1, 0, 1)
    (change,) = told["samples"][0]["changes"]
    assert change == {"path": "/domain/registrar", "before": "R-77", "after": "Example Registrar"}
    document, etag = await place.polled(job_id)
    assert etag != first_etag
    then, now = orjson.loads(first), orjson.loads(document)
    then["results"][0]["data"]["domain"]["registrar"] = "Example Registrar"
    assert now == then
    for _ in range(2):
        await place.stop()
        await place.wiring.redis.flushall()
        place.start()
        await place.settled()
        assert await place.polled(job_id) == (document, etag)


async def test_nothing_is_corrected_while_somebody_seals_or_erases(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raw answer that was read just before its job's erasure would come back as a result just after it."""
    await place.job()
    monkeypatch.setitem(module.READERS, "rdap", Reader("rdap", 2, better))
    assert place.wiring.settings.database_url is not None
    async with open_retention_table(place.wiring.settings.database_url) as table:
        await table.lock()

        with pytest.raises(SomebodyElseSeals):
            await place.looked(reason="now")
        assert (await place.looked())["counts"]["changed"] == 1

    assert (await place.looked(reason="now"))["corrected"] == 1


async def test_the_command_tells_what_it_found(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = await place.job()
    await place.settled()
    monkeypatch.setitem(module.READERS, "rdap", Reader("rdap", 2, better))
    monkeypatch.setenv("LOOKUP_DATABASE_URL", place.wiring.settings.database_url or "")

    assert await type_in("reparse", "rdap", "--json") == 0
    assert json.loads(capsys.readouterr().out)["samples"][0]["job_id"] == str(job_id)
    assert await type_in("reparse", "RDAP") == 0
    printed = capsys.readouterr().out
    assert "1 come out differently" in printed
    assert '/domain/registrar: "R-77" -> "Example Registrar"' in printed
    assert "Nothing was written" in printed


@pytest.mark.parametrize(
    "words", [["Whois"], ["RDAP", "--apply"], ["RDAP", "--reason", "x"], ["RDAP", "--apply", "--reason", " "]]
)
async def test_the_command_wants_a_service_and_a_reason(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert await type_in("reparse", *words) == 2
    assert capsys.readouterr().err.startswith("lookup: ")


async def type_in(*words: str) -> Any:
    """Run the command as the shell would; it runs an event loop of its own."""
    return await asyncio.to_thread(app, words, result_action="return_value")
