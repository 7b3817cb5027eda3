"""The erasure list: what was erased, kept outside of the database, so that an older backup cannot undo an erasure.

One JSON object a line, only ever appended to. It names jobs, never a target: the ids find the facts in any backup of this log.
"""

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from uuid import UUID

import orjson

JOBS_PER_LINE = 500


@dataclass(frozen=True, slots=True)
class ListedErasure:
    """One line: some of the jobs of an erasure. `is_last` says that the list has all of them by then."""

    erasure_id: UUID
    target_sha256: str
    by: str
    reason: str
    erased_at: datetime
    job_ids: Sequence[UUID]
    is_last: bool


class ErasureList:
    """The file; it is made with the first erasure. Methods block on the disk and may raise `OSError`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def has(self, erasure_id: UUID) -> bool:
        return any(line.erasure_id == erasure_id and line.is_last for line in self.lines())

    def lines(self) -> Iterator[ListedErasure]:
        """A line that was cut off by a crash is passed over: its erasure was written again, whole."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            for text in file:
                if (line := _parsed(text)) is not None:
                    yield line

    def append(self, lines: Sequence[ListedErasure]) -> None:
        """Durable when this returns."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "ab") as file:
            # Behind half a line of a crash, a line feed of our own makes it a line that nobody can read.
            file.write(b"".join(b"\n" + orjson.dumps(line) for line in lines) + b"\n")
            file.flush()
            os.fsync(file.fileno())


async def lines_of(
    erasure_id: UUID, target_sha256: str, by: str, reason: str, erased_at: datetime, pages: AsyncIterator[Sequence[UUID]]
) -> AsyncIterator[ListedErasure]:
    """An erasure's lines, the last of them marked; one without a job has one line."""
    async for page in pages:
        for first in range(0, len(page), JOBS_PER_LINE):
            some = page[first : first + JOBS_PER_LINE]
            yield ListedErasure(erasure_id, target_sha256, by, reason, erased_at, some, is_last=False)
    yield ListedErasure(erasure_id, target_sha256, by, reason, erased_at, (), is_last=True)


def _parsed(text: bytes) -> ListedErasure | None:
    try:
        told = orjson.loads(text)
        return ListedErasure(
            UUID(told["erasure_id"]),
            told["target_sha256"],
            told["by"],
            told["reason"],
            datetime.fromisoformat(told["erased_at"]),
            [UUID(job_id) for job_id in told["job_ids"]],
            told["is_last"],
        )
    except (ValueError, KeyError, TypeError):
        return None
