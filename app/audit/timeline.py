"""What happened to a job, fact by fact: as a list in time, and as a tree of what led to what."""

from collections.abc import Sequence
from dataclasses import dataclass

from app.rendering import safe
from events.facts import TasksDispatched
from events.record import Recorded, StoredFact, cause_of, read
from read_side.sentences import sentences_of


@dataclass(frozen=True, slots=True)
class Line:
    """One fact: what happened, who did it, why, and on whose request. `commands` are the ids of the commands that it gave."""

    position: int
    at: str
    fact: str
    sentence: str
    actor: str
    reason: str | None
    request_id: str | None
    key_id: str | None
    traceparent: str | None
    correlation_id: str
    causation_id: str
    hash: str
    commands: tuple[str, ...] = ()


def timeline_of(stream: Sequence[StoredFact]) -> list[Line]:
    """Raises `UnknownFact` for a fact that this program does not know."""
    facts = [read(stored) for stored in stream]
    sentences = sentences_of(recorded.fact for recorded in facts)
    return [_line(stored, recorded, told) for stored, recorded, told in zip(stream, facts, sentences, strict=True)]


def as_text(line: Line) -> str:
    """Two lines of text."""
    why = f", since {line.reason}" if line.reason else ""
    rest = {"request": line.request_id, "key": line.key_id, "trace": line.traceparent, "command": line.causation_id}
    named = "  ".join(f"{name} {value}" for name, value in rest.items() if value is not None)
    return safe(f"{line.position:>8}  {line.at}  {line.sentence}") + "\n" + safe(f"{'':10}by {line.actor}{why}  ({named})")


def tree_of(lines: Sequence[Line]) -> list[str]:
    """The request and the facts that it led to, below each fact the commands that it gave, below these what they led to."""
    given = {command for line in lines for command in line.commands}
    drawn: list[str] = []
    for cause in dict.fromkeys(line.causation_id for line in lines if line.causation_id not in given):
        first = next(line for line in lines if line.causation_id == cause)
        name = f"request {first.request_id or cause}" if cause == first.correlation_id else f"command {cause}"
        drawn.append(safe(f"{name}, by {first.actor}" + (f": {first.reason}" if first.reason else "")))
        drawn += _branches(cause, lines, "")
    return drawn


def _branches(cause: str, lines: Sequence[Line], indent: str) -> list[str]:
    """A command is given before what it leads to, so this comes to an end."""
    drawn: list[str] = []
    led_to = [line for line in lines if line.causation_id == cause]
    for line in led_to:
        last = line is led_to[-1]
        drawn.append(safe(f"{indent}{'└' if last else '├'}─ {line.position} {line.fact}: {line.sentence}"))
        below = indent + ("   " if last else "│  ")
        for command in line.commands:
            later = [other for other in lines if other.position > line.position]
            told = _branches(command, later, below + "   ")
            by = next((other.actor for other in later if other.causation_id == command), "nobody yet")
            drawn.append(safe(f"{below}◦ command {command}, taken up by {by}"))
            drawn += told
    return drawn


def _line(stored: StoredFact, recorded: Recorded, sentence: str) -> Line:
    cause = cause_of(stored.state)
    fact = recorded.fact
    return Line(
        position=recorded.position,
        at=recorded.recorded_at.isoformat(timespec="milliseconds"),
        fact=type(fact).__name__,
        sentence=sentence,
        actor=cause.actor,
        reason=cause.reason,
        request_id=cause.request_id,
        key_id=cause.key_id,
        traceparent=cause.traceparent,
        correlation_id=str(cause.correlation_id),
        causation_id=str(cause.causation_id or cause.correlation_id),
        hash=recorded.hash,
        commands=tuple(str(task.command_id) for task in fact.tasks) if isinstance(fact, TasksDispatched) else (),
    )
