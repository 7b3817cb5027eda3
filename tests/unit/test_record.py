"""How a fact lies in the log, and what is left of it when its erasable part is gone."""

import json
from datetime import UTC, datetime
from hashlib import sha256
from uuid import UUID

import orjson
import pytest

from events.catalog import TOPICS, UnknownFact
from events.chain import GENESIS, chained_hash
from events.facts import Erased, Fact, JobSubmitted, Target, TargetType, TasksDispatched
from events.record import SALT_BYTES, Cause, Place, StoredFact, digest, envelope_of, hash_of, read, whole_fact, write
from tests.builders import JOB, NOW, PING, RDAP, completed, dispatched, failed, submitted

EVENT_ID = UUID(int=1)
CAUSE = Cause(actor="anonymous", correlation_id=UUID(int=2), traceparent="00-aa-bb-01")
SALT = bytes(range(SALT_BYTES))


def stored(fact: Fact, cause: Cause = CAUSE) -> StoredFact:
    place = Place(JOB, 1, GENESIS)
    row = write(fact, place, cause, event_id=EVENT_ID, recorded_at=NOW, salt=lambda: SALT)
    return StoredFact(9, row.stream_id, row.stream_version, row.topic, row.state)


def with_state(row: StoredFact, state: bytes) -> StoredFact:
    return StoredFact(row.position, row.stream_id, row.stream_version, row.topic, state)


def test_a_written_fact_reads_as_it_was_with_its_place_and_time() -> None:
    for fact in (submitted(PING, RDAP), dispatched(PING), completed(PING), failed(RDAP)):
        row = stored(fact)
        recorded = read(row)
        assert recorded.fact == fact
        assert (recorded.position, recorded.stream_id, recorded.stream_version) == (9, JOB, 1)
        assert (recorded.recorded_at, recorded.hash) == (NOW, hash_of(row.state).hex())


def test_the_envelope_says_who_and_why_and_leaves_out_what_nobody_knows() -> None:
    envelope = envelope_of(stored(completed(PING)).state)

    assert envelope == {
        "event_id": str(EVENT_ID),
        "correlation_id": str(CAUSE.correlation_id),
        "causation_id": str(CAUSE.correlation_id),
        "actor": "anonymous",
        "recorded_at": "2026-01-02T03:04:05Z",
        "traceparent": "00-aa-bb-01",
    }


def test_erasable_values_lie_in_the_last_two_lines_only() -> None:
    envelope, chained, _, salts, values = stored(submitted(PING)).state.split(b"\n")

    for part in (envelope, chained, salts):
        assert b"198.51.100.7" not in part
        assert b"203.0.113.9" not in part
    assert orjson.loads(salts) == {"target": SALT.hex(), "requested_by": SALT.hex()}
    assert orjson.loads(values)["target"]["raw"] == " 198.51.100.7 "


def test_the_chained_part_keeps_a_salted_digest_of_each_erasable_value() -> None:
    """The digest can be checked by anybody who holds lines 4 and 5: SHA-256 over the salt and the value's bytes."""
    envelope, _, _, salts, values = stored(submitted(PING)).state.split(b"\n")
    digests = orjson.loads(envelope)["erasable"]

    assert digests.keys() == {"target", "requested_by"}
    for name, value in orjson.loads(values).items():
        salt = bytes.fromhex(orjson.loads(salts)[name])
        canonical = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
        assert digests[name] == digest(salt, canonical) == sha256(salt + canonical).hexdigest()


def test_a_fact_without_erasable_values_is_three_lines() -> None:
    assert len(stored(completed(PING)).state.split(b"\n")) == 3


def test_erasing_removes_two_lines_the_chain_still_verifies_and_the_field_reads_as_erased() -> None:
    row = stored(submitted(PING))
    envelope, chained, kept_hash, *_ = row.state.split(b"\n")

    erased = with_state(row, b"\n".join([envelope, chained, kept_hash]))

    fact = read(erased).fact
    assert isinstance(fact, JobSubmitted)
    assert fact.target == fact.requested_by == Erased()
    assert fact.target_type is TargetType.IP_ADDRESS
    assert b"198.51.100.7" not in erased.state
    assert chained_hash(GENESIS, JOB, 1, row.topic, envelope, chained) == hash_of(erased.state) == hash_of(row.state)


def test_a_single_field_can_be_erased() -> None:
    row = stored(submitted(PING))
    *kept, _, values = row.state.split(b"\n")
    target = orjson.dumps({"target": orjson.loads(values)["target"]})

    fact = read(with_state(row, b"\n".join([*kept, b"{}", target]))).fact

    assert isinstance(fact, JobSubmitted)
    assert fact.requested_by == Erased()
    assert isinstance(fact.target, Target)


def test_an_absent_value_stays_absent_instead_of_reading_as_erased() -> None:
    fact = submitted(PING).model_copy(update={"requested_by": None})
    row = stored(fact)

    assert read(row).fact == fact
    assert "requested_by" not in envelope_of(row.state)["erasable"]


def test_a_dispatch_that_is_decided_after_the_erasure_knows_no_target_either() -> None:
    fact = dispatched(PING).model_copy(update={"target": Erased()})

    assert read(stored(fact)).fact == fact


@pytest.mark.parametrize(
    "raw", ["line\nfeed.example", 'quo"te\\.example', "b\u00fccher.de", "\u2028\u0000.example", "x" * 1000]
)
def test_no_value_can_break_the_lines(raw: str) -> None:
    target = Target(raw=raw, canonical="example.com", type=TargetType.DOMAIN)
    fact = submitted(PING, target=target).model_copy(update={"requested_by": raw})
    row = stored(fact, Cause(actor=raw, correlation_id=JOB, reason=raw))

    assert len(row.state.split(b"\n")) == 5
    assert read(row).fact == fact
    assert envelope_of(row.state)["reason"] == raw


def test_times_are_kept_to_the_microsecond_in_utc() -> None:
    when = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)

    fact = read(stored(completed(PING, when=when))).fact

    assert fact == completed(PING, when=when)


def test_a_topic_that_is_not_in_the_catalog_stops_the_reader() -> None:
    row = stored(completed(PING))
    strange = StoredFact(row.position, row.stream_id, row.stream_version, "lookup.TaskVanished.v1", row.state)

    with pytest.raises(UnknownFact, match="TaskVanished"):
        read(strange)


def test_a_newer_version_stops_the_reader() -> None:
    row = stored(completed(PING))
    newer = StoredFact(row.position, row.stream_id, row.stream_version, "lookup.TaskCompleted.v3", row.state)

    with pytest.raises(UnknownFact, match="Upgrade"):
        read(newer)


def test_a_field_that_is_not_ours_stops_the_reader() -> None:
    row = stored(failed(PING))
    assert row.topic == TOPICS[type(failed(PING))]

    with pytest.raises(ValueError, match="surprise"):
        read(with_state(row, row.state.replace(b'"attempt":', b'"surprise":1,"attempt":')))


def test_the_whole_fact_is_the_json_that_subscribers_get() -> None:
    for fact in (submitted(PING), dispatched(PING), completed(PING)):
        row = stored(fact)
        assert type(fact).model_validate_json(whole_fact(row.topic, row.state)) == fact
    assert isinstance(read(stored(dispatched(PING))).fact, TasksDispatched)


def test_what_somebody_says_in_an_envelope_is_never_taken_for_another_member_of_it() -> None:
    says = 'x","recorded_at":"1999-01-01T00:00:00Z","erasable":{"target":"y"}'
    row = stored(submitted(PING), Cause(actor=says, correlation_id=UUID(int=2), reason='{"erasable":{}},"erasable":{'))

    assert read(row).recorded_at == NOW
    assert read(row).fact == submitted(PING)


def test_an_envelope_in_another_order_and_spelling_reads_the_same() -> None:
    row = stored(submitted(PING))
    envelope, rest = row.state.split(b"\n", 1)
    members = orjson.loads(envelope)
    spelled = json.dumps({name: members[name] for name in reversed(members)}, separators=(" , ", " : ")).encode()
    assert envelope != spelled

    erased = with_state(row, b"\n".join([spelled, *rest.split(b"\n")[:2]]))

    assert read(with_state(row, spelled + b"\n" + rest)) == read(row)
    assert read(erased).fact == submitted(PING).model_copy(update={"target": Erased(), "requested_by": Erased()})
