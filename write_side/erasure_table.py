"""The tables of erasures under way: what is being erased and how far it has come, until the last step is done.

`write_side/erasure.py` carries them out.
"""

import re
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any, LiteralString
from uuid import UUID

import orjson
from psycopg import AsyncConnection
from psycopg.rows import class_row

from events.record import StoredFact

JOBS_PAGE = 200
LETTERS_PAGE = 200

CREATE_TABLES: LiteralString = """
CREATE TABLE IF NOT EXISTS erasures (
    erasure_id uuid PRIMARY KEY,
    target text NOT NULL,
    spellings text[] NOT NULL DEFAULT '{}',
    salt text NOT NULL,
    target_sha256 text NOT NULL,
    by text NOT NULL,
    reason text NOT NULL,
    started_at timestamptz NOT NULL,
    from_list boolean NOT NULL DEFAULT false,
    scanned_to bigint NOT NULL DEFAULT 0,
    not_before timestamptz,
    counts json NOT NULL DEFAULT '{}'
);
CREATE TABLE IF NOT EXISTS erasure_jobs (
    erasure_id uuid NOT NULL REFERENCES erasures ON DELETE CASCADE,
    job_id uuid NOT NULL,
    positions bigint[] NOT NULL,
    PRIMARY KEY (erasure_id, job_id)
)
"""
"""Of erasures that are under way: when one is done, its rows go too."""

_BEGIN: LiteralString = """
INSERT INTO erasures (erasure_id, target, salt, target_sha256, by, reason, started_at, from_list)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
"""
_UNDER_WAY: LiteralString = """
SELECT erasure_id, target, spellings, salt, target_sha256, by, reason, started_at, from_list, scanned_to, not_before, counts
FROM erasures ORDER BY started_at, erasure_id LIMIT 1
"""
_ADD_JOB: LiteralString = """
INSERT INTO erasure_jobs (erasure_id, job_id, positions) VALUES (%s, %s, %s) ON CONFLICT (erasure_id, job_id)
DO UPDATE SET positions = erasure_jobs.positions || excluded.positions
"""
_SCANNED: LiteralString = "UPDATE erasures SET scanned_to = %s, spellings = %s WHERE erasure_id = %s"
_NOT_BEFORE: LiteralString = "UPDATE erasures SET not_before = %s WHERE erasure_id = %s"
_COUNTED: LiteralString = "UPDATE erasures SET counts = %s WHERE erasure_id = %s"
_JOBS: LiteralString = (
    "SELECT job_id, positions FROM erasure_jobs WHERE erasure_id = %s AND job_id > %s ORDER BY job_id LIMIT %s"
)
_OURS: LiteralString = "SELECT job_id FROM erasure_jobs WHERE erasure_id = %s AND job_id = ANY(%s)"
_ROWS: LiteralString = "SELECT notification_id, state FROM stored_events WHERE originator_id = ANY(%s)"
_ERASE_ROWS: LiteralString = (
    "UPDATE stored_events SET state = new.state FROM unnest(%s::bigint[], %b::bytea[]) AS new (position, state)"
    " WHERE notification_id = new.position"
)
_DELETE_DOCUMENTS: LiteralString = (
    "DELETE FROM result_documents USING erasure_jobs"
    " WHERE erasure_id = %s AND split_part(key, '/', 1) = erasure_jobs.job_id::text"
)
_LETTERS: LiteralString = (
    "SELECT id, body, headers::text, EXISTS (SELECT FROM erasure_jobs j WHERE j.erasure_id = %s AND j.job_id = d.job_id)"
    " FROM dead_letters d WHERE id > %s ORDER BY id LIMIT %s"
)
_DELETE_LETTERS: LiteralString = "DELETE FROM dead_letters WHERE id = ANY(%s)"
_TOLD: LiteralString = "SELECT position FROM relay_checkpoints WHERE name = 'facts'"
_END: LiteralString = "DELETE FROM erasures WHERE erasure_id = %s"
_BEFORE_ALL = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is erased: a target in its canonical form, and as it was typed. Empty when only the jobs are known."""

    canonical: str
    spellings: Sequence[str] = ()

    def is_told_by(self, row: StoredFact) -> bool:
        """Whether an erasable field of this fact holds the target."""
        lines = row.state.split(b"\n")
        if not self.canonical or len(lines) <= 4 or self.canonical.encode() not in lines[4]:  # noqa: PLR2004 - the layout
            return False
        return any(isinstance(value, dict) and value.get("canonical") == self.canonical for value in erasable_values(lines))

    def is_mentioned_in(self, text: bytes) -> bool:
        """Whether the target is spelled out somewhere in a text. A longer name that ends in it is another target."""
        forms = sorted({form.strip() for form in (self.canonical, *self.spellings)} - {""}, key=len, reverse=True)
        if not forms:
            return False
        pattern = rf"(?<![\w.:%-])(?:{'|'.join(map(re.escape, forms))})(?![\w:%-])(?!\.\w)"
        return re.search(pattern, text.decode(errors="replace"), re.IGNORECASE) is not None


@dataclass(frozen=True, slots=True)
class UnderWay:
    """An erasure that has begun, as `ErasureTable` has it."""

    erasure_id: UUID
    target: str
    spellings: Sequence[str]
    salt: str
    target_sha256: str
    by: str
    reason: str
    started_at: datetime
    from_list: bool
    scanned_to: int
    not_before: datetime | None
    counts: Mapping[str, int]

    @property
    def subject(self) -> Subject:
        return Subject(self.target, self.spellings)


class ErasureTable:
    """Erasures under way, and all tables that they change, as the retention role sees them. May raise `psycopg.Error`."""

    def __init__(self, conn: AsyncConnection) -> None:
        self._conn = conn

    async def begin(self, new: UnderWay) -> None:
        told = (new.erasure_id, new.target, new.salt, new.target_sha256, new.by, new.reason, new.started_at, new.from_list)
        await self._conn.execute(_BEGIN, told)

    async def has(self, canonical: str) -> bool:
        """Whether an erasure of this target has begun already."""
        row = await (await self._conn.execute("SELECT FROM erasures WHERE target = %s", (canonical,))).fetchone()
        return row is not None

    async def under_way(self) -> UnderWay | None:
        """The oldest that is not done."""
        async with self._conn.cursor(row_factory=class_row(UnderWay)) as curs:
            return await (await curs.execute(_UNDER_WAY)).fetchone()

    async def found(self, erasure_id: UUID, rows: Iterable[StoredFact], scanned_to: int, spellings: Sequence[str]) -> None:
        """Facts that tell of the target, and how far the log was looked through: in one step, so that none counts twice."""
        positions: dict[UUID, list[int]] = {}
        for row in rows:
            positions.setdefault(row.stream_id, []).append(row.position)
        async with self._conn.transaction():
            await self.add_jobs(erasure_id, positions)
            await self._conn.execute(_SCANNED, (scanned_to, list(spellings), erasure_id))

    async def add_jobs(self, erasure_id: UUID, positions: Mapping[UUID, Sequence[int]]) -> None:
        async with self._conn.cursor() as curs:
            await curs.executemany(_ADD_JOB, [(erasure_id, job_id, list(told)) for job_id, told in positions.items()])

    async def wait_until(self, erasure_id: UUID, not_before: datetime) -> None:
        await self._conn.execute(_NOT_BEFORE, (not_before, erasure_id))

    async def count(self, one: UnderWay, kind: str, more: int) -> UnderWay:
        """Add to a count; gives the erasure with it."""
        now = await self.under_way()
        assert now is not None
        counts = {**now.counts, kind: now.counts.get(kind, 0) + more}
        await self._conn.execute(_COUNTED, (orjson.dumps(counts).decode(), one.erasure_id))
        return now

    async def jobs(self, erasure_id: UUID) -> AsyncIterator[dict[UUID, Sequence[int]]]:
        """The jobs and the positions of their facts that told of the target, at most `JOBS_PAGE` at once."""
        after = _BEFORE_ALL
        while rows := await (await self._conn.execute(_JOBS, (erasure_id, after, JOBS_PAGE))).fetchall():
            yield dict(rows)
            after = rows[-1][0]

    async def ours(self, erasure_id: UUID, job_ids: Sequence[UUID]) -> set[UUID]:
        """Those of these jobs that are to be erased."""
        return {job_id for (job_id,) in await (await self._conn.execute(_OURS, (erasure_id, list(job_ids)))).fetchall()}

    async def erase_facts(self, job_ids: Iterable[UUID]) -> None:
        async with self._conn.cursor(binary=True) as curs:
            rows = await (await curs.execute(_ROWS, (list(job_ids),))).fetchall()
            left = {position: b"\n".join(bytes(state).split(b"\n")[:3]) for position, state in rows}
            await curs.execute(_ERASE_ROWS, (list(left), list(left.values())))

    async def delete_documents(self, erasure_id: UUID) -> int:
        return (await self._conn.execute(_DELETE_DOCUMENTS, (erasure_id,))).rowcount

    async def letters(self, erasure_id: UUID) -> AsyncIterator[list[tuple[int, bytes, str, bool]]]:
        """Dead letters: id, body, headers, and whether their job is one of ours."""
        after = 0
        while True:
            async with self._conn.cursor(binary=True) as curs:
                page = await (await curs.execute(_LETTERS, (erasure_id, after, LETTERS_PAGE))).fetchall()
            if not page:
                return
            yield [(int(row[0]), bytes(row[1]), str(row[2]), bool(row[3])) for row in page]
            after = page[-1][0]

    async def delete_letters(self, letter_ids: Sequence[int]) -> int:
        return (await self._conn.execute(_DELETE_LETTERS, (list(letter_ids),))).rowcount

    async def told_to(self) -> int:
        """The position up to which subscribers were sent everything."""
        row = await (await self._conn.execute(_TOLD)).fetchone()
        return int(row[0]) if row else 0

    async def end(self, erasure_id: UUID) -> None:
        await self._conn.execute(_END, (erasure_id,))


def salted(salt: str, canonical: str) -> str:
    """What the log keeps of an erased target: hex of SHA-256(salt || canonical form)."""
    return sha256(salt.encode() + canonical.encode()).hexdigest()


def erased(row: StoredFact) -> StoredFact:
    """The fact without its erasable lines."""
    state = b"\n".join(row.state.split(b"\n")[:3])
    return StoredFact(row.position, row.stream_id, row.stream_version, row.topic, state)


def is_erasable(row: StoredFact) -> bool:
    """Whether there is still something in it that could be erased."""
    return row.state.count(b"\n") > 2  # noqa: PLR2004 - lines 4 and 5 of the layout


def erasable_values(lines: Sequence[bytes]) -> Iterable[Any]:
    """Of a fact whose lines these are; nothing when they were erased."""
    try:
        return list(orjson.loads(lines[4]).values())
    except (ValueError, AttributeError):
        return []
