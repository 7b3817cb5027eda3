"""The self-check: now and then all views are made again from the log, beside those that are shown, and held against them.

Each document is compared at a moment at which both stand at the same position, so a service under load gives no false alarm.
What was made for it is dropped again. What came of it is left in Redis, for the metrics and `lookup doctor`.
"""

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.metrics import Family, Reading
from events.store import HistoryReader, StoreUnavailable
from projections.comparison import Comparer, Differences, NotAtRest
from projections.folding import Documents
from projections.generations import GenerationStore
from projections.job_views import Terms, View
from projections.replay import CannotReplay, Rebuild, leading
from results.documents import ResultsUnavailable

NOTE_KEY = "self-check:last"
NAMED_MAX = 20
LOOK_S = 60.0
TRY_AGAIN_S = 300.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What a self-check of a log found. `differing` is how many documents differ in each view that has any, and `named` has
    the first of them, as VIEW:KEY.
    """

    log_id: str
    at: datetime
    position: int
    seconds: float
    compared: int
    differing: Mapping[str, int] = field(default_factory=dict)
    named: Sequence[str] = ()

    @property
    def differing_total(self) -> int:
        return sum(self.differing.values())


@dataclass(frozen=True)
class SelfChecker:
    """Makes self-checks. `views` have to be those of the program that runs; `rate` is of facts a second."""

    redis: Redis
    generations: GenerationStore
    comparer: Comparer
    log: HistoryReader
    documents: Documents
    views: Sequence[View]
    terms: Terms
    now: Callable[[], datetime]
    rate: float | None = None

    async def run(self) -> SelfCheck:
        """One self-check, which is noted too. Raises `CannotReplay`, `NotAtRest`, or what log, results and Redis raise."""
        began = time.monotonic()
        async with leading(self.generations) as fence:
            rebuild = Rebuild(
                fence, self.generations, self.log, self.documents, self.views, self.terms, self.now, rate=self.rate
            )
            await rebuild.open()
            try:
                await rebuild.build()
                log_id = str(await self.log.log_id())
                found = await self.comparer.compare(await self._shown(log_id), rebuild.name)
            finally:
                await rebuild.drop()
        seconds = round(time.monotonic() - began, 3)
        check = _check_of(found, log_id, self.now(), rebuild.position, seconds)
        await self.redis.set(NOTE_KEY, _noted(check))
        if check.differing_total:
            log.error("%d documents of the views are not what the log makes of them: %s", check.differing_total, check.named)
        return check

    async def _shown(self, log_id: str) -> dict[str, str]:
        """The generation that each view is shown of, if it is of this log and of this version."""
        standing = await self.generations.standing()
        shown = {view.name: (standing.of(view.name), str(view.version)) for view in self.views}
        return {
            name: one.name
            for name, (one, version) in shown.items()
            if one is not None and one.log_id == log_id and one.views.get(name) == version
        }


@dataclass(frozen=True)
class Nightly:
    """Makes a self-check each time that `hour` (UTC) comes, and every `every` from then on. Runs until cancelled."""

    checker: SelfChecker
    hour: int
    every: timedelta
    now: Callable[[], datetime]

    async def run(self) -> None:
        done_until = self.now()
        while True:
            at = last_slot(self.now(), self.hour, self.every)
            if at <= done_until:
                await asyncio.sleep(LOOK_S)
            elif await self._made():
                done_until = at
            else:
                await asyncio.sleep(TRY_AGAIN_S)

    async def _made(self) -> bool:
        try:
            await self.checker.run()
        except (CannotReplay, NotAtRest) as why:
            log.info("No self-check now: %s", why)
            return False
        return True


def last_slot(now: datetime, hour: int, every: timedelta) -> datetime:
    """The last moment at which a self-check was due."""
    first = datetime(2026, 1, 1, hour, tzinfo=UTC)
    return now - (now - first) % every


async def last_check(redis: Redis) -> SelfCheck | None:
    """What the last self-check found, None if there was none yet. Raises `RedisError`."""
    noted: Any = await redis.get(NOTE_KEY)
    if noted is None:
        return None
    told = json.loads(noted)
    return SelfCheck(**told | {"at": datetime.fromisoformat(told["at"])})


async def check_now(checker: SelfChecker, *, as_json: bool) -> int:
    """A self-check for a person or a script; gives the exit code."""
    try:
        found = await checker.run()
    except (CannotReplay, NotAtRest) as why:
        return _said(f"lookup: {why}", 1)
    except (StoreUnavailable, ResultsUnavailable, RedisError, OSError):
        return _said("lookup: The database or Redis cannot be reached.", 3)
    if as_json:
        print(_noted(found))  # noqa: T201 - a command prints
    else:
        told = f"Compared {found.compared:,} documents up to position {found.position:,} in {found.seconds:.1f} s"
        print(f"{told}; {found.differing_total:,} differ.")  # noqa: T201
        for name in found.named:
            print(f"  {name}")  # noqa: T201
    return 1 if found.differing_total else 0


def _said(why: str, code: int) -> int:
    print(why, file=sys.stderr)  # noqa: T201
    return code


def self_check_reading(redis: Redis, now: Callable[[], datetime]) -> Reading:
    """Nothing while there was none yet."""

    async def read() -> list[Family]:
        last = await last_check(redis)
        if last is None:
            return []
        values = {
            "age_seconds": ("How long ago the last self-check ended.", (now() - last.at).total_seconds()),
            "duration_seconds": ("How long the last self-check took.", last.seconds),
            "compared": ("Documents that the last self-check compared.", last.compared),
            "differing": ("Documents that were not what the log makes of them.", last.differing_total),
        }
        return [Family(f"lookup_self_check_{name}", "gauge", what, "", {"": value}) for name, (what, value) in values.items()]

    return read


def _check_of(found: Mapping[str, Differences], log_id: str, at: datetime, position: int, seconds: float) -> SelfCheck:
    compared = sum(sum(differences.counts.values()) for differences in found.values())
    differing = {
        view: sum(differences.counts.values()) - differences.counts["same"]
        for view, differences in found.items()
        if not differences.is_none
    }
    named = [f"{view}:{key}" for view, told in found.items() for keys in told.samples.values() for key in keys]
    return SelfCheck(log_id, at, position, seconds, compared, differing, named[:NAMED_MAX])


def _noted(check: SelfCheck) -> str:
    return json.dumps(asdict(check) | {"at": check.at.isoformat()})
