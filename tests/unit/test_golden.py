"""What was ever written loads for ever: each golden file is a row of the log from the day its version was born.

A red test here means that logs that exist cannot be read any more, or that a fact changed without a new version. Never
edit or rewrite a golden file; give the fact a new version, an upcaster from the old one, and a file of its own.
"""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
import pytest

from events.catalog import FACTS, TOPICS, UPCASTERS, VERSIONS, topics_of
from events.chain import chained_hash
from events.facts import Erased, Fact
from events.record import StoredFact, digest, hash_of, read, recorded
from tests.golden.write import (
    EXAMPLES,
    FOLDER,
    SCHEMAS,
    Golden,
    golden_of,
    schema_of,
    sha256_of,
    write_missing,
    write_missing_schemas,
)

FILES = sorted(FOLDER.glob("*.json"))
SINCE_THEN: dict[str, dict[str, Any]] = {
    "lookup.TaskCompleted.v1": {"worker": None, "provider": None, "parser": None, "raw": None, "raw_absent": None},
    "lookup.TaskFailed.v1": {"worker": None},
}
"""Old topic -> what its upcasters make of the golden row beyond what it said: written down, so that no upcaster drifts."""
TO_DO = """
Facts of this version lie in logs that this program has to read. If you did not mean to change what they look like, take the
change back. If you did, give the fact a new version (docs/schema.md):
  1. events/catalog.py: raise its number in VERSIONS, and add an upcaster from the old topic to UPCASTERS;
  2. tests/golden/write.py: an example of the new version instead of the old one's (whose file stays); then
     `python -m tests.golden.write`;
  3. tests/unit/test_golden.py: a line for each new file in COMMITTED, and one for the old topic in SINCE_THEN.
A value or an enumeration is part of every fact that holds it: all of them need their new version."""


def load(path: Path) -> Golden:
    return Golden(**orjson.loads(path.read_bytes()))


def row_of(golden: Golden, state: bytes) -> StoredFact:
    return StoredFact(1, UUID(golden.stream_id), golden.stream_version, golden.topic, state)


def recomputed(golden: Golden, state: bytes) -> bytes:
    envelope, chained, *_ = state.split(b"\n")
    return chained_hash(
        bytes.fromhex(golden.previous_hash), UUID(golden.stream_id), golden.stream_version, golden.topic, envelope, chained
    )


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    path: Path = request.param
    return load(path)


def test_a_golden_row_reads_as_the_fact_that_it_was(golden: Golden) -> None:
    recorded = read(row_of(golden, golden.state))

    assert recorded.fact.model_dump(mode="json") == golden.fact | SINCE_THEN.get(golden.topic, {})
    assert recorded.hash == golden.hash


def test_a_golden_rows_hash_can_be_recomputed(golden: Golden) -> None:
    assert recomputed(golden, golden.state).hex() == golden.hash == hash_of(golden.state).hex()


def test_an_erased_golden_row_still_verifies_and_reads_as_erased(golden: Golden) -> None:
    erased = "\n".join(golden.lines[:3]).encode()

    fact = read(row_of(golden, erased)).fact

    erasable = set(orjson.loads(golden.lines[0]).get("erasable", {}))
    assert erasable <= set(fact.erasable_fields)
    assert all(getattr(fact, name) == Erased() for name in erasable)
    assert recomputed(golden, erased).hex() == golden.hash
    whole = golden.fact | SINCE_THEN.get(golden.topic, {})
    kept = {name: value for name, value in whole.items() if name not in erasable}
    assert {name: value for name, value in fact.model_dump(mode="json").items() if name not in erasable} == kept


def test_a_golden_rows_digests_are_those_of_its_erasable_values(golden: Golden) -> None:
    digests = orjson.loads(golden.lines[0]).get("erasable", {})
    salts, values = (orjson.loads(line) for line in golden.lines[3:5]) if digests else ({}, {})

    assert digests.keys() == salts.keys() == values.keys()
    for name, value in values.items():
        canonical = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
        assert digests[name] == digest(bytes.fromhex(salts[name]), canonical)


@pytest.mark.parametrize("topic", topics_of(*VERSIONS))
def test_every_version_that_was_ever_written_has_its_golden_file_and_its_way_to_the_current_one(topic: str) -> None:
    name = topic.removeprefix("lookup.")

    assert load(FOLDER / f"{name}.json").topic == topic
    assert topic in FACTS or topic in UPCASTERS


@pytest.mark.parametrize("fact", VERSIONS, ids=lambda fact: TOPICS[fact])
def test_a_fact_does_not_change_its_shape_without_a_new_version(fact: type[Fact]) -> None:
    name = TOPICS[fact].removeprefix("lookup.")
    committed = SCHEMAS / f"{name}.json"
    assert committed.exists(), f"{name} has no schema yet: `python -m tests.golden.write` writes it, once."

    changes = list(differences(orjson.loads(committed.read_bytes()), schema_of(fact)))

    assert not changes, "\n".join([f"{name} does not look as it did when it was first written:", *changes, TO_DO])


def test_a_schema_is_the_one_that_its_golden_file_was_written_with() -> None:
    """The golden file cannot be changed, so the schema beside it cannot be either."""
    vouched = {load(path).topic.removeprefix("lookup."): load(path).schema_sha256 for path in FILES}

    assert {path.stem: sha256_of(orjson.loads(path.read_bytes())) for path in SCHEMAS.glob("*.json")} == vouched


def test_a_changed_value_is_told_by_its_place() -> None:
    then = {"$defs": {"TaskError": {"required": ["code"], "properties": {"code": {"type": "string"}}}}}
    now = {"$defs": {"TaskError": {"required": ["code", "hint"], "properties": {"hint": {"type": "string"}}}}}

    assert list(differences(then, now)) == [
        '  $defs.TaskError.properties.code was {"type":"string"}, and is gone',
        '  $defs.TaskError.properties.hint is {"type":"string"}, and was not there',
        '  $defs.TaskError.required was ["code"], and is ["code","hint"]',
    ]


def differences(then: Any, now: Any, place: str = "") -> Iterator[str]:
    """Where two schemas differ, a line each."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        if then != now:
            yield f"  {place} was {_spelled(then)}, and is {_spelled(now)}"
        return
    for name in sorted(then.keys() | now.keys()):
        inner = f"{place}.{name}" if place else name
        if name not in now:
            yield f"  {inner} was {_spelled(then[name])}, and is gone"
        elif name not in then:
            yield f"  {inner} is {_spelled(now[name])}, and was not there"
        else:
            yield from differences(then[name], now[name], inner)


def _spelled(schema: Any) -> str:
    return orjson.dumps(schema).decode()


def test_what_is_written_today_is_written_as_it_was_then(golden: Golden) -> None:
    """Byte for byte: a writer that orders or spells anything differently would be a new version, too."""
    if golden.topic not in FACTS:
        pytest.skip("An older version: nobody writes it any more.")
    fact = next(fact for fact in EXAMPLES.values() if fact.model_dump(mode="json") == golden.fact)
    stored = row_of(golden, golden.state)

    assert golden_of(fact).state == golden.state
    assert recorded(stored, fact) == read(stored)


def test_a_golden_file_that_exists_is_never_overwritten(tmp_path: Path) -> None:
    written = write_missing(tmp_path)
    assert sorted(written) == sorted(path.stem for path in FILES if load(path).topic in FACTS)
    victim = tmp_path / f"{written[0]}.json"
    victim.write_text("precious")

    assert write_missing(tmp_path) == []
    assert victim.read_text() == "precious"


def test_a_schema_that_exists_is_never_overwritten(tmp_path: Path) -> None:
    written = write_missing_schemas(tmp_path)
    assert len(written) == len(VERSIONS)
    victim = tmp_path / f"{written[0]}.json"
    victim.write_text("precious")

    assert write_missing_schemas(tmp_path) == []
    assert victim.read_text() == "precious"


def test_the_golden_files_are_those_that_were_committed() -> None:
    """Editing one would be rewriting history. A new file adds a line here; no line ever changes."""
    assert {path.stem: sha256(path.read_bytes()).hexdigest() for path in FILES} == COMMITTED


COMMITTED = {
    "CanarySent.v1": "b9c5213c68badad86921e92821728f0e55c3377153bc55342b65081122dc4496",
    "DeadLetterDiscarded.v1": "065ed0d8a174f7a230ff5877a4ef396e39cad7820cf10c66e36278a4a13c25aa",
    "DeadLetterDiscarded.v1.least": "afe1b4c3c84eb862313e79622b81d924fbcda8851379871ecc9dc69cda544e6a",
    "DeadLetterRetried.v1": "72419db1f379e68563e1930f9815dd4672780084ebf0607da67621e11152a991",
    "DeadLetterRetried.v1.least": "c572b2cff76dc130ca1860588de23aa1abdee4a7dfb5faefaad81ce520d5333f",
    "IdempotencyKeyClaimed.v1": "a4873e47276515c99b726e7cab3ec6dae731dad806cd59eb02036d88949367c5",
    "ErasureStarted.v1": "ac05593a5f7579bcefe0715aa80dc523d35c6d4711d217c03f98e99dd1a412dc",
    "TargetErased.v1": "40e090ac0bba21d98bed087b29831cbd4f042cebc9badf716810bbc1a1a78d24",
    "JobsSealed.v1": "ccfc3710a525e091ce9faf0b0edf006cceccf7bfeb0ffc84dcfe74dc22cb80d0",
    "JobCancelled.v1": "4b6ceee1cd12a8afc6135f3157798d4dad3fc5bb4e05e890845addd72b9e31a3",
    "JobCompleted.v1": "e07588140032323d3e7f643edf3f43b494103d470e7920ff1201ea39f2819a5d",
    "JobFailed.v1": "042b0db72a7f8428789a1cf6d7486232bef27f1b3315f95f7e68663c61f8ef0e",
    "JobSubmitted.v1": "2f959ad3a0dd3ea1f490474460b0481c42f2789999a75b88bdb721ea05d94c9e",
    "JobSubmitted.v1.least": "e994ca45d66fd56ed937595a801afc3caa87a9432c8d4373b5d06504b2a23636",
    "LogRestored.v1": "6ab6eba1a783d57e0bd777b5adf2dcbd685472e2ca149f9dd894e14861422ec0",
    "ResultCorrected.v1": "450fbbdd8d8053e2c478758de7643c1988639330b290732b63cac6ea2f263198",
    "TaskCompleted.v1": "7fa9cb983ff8e0a3e810a9766dd6e4a0d35ced1ff1e08a9e37433aa76efea6fa",
    "TaskCompleted.v2": "3011320ec8965292aaf65df756d42eb92a0fbd63f7fffbdd2d6abf7da4e7eec5",
    "TaskCompleted.v2.least": "7ae585126f150cb72cd96d2863e825d358b28612f99930f677b2cb9a3cc67d8a",
    "TaskCompleted.v2.too-large": "3246d08898ef2da76041cd46f11cd2062e334b4f149acd41a200d50bcf93f17d",
    "TaskDeferred.v1": "bc61f9164dad607e0dc26050c40b92346adbffbd24ad47340964c021b24159c9",
    "TaskFailed.v1": "c6d783ce3c1d15e7af62246aac3b483819456dd269c4e11f2df481ae726ba028",
    "TaskFailed.v2": "c655bc0805503a0ab675bdb00d17d8aa5ba80fb2189b0a302fdd48891ee89a95",
    "TaskFailed.v2.least": "a8387f6ef173e8f60580ff2633172715ff2c6feb20c1120fa85d5abea511da53",
    "TaskSkipped.v1": "fdc5083c533aa25801424d1383cba3e62f6922ae90f147c966b63f509c91560f",
    "TaskTimedOut.v1": "fe704cf7668742616075fe3c2758331786299a60a936e3d6af21c66ee791242b",
    "TasksDispatched.v1": "c5029a6bdb9b79fe1822911afe9908c1dd35a3b344e89dcce7019c5008dbd4b6",
}
