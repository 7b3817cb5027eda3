"""Checks of what moves things on: the relay, the projector, the parts. They need none of them to be alive."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from app import lag
from app.doctor.findings import Problem
from app.heartbeat import Heartbeat
from app.lag import Reached
from app.self_check import SelfCheck

RETRYING = "retrying"

About = tuple[str, Problem]
"""What a problem is about (a checkpoint, a generation, a part), and the problem."""


@dataclass(frozen=True, slots=True)
class Projection:
    """The live generation of views, as Redis has it. `stands_in_our_log`: it is of our log, at a fact that our log has."""

    generation: str
    reached: Reached
    stands_in_our_log: bool
    checked_at: datetime


@dataclass(frozen=True, slots=True)
class Machinery:
    """What moves things on, at one moment. `log_head` is 0 for an empty log; `projection` is None without any views, which
    says nothing when Redis does not answer. While all is well nothing waits longer than `lag_max` to be relayed or projected.
    `log_since` is when the first fact was recorded, `self_check_every` how often a self-check is due (zero: never, or Redis
    does not answer).
    """

    at: datetime
    log_head: int
    relayed: Mapping[str, Reached]
    relay_leads: bool
    oldest_dead_letter: datetime | None
    dead_letter_max_age: timedelta
    lag_max: timedelta
    log_since: datetime | None = None
    self_check_every: timedelta = timedelta(0)
    redis_answers: bool = False
    projection: Projection | None = None
    parts: Sequence[Heartbeat] = ()
    self_check: SelfCheck | None = None


@dataclass(frozen=True, slots=True)
class Looks:
    """The machinery now and a moment earlier: what was only on its way has moved meanwhile, and every part has told of
    itself anew.
    """

    now: Machinery
    earlier: Machinery


def no_relay(looks: Looks) -> Iterator[About]:
    """Somebody relays. An empty log is nobody's business."""
    if looks.now.log_head and not looks.now.relay_leads and not looks.earlier.relay_leads:
        yield "relay", Problem("No relay leads: no task is sent out and no fact told.")


def relay_behind(looks: Looks) -> Iterator[About]:
    """What was committed leaves within seconds, commands as well as facts."""
    for name, reached in looks.now.relayed.items():
        yield from _lag(name, reached, looks.earlier.relayed.get(name), looks.now)


def no_projector(looks: Looks) -> Iterator[About]:
    """Somebody looks after the views, also when nothing happens."""
    now, projection = looks.now, looks.now.projection
    if now.log_head and projection is not None:
        sentence = lag.forsaken(projection.checked_at, now.at, now.lag_max)
        if sentence is not None:
            yield projection.generation, Problem(sentence)


def projection_behind(looks: Looks) -> Iterator[About]:
    """What was committed is shown within seconds."""
    now, projection, earlier = looks.now, looks.now.projection, looks.earlier.projection
    if projection is None:
        if now.log_head and now.redis_answers:
            yield "views", Problem(lag.NO_VIEWS)
    elif projection.stands_in_our_log:
        yield from _lag(projection.generation, projection.reached, earlier.reached if earlier else None, now)


def views_of_another_log(looks: Looks) -> Iterator[About]:
    """The views are made of this log, and stand at a fact that it has."""
    projection = looks.now.projection
    if projection is not None and not projection.stands_in_our_log:
        position = projection.reached.position
        yield projection.generation, Problem(lag.of_another_log(position), position)


def self_check_failed(looks: Looks) -> Iterator[About]:
    """Every document of every view is what the log makes of it: the last self-check of this log found no other."""
    last = looks.now.self_check
    if last is None:
        return
    for view, count in last.differing.items():
        of_view = [name.removeprefix(f"{view}:") for name in last.named if name.startswith(f"{view}:")]
        such = f", such as {of_view[0] or 'all of it'}" if of_view else ""
        told = f"{count} documents were not what the log makes of them at {last.at:%F %T} UTC{such}."
        yield view, Problem(told, last.position)


def self_check_overdue(looks: Looks) -> Iterator[About]:
    """A self-check of this log is not older than twice the time after which one is due."""
    now, last = looks.now, looks.now.self_check
    since = last.at if last is not None else now.log_since
    if not now.self_check_every or since is None or now.at - since <= 2 * now.self_check_every:
        return
    told = f"The last one was at {last.at:%F %T} UTC" if last is not None else "There was none of this log yet"
    yield "self-check", Problem(f"{told}; one is due every {now.self_check_every / timedelta(hours=1):g} h.")


def parts_retrying(looks: Looks) -> Iterator[About]:
    """A part that ended in an error is back before it tells of itself again."""
    told = {(beat.part, beat.host, beat.pid): beat.at for beat in looks.earlier.parts if beat.state == RETRYING}
    for beat in looks.now.parts:
        at = told.get((beat.part, beat.host, beat.pid))
        if beat.state == RETRYING and at is not None and at != beat.at:
            problem = Problem(f"It ends in an error again and again ({beat.detail}).")
            yield f"{beat.part} on {beat.host}, process {beat.pid}", problem


def old_dead_letters(looks: Looks) -> Iterator[About]:
    """Somebody decides about a dead letter before it is old."""
    now, oldest = looks.now, looks.now.oldest_dead_letter
    if oldest is not None and now.at - oldest > now.dead_letter_max_age:
        yield "dead letters", Problem(f"The oldest that nobody has decided about died at {oldest:%F %T} UTC.")


def _lag(about: str, reached: Reached, earlier: Reached | None, now: Machinery) -> Iterator[About]:
    moves = earlier is None or earlier.position != reached.position
    sentence = lag.behind(reached, now.log_head, now.at, now.lag_max, moves=moves)
    if sentence is not None:
        yield about, Problem(sentence, reached.position)
