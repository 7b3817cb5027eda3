"""`lookup doctor` from its settings to its report."""

from dataclasses import dataclass
from datetime import timedelta

import psycopg
from redis.exceptions import RedisError

from app.doctor.examination import NO_DATABASE, NO_REDIS, SECOND_LOOK_AFTER_S, Examination
from app.doctor.findings import Report
from app.doctor.mending import Mender
from app.wiring import Wiring, utc_now
from events.store import OutcomeUnknown, StoreUnavailable
from results.documents import ResultsUnavailable
from write_side.sagas import TooManyConflicts

DEAD_LETTER_MAX_AGE = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Fix:
    """Put right what was found, in somebody's name and for a reason (None: that it was found)."""

    actor: str
    reason: str | None = None


async def consult(
    wiring: Wiring,
    fix: Fix | None = None,
    *,
    dead_letter_max_age: timedelta = DEAD_LETTER_MAX_AGE,
    second_look_after_s: float = SECOND_LOOK_AFTER_S,
) -> Report:
    """Examines everything, and mends what was found if it should. Whatever cannot be reached is told in the report."""
    examination = await examination_of(wiring, dead_letter_max_age=dead_letter_max_age, second_look_after_s=second_look_after_s)
    report = await examination.run()
    if fix is not None and report.broken:
        await _mend(Mender(examination, wiring.watch(), fix.actor, fix.reason), report)
    return report


async def examination_of(wiring: Wiring, *, dead_letter_max_age: timedelta, second_look_after_s: float) -> Examination:
    settings = wiring.settings
    assert settings.database_url is not None
    return Examination(
        database_url=settings.database_url,
        store=wiring.history,
        redis=wiring.redis,
        documents=await wiring.all_documents(),
        keys=wiring.keys,
        rules=settings.rules,
        retention=settings.retention,
        dead_letter_max_age=dead_letter_max_age,
        lag_max=settings.patience.stalled_after,
        self_check_every=settings.self_check_every,
        now=utc_now,
        second_look_after_s=second_look_after_s,
    )


async def _mend(mender: Mender, report: Report) -> None:
    try:
        await mender.mend(report)
    except (StoreUnavailable, OutcomeUnknown, TooManyConflicts, ResultsUnavailable, psycopg.Error):
        report.unexamined["what is left to mend"] = NO_DATABASE
    except (RedisError, OSError):
        report.unexamined["what is left to mend"] = NO_REDIS
