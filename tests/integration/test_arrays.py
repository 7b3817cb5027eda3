"""Our arrays are, for PostgreSQL and byte for byte, what psycopg makes of a list."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.adapt import PyFormat, Transformer
from uuid_utils.compat import uuid7

from events.arrays import Bigints, BinaryArray, Byteas, Texts, Uuids

CASES: list[tuple[str, BinaryArray, Sequence[Any]]] = [
    ("uuid", Uuids.of(ids := [uuid7(), UUID(int=0), UUID(int=2**128 - 1)]), ids),
    ("bigint", Bigints.of(numbers := [0, -1, 2**63 - 1, -(2**63)]), numbers),
    ("text", Texts.of(texts := ["", "a", 'in braces, {}"\\ and\nmore', "NULL"]), texts),
    ("bytea", Byteas(bodies := [b"", b"\x00\xff", bytes(70_000)]), bodies),
]


@pytest.mark.parametrize(("kind", "array", "values"), CASES)
def test_an_array_arrives_as_its_values(postgres: str, kind: str, array: BinaryArray, values: Sequence[Any]) -> None:
    with psycopg.connect(postgres) as conn:
        assert conn.execute("SELECT %b, pg_typeof(%b)::text", [array, array]).fetchone() == (values, f"{kind}[]")


@pytest.mark.parametrize(("kind", "array", "values"), CASES)
def test_an_array_is_what_psycopg_makes_of_a_list(kind: str, array: BinaryArray, values: Sequence[Any]) -> None:
    assert dumped(array) == dumped(values)


@pytest.mark.parametrize("kind", [Uuids, Bigints, Texts, Byteas])
def test_an_array_without_elements_is_empty(postgres: str, kind: type[BinaryArray]) -> None:
    with psycopg.connect(postgres) as conn:
        assert conn.execute("SELECT cardinality(%b)", [kind()]).fetchone() == (0,)


def test_a_text_that_another_encoding_would_spell_otherwise_is_refused() -> None:
    with pytest.raises(UnicodeEncodeError):
        Texts.of(["Bücher"])


def dumped(value: Any) -> tuple[bytes, int]:
    transformer = Transformer()
    (parameter,) = transformer.dump_sequence([value], [PyFormat.BINARY])
    assert parameter is not None
    assert transformer.types is not None
    return bytes(parameter), transformer.types[0]
