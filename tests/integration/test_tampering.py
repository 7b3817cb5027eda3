"""Tampering with the log is named, with the first position at which the log is not what it was.

What was done is not told to the verification; the first bad position is found here by comparing the rows before and after.
"""

import os
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import orjson
import psycopg
import pytest
from uuid_utils.compat import uuid7

from app.audit.keys import load_public, load_signer, make_key, public_path, verifiers
from app.audit.trail import Trail, compared
from app.audit.verification import Told, Verdict, Verification
from app.migrate import migrate
from events.chain import GENESIS, chained_hash, next_head
from events.facts import JobFact, ResultReference
from events.heads import PublicKeys
from events.postgres import PostgresStore
from events.record import SALT_BYTES, StoredFact, hash_of
from events.store import AppendUnit, NewFacts, Scribe, StreamHead
from results.documents import reference_to
from results.postgres import PostgresDocuments
from tests.builders import (
    CAUSE,
    DOCUMENT,
    NOW,
    PING,
    RDAP,
    Clock,
    completed,
    counts,
    dispatched,
    failed,
    job_completed,
    submitted,
)
from tests.servers.postgres import fresh_database
from write_side.head_keeper import HeadKeeper
from write_side.heads import HeadFile, open_heads

MUTATIONS = 1_000
IN_THE_DATABASE = 120
JOBS = 24
FACTS_PER_HEAD = 35
SEED = 20_260_102

Rows = list[StoredFact]
Row = tuple[int, UUID, int, str, bytes]


@dataclass(frozen=True)
class Recorded:
    """A log that was recorded and signed to its end, and where it lies."""

    database_url: str
    log_id: UUID
    rows: Rows
    head_lines: Sequence[str]
    keys: PublicKeys
    relay: Told

    @property
    def heads(self) -> "Trail":
        return self.trail(self.head_lines)

    def trail(self, lines: Sequence[str], name: str = "heads.jsonl") -> Trail:
        return Trail(name, partial(_each, lines), self.keys)


class MemoryLog:
    """A log that is these rows."""

    def __init__(self, rows: Iterable[StoredFact], log_id: UUID) -> None:
        self._rows = sorted(rows, key=lambda row: row.position)
        self._positions = [row.position for row in self._rows]
        self._log_id = log_id

    async def read(self, stream_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[StoredFact]]:
        found = {id_: [row for row in self._rows if row.stream_id == id_] for id_ in stream_ids}
        return {id_: sorted(rows, key=lambda row: row.stream_version) for id_, rows in found.items() if rows}

    async def read_all(self, after: int, limit: int) -> Sequence[StoredFact]:
        first = bisect_right(self._positions, after)
        return self._rows[first : first + limit]

    async def head(self) -> int:
        return self._positions[-1] if self._positions else 0

    async def stream_ids(self, after: UUID | None, limit: int) -> Sequence[UUID]:
        raise NotImplementedError

    async def log_id(self) -> UUID:
        return self._log_id


async def _each(lines: Sequence[str]) -> AsyncIterator[str]:
    for line in lines:
        yield line


@pytest.fixture(scope="module")
async def recorded(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Recorded]:
    with fresh_database(postgres) as url:
        log_id = uuid4()
        migrate(url, log_id, {})
        yield await _record(url, log_id, tmp_path_factory.mktemp("heads"))


async def _record(url: str, log_id: UUID, folder: Path) -> Recorded:
    """Jobs that happen at the same time, with a hole in the positions here and there."""
    store = PostgresStore(url, Scribe(lambda: NOW, uuid7, partial(os.urandom, SALT_BYTES)))
    documents = PostgresDocuments(url)
    await documents.open()
    for one, other in zip(*[iter([uuid7() for _ in range(JOBS)])] * 2, strict=True):
        heads = {one: StreamHead(), other: StreamHead()}
        for step, facts in enumerate(_story()):
            for job_id, head in heads.items():
                named = [fact.model_copy(update={"job_id": job_id}) for fact in facts]
                if step == 1:
                    named[0] = completed(PING, job_id=job_id)
                    await documents.put(job_id, DOCUMENT)
                (heads[job_id],) = await store.append(AppendUnit([NewFacts(job_id, head, named)], CAUSE))
        _leave_a_hole(url)
    rows = list(await store.read_all(0, 10_000))
    make_key(folder / "heads.key")
    keys = verifiers(load_public(public_path(folder / "heads.key")))
    file = HeadFile(folder / "heads.jsonl")
    async with open_heads(url) as table:
        keeper = HeadKeeper(
            MemoryLog(rows, log_id),
            table,
            [file],
            load_signer(folder / "heads.key"),
            keys,
            FACTS_PER_HEAD,
            timedelta(0),
            Clock(),
        )
        await keeper.take_up()
        await keeper.tick()
    await store.close()
    await documents.close()
    relay = GENESIS
    for row in rows:
        relay = next_head(relay, row.position, hash_of(row.state))
    return Recorded(url, log_id, rows, list(file.lines()), keys, Told(rows[-1].position, relay))


def _story() -> list[list[JobFact]]:
    return [
        [submitted(PING, RDAP), dispatched(PING, RDAP)],
        [completed(PING)],
        [failed(RDAP), job_completed(counts(succeeded=1, failed=1))],
    ]


def _leave_a_hole(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as database:
        database.execute("SELECT nextval('stored_events_notification_id_seq')")


async def verified(recorded: Recorded, rows: Iterable[StoredFact], trail: Trail | None = None, **more: Any) -> Verdict:
    trail = trail or recorded.heads
    await trail.judge()
    return await Verification(MemoryLog(rows, recorded.log_id), trail, **more).run()


# --- What can be done to the rows -------------------------------------------------------------------------------------


def flip(rows: Rows, at: int, chance: random.Random) -> Rows:
    """One bit of one column."""
    row = rows[at]
    column = chance.choice(("state", "state", "state", "topic", "stream_id", "stream_version", "position"))
    if column == "state":
        state = bytearray(row.state)
        state[chance.randrange(len(state))] ^= 1 << chance.randrange(8)
        return _with(rows, at, row._replace(state=bytes(state)))
    if column == "topic":
        place = chance.randrange(len(row.topic))
        return _with(rows, at, row._replace(topic=row.topic[:place] + chr(ord(row.topic[place]) ^ 1) + row.topic[place + 1 :]))
    if column == "stream_id":
        return _with(rows, at, row._replace(stream_id=UUID(int=row.stream_id.int ^ 1 << chance.randrange(128))))
    if column == "stream_version":
        return _with(rows, at, row._replace(stream_version=row.stream_version ^ 1 << chance.randrange(4, 30)))
    return _with(rows, at, row._replace(position=chance.choice(_free(rows))))


def delete(rows: Rows, at: int, _: random.Random) -> Rows:
    return rows[:at] + rows[at + 1 :]


def swap_contents(rows: Rows, at: int, chance: random.Random) -> Rows:
    other = chance.choice([index for index in range(len(rows)) if index != at])
    one, two = rows[at], rows[other]
    return _with(_with(rows, at, one._replace(state=two.state)), other, two._replace(state=one.state))


def swap_places(rows: Rows, at: int, chance: random.Random) -> Rows:
    """Two facts in each other's position: the chains of their streams may still be whole."""
    other = at + 1 if at + 1 < len(rows) and chance.random() < 0.5 else chance.choice(range(len(rows)))
    if other == at:
        other = at - 1
    one, two = rows[at], rows[other]
    return _with(_with(rows, at, one._replace(position=two.position)), other, two._replace(position=one.position))


def insert(rows: Rows, at: int, chance: random.Random) -> Rows:
    """A fact of somebody's own: in a hole, or before this one, with all later ones moved up. Its own chain is whole."""
    stream_id = chance.choice([uuid4(), rows[at].stream_id])
    forged = _chained(rows, stream_id, b'{"at":%d}' % chance.randrange(1_000))
    if chance.random() < 0.3:
        return [*rows, forged._replace(position=chance.choice(_free(rows)))]
    place = rows[at].position
    return [
        *(row if row.position < place else row._replace(position=row.position + 1) for row in rows),
        forged._replace(position=place),
    ]


def truncate(rows: Rows, at: int, _: random.Random) -> Rows:
    return rows[:at]


def rewrite(rows: Rows, at: int, chance: random.Random) -> Rows:
    """The work of somebody who knows the formula: another story, and every later hash of the stream made to fit."""
    row = rows[at]
    envelope, chained, _, *erasable = row.state.split(b"\n")
    changed = list(rows)
    states = {row.position: (envelope.replace(b'"actor":"test"', b'"actor":"tes%d"' % chance.randrange(10)), chained, erasable)}
    previous = _hash_before(rows, row)
    for index, later in enumerate(rows):
        if later.stream_id != row.stream_id or later.stream_version < row.stream_version:
            continue
        told = later.state.split(b"\n")
        parts = states.get(later.position, (told[0], told[1], told[3:]))
        hashed = chained_hash(previous, later.stream_id, later.stream_version, later.topic, parts[0], parts[1])
        previous = hashed
        changed[index] = later._replace(state=b"\n".join([parts[0], parts[1], hashed.hex().encode(), *parts[2]]))
    return changed


Mutation = Callable[[Rows, int, random.Random], Rows]
MUTANTS: Sequence[Mutation] = (flip, flip, delete, swap_contents, swap_places, insert, truncate, rewrite)


def _with(rows: Rows, at: int, row: StoredFact) -> Rows:
    return [*rows[:at], row, *rows[at + 1 :]]


def _free(rows: Rows) -> list[int]:
    taken = {row.position for row in rows}
    return [position for position in range(1, rows[-1].position) if position not in taken]


def _hash_before(rows: Rows, row: StoredFact) -> bytes:
    before = [other for other in rows if other.stream_id == row.stream_id and other.stream_version < row.stream_version]
    return hash_of(before[-1].state) if before else GENESIS


def _chained(rows: Rows, stream_id: UUID, chained: bytes) -> StoredFact:
    """A well-made next fact of a stream."""
    own = [row for row in rows if row.stream_id == stream_id]
    previous, version = (hash_of(own[-1].state), own[-1].stream_version + 1) if own else (GENESIS, 1)
    envelope, topic = b'{"event_id":"%b"}' % str(uuid4()).encode(), "lookup.JobCancelled.v1"
    hashed = chained_hash(previous, stream_id, version, topic, envelope, chained)
    return StoredFact(0, stream_id, version, topic, b"\n".join([envelope, chained, hashed.hex().encode()]))


def first_difference(before: Iterable[StoredFact], after: Iterable[StoredFact]) -> int:
    """The lowest position at which there is now something else than there was, or nothing, or something new."""
    was, now = ({row.position: row for row in rows} for rows in (before, after))
    return min(position for position in was.keys() | now.keys() if was.get(position) != now.get(position))


# --- The claims -------------------------------------------------------------------------------------------------------


async def test_the_log_as_it_was_recorded_is_sound(recorded: Recorded) -> None:
    verdict = await verified(recorded, recorded.rows, relay=recorded.relay)

    assert (verdict.broken, verdict.head_problems) == (0, [])
    assert (verdict.facts, verdict.beyond, verdict.covered) == (len(recorded.rows), 0, recorded.rows[-1].position)
    assert verdict.heads == len(recorded.head_lines) > 3
    assert _free(recorded.rows), "there are holes"


async def test_of_a_thousand_ways_to_tamper_each_is_named_with_the_first_bad_position(recorded: Recorded) -> None:
    chance = random.Random(SEED)
    named: Counter[str] = Counter()
    wrong: list[tuple[str, int, Any]] = []
    last_two = 0
    for number in range(MUTATIONS):
        at = len(recorded.rows) - 1 - number % len(recorded.rows)
        mutation = MUTANTS[(number + number // len(recorded.rows)) % len(MUTANTS)]
        changed = mutation(recorded.rows, at, chance)
        expected = first_difference(recorded.rows, changed)
        first = (await verified(recorded, changed)).first_bad
        if first is None or (first.position, first.last) != (expected, expected):
            wrong.append((mutation.__name__, expected, first))
        named[mutation.__name__] += 1
        last_two += at >= len(recorded.rows) - 2

    assert wrong == []
    assert named.total() == MUTATIONS
    assert min(named.values()) >= MUTATIONS // (len(MUTANTS) + 1)
    assert last_two >= 2 * (MUTATIONS // len(recorded.rows))


async def test_the_same_in_the_database_itself(recorded: Recorded) -> None:
    """Each is done to the table in a transaction, verified there, and taken back."""
    chance = random.Random(SEED + 1)
    done: Counter[str] = Counter()
    with psycopg.connect(recorded.database_url) as database:
        for number in range(IN_THE_DATABASE):
            at = len(recorded.rows) - 1 - (number * 7) % len(recorded.rows)
            mutation = MUTANTS[number % len(MUTANTS)]
            changed = mutation(recorded.rows, at, chance)
            if not _fits_the_table(changed):
                continue
            _replace_rows(database, recorded.rows, changed)
            log = MemoryLog(_rows_of(database), recorded.log_id)
            database.rollback()
            trail = recorded.heads
            await trail.judge()
            first = (await Verification(log, trail).run()).first_bad
            assert first is not None
            assert first.position == first_difference(recorded.rows, changed)
            done[mutation.__name__] += 1
        assert _rows_of(database) == recorded.rows
    assert done.keys() == {mutation.__name__ for mutation in MUTANTS}
    assert done.total() >= IN_THE_DATABASE // 2


# --- Beyond the last head ---------------------------------------------------------------------------------------------


async def test_beyond_the_last_head_every_change_of_a_fact_is_still_named(recorded: Recorded) -> None:
    """The chains alone do that."""
    chance = random.Random(SEED + 2)
    trail = recorded.trail(recorded.head_lines[:-2])
    await trail.judge()
    assert trail.last is not None
    beyond = [index for index, row in enumerate(recorded.rows) if row.position > trail.last.state.position]
    assert len(beyond) > FACTS_PER_HEAD
    for at in beyond:
        state = bytearray(recorded.rows[at].state)
        state[chance.randrange(len(state))] ^= 1 << chance.randrange(8)
        changed = _with(recorded.rows, at, recorded.rows[at]._replace(state=bytes(state)))

        first = (await verified(recorded, changed, trail)).first_bad

        assert first is not None
        assert (first.position, first.last) == (recorded.rows[at].position, recorded.rows[at].position)


async def test_beyond_the_last_head_a_missing_fact_is_named_by_the_one_that_follows_it_in_its_stream(
    recorded: Recorded,
) -> None:
    """Where more than one position is free, by the span in which it was."""
    trail = recorded.trail(recorded.head_lines[:-2])
    await trail.judge()
    assert trail.last is not None
    named = unseen = 0
    for at, row in enumerate(recorded.rows):
        if row.position <= trail.last.state.position:
            continue
        changed = delete(recorded.rows, at, random.Random(0))
        verdict = await verified(recorded, changed, trail)
        if any(other.stream_id == row.stream_id and other.position > row.position for other in recorded.rows):
            first = verdict.first_bad
            assert first is not None
            assert first.position <= row.position <= first.last
            named += 1
        else:
            assert verdict.is_sound, "the last fact of a stream is missed by nobody"
            assert not (await verified(recorded, changed, trail, relay=recorded.relay)).is_sound, "but by the relay"
            unseen += 1
    assert named > unseen > 0


async def test_the_newest_facts_are_missed_by_nobody_until_a_head_or_the_relay_has_told_of_them(recorded: Recorded) -> None:
    """What docs/audit.md says plainly."""
    trail = recorded.trail(recorded.head_lines[:-1])
    await trail.judge()
    assert trail.last is not None
    kept = [row for row in recorded.rows if row.position <= trail.last.state.position]

    assert (await verified(recorded, kept, trail)).is_sound
    told = (await verified(recorded, kept, trail, relay=recorded.relay)).first_bad
    assert told is not None
    assert (told.position, told.last) == (trail.last.state.position + 1, recorded.rows[-1].position)
    assert not (await verified(recorded, kept)).is_sound


async def test_without_any_head_the_chains_are_verified_all_the_same(recorded: Recorded) -> None:
    changed = rewrite(recorded.rows, 40, random.Random(0))[:-1]
    flipped = flip(recorded.rows, 40, random.Random(1))

    assert (await Verification(MemoryLog(changed, recorded.log_id), None).run()).is_sound, "a forger knows the formula"
    assert not (await Verification(MemoryLog(flipped, recorded.log_id), None).run()).is_sound


# --- Erasure ----------------------------------------------------------------------------------------------------------


async def test_erasing_what_may_be_erased_breaks_nothing(recorded: Recorded) -> None:
    erased = [row._replace(state=b"\n".join(row.state.split(b"\n")[:3])) for row in recorded.rows]
    assert erased != recorded.rows

    verdict = await verified(recorded, erased, relay=recorded.relay)

    assert (verdict.broken, verdict.head_problems) == (0, [])


def _in_capitals(salts: bytes) -> bytes:
    """The same bytes, in other digits."""
    return orjson.dumps({name: salt.upper() for name, salt in orjson.loads(salts).items()})


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines[:4], lines[4].replace(b"198.51.100.7", b"198.51.100.8")],
        lambda lines: [*lines[:3], _in_capitals(lines[3]), lines[4]],
        lambda lines: [*lines[:4], lines[4].replace(b":", b": ", 1)],
        lambda lines: lines[:4],
        lambda lines: [*lines[:3], b"{}", b"{}"],
        lambda lines: [*lines[:3], lines[4], lines[3]],
        lambda lines: [*lines, b""],
    ],
    ids=["value", "salt", "spelling", "values only", "emptied", "swapped", "one more line"],
)
async def test_what_may_be_erased_may_not_be_changed_not_even_its_spelling(
    recorded: Recorded, change: Callable[[list[bytes]], list[bytes]]
) -> None:
    row = recorded.rows[0]
    changed = _with(recorded.rows, 0, row._replace(state=b"\n".join(change(row.state.split(b"\n")))))
    assert changed != recorded.rows

    first = (await verified(recorded, changed)).first_bad

    assert first is not None
    assert first.position == row.position


# --- Result documents -------------------------------------------------------------------------------------------------


async def test_a_document_that_was_changed_or_taken_away_is_named_by_the_fact_that_tells_of_it(recorded: Recorded) -> None:
    for statement in (
        "UPDATE result_documents SET body = %s WHERE key = %s",
        "DELETE FROM result_documents WHERE %s::bytea IS NOT NULL AND key = %s",
    ):
        row = next(row for row in recorded.rows[30:] if "TaskCompleted" in row.topic)
        key = reference_to(row.stream_id, DOCUMENT).location.key
        with psycopg.connect(recorded.database_url) as database:
            kept = database.execute("SELECT body FROM result_documents WHERE key = %s", (key,)).fetchone()
            assert kept is not None
            database.execute(statement, (b"forged", key))
            documents = await _opened(recorded.database_url)
            database.commit()
            try:
                verdict = await verified(recorded, recorded.rows, documents=documents.get)
            finally:
                await documents.close()
                database.execute("DELETE FROM result_documents WHERE key = %s", (key,))
                database.execute("INSERT INTO result_documents (key, body) VALUES (%s, %s)", (key, kept[0]))

        assert [(defect.position, "document" in defect.what) for defect in verdict.defects] == [(row.position, True)]
        assert verdict.documents == JOBS - 1


async def test_documents_of_a_job_that_was_erased_are_missed_by_nobody(recorded: Recorded) -> None:
    async def none(_: Sequence[ResultReference]) -> Mapping[str, bytes]:
        return {}

    erased = [row._replace(state=b"\n".join(row.state.split(b"\n")[:3])) for row in recorded.rows]

    verdict = await verified(recorded, erased, documents=none)

    assert (verdict.broken, verdict.erased) == (0, JOBS)
    assert (await verified(recorded, recorded.rows, documents=none)).broken == JOBS


async def _opened(url: str) -> PostgresDocuments:
    documents = PostgresDocuments(url)
    await documents.open()
    return documents


# --- Heads ------------------------------------------------------------------------------------------------------------


def _changed(line: str, **members: Any) -> str:
    return orjson.dumps({**orjson.loads(line), **members}, option=orjson.OPT_SORT_KEYS).decode()


HEAD_TAMPERINGS: Mapping[str, Callable[[list[str]], list[str]]] = {
    "taken out": lambda lines: lines[:1] + lines[2:],
    "the first taken out": lambda lines: lines[1:],
    "exchanged": lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
    "twice": lambda lines: [*lines[:2], lines[1], *lines[2:]],
    "another root": lambda lines: [lines[0], _changed(lines[1], root="00" * 32), *lines[2:]],
    "another position": lambda lines: [lines[0], _changed(lines[1], position=1), *lines[2:]],
    "another time": lambda lines: [lines[0], _changed(lines[1], at="2026-01-02T03:04:06+00:00"), *lines[2:]],
    "other checksums": lambda lines: [lines[0], _changed(lines[1], checksums="AAAA"), *lines[2:]],
    "another signature": lambda lines: [lines[0], _changed(lines[1], signature="00" * 64), *lines[2:]],
    "another key": lambda lines: [lines[0], _changed(lines[1], key="00" * 16), *lines[2:]],
    "one more member": lambda lines: [lines[0], _changed(lines[1], note="genuine"), *lines[2:]],
    "no head": lambda lines: [lines[0], "{}", *lines[2:]],
}


@pytest.mark.parametrize("tampering", HEAD_TAMPERINGS)
async def test_tampering_with_the_heads_is_named_and_leaves_the_log_sound(recorded: Recorded, tampering: str) -> None:
    lines = HEAD_TAMPERINGS[tampering](list(recorded.head_lines))

    verdict = await verified(recorded, recorded.rows, trail := recorded.trail(lines))

    assert trail.problems
    assert any("missing" in problem for problem in trail.problems) or tampering not in {"taken out", "the first taken out"}
    assert verdict.broken == 0
    assert verdict.covered == recorded.rows[-1].position


@pytest.mark.parametrize("tampering", HEAD_TAMPERINGS)
async def test_the_log_is_still_held_against_the_heads_that_are_left(recorded: Recorded, tampering: str) -> None:
    """Facts exchanged under the very head that was tampered with: the next one tells, if only within which span."""
    lines = HEAD_TAMPERINGS[tampering](list(recorded.head_lines))
    rows = recorded.rows
    pairs = zip(rows[FACTS_PER_HEAD:], rows[FACTS_PER_HEAD + 1 : 2 * FACTS_PER_HEAD], strict=False)
    one, other = next(pair for pair in pairs if pair[0].stream_id != pair[1].stream_id)
    places = {one.position: other.position, other.position: one.position}
    changed = [row._replace(position=places.get(row.position, row.position)) for row in rows]
    assert (await Verification(MemoryLog(changed, recorded.log_id), None).run()).is_sound, "no chain tells"

    verdict = await verified(recorded, changed, recorded.trail(lines))

    assert verdict.first_bad is not None
    assert verdict.first_bad.position <= first_difference(recorded.rows, changed) <= verdict.first_bad.last


async def test_half_a_line_that_a_crash_left_is_no_tampering(recorded: Recorded) -> None:
    lines = [*recorded.head_lines[:2], recorded.head_lines[2][:100], *recorded.head_lines[2:]]

    verdict = await verified(recorded, recorded.rows, trail := recorded.trail(lines))

    assert (trail.problems, verdict.broken) == ([], 0)


async def test_heads_that_are_fewer_in_one_place_than_in_another_are_named(recorded: Recorded) -> None:
    """The table cannot be cut without the file telling."""
    file, table = recorded.heads, recorded.trail(recorded.head_lines[:-1], "the table")
    await file.judge()
    await table.judge()

    assert compared(file, file) == []
    assert compared(file, table) == [
        f"the table ends with head {len(recorded.head_lines) - 1}, heads.jsonl with head {len(recorded.head_lines)}."
    ]


async def test_heads_of_another_log_are_told(recorded: Recorded) -> None:
    verdict = await Verification(MemoryLog(recorded.rows, uuid4()), await _judged(recorded.heads)).run()

    assert len(verdict.head_problems) == 1


async def _judged(trail: Trail) -> Trail:
    await trail.judge()
    return trail


# --- The table --------------------------------------------------------------------------------------------------------


def _fits_the_table(rows: Rows) -> bool:
    """The table takes each version of a stream once."""
    return len({(row.stream_id, row.stream_version) for row in rows}) == len(rows)


def _replace_rows(database: psycopg.Connection, before: Rows, after: Rows) -> None:
    was, now = ({row.position: row for row in rows} for rows in (before, after))
    gone = [position for position in was if now.get(position) != was[position]]
    database.execute("DELETE FROM stored_events WHERE notification_id = ANY(%s)", (gone,))
    with database.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO stored_events (notification_id, originator_id, originator_version, topic, state)"
            " VALUES (%s, %s, %s, %s, %s)",
            [
                (row.position, row.stream_id, row.stream_version, row.topic, row.state)
                for position, row in now.items()
                if was.get(position) != row
            ],
        )


def _rows_of(database: psycopg.Connection) -> Rows:
    cursor = database.execute(
        "SELECT notification_id, originator_id, originator_version, topic, state FROM stored_events ORDER BY 1"
    )
    return [StoredFact(*row) for row in cursor]
