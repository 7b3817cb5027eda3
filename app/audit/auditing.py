"""What `lookup audit` works on: the log, its heads in every place where they are, and the keys that are known."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from uuid import UUID

import psycopg

from app.audit.keys import PublicKey, load_public, public_path, verifiers
from app.audit.trail import Trail, compared
from app.audit.verification import Progress, Told, Verdict, Verification
from app.wiring import Wiring
from events.facts import ResultReference
from events.record import StoredFact
from events.segments import ArchivedLog
from events.store import StoreUnavailable
from results.documents import ResultsUnavailable
from write_side import checkpoints
from write_side.checkpoints import relayed
from write_side.heads import HeadFile, HeadTable, open_heads

TABLE = "the table log_heads"
UNREACHABLE = "The database cannot be reached, or `lookup migrate` has not been run."


class CannotAudit(Exception):  # noqa: N818 - a state, in our words
    """The command cannot do its work; the message says why. `code` is its exit code."""

    def __init__(self, sentence: str, code: int = 3) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True, slots=True)
class Auditor:
    """Reads the log and its heads. Raises `CannotAudit`."""

    wiring: Wiring
    keys_file: Path | None = None

    @property
    def database_url(self) -> str:
        settings = self.wiring.settings
        url = settings.database_read_url or settings.database_url
        if url is None:
            raise CannotAudit("nothing runs here, and LOOKUP_DATABASE_URL is not set.")
        return url

    def keys(self) -> Mapping[str, PublicKey]:
        """Those that are known, none if no key was ever made. Raises `KeyProblem`."""
        path = self.keys_file or public_path(self.wiring.settings.heads_key)
        return load_public(path) if self.keys_file is not None or path.exists() else {}

    async def verify(self, heads_file: Path | None, progress: Progress) -> Verdict:
        """Verify all of the log: under the heads of a file if one is given, else of the first place that has any."""
        async with self.table() as table:
            trails = await self._trails(table, heads_file)
            main = trails[0] if trails else None
            with _told():
                relay = (await relayed(self.database_url))[checkpoints.FACTS]
                walk = Verification(
                    self.wiring.history, main, self.documents, Told(relay.position, relay.log_head), progress=progress
                )
                verdict = await walk.run()
        for trail in trails:
            verdict.head_problems += trail.problems
        if main is not None:
            for other in trails[1:]:
                verdict.head_problems += compared(main, other)
        return verdict

    @asynccontextmanager
    async def table(self) -> AsyncIterator[HeadTable]:
        with _told():
            async with open_heads(self.database_url) as table:
                yield table

    async def stream(self, job_id: UUID) -> Sequence[StoredFact]:
        """A job's facts."""
        with _told():
            stream = (await self.wiring.history.read([job_id])).get(job_id)
        if stream is None:
            raise CannotAudit(f"There is no job {job_id} in this log.", 1)
        return stream

    async def documents(self, references: Sequence[ResultReference]) -> Mapping[str, bytes]:
        """From the table or from segments: those that are what their SHA-256 says."""
        found = dict(await (await self.wiring.documents()).get(references))
        missing = {reference.location.key: reference.sha256 for reference in references if reference.location.key not in found}
        history = self.wiring.history
        if missing and isinstance(history, ArchivedLog):
            sealed = await history.documents(list(missing))
            found |= {key: body for key, body in sealed.items() if sha256(body).hexdigest() == missing[key]}
        return found

    async def _trails(self, table: HeadTable, heads_file: Path | None) -> list[Trail]:
        """The judged trails of all places that have heads; the one that counts first."""
        keys = verifiers(self.keys())
        files = [heads_file] if heads_file is not None else list(self.wiring.settings.heads_outside)
        trails = [Trail(str(path), partial(_lines_of, HeadFile(path)), keys) for path in files if path.exists()]
        if heads_file is not None and not trails:
            raise CannotAudit(f"There is no file {heads_file}.", 2)
        trails.append(Trail(TABLE, table.lines, keys))
        try:
            for trail in trails:
                await trail.judge()
        except OSError as error:
            raise CannotAudit("A file of heads cannot be read.", 2) from error
        return [trail for trail in trails if trail.digests or trail.problems]


async def _lines_of(file: HeadFile) -> AsyncIterator[str]:
    for number, line in enumerate(file.lines()):
        if number % 100 == 0:
            await asyncio.sleep(0)
        yield line


@contextmanager
def _told() -> Iterator[None]:
    """What the servers raise, in our words."""
    try:
        yield
    except (psycopg.Error, StoreUnavailable, ResultsUnavailable) as error:
        raise CannotAudit(UNREACHABLE) from error
