"""The catalog is complete, resolves to itself only, and brings what an older release wrote up to date."""

import re
from collections.abc import Mapping
from typing import Any

import pytest

from events import facts
from events.catalog import FACTS, TOPICS, UPCASTERS, VERSIONS, UnknownFact, fact_type
from events.facts import Fact, JobFact, TaskTimedOut
from events.record import StoredFact, fact_of
from events.wire import cloud_events, read_batch
from tests.builders import PING, given, memory_store, skipped, submitted, timed_out


def test_every_kind_of_fact_is_in_the_catalog() -> None:
    assert set(VERSIONS) == set(Fact.__subclasses__())
    assert set(JobFact.__args__) < set(VERSIONS)


def test_topics_tell_name_and_version_and_lead_back_to_their_fact() -> None:
    assert len(set(TOPICS.values())) == len(VERSIONS)
    for fact, topic in TOPICS.items():
        assert re.fullmatch(rf"lookup\.{fact.__name__}\.v{VERSIONS[fact]}", topic)
        assert fact_type(topic) is fact
        assert FACTS[topic] is fact


@pytest.mark.parametrize("topic", ["os:system", "events.facts:JobSubmitted", "lookup.JobSubmitted.v2", "lookup.Fact.v1", ""])
def test_a_topic_that_somebody_else_wrote_leads_nowhere(topic: str) -> None:
    with pytest.raises(UnknownFact):
        fact_type(topic)


def test_the_erasable_fields_are_the_personal_ones() -> None:
    erasable = {fact.__name__: fact.erasable_fields for fact in VERSIONS if fact.erasable_fields}

    assert erasable == {"JobSubmitted": ("target", "requested_by"), "TasksDispatched": ("target",)}


def test_facts_are_frozen_strict_and_know_their_fields() -> None:
    for fact in VERSIONS:
        assert fact.model_config["frozen"]
        assert fact.model_config["strict"]
        assert fact.model_config["extra"] == "forbid"
    with pytest.raises(ValueError, match="frozen"):
        setattr(skipped(PING), "message", "another")  # noqa: B010 - the type checker refuses the plain spelling, rightly


FIRST, SECOND, THIRD = (f"lookup.TaskTimedOut.v{version}" for version in (1, 2, 3))


@pytest.fixture
def two_versions_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release in which TaskTimedOut stands at version 3: first it had no attempt, then its time had another name."""
    monkeypatch.delitem(FACTS, FIRST)
    monkeypatch.setitem(FACTS, THIRD, TaskTimedOut)
    topics: Mapping[Any, str] = TOPICS
    monkeypatch.setitem(topics, TaskTimedOut, THIRD)
    monkeypatch.setitem(UPCASTERS, FIRST, lambda old: {**old, "attempt": 1})
    monkeypatch.setitem(UPCASTERS, SECOND, _with_the_times_new_name)


def _with_the_times_new_name(old: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in old.items() if name != "at"} | {"timed_out_at": old["at"]}


WRITTEN_THEN = {
    FIRST: b'{"job_id":"019b7c8a-0000-7000-8000-000000000001","service":"Ping","at":"2026-01-02T03:04:05Z"}',
    SECOND: b'{"job_id":"019b7c8a-0000-7000-8000-000000000001","service":"Ping","attempt":1,"at":"2026-01-02T03:04:05Z"}',
}


@pytest.mark.usefixtures("two_versions_later")
@pytest.mark.parametrize("topic", [FIRST, SECOND])
def test_an_older_version_is_brought_up_to_date_step_by_step(topic: str) -> None:
    assert fact_of(topic, b"{}\n" + WRITTEN_THEN[topic] + b"\n00") == timed_out(PING)


@pytest.mark.usefixtures("two_versions_later")
def test_a_version_that_is_yet_to_come_stops_the_reader_all_the_same() -> None:
    with pytest.raises(UnknownFact):
        fact_of("lookup.TaskTimedOut.v4", b"{}\n{}\n00")


@pytest.mark.usefixtures("two_versions_later")
@pytest.mark.parametrize("topic", [FIRST, SECOND])
async def test_subscribers_see_the_current_version_whatever_the_log_holds(topic: str) -> None:
    store = memory_store()
    await given(store, submitted(PING), timed_out(PING))
    _, row = await store.read_all(0, 10)
    envelope, _, fact_hash = row.state.split(b"\n")
    older = StoredFact(2, row.stream_id, 2, topic, b"\n".join([envelope, WRITTEN_THEN[topic], fact_hash]))

    body = cloud_events([older], "/lookup/test")

    (recorded,) = read_batch(body)
    assert recorded.fact == timed_out(PING)
    assert f'"type":"{THIRD}"'.encode() in body


def test_a_value_has_one_home() -> None:
    """The same class by two names would be two topics for one fact."""
    names = [name for name in vars(facts) if isinstance(vars(facts)[name], type) and issubclass(vars(facts)[name], Fact)]
    assert len(names) == len(VERSIONS) + 1
