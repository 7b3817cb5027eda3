"""What was ever written loads for ever: each golden file is a row of the log from the day its version was born.

A red test here means that logs that exist cannot be read any more, or that a fact changed without a new version. Never
edit or rewrite a golden file; give the fact a new version, an upcaster from the old one, and a file of its own.
"""

from hashlib import sha256
from pathlib import Path
from uuid import UUID

import orjson
import pytest

from events.catalog import FACTS, TOPICS, VERSIONS, fact_type
from events.chain import chained_hash
from events.facts import Erased
from events.record import StoredFact, digest, hash_of, read
from tests.golden.write import EXAMPLES, FOLDER, Golden, golden_of, schema_sha256, write_missing

FILES = sorted(FOLDER.glob("*.json"))


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

    assert recorded.fact.model_dump(mode="json") == golden.fact
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
    kept = {name: value for name, value in golden.fact.items() if name not in erasable}
    assert {name: value for name, value in fact.model_dump(mode="json").items() if name not in erasable} == kept


def test_a_golden_rows_digests_are_those_of_its_erasable_values(golden: Golden) -> None:
    digests = orjson.loads(golden.lines[0]).get("erasable", {})
    salts, values = (orjson.loads(line) for line in golden.lines[3:5]) if digests else ({}, {})

    assert digests.keys() == salts.keys() == values.keys()
    for name, value in values.items():
        canonical = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
        assert digests[name] == digest(bytes.fromhex(salts[name]), canonical)


@pytest.mark.parametrize("fact", VERSIONS, ids=lambda fact: TOPICS[fact])
def test_every_version_in_the_catalog_has_its_golden_file(fact: type) -> None:
    name = TOPICS[fact].removeprefix("lookup.")

    assert load(FOLDER / f"{name}.json").topic == TOPICS[fact]


def test_a_fact_does_not_change_its_shape_without_a_new_version(golden: Golden) -> None:
    if golden.topic not in FACTS:
        pytest.skip("An older version: its upcaster is what keeps it readable.")

    assert schema_sha256(fact_type(golden.topic)) == golden.schema_sha256, "Give the fact a new version and an upcaster."


def test_what_is_written_today_is_written_as_it_was_then(golden: Golden) -> None:
    """Byte for byte: a writer that orders or spells anything differently would be a new version, too."""
    if golden.topic not in FACTS:
        pytest.skip("An older version: nobody writes it any more.")
    name = next(name for name, fact in EXAMPLES.items() if fact.model_dump(mode="json") == golden.fact)

    assert golden_of(EXAMPLES[name]).state == golden.state


def test_a_golden_file_that_exists_is_never_overwritten(tmp_path: Path) -> None:
    written = write_missing(tmp_path)
    assert sorted(written) == sorted(path.stem for path in FILES if load(path).topic in FACTS)
    victim = tmp_path / f"{written[0]}.json"
    victim.write_text("precious")

    assert write_missing(tmp_path) == []
    assert victim.read_text() == "precious"


def test_the_golden_files_are_those_that_were_committed() -> None:
    """Editing one would be rewriting history. A new file adds a line here; no line ever changes."""
    assert {path.stem: sha256(path.read_bytes()).hexdigest() for path in FILES} == COMMITTED


COMMITTED = {
    "IdempotencyKeyClaimed.v1": "a4873e47276515c99b726e7cab3ec6dae731dad806cd59eb02036d88949367c5",
    "JobCancelled.v1": "4b6ceee1cd12a8afc6135f3157798d4dad3fc5bb4e05e890845addd72b9e31a3",
    "JobCompleted.v1": "e07588140032323d3e7f643edf3f43b494103d470e7920ff1201ea39f2819a5d",
    "JobFailed.v1": "042b0db72a7f8428789a1cf6d7486232bef27f1b3315f95f7e68663c61f8ef0e",
    "JobSubmitted.v1": "2f959ad3a0dd3ea1f490474460b0481c42f2789999a75b88bdb721ea05d94c9e",
    "JobSubmitted.v1.least": "e994ca45d66fd56ed937595a801afc3caa87a9432c8d4373b5d06504b2a23636",
    "TaskCompleted.v1": "7fa9cb983ff8e0a3e810a9766dd6e4a0d35ced1ff1e08a9e37433aa76efea6fa",
    "TaskDeferred.v1": "bc61f9164dad607e0dc26050c40b92346adbffbd24ad47340964c021b24159c9",
    "TaskFailed.v1": "c6d783ce3c1d15e7af62246aac3b483819456dd269c4e11f2df481ae726ba028",
    "TaskSkipped.v1": "fdc5083c533aa25801424d1383cba3e62f6922ae90f147c966b63f509c91560f",
    "TaskTimedOut.v1": "fe704cf7668742616075fe3c2758331786299a60a936e3d6af21c66ee791242b",
    "TasksDispatched.v1": "c5029a6bdb9b79fe1822911afe9908c1dd35a3b344e89dcce7019c5008dbd4b6",
}
