"""The marker test: a target that is nobody else's is planted everywhere, found everywhere, erased, and found nowhere.

It looks inside: into compressed documents and segments, into every key of Redis, and into the files of the servers, with their
write-ahead log and append-only file. So it has servers of its own.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
import psycopg
import pytest
import zstandard
from psycopg import sql
from redis.asyncio import Redis

from app.compaction import compact_database, compact_redis
from app.doctor.stories import broken_links, missing_versions, stream_of
from app.embedded.servers import Embedded
from app.erasure import erasure_of, receipt_as_json
from app.migrate import migrate
from app.parts import PartNames, Process
from app.running import with_embedded
from app.settings import Settings
from app.wiring import Wiring, new_id, utc_now
from domain.errors import ErrorCode
from domain.target import parse_target
from events.bus import COMMANDS, DEAD_LETTERS, FACTS
from events.facts import Priority, Service, Target
from events.record import Cause
from events.redis_bus import PREFIX
from events.segment_files import Segment, digest_of, segment_files
from events.store import StoreUnavailable
from projections.views import target_key
from workers.lookup import Answer, LookUp, LookupFailed, RawAnswer, Result
from write_side.dead_letters import Keep, open_letters
from write_side.erasure import Receipt, not_done_here
from write_side.erasure_list import ErasureList
from write_side.erasure_table import is_erasable
from write_side.retention import open_retention_table
from write_side.submit import Submitter

MARKER = "zq7marker"
CANONICAL = f"www.{MARKER}.example"
TYPED = f" WWW.{MARKER.title()}.Example. "
BYSTANDER = "bystander.example"
STEPS = ("start", "find", "cancel", "facts", "documents", "letters", "segments", "messages", "views", "list", "end")
SERVICES = (Service.GEOIP, Service.PING, Service.RDAP)
NO_OTHERS: Mapping[Service, LookUp] = {}
EVERYWHERE = {
    "rows of stored_events",
    "rows of result_documents",
    "rows of dead_letters",
    "samples of values (pg_stats)",
    "documents of views",
    "keys of views",
    f"messages of {COMMANDS[Service.PING, Priority.INTERACTIVE].name}",
    f"messages of {FACTS.name}",
    f"messages of {DEAD_LETTERS.name}",
    "segments",
    "files of postgres/base",
    "files of postgres/pg_wal",
    "files of valkey/appendonlydir",
}


class Page(Result):
    about: str


async def answers(target: Target) -> Answer[Result]:
    raw = RawAnswer({"asked": target.canonical}, f"whois {target.canonical}".encode())
    about = f"{' '.join(map(str, range(300)))}: all that is known of {target.canonical}"
    return Answer(Page(about=about), "peer.example", "peer/1", raw)


async def says_nothing(target: Target) -> Answer[Result]:
    raise LookupFailed(ErrorCode.NO_REPLY, f"{target.canonical} answered none of 4 echoes.")


@dataclass(frozen=True)
class Installation:
    """A service with small servers of its own, whose files can be looked into."""

    folder: Path
    settings: Settings
    owner_url: str

    @asynccontextmanager
    async def wiring(self) -> AsyncIterator[Wiring]:
        wiring = Wiring(self.settings, lookups={**dict.fromkeys(Service, answers), Service.PING: says_nothing})
        try:
            yield wiring
        finally:
            await wiring.aclose()

    @asynccontextmanager
    async def running(self, lookups: Mapping[Service, LookUp] = NO_OTHERS) -> AsyncIterator[Wiring]:
        wiring = Wiring(self.settings, lookups={**dict.fromkeys(Service, answers), Service.PING: says_nothing, **lookups})
        stop = asyncio.Event()
        process = asyncio.create_task(Process(wiring, PartNames.all(), "127.0.0.1", 0).run(stop))
        try:
            yield wiring
        finally:
            stop.set()
            await process

    async def submit(self, wiring: Wiring, typed: str) -> UUID:
        submitter = Submitter(wiring.sagas, wiring.policy(), self.settings.rules, utc_now, new_id, "default")
        cause = Cause(actor="test", correlation_id=new_id())
        job_id = new_id()
        async with asyncio.timeout(60):
            while True:
                try:
                    await submitter.submit(job_id, parse_target(typed), SERVICES, cause, requested_by="203.0.113.9")
                except StoreUnavailable:
                    # Nothing was appended: a crowded machine takes its time to connect, and a client would ask again.
                    await asyncio.sleep(0.2)
                else:
                    return job_id

    async def document(self, wiring: Wiring, job_id: UUID) -> bytes:
        """What pollers of a job get; nothing as long as there is no view."""
        shown_from: Any = await wiring.redis.hget(wiring.keys.live, "job_status")
        value: Any = await wiring.redis.get(wiring.keys.job(shown_from.decode(), job_id)) if shown_from else b""
        return bytes(value or b"").partition(b"\n")[2]


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[Installation]:
    embedded = Embedded(tmp_path)
    servers = embedded.start()
    migrate(servers.database_owner_url, new_id(), {})
    settings = Settings(data_dir=tmp_path, log_level="WARNING", heads_key_make=True)
    settings = with_embedded(settings, servers.database_owner_url, servers.redis_url)
    yield Installation(tmp_path, settings, servers.database_owner_url)
    embedded.stop()


# --- Planting ---------------------------------------------------------------------------------------------------------


async def plant(installation: Installation) -> list[UUID]:
    """The marker in every place; gives the jobs: sealed, ended, open."""
    async with installation.running() as wiring:
        sealed = await installation.submit(wiring, TYPED)
        await ended(installation, wiring, sealed)
    await seal(installation)
    async with installation.running() as wiring:
        closed = await installation.submit(wiring, TYPED)
        bystander = await installation.submit(wiring, BYSTANDER)
        await ended(installation, wiring, closed)
        await ended(installation, wiring, bystander)
        await copy_generation(wiring)
    async with installation.wiring() as wiring:
        open_job = await installation.submit(wiring, TYPED)
        await relayed(wiring)
        await plant_letters(installation, wiring, closed)
    with psycopg.connect(installation.owner_url, autocommit=True) as conn:
        conn.execute("ANALYZE")
        conn.execute("CHECKPOINT")
    return [sealed, closed, open_job]


async def ended(installation: Installation, wiring: Wiring, job_id: UUID) -> None:
    async with asyncio.timeout(60):
        while b'"Completed"' not in await installation.document(wiring, job_id):  # noqa: ASYNC110 - Redis sets no event
            await asyncio.sleep(0.05)


async def seal(installation: Installation) -> None:
    assert installation.settings.database_retention_url is not None
    async with installation.wiring() as wiring, open_retention_table(installation.settings.database_retention_url) as table:
        assert (await wiring.retention_of(table, timedelta(0)).run()).jobs == 1


async def copy_generation(wiring: Wiring) -> None:
    """As a replay that was left off, or a generation that is kept for a rollback."""
    async for key in wiring.redis.scan_iter(f"{wiring.keys.prefix}g*"):
        generation = key.decode().removeprefix(wiring.keys.prefix).partition(":")[0]
        if generation != "g1":
            await wiring.redis.copy(key, key.decode().replace(generation, "g1", 1))


async def relayed(wiring: Wiring) -> None:
    """What the log holds is on the bus, and nobody takes it from there."""
    relay = asyncio.create_task(wiring.relay())
    for queue in (COMMANDS[Service.PING, Priority.INTERACTIVE], FACTS):
        async with asyncio.timeout(30):
            while not await wiring.redis.xlen(PREFIX + queue.name):  # noqa: ASYNC110 - Redis sets no event
                await asyncio.sleep(0.05)
    relay.cancel()
    await asyncio.wait({relay})


async def plant_letters(installation: Installation, wiring: Wiring, job_id: UUID) -> None:
    body = f'{{"target":{{"raw":"{CANONICAL}"}}}}'.encode()
    about = dict.fromkeys(("command_id", "service", "attempt", "deliveries"), None)
    letters = [
        Keep(message, "lookup.commands.Ping.interactive", "wrong_schema", text, {}, job, died_at=utc_now(), **about)
        for message, text, job in (("1", body, None), ("2", b"torn", job_id))
    ]
    async with open_letters(installation.owner_url) as table:
        await table.keep(letters)
    bus = wiring.bus()
    await bus.start()
    await bus.publish(DEAD_LETTERS, body)
    await bus.stop()


# --- Looking ----------------------------------------------------------------------------------------------------------


async def places(installation: Installation, needles: list[bytes]) -> set[str]:
    """Where any of these lies."""
    found = {place for place, text in rows(installation.owner_url) if has(text, needles)}
    found |= {place for place, text in files(installation.folder) if has(text, needles)}
    for path in segment_files(installation.folder / "segments"):
        with zstandard.ZstdDecompressor().stream_reader(path.read_bytes(), read_across_frames=True) as reader:
            found |= {"segments"} if has(reader.read(), needles) else set()
    async with Redis.from_url(installation.settings.redis_url or "") as redis:
        found |= {place async for place, text in keys(redis) if has(text, needles)}
    return found


def has(text: bytes, needles: list[bytes]) -> bool:
    return any(needle in text.lower() or needle in text for needle in needles)


def rows(owner_url: str) -> Iterator[tuple[str, bytes]]:
    with psycopg.connect(owner_url) as conn:
        for table in ("stored_events", "dead_letters", "erasures", "erasure_jobs", "relay_checkpoints"):
            for (text,) in conn.execute(sql.SQL("SELECT t::text FROM {} t").format(sql.Identifier(table))):
                yield f"rows of {table}", opened(text)
        for key, body in conn.execute("SELECT key, body FROM result_documents"):
            yield "rows of result_documents", key.encode() + zstandard.ZstdDecompressor().decompress(body)
        for (text,) in conn.execute("SELECT t::text FROM pg_stats t WHERE schemaname = 'public'"):
            yield "samples of values (pg_stats)", opened(text)


def opened(text: str) -> bytes:
    """A row as text, and what is in its columns of bytes."""
    inner = [bytes.fromhex(part) for part in _hex_of(text)]
    return b" ".join([text.encode(), *inner])


def _hex_of(text: str) -> Iterator[str]:
    for part in text.split("\\x")[1:]:
        digits = part[: next((at for at, char in enumerate(part) if char not in "0123456789abcdef"), len(part))]
        yield digits[: len(digits) // 2 * 2]


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield f"files of {'/'.join(path.relative_to(folder).parts[:2])}", path.read_bytes()


async def keys(redis: Redis) -> AsyncIterator[tuple[str, bytes]]:
    async for key in redis.scan_iter():
        kind = bytes(await redis.type(key)).decode()  # type: ignore[arg-type]  # this client gives bytes
        if kind == "stream":
            yield f"messages of {key.decode().removeprefix(PREFIX)}", repr(await redis.xrange(key)).encode()
        elif kind == "string":
            yield "documents of views", key + (await redis.get(key) or b"")
        else:
            yield "keys of views", key + (await redis.dump(key) or b"")


def wal_files(owner_url: str) -> tuple[str, set[str]]:
    """The file that is written to now, and all that there are."""
    with psycopg.connect(owner_url) as conn:
        now = conn.execute("SELECT pg_walfile_name(pg_current_wal_lsn())").fetchone()
        names = {name for (name,) in conn.execute("SELECT name FROM pg_ls_waldir()")}
    assert now
    return now[0], names


# --- Erasing ----------------------------------------------------------------------------------------------------------


async def erase_and_die(installation: Installation, step: str) -> None:
    """In a process of its own, which is killed before this step."""
    erasing = get_context("spawn").Process(target=erase_until, args=(installation, step))
    erasing.start()
    await asyncio.to_thread(erasing.join, 60)
    assert erasing.exitcode == -signal.SIGKILL


def erase_until(installation: Installation, step: str) -> None:
    def die(name: str) -> None:
        if name == step:
            os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(erase(installation, die))


async def erase(installation: Installation, on_step: Callable[[str], None] = lambda _: None) -> tuple[list[Receipt], float]:
    """Begin it unless it has begun, and carry it out; also how long open jobs would have been waited for."""
    waited: list[float] = []

    async def note(seconds: float) -> None:
        waited.append(seconds)

    for _ in range(10):
        # A crowded machine takes its time to connect; an erasure that could not go on goes on when it is called again.
        with suppress(StoreUnavailable):
            async with installation.wiring() as wiring, erasure_of(wiring, on_step=on_step) as erasure:
                erasure.wait = note
                await erasure.retention.lock()
                if not await begun(installation):
                    await erasure.begin(CANONICAL, salt="5a17", by="alice", reason="asked for by the person concerned")
                return await erasure.run(), max(waited)
    raise AssertionError("The database could not be reached ten times.")


async def begun(installation: Installation) -> bool:
    with psycopg.connect(installation.owner_url) as conn:
        return conn.execute("SELECT FROM erasures").fetchone() is not None


async def bodies_of(installation: Installation, jobs: list[UUID]) -> list[bytes]:
    """The documents as their compressed bytes lie in the table: no marker can be read in them."""
    with psycopg.connect(installation.owner_url) as conn:
        found = conn.execute("SELECT key, body FROM result_documents").fetchall()
    return [bytes(body) for key, body in found if UUID(key.partition("/")[0]) in jobs]


@pytest.mark.timeout(300)
async def test_a_planted_target_is_found_everywhere_then_erased_and_found_nowhere(installation: Installation) -> None:
    """Killed (with -9) before each step, the erasure goes on from there."""
    jobs = await plant(installation)
    sealed, closed, open_job = jobs
    bodies = await bodies_of(installation, jobs)
    needles = [MARKER.encode(), target_key(CANONICAL).encode(), *bodies]
    assert len(bodies) == 2, "the result and the raw answer of the job that was not sealed"
    assert not all(MARKER.encode() in body for body in bodies), "one is so compressed that it must be looked into"
    assert EVERYWHERE - await places(installation, needles) == set()
    assert "files of postgres/base" in await places(installation, bodies)

    for step in STEPS:
        await erase_and_die(installation, step)
    ((receipt,), waited) = await erase(installation)
    async with installation.wiring() as wiring:
        left = await compact_redis(wiring.redis)
    written, _ = wal_files(installation.owner_url)
    left += await asyncio.to_thread(compact_database, installation.owner_url)

    assert left == []
    assert await places(installation, needles) == set()
    assert min(wal_files(installation.owner_url)[1]) > written, "none of the old files, whatever they were renamed to"
    assert 0 < waited <= 95
    await receipt_is_true(installation, receipt, jobs)
    await chain_holds(installation, jobs)
    async with installation.running() as wiring:
        await serves_on(installation, wiring, sealed, closed, open_job)


async def test_a_target_that_is_being_looked_up_is_erased_while_everything_runs(installation: Installation) -> None:
    """What remembers it has to let go: the saga, the projector, and a worker that brings its answer when all else is done."""
    called_off = asyncio.Event()

    async def takes_its_time(target: Target) -> Answer[Result]:
        await called_off.wait()
        return Answer(Page(about=f"late news of {target.canonical}"))

    async def until_the_answer_is_stored(seconds: float) -> None:
        assert 0 < seconds <= 95
        called_off.set()
        await documents_are(installation, 3)

    async with installation.running({Service.RDAP: takes_its_time}) as wiring:
        job_id = await installation.submit(wiring, TYPED)
        await documents_are(installation, 2)
        await shown(installation, wiring, job_id, "Processing")
        async with installation.wiring() as own, erasure_of(own) as erasure:
            erasure.wait = until_the_answer_is_stored
            await erasure.retention.lock()
            await erasure.begin(CANONICAL, salt="5a17", by="alice", reason="asked for by the person concerned")
            (receipt,) = await erasure.run()
        document = await shown(installation, wiring, job_id, "Cancelled")
        found = await places(installation, [MARKER.encode(), target_key(CANONICAL).encode()])

    assert {place for place in found if not place.startswith(("files", "samples"))} == set()
    assert document["target"] == "[erased]"
    assert receipt.counts["documents"] == 3, "also the answer that came after the job had been called off"


async def documents_are(installation: Installation, number: int) -> None:
    async with asyncio.timeout(60):
        while await asyncio.to_thread(documents_in, installation.owner_url) != number:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.05)


def documents_in(owner_url: str) -> int:
    with psycopg.connect(owner_url) as conn:
        row = conn.execute("SELECT count(*) FROM result_documents").fetchone()
    return int(row[0]) if row else 0


async def receipt_is_true(installation: Installation, receipt: Receipt, jobs: list[UUID]) -> None:
    told = receipt_as_json(receipt, [])
    assert set(told["jobs"]) == {str(job_id) for job_id in jobs}
    counts = {name: receipt.counts[name] for name in ("jobs", "facts", "documents", "letters", "segments")}
    assert counts == {"jobs": 3, "facts": 6, "documents": 4, "letters": 2, "segments": 1}
    assert receipt.counts["views"] >= 4, "documents in two generations, and what lists them by their target"
    assert receipt.counts["messages"] >= 3
    assert sum(map(len, told["sent_to_subscribers"]["positions"].values())) == receipt.counts["told_facts"] == 6
    assert receipt.target_sha256 == sha256(b"5a17" + CANONICAL.encode()).hexdigest()
    assert any("Backups" in sentence for sentence in told["beyond_reach"])
    listed = ErasureList(installation.settings.erasures)
    assert {job_id for line in listed.lines() for job_id in line.job_ids} == set(jobs)


async def chain_holds(installation: Installation, jobs: list[UUID]) -> None:
    async with installation.wiring() as wiring:
        streams = await wiring.whole_log.read([*jobs])
        assert set(streams) == set(jobs)
        for job_id, rows_of_job in streams.items():
            stream = stream_of(job_id, rows_of_job)
            assert [*missing_versions(stream), *broken_links(stream), *stream.unreadable] == []
            assert not any(map(is_erasable, rows_of_job))
        (path,) = segment_files(installation.folder / "segments")
        (seal,) = await wiring.whole_log.seals()
        segment = Segment(path)
        assert segment.header.sha256 == seal.fact.sha256 == digest_of(segment.rows())
        assert await not_done_here(ErasureList(installation.settings.erasures), wiring.whole_log) == []


async def serves_on(installation: Installation, wiring: Wiring, sealed: UUID, closed: UUID, open_job: UUID) -> None:
    """Erased jobs are shown as such, called-off ones as cancelled; views that are built anew show the same; new jobs run."""
    await shown(installation, wiring, open_job, "Cancelled")
    before = await shown(installation, wiring, closed, "Completed")
    assert before["target"] == "[erased]"
    assert [result["data"] for result in before["results"]] == [None, None, None]
    assert MARKER not in str(before).lower()
    again = await installation.submit(wiring, TYPED)
    await ended(installation, wiring, again)
    await wiring.redis.flushall()
    after = await shown(installation, wiring, closed, "Completed")
    assert after == before
    assert (await shown(installation, wiring, sealed, "Completed"))["target"] == "[erased]"
    assert (await shown(installation, wiring, again, "Completed"))["target"] == TYPED


async def shown(installation: Installation, wiring: Wiring, job_id: UUID, status: str) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            document = await installation.document(wiring, job_id)
            told: dict[str, Any] = orjson.loads(document) if document else {}
            if told.get("status") == status:
                return told
            await asyncio.sleep(0.05)
