"""How a fact lies in the log: an envelope, a chained part, a hash, and an erasable part.

The `state` of a stored event is five lines of text, of which the last two may be missing:

    1 envelope    JSON: event_id, correlation_id, actor, recorded_at, …, `erasable`: {field: SHA-256(salt || value)}
    2 chained     JSON: the fact without its erasable fields
    3 hash        hex: SHA-256 over the stream's previous hash and everything above (see `events/chain.py`)
    4 salts       JSON: {field: hex salt}
    5 values      JSON: {field: value}

Erasing removes lines 4 and 5 (or single fields of them) and nothing else: the chain still verifies, and the field reads as
`Erased`. Compact JSON has no raw line feed, so the lines are found without parsing, and the exact hashed bytes are kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any, NamedTuple
from uuid import UUID

import orjson

from events.catalog import FACTS, TOPICS, fact_type, upcast
from events.chain import chained_hash
from events.facts import Fact

SALT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Cause:
    """Who or what made a decision, on whose request, and why; goes into the envelope of each of its facts.

    `causation_id` is the command that was carried out. Without one it was the request itself, which `correlation_id` names.
    `key_id` is the API key of the request.
    """

    actor: str
    correlation_id: UUID
    causation_id: UUID | None = None
    request_id: str | None = None
    key_id: str | None = None
    reason: str | None = None
    traceparent: str | None = None


class StoredFact(NamedTuple):
    """One row of the log, as it lies there. `position` is global, `stream_version` counts from 1 within the stream."""

    position: int
    stream_id: UUID
    stream_version: int
    topic: str
    state: bytes


class Recorded(NamedTuple):
    """One fact with its place in the log."""

    position: int
    stream_id: UUID
    stream_version: int
    fact: Fact
    hash: str
    recorded_at: datetime


@dataclass(frozen=True, slots=True)
class Place:
    """Where in its stream a fact goes, and what it is chained to."""

    stream_id: UUID
    stream_version: int
    previous_hash: bytes


@dataclass(frozen=True, slots=True)
class Written:
    """A fact made ready for the log."""

    stream_id: UUID
    stream_version: int
    topic: str
    state: bytes
    hash: bytes
    fact: Fact

    def at(self, position: int) -> StoredFact:
        """As it lies in the log."""
        return StoredFact(position, self.stream_id, self.stream_version, self.topic, self.state)


def write(
    fact: Fact, place: Place, cause: Cause, *, event_id: UUID, recorded_at: datetime, salt: Callable[[], bytes]
) -> Written:
    """Lay a fact out for the log. `salt` gives `SALT_BYTES` fresh random bytes for each erasable field."""
    return write_caused(fact, place, shared_envelope(cause, recorded_at), event_id=event_id, salt=salt)


def shared_envelope(cause: Cause, recorded_at: datetime) -> bytes:
    """What the envelopes of all facts of one decision have in common: JSON members, without the braces."""
    members = {
        "correlation_id": cause.correlation_id,
        "causation_id": cause.causation_id or cause.correlation_id,
        "actor": cause.actor,
        "recorded_at": recorded_at,
        "request_id": cause.request_id,
        "key_id": cause.key_id,
        "reason": cause.reason,
        "traceparent": cause.traceparent,
    }
    told = {name: value for name, value in members.items() if value is not None}
    return orjson.dumps(told, option=orjson.OPT_UTC_Z)[1:-1]


def write_caused(fact: Fact, place: Place, shared: bytes, *, event_id: UUID, salt: Callable[[], bytes]) -> Written:
    """`write` with the envelope's common part already laid out."""
    topic = TOPICS[type(fact)]
    envelope = b'{"event_id":"%b",%b' % (str(event_id).encode(), shared)
    if not fact.erasable_fields:
        chained = fact.__pydantic_serializer__.to_json(fact, exclude_none=True)
        return _written(fact, place, topic, envelope + b"}", chained, [])
    chained = fact.__pydantic_serializer__.to_json(fact, exclude=set(fact.erasable_fields), exclude_none=True)
    values = _erasable_values(fact)
    if not values:
        return _written(fact, place, topic, envelope + b"}", chained, [])
    salts = {name: salt() for name in values}
    digests = orjson.dumps({name: digest(salts[name], value) for name, value in values.items()})
    erasable = [
        orjson.dumps({name: value.hex() for name, value in salts.items()}),
        b"{" + b",".join(b'"%b":%b' % (name.encode(), value) for name, value in values.items()) + b"}",
    ]
    return _written(fact, place, topic, b'%b,"erasable":%b}' % (envelope, digests), chained, erasable)


def _written(fact: Fact, place: Place, topic: str, envelope: bytes, chained: bytes, erasable: list[bytes]) -> Written:
    hashed = chained_hash(place.previous_hash, place.stream_id, place.stream_version, topic, envelope, chained)
    state = b"\n".join([envelope, chained, hashed.hex().encode(), *erasable])
    return Written(place.stream_id, place.stream_version, topic, state, hashed, fact)


def read(stored: StoredFact) -> Recorded:
    """The fact of a row, in its current version. Raises `UnknownFact` for a topic that this program does not know."""
    lines = stored.state.split(b"\n")
    return _recorded(stored, lines, _fact_of(stored.topic, lines))


def recorded(stored: StoredFact, fact: Fact) -> Recorded:
    """As `read`, for who still has the fact that was written there."""
    return _recorded(stored, stored.state.split(b"\n", 3), fact)


def _recorded(stored: StoredFact, lines: Sequence[bytes], fact: Fact) -> Recorded:
    return Recorded(
        stored.position,
        stored.stream_id,
        stored.stream_version,
        fact,
        bytes.fromhex(lines[2].decode()).hex(),
        _recorded_at(lines[0]),
    )


def fact_of(topic: str, state: bytes) -> Fact:
    return _fact_of(topic, state.split(b"\n"))


def whole_fact(topic: str, state: bytes) -> bytes:
    """The fact's JSON with its erasable fields put back, or `{"erased":true}` where they were erased."""
    return _whole_fact(fact_type(topic), state.split(b"\n"))


def _fact_of(topic: str, lines: Sequence[bytes]) -> Fact:
    known = FACTS.get(topic)
    if known is None:
        known = fact_type(topic)
        return known.model_validate_json(orjson.dumps(upcast(topic, orjson.loads(_whole_fact(known, lines)))))
    # What `model_validate_json` comes to, without the questions that it asks before: there are millions of rows.
    fact: Fact = known.__pydantic_validator__.validate_json(_whole_fact(known, lines))
    return fact


def _whole_fact(known: type[Fact], lines: Sequence[bytes]) -> bytes:
    if not known.erasable_fields:
        return lines[1]
    values: dict[str, Any] = orjson.loads(lines[4]) if len(lines) > 4 else {}  # noqa: PLR2004 - line 5 of the layout above
    erasable = _erasable_of(lines[0])
    if values and values.keys() >= erasable.keys():
        return b"%b,%b" % (lines[1][:-1], lines[4][1:])
    for name in erasable:
        values.setdefault(name, {"erased": True})
    if not values:
        return lines[1]
    return lines[1][:-1] + b"," + orjson.dumps(values)[1:]


def _erasable_of(envelope: bytes) -> dict[str, str]:
    """The member `erasable`. Within a text a quote is escaped, so it is found without parsing what is before it; it is the
    last one wherever we wrote it, and is looked for like any other where we did not.
    """
    _, found, rest = envelope.partition(b',"erasable":{')
    if found and rest.find(b"}") == len(rest) - 2:
        last: dict[str, str] = orjson.loads(b"{" + rest[:-1])
        return last
    erasable: dict[str, str] = orjson.loads(envelope).get("erasable", {})
    return erasable


def _recorded_at(envelope: bytes) -> datetime:
    """The member `recorded_at`, found in the same way."""
    _, found, rest = envelope.partition(b'"recorded_at":"')
    if found:
        return datetime.fromisoformat(rest[: rest.index(b'"')].decode())
    return datetime.fromisoformat(orjson.loads(envelope)["recorded_at"])


def envelope_of(state: bytes) -> dict[str, Any]:
    envelope: dict[str, Any] = orjson.loads(state[: state.index(b"\n")])
    return envelope


def cause_of(state: bytes) -> Cause:
    """What the envelope says of the decision. Old envelopes may lack the command."""
    told = envelope_of(state)
    command_id = told.get("causation_id")
    return Cause(
        actor=told["actor"],
        correlation_id=UUID(told["correlation_id"]),
        causation_id=None if command_id is None else UUID(command_id),
        request_id=told.get("request_id"),
        key_id=told.get("key_id"),
        reason=told.get("reason"),
        traceparent=told.get("traceparent"),
    )


def hash_of(state: bytes) -> bytes:
    return bytes.fromhex(state.split(b"\n", 3)[2].decode())


def digest(salt: bytes, value: bytes) -> str:
    """What the chained part keeps of an erasable value (canonical JSON bytes): hex of SHA-256(salt || value)."""
    return sha256(salt + value).hexdigest()


def _erasable_values(fact: Fact) -> dict[str, bytes]:
    if not fact.erasable_fields:
        return {}
    values = fact.model_dump(mode="json", include=set(fact.erasable_fields), exclude_none=True)
    return {name: orjson.dumps(value, option=orjson.OPT_SORT_KEYS) for name, value in values.items()}
