"""A job's past, over the in-memory log: what was published comes again, fields have their facts, facts their sentences."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, get_args
from uuid import UUID

import orjson
import pytest
from aiohttp import ClientSession
from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from uuid_utils.compat import uuid7

from app.http.problem import problem
from app.http.serving import serving
from domain.commands import Deferred, ExpireTasks, Failed, Skipped, Succeeded, TimedOut
from domain.saga import Ending, evolve, expire_tasks, record_outcome, replay, submit
from events.bus import Delivery
from events.catalog import TOPICS
from events.facts import (
    DeadLetterDiscarded,
    DeadLetterRetried,
    Erased,
    Fact,
    JobFact,
    PostgresLocation,
    ResultCorrected,
    ResultReference,
    Service,
    TaskCompleted,
)
from events.memory import MemoryBus, MemoryStore
from events.record import StoredFact, hash_of
from events.store import AppendUnit, NewFacts, StoreUnavailable, StreamHead
from events.wire import cloud_events, stretch_headers
from projections import job_status
from projections.memory import MemoryViews
from projections.projector import Projector
from read_side import history as module
from read_side.api import ReadApi
from read_side.history import JobHistory, Unanswered
from read_side.history_api import HistoryApi
from read_side.queries import JobQueries
from read_side.sentences import sentences_of
from results.documents import MemoryDocuments
from tests.builders import (
    CAUSE,
    CORRECTED,
    DOCUMENT,
    GEOIP,
    JOB,
    NOW,
    OUT_OF_TIME,
    PERMANENT,
    PING,
    RDAP,
    REFUSED,
    REVERSE_DNS,
    RULES,
    TRANSIENT,
    Clock,
    at,
    completed,
    corrected,
    counts,
    deferred,
    dispatched,
    failed,
    job_cancelled,
    job_completed,
    job_failed,
    memory_store,
    numbered_ids,
    outcome,
    quota,
    skipped,
    submit_command,
    submitted,
    success,
    timed_out,
)
from tests.peers.lookups import closed_port

REGISTERED = (
    b'{"handle":"H","domain":{"registrar":"Example Registrar","a/b":{"~":1}},"events":[{"action":"x"}],"raw":{"handle":"h"}}'
)


@dataclass
class Past:
    """A log in memory, its documents, and the history that is told of them."""

    clock: Clock = field(default_factory=Clock)
    related: Sequence[UUID] = ()

    def __post_init__(self) -> None:
        self.store: MemoryStore = memory_store(self.clock)
        self.documents = MemoryDocuments()
        self.history = JobHistory(self.store, self.documents, job_status.fold, VERSION, self._related, self.clock)
        self._heads: dict[UUID, StreamHead] = {}

    async def _related(self, _: UUID) -> Sequence[UUID]:
        return self.related

    async def happened(self, *facts: Fact, stream_id: UUID = JOB, when: datetime | None = None) -> int:
        """Append facts in one unit, and store the answers that they tell of; gives the position of the last."""
        if when is not None:
            self.clock.move_to(when)
        for fact in facts:
            if isinstance(fact, TaskCompleted | ResultCorrected):
                await self.documents.put(fact.job_id, DOCUMENTS[fact.result.sha256])
        new = NewFacts(stream_id, self._heads.get(stream_id, StreamHead()), facts)
        (self._heads[stream_id],) = await self.store.append(AppendUnit([new], CAUSE))
        return self._heads[stream_id].position

    @asynccontextmanager
    async def served(self, *, without_log: bool = False, data_as_string: bool = False) -> AsyncIterator["Client"]:
        """The query side over HTTP; there is no Redis at all."""
        with closed_port() as port:
            redis = Redis(port=port)
            history = HistoryApi(None if without_log else self.history, problem)
            api = ReadApi(JobQueries(redis, self.clock), problem, b"[]", data_as_string, history)
            async with serving(api.routes(), "127.0.0.1", 0) as url, ClientSession() as http:
                yield Client(url, http)
            await redis.aclose()


@dataclass
class Client:
    url: str
    http: ClientSession

    async def get(self, path: str, job_id: UUID | str = JOB, **headers: str) -> tuple[int, Any, Mapping[str, str]]:
        async with self.http.get(f"{self.url}/api/lookup/{job_id}{path}", headers=headers) as answer:
            body = await answer.read()
            return answer.status, orjson.loads(body) if body else None, answer.headers

    async def refusal(self, path: str, job_id: UUID | str = JOB) -> tuple[int, str, str]:
        status, body, _ = await self.get(path, job_id)
        assert body["error"] == body["detail"]
        return status, body["code"], body["error"]

    async def why(self, path: str, more: str = "") -> dict[str, Any]:
        status, body, _ = await self.get(f"/why?path={path}{more}")
        assert status == 200, body
        assert isinstance(body, dict)
        return body


DOCUMENTS = {
    fact.result.sha256: document
    for document in (DOCUMENT, CORRECTED, REGISTERED)
    for fact in [completed(PING, document=document)]
}

VERSION = job_status.VIEW.version
OTHER = UUID("019b7c8a-0000-7000-8000-000000000002")
LETTER = UUID("5f3a3e0e-0000-5000-8000-000000000003")

# --- As of ------------------------------------------------------------------------------------------------------------

ENDINGS: dict[str, Callable[[], Succeeded | Failed | TimedOut | Skipped]] = {
    "success": success,
    "permanent": lambda: PERMANENT,
    "transient": lambda: TRANSIENT,
    "out of time": lambda: OUT_OF_TIME,
    "refused": lambda: REFUSED,
}
STEPS = st.lists(
    st.tuples(st.sampled_from(Service), st.sampled_from([*ENDINGS, "deferred", "clock", "corrected"]), st.integers(0, 40)),
    max_size=25,
)


def story_of(services: Sequence[Service], steps: Sequence[tuple[Service, str, int]]) -> list[list[JobFact]]:
    """The decisions of a saga to which workers and the clock do what these steps say."""
    new_id = numbered_ids(100)
    decisions: list[list[JobFact]] = [submit(submit_command(*services), RULES)]
    saga = replay(decisions[0])
    now = NOW
    for service, step, seconds in steps:
        now += timedelta(seconds=seconds / 4)
        facts: list[JobFact] = []
        if step == "clock":
            now += timedelta(seconds=seconds)
            ids = {name: new_id() for name in saga.open_tasks}
            facts = expire_tasks(saga, ExpireTasks(JOB, now, now), next_command_ids=ids, rules=RULES)
        elif step == "corrected":
            facts += [corrected(service)] if saga.endings.get(service) is Ending.SUCCEEDED else []
        elif (task := saga.open_tasks.get(service)) is not None:
            ending: Succeeded | Failed | TimedOut | Skipped | Deferred
            ending = quota(now + timedelta(seconds=seconds)) if step == "deferred" else ENDINGS[step]()
            told = outcome(service, ending, attempt=task.attempt).model_copy(update={"command_id": task.command_id})
            facts = record_outcome(saga, told, next_command_id=new_id(), now=now, rules=RULES)
        for fact in facts:
            saga = evolve(saga, fact)
        decisions += [facts] if facts else []
    return decisions


@settings(max_examples=60, deadline=None)
@given_any(services=st.lists(st.sampled_from(Service), min_size=1, max_size=4, unique=True), steps=STEPS)
async def test_as_of_any_position_is_what_the_projector_published_at_it(
    services: list[Service], steps: list[tuple[Service, str, int]]
) -> None:
    """However the story went. The projector is given one fact at a time, so that every state is published."""
    past = Past()
    await past.happened(submitted(PING, job_id=OTHER), stream_id=OTHER)
    for decision in story_of(services, steps):
        await past.happened(*decision)
    published = await published_by_position(past)

    for position in range(1, await past.store.head() + 1):
        if position not in published:
            with pytest.raises(Unanswered, match="job_not_yet"):
                await past.history.as_of(JOB, position)
            continue
        etag, body = published[position]
        answer = await past.history.as_of(JOB, position)
        assert (answer.etag, answer.body) == (etag, body)


async def published_by_position(past: Past) -> dict[int, tuple[str, bytes]]:
    """ETag and body of the job at each position at which a projector could have been polled."""
    views = MemoryViews(past.clock, uuid7)
    projector = Projector(views, past.store, past.documents, MemoryBus(), RULES, timedelta(days=1000), past.clock)
    log_id = str(await past.store.log_id())
    assert await projector._leads()
    projector._log_id = log_id
    await projector._take_over()
    published: dict[int, tuple[str, bytes]] = {}
    for stored in await past.store.read_all(0, 1_000):
        headers = stretch_headers(stored.position - 1, stored.position, log_id)
        await projector.project([Delivery(cloud_events([stored], "/lookup/test"), headers, 1, None)])
        if (value := views.document(JOB)) is not None:
            position, _, body = value.partition(b"\n")
            published[stored.position] = (f'"{VERSION}-{position.decode()}"', body)
    return published


async def test_a_document_of_the_past_has_its_etag_and_answers_if_none_match() -> None:
    past = Past()
    await past.happened(submitted(PING), dispatched(PING))
    closed = await past.happened(completed(PING), job_completed(counts(succeeded=1)))

    async with past.served() as client:
        status, body, headers = await client.get("?asOf=2")
        again = await client.get("?asOf=2", **{"If-None-Match": headers["ETag"]})
        end = await client.get(f"?asOf={closed}")

    assert (status, body["status"], headers["ETag"]) == (200, "Processing", f'"{VERSION}-2"')
    assert again[:2] == (304, None)
    assert (end[1]["status"], end[2]["ETag"]) == ("Completed", f'"{VERSION}-4"')
    assert end[1]["results"][0]["data"] == {"answer": 42}


@pytest.mark.parametrize(
    ("asked", "position"),
    [
        ("2026-01-02T03:04:05Z", 2),
        ("2026-01-02t03:04:05.999999999z", 2),
        ("2026-01-02T03:04:06Z", 3),
        ("2026-01-02T04:04:06%2B01:00", 3),
        ("2026-01-02T04:04:06+01:00", 3),
        ("2026-01-01T22:04:06-05:00", 3),
        ("2026-01-02%2003:04:08Z", 4),
    ],
)
async def test_a_time_is_the_last_fact_recorded_by_then(asked: str, position: int) -> None:
    past = Past()
    await past.happened(submitted(PING, RDAP), dispatched(PING, RDAP), when=NOW)
    await past.happened(completed(PING), when=at(1))
    await past.happened(failed(RDAP), when=at(2))
    await past.happened(job_completed(counts(succeeded=1, failed=1)), when=at(4))

    async with past.served() as client:
        status, _, headers = await client.get(f"?asOf={asked}")

    assert (status, headers["ETag"]) == (200, f'"{VERSION}-{position}"')


async def test_a_clock_that_goes_back_leaves_no_fact_out_of_the_middle() -> None:
    past = Past()
    await past.happened(submitted(PING), when=at(5))
    await past.happened(dispatched(PING), when=at(9))
    await past.happened(completed(PING), job_completed(counts(succeeded=1)), when=at(6))
    past.clock.move_to(at(20))

    answers = [await past.history.as_of(JOB, at(seconds)) for seconds in (7, 9)]

    assert [answer.etag for answer in answers] == [f'"{VERSION}-1"', f'"{VERSION}-4"']


@pytest.mark.parametrize(
    "asked",
    ["", "x", "-1", "1.5", "1e3", "%D9%A3", "9223372036854775808", "1" * 5000, "2026-01-02", "2026-01-02T03:04:05", "now",
     "2026-02-30T00:00:00Z", "2026-01-02T24:00:00Z", "2026-01-02T03:04:60Z", "0001-01-01T00:00:00%2B23:59",
     "9999-12-31T23:59:59-23:59", "2026-01-02T03:04:05%2B25:00", "0000-01-01T00:00:00Z", "2026-W01-1T00:00:00Z"],
)  # fmt: skip
async def test_what_is_no_moment_is_refused(asked: str) -> None:
    past = Past()
    await past.happened(submitted(PING))

    async with past.served() as client:
        assert (await client.refusal(f"?asOf={asked}"))[:2] == (400, "as_of_invalid")
        assert (await client.refusal(f"/why?path=/status&asOf={asked}"))[:2] == (400, "as_of_invalid")


async def test_what_has_not_happened_yet_is_refused_with_how_far_the_log_is() -> None:
    past = Past()
    await past.happened(submitted(PING))

    async with past.served() as client:
        position = await client.refusal("?asOf=2")
        time = await client.refusal("?asOf=2026-01-02T03:04:06Z")

    assert position == (400, "as_of_ahead", "The log has not reached position 2 yet: it ends at position 1.")
    message = "2026-01-02 03:04:06 UTC has not come yet: what a poller will see then is not known."
    assert time == (400, "as_of_ahead", message)


async def test_what_is_no_fact_of_the_job_changes_no_document() -> None:
    past = Past()
    await past.happened(submitted(PING), retried())

    answer = await past.history.as_of(JOB, 2)

    assert answer.etag == f'"{VERSION}-1"'


class Busy(MemoryStore):
    """A fact is appended right after each read of a stream."""

    async def read(self, stream_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[StoredFact]]:
        found = await super().read(stream_ids)
        head = StreamHead(len(found[JOB]), hash_of(found[JOB][-1].state), found[JOB][-1].position)
        await self.append(AppendUnit([NewFacts(JOB, head, [dispatched(PING)])], CAUSE))
        return found


async def test_what_is_appended_while_the_past_is_read_is_not_left_out_of_it() -> None:
    """Position 2 is reached after the stream was read: an answer without it would be wrong for good."""
    past = Past()
    past.store = past.history.log = Busy(past.store._scribe, uuid7())
    await past.happened(submitted(PING))

    with pytest.raises(Unanswered, match="as_of_ahead"):
        await past.history.as_of(JOB, 2)


async def test_clients_of_the_older_service_get_the_past_in_their_shape() -> None:
    past = Past()
    await past.happened(submitted(PING), dispatched(PING), completed(PING))

    async with past.served(data_as_string=True) as client:
        _, body, _ = await client.get("?asOf=3")

    assert body["results"][0]["data"] == DOCUMENT.decode()


async def test_before_a_job_existed_it_did_not() -> None:
    past = Past()
    await past.happened(submitted(PING, job_id=OTHER), stream_id=OTHER)
    await past.happened(submitted(PING))

    async with past.served() as client:
        position = await client.refusal("?asOf=1")
        time = await client.refusal("?asOf=2026-01-02T03:04:04.999Z")

    told = "The job was taken on at position 2: at position 1 it did not exist yet."
    assert position == (404, "job_not_yet", told)
    told = "The job was taken on at 2026-01-02 03:04:05 UTC: at 2026-01-02 03:04:04 UTC it did not exist yet."
    assert time == (404, "job_not_yet", told)


@pytest.mark.parametrize("path", ["?asOf=1", "/history", "/why?path=/status"])
async def test_what_is_no_job_has_no_past(path: str) -> None:
    """Nor has a stream of the log that is of something else."""
    past = Past()
    await past.happened(retried(), stream_id=LETTER)

    async with past.served() as client:
        for nobody in (OTHER, LETTER, "nonsense"):
            assert await client.refusal(path, nobody) == (404, "job_not_found", "Job not found")


def retried(job_id: UUID | None = JOB) -> DeadLetterRetried:
    return DeadLetterRetried(letter_id=3, queue="lookup.outcomes", job_id=job_id, by="erin", reason="fixed", retried_at=NOW)


async def test_an_erased_target_reads_so_at_any_time() -> None:
    past = Past()
    await past.happened(submitted(PING), dispatched(PING))
    past.store._streams[JOB] = [erased(stored) for stored in past.store._streams[JOB]]

    async with past.served() as client:
        _, document, _ = await client.get("?asOf=1")
        _, history, _ = await client.get("/history")

    assert document["target"] == "[erased]"
    assert history["facts"][0]["sentence"].startswith("A lookup of [erased] by Ping was accepted")
    assert "198.51.100.7" not in str(history)


async def test_what_was_erased_is_explained_by_the_facts_that_are_left() -> None:
    past = Past()
    await past.happened(submitted(PING), dispatched(PING), completed(PING), job_completed(counts(succeeded=1)))
    past.store._streams[JOB] = [erased(stored) for stored in past.store._streams[JOB]]
    past.history.documents = MemoryDocuments()

    async with past.served() as client:
        target, data = await client.why("/target"), await client.why("/results/Ping/data")
        refusal = await client.refusal("/why?path=/results/Ping/data/answer")

    assert (target["value"], target["fact"]["position"]) == ("[erased]", 1)
    assert target["because"].startswith("A lookup of [erased] by Ping was accepted")
    assert (data["value"], data["fact"]["position"]) == (None, 3)
    assert refusal[:2] == (404, "path_unknown")
    assert "198.51.100.7" not in str((target, data, refusal))


def erased(stored: StoredFact) -> StoredFact:
    """A row as erasing leaves it: without lines 4 and 5."""
    state = b"\n".join(stored.state.split(b"\n")[:3])
    return StoredFact(stored.position, stored.stream_id, stored.stream_version, stored.topic, state)


# --- When it cannot be told -------------------------------------------------------------------------------------------


class Unreachable(MemoryStore):
    async def head(self) -> int:
        raise StoreUnavailable

    async def read(self, _: Sequence[UUID]) -> Mapping[UUID, Sequence[StoredFact]]:
        raise StoreUnavailable


class Frozen(MemoryStore):
    async def head(self) -> int:
        return await asyncio.Future()

    async def read(self, _: Sequence[UUID]) -> Mapping[UUID, Sequence[StoredFact]]:
        return await asyncio.Future()


PATHS = ("?asOf=1", "/history", "/why?path=/status")


@pytest.mark.parametrize("path", PATHS)
async def test_a_log_that_cannot_be_read_is_said_so(path: str) -> None:
    past = Past()
    past.history.log = Unreachable(past.store._scribe, uuid7())

    async with past.served() as client:
        status, body, headers = await client.get(path)

    assert (status, body["code"], headers["Retry-After"]) == (503, "history_unavailable", "5")
    assert body["error"] == "The log cannot be read right now. Try again shortly."


@pytest.mark.parametrize("path", PATHS)
async def test_a_log_that_does_not_answer_is_not_waited_for_for_ever(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_MAX_S", 0.05)
    past = Past()
    past.history.log = Frozen(past.store._scribe, uuid7())

    async with past.served() as client, asyncio.timeout(10):
        assert (await client.refusal(path))[:2] == (503, "history_unavailable")
    assert past.history._askers == 0


@pytest.mark.parametrize("path", PATHS)
async def test_without_a_database_there_is_no_past(path: str) -> None:
    async with Past().served(without_log=True) as client:
        status, code, message = await client.refusal(path)

    assert (status, code) == (503, "history_unavailable")
    assert message == "This service was given no database to read history from (LOOKUP_DATABASE_READ_URL)."


@pytest.mark.parametrize("path", PATHS)
async def test_a_log_of_a_newer_version_is_not_misread(path: str) -> None:
    past = Past()
    await past.happened(submitted(PING))
    past.store._streams[JOB] = [StoredFact(1, JOB, 1, "lookup.JobSubmitted.v999", past.store._log[0].state)]

    async with past.served() as client:
        status, code, message = await client.refusal(path)

    assert (status, code) == (503, "history_unavailable")
    assert message == "The log holds what only a newer version of this program can read. Try again after its upgrade."


async def test_no_more_ask_for_history_at_a_time_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ASKERS_MAX", 0)
    past = Past()
    await past.happened(submitted(PING))

    async with past.served() as client:
        assert (await client.refusal("/history"))[:2] == (503, "history_unavailable")


# --- The history ------------------------------------------------------------------------------------------------------


async def test_each_fact_is_a_sentence_with_its_place_and_its_envelope() -> None:
    past = Past()
    await past.happened(submitted(PING, RDAP), dispatched(PING, RDAP), when=NOW)
    await past.happened(completed(RDAP), when=at(1))

    async with past.served() as client:
        status, body, headers = await client.get("/history")

    stored = past.store._log[2]
    assert (status, headers["Cache-Control"]) == (200, "no-cache")
    assert body["jobId"] == str(JOB)
    assert body["next"] is None
    assert [fact["sentence"] for fact in body["facts"]] == [
        "A lookup of 198.51.100.7 by Ping and RDAP was accepted, to end by 2026-01-02 03:05:35 UTC at the latest.",
        "Ping and RDAP were dispatched, to end within 10 s each.",
        "RDAP answered in 12 ms (attempt 1).",
    ]
    told = body["facts"][2]
    assert UUID(told.pop("eventId")).version == 7
    assert told.pop("hash") == stored.state.split(b"\n")[2].decode()
    assert told == {
        "position": 3,
        "recordedAt": "2026-01-02T03:04:06Z",
        "type": "TaskCompleted",
        "sentence": "RDAP answered in 12 ms (attempt 1).",
        "actor": "test",
        "reason": None,
        "correlationId": str(CAUSE.correlation_id),
        "causationId": str(CAUSE.correlation_id),
        "requestId": None,
        "keyId": None,
        "traceparent": None,
        "streamId": str(JOB),
        "version": 3,
        "schemaVersion": int(TOPICS[TaskCompleted].rpartition(".v")[2]),
    }


async def test_a_history_is_read_page_by_page() -> None:
    past = Past()
    await past.happened(submitted(PING), *(dispatched(PING, attempt=attempt) for attempt in range(1, 10)))
    pages: list[list[int]] = []

    async with past.served() as client:
        path = "/history?limit=4"
        while path:
            _, body, _ = await client.get(path)
            pages.append([fact["position"] for fact in body["facts"]])
            path = (body["next"] or "").removeprefix(f"/api/lookup/{JOB}")
        _, beyond, _ = await client.get("/history?after=10")

    assert pages == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert beyond["facts"] == []


@pytest.mark.parametrize("page", ["limit=0", "limit=501", "limit=x", "limit=", "after=-1", "after=x"])
async def test_a_page_that_makes_no_sense_is_refused(page: str) -> None:
    past = Past()
    await past.happened(submitted(PING))

    async with past.served() as client:
        assert (await client.refusal(f"/history?{page}"))[:2] == (400, "page_invalid")


async def test_what_other_streams_tell_of_the_job_is_told_in_its_place() -> None:
    past = Past(related=[LETTER])
    await past.happened(submitted(PING), dispatched(PING))
    await past.happened(retried(), retried(OTHER), stream_id=LETTER)
    await past.happened(completed(PING), job_completed(counts(succeeded=1)))

    async with past.served() as client:
        _, body, _ = await client.get("/history")

    assert [(fact["position"], fact["type"]) for fact in body["facts"]] == [
        (1, "JobSubmitted"),
        (2, "TasksDispatched"),
        (3, "DeadLetterRetried"),
        (5, "TaskCompleted"),
        (6, "JobCompleted"),
    ]
    letter = body["facts"][2]
    assert letter["sentence"] == "Dead letter 3 of the queue lookup.outcomes was published again by erin: fixed."
    assert letter["streamId"] == str(LETTER)


# --- Sentences --------------------------------------------------------------------------------------------------------

DISCARDED = DeadLetterDiscarded(letter_id=4, queue="lookup.outcomes", by="erin", reason="Nonsense.", discarded_at=NOW)


ERASED_TARGET = submitted(PING).model_copy(update={"target": Erased()})
SENTENCES: list[tuple[list[Fact], str]] = [
    ([ERASED_TARGET], "A lookup of [erased] by Ping was accepted, to end by 2026-01-02 03:05:35 UTC at the latest."),
    ([dispatched(GEOIP)], "GeoIP was dispatched, to end within 10 s."),
    ([dispatched(GEOIP, PING, RDAP)], "GeoIP, Ping and RDAP were dispatched, to end within 10 s each."),
    ([dispatched(PING), dispatched(PING, attempt=2)], "Ping was dispatched again as attempt 2, to end within 10 s."),
    ([dispatched(PING), dispatched(PING)], "Ping was dispatched again, still as attempt 1, to end within 10 s."),
    ([completed(PING, attempt=2)], "Ping answered in 12 ms (attempt 2)."),
    ([completed(PING).model_copy(update={"duration_ms": 1234})], "Ping answered in 1.2 s (attempt 1)."),
    (
        [completed(RDAP).model_copy(update={"provider": "rdap.example.org"})],
        "RDAP answered in 12 ms (attempt 1, by rdap.example.org).",
    ),
    ([corrected(RDAP)], "RDAP's answer (attempt 1) was read again by rdap/2: the old parser was wrong."),
    ([failed(PING)], "Ping failed after 12 ms (attempt 1, unreachable): The service cannot be reached."),
    ([timed_out(PING, attempt=2)], "Ping brought no answer in time (attempt 2)."),
    (
        [skipped(REVERSE_DNS)],
        "ReverseDNS was not asked, as it does not apply to such a target: Reverse DNS lookup requires an IP address target.",
    ),
    (
        [deferred(RDAP, until=at(30))],
        "RDAP was put off until 2026-01-02 03:04:35 UTC, as the source allows no more questions for now (still attempt 1).",
    ),
    (
        [job_completed(counts(succeeded=2, failed=1, timed_out=1))],
        "The job was completed: 2 answered, 1 failed and 1 timed out.",
    ),
    ([job_failed(counts(skipped=1), reason="None answered.")], "The job failed: 1 not asked. None answered."),
    ([job_cancelled()], "The job was cancelled by operator: not needed any more."),
    ([retried()], "Dead letter 3 of the queue lookup.outcomes was published again by erin: fixed."),
    (
        [retried().model_copy(update={"reason": None})],
        "Dead letter 3 of the queue lookup.outcomes was published again by erin.",
    ),
    ([DISCARDED], "Dead letter 4 of the queue lookup.outcomes was discarded by erin: Nonsense."),
]


@pytest.mark.parametrize(("facts", "sentence"), SENTENCES)
def test_each_fact_is_a_sentence_of_its_own(facts: list[Fact], sentence: str) -> None:
    assert sentences_of(facts)[-1] == sentence


def test_every_fact_of_a_job_has_its_sentence() -> None:
    assert set(get_args(JobFact)) <= {type(facts[-1]) for facts, _ in SENTENCES}


# --- Why --------------------------------------------------------------------------------------------------------------


RAW = ResultReference(location=PostgresLocation(key="raw"), sha256="0" * 64, size_bytes=9)


async def told() -> Past:
    """Positions: 1 submitted, 2 dispatched, 3 skipped, 4 RDAP, 5 Ping again, 6 GeoIP deferred, 7 again, 8 GeoIP failed, 9 Ping
    timed out, 10 closed.
    """
    past = Past()
    await past.happened(submitted(GEOIP, PING, RDAP, REVERSE_DNS), dispatched(GEOIP, PING, RDAP), skipped(REVERSE_DNS))
    origin = {"provider": "rdap.example.org", "parser": "rdap/1", "raw": RAW}
    await past.happened(completed(RDAP, document=REGISTERED).model_copy(update=origin))
    await past.happened(dispatched(PING, attempt=2))
    await past.happened(deferred(GEOIP, until=at(1)))
    await past.happened(dispatched(GEOIP, dispatch=2))
    await past.happened(failed(GEOIP))
    closing = job_completed(counts(succeeded=1, failed=1, timed_out=1, skipped=1))
    await past.happened(timed_out(PING, attempt=2), closing)
    return past


@pytest.mark.parametrize(
    ("path", "value", "position"),
    [
        ("/status", "Completed", 10),
        ("/target", " 198.51.100.7 ", 1),
        ("/jobId", str(JOB), 1),
        ("/completedAt", "2026-01-02T03:04:05Z", 10),
        ("/completionPercentage", 100, 9),
        ("/requestedServices/1", "Ping", 1),
        ("/warnings", [], 1),
        ("/results/RDAP/data/domain/registrar", "Example Registrar", 4),
        ("/results/RDAP/data/registrar", "Example Registrar", 4),
        ("/results/RDAP/data/handle", "H", 4),
        ("/results/RDAP/data/domain/a~1b/~0", 1, 4),
        ("/results/RDAP/data/events/0/action", "x", 4),
        ("/results/2/data/handle", "H", 4),
        ("/results/RDAP/durationMs", 12, 4),
        ("/results/Ping/status", "TimedOut", 9),
        ("/results/Ping/attempt", 2, 9),
        ("/results/Ping/data", None, 9),
        ("/results/GeoIP/errorMessage", "The service cannot be reached.", 8),
        ("/results/GeoIP/errorCode", "unreachable", 8),
        ("/results/ReverseDNS/errorMessage", "Reverse DNS lookup requires an IP address target.", 3),
    ],
)
async def test_each_field_has_the_fact_that_made_it_so(path: str, value: object, position: int) -> None:
    past = await told()

    async with past.served() as client:
        answer = await client.why(path)
        _, history, _ = await client.get("/history")

    assert (answer["value"], answer["fact"]["position"]) == (value, position)
    assert answer["fact"] == history["facts"][position - 1]
    assert answer["because"] == answer["fact"]["sentence"]


async def test_a_shorthand_is_answered_with_the_path_that_it_stood_for() -> None:
    past = await told()

    async with past.served() as client:
        answer = await client.why("/results/RDAP/data/registrar")

    assert answer["path"] == "/results/RDAP/data/domain/registrar"


async def test_the_reason_of_an_answer_says_who_asked_whom_and_when() -> None:
    past = await told()

    async with past.served() as client:
        answer = await client.why("/results/RDAP/data/handle")

    reference = completed(RDAP, document=REGISTERED).result
    assert (answer["service"], answer["attempt"], answer["worker"], answer["durationMs"]) == ("RDAP", 1, "worker-1", 12)
    assert (answer["provider"], answer["parser"], answer["source"]) == ("rdap.example.org", "rdap/1", "live")
    assert answer["observedAt"] == "2026-01-02T03:04:05Z"
    assert answer["result"] == {"sha256": reference.sha256, "sizeBytes": len(REGISTERED)}
    assert answer["raw"] == {"sha256": "0" * 64, "sizeBytes": 9}
    assert answer["dispatch"]["position"] == 2


async def test_the_reason_of_an_answer_that_was_read_again_is_the_correction_and_the_answer() -> None:
    past = await told()
    await past.happened(corrected(RDAP, replaces=REGISTERED))

    async with past.served() as client:
        data = await client.why("/results/RDAP/data/corrected")
        status = await client.why("/results/RDAP/status")

    assert (data["fact"]["position"], data["answer"]["position"], data["dispatch"]["position"]) == (11, 4, 2)
    assert (data["parser"], data["worker"], data["source"]) == ("rdap/2", "worker-1", "live")
    assert data["replaces"] == completed(RDAP, document=REGISTERED).result.sha256
    assert status["fact"]["position"] == 4
    assert "answer" not in status


@pytest.mark.parametrize(("as_of", "status", "position"), [(2, "Pending", 2), (6, "Deferred", 6), (7, "Pending", 7)])
async def test_the_reason_may_be_asked_of_the_past_too(as_of: int, status: str, position: int) -> None:
    past = await told()

    async with past.served() as client:
        answer = await client.why("/results/GeoIP/status", f"&asOf={as_of}")

    assert (answer["value"], answer["fact"]["position"]) == (status, position)


async def test_a_cancelled_job_has_its_cancellation_behind_what_was_not_asked() -> None:
    past = Past()
    await past.happened(submitted(PING, RDAP), dispatched(PING, RDAP), completed(PING), job_cancelled())

    async with past.served() as client:
        reasons = [(await client.why(f"/results/{service}/status"))["fact"]["type"] for service in (PING, RDAP)]

    assert reasons == ["TaskCompleted", "JobCancelled"]


@pytest.mark.parametrize("path", ["status", "/status~", "/~2", "/" + "x" * 1000, "%00"])
async def test_what_is_no_pointer_is_refused(path: str) -> None:
    past = await told()

    async with past.served() as client:
        assert (await client.refusal(f"/why?path={path}"))[:2] == (400, "path_invalid")
        assert (await client.refusal("/why"))[:2] == (400, "path_invalid")


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/",
        "/results/Whois",
        "/results/Whois/status",
        "/results/9/status",
        "/results/01/status",
        "/results/-",
        "/results/RDAP/data/nothing",
        "/results/RDAP/data/events/1",
        "/results/RDAP/data/events/00",
        "/results/Ping/data/handle",
        "/status/x",
    ],
)
async def test_a_path_that_leads_to_nothing_is_unknown(path: str) -> None:
    past = await told()

    async with past.served() as client:
        assert (await client.refusal(f"/why?path={path}"))[:2] == (404, "path_unknown")


async def test_the_whole_document_is_as_its_last_fact_left_it() -> None:
    past = await told()

    async with past.served() as client:
        answer = await client.why("")

    assert (answer["path"], answer["fact"]["position"]) == ("", 10)
