"""Which keys of Redis are ours, and whom they belong to."""

import re
from collections.abc import Collection
from enum import Enum, auto
from uuid import UUID

from app.heartbeat import PREFIX as PARTS_PREFIX
from events.redis_bus import ALL_KEYS as BUS_KEYS
from events.redis_bus import PREFIX as BUS_PREFIX
from projections.table import PROJECTIONS
from projections.views import JOB_STATUS, Keys

VIEWS_PREFIX = "views:"
_PART = re.compile(rf"{PARTS_PREFIX}[^:]+:[^:]+:\d+")
_OF_A_GENERATION = re.compile(r"(g\d+):(.+)", re.DOTALL)


class Owner(Enum):
    """Whom a key belongs to. A `JOB` may still be one that the log does not know."""

    SOMEBODY_ELSE = auto()
    PART = auto()
    QUEUE = auto()
    VIEWS = auto()
    JOB = auto()
    OLD_GENERATION = auto()
    NOBODY = auto()


def owner_of(key: str, used: Collection[str], keys: Keys) -> Owner:
    """The owner of a key, when these generations of views are in use."""
    if key.startswith(BUS_PREFIX):
        return Owner.QUEUE if key in BUS_KEYS else Owner.NOBODY
    if key.startswith(PARTS_PREFIX):
        return Owner.PART if _PART.fullmatch(key) else Owner.NOBODY
    if not key.startswith(VIEWS_PREFIX):
        return Owner.SOMEBODY_ELSE
    if key in _of_all_generations(keys):
        return Owner.VIEWS
    generation = generation_of(key, keys)
    if generation is None:
        return Owner.NOBODY
    if generation not in used:
        return Owner.OLD_GENERATION
    if job_of(key, keys) is not None:
        return Owner.JOB
    return Owner.VIEWS if _is_of_a_view(key, generation, keys) else Owner.NOBODY


def _of_all_generations(keys: Keys) -> set[str]:
    whose_turn = {keys.fence, keys.lease, keys.builder}
    return whose_turn | {keys.live, keys.fed, keys.kept, keys.before, keys.built, keys.dropped, keys.roster}


def _is_of_a_view(key: str, generation: str, keys: Keys) -> bool:
    """Whether it is a key of a view that we know, or of the generation as a whole. Those of jobs are looked at on their own."""
    if key in {keys.meta(generation), keys.expiry(generation), keys.marker(generation)}:
        return True
    names = [view.name for view in PROJECTIONS if view.name != JOB_STATUS]
    return any(key == keys.key(generation, name) or key.startswith(f"{keys.key(generation, name)}:") for name in names)


def generation_of(key: str, keys: Keys) -> str | None:
    """The generation of views that a key is one of."""
    if not key.startswith(keys.prefix):
        return None
    found = _OF_A_GENERATION.fullmatch(key.removeprefix(keys.prefix))
    return found[1] if found else None


def all_of(generation: str, keys: Keys) -> str:
    """The pattern of all keys of a generation."""
    return f"{keys.prefix}{generation}:*"


def job_of(key: str, keys: Keys) -> UUID | None:
    """The job that a key is the view of."""
    generation = generation_of(key, keys)
    if generation is None:
        return None
    job_id = as_job_id(key.removeprefix(keys.job(generation, "")))
    return job_id if job_id is not None and key == keys.job(generation, job_id) else None


def as_job_id(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
