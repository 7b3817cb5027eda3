"""Arrays for PostgreSQL in its binary form (`array_send` in its `arrayfuncs.c`), of elements that are in that form already.

psycopg asks each element of a list for its type and dumps it by itself, in Python. That is right for lists that may hold
anything; for the columns of an append it took as long as the rest of the call.
"""

from collections.abc import Iterable
from struct import Struct
from typing import ClassVar
from uuid import UUID

import psycopg
from psycopg.adapt import Dumper
from psycopg.pq import Format

_SHAPE = Struct("!iiIii")
_SIZE = Struct("!i")


class BinaryArray(list[bytes]):
    """An array of one dimension: what PostgreSQL receives as each of its elements, none of which is NULL.

    A parameter for the placeholder `%b`.
    """

    element: ClassVar[str]


class Uuids(BinaryArray):
    """`uuid[]`."""

    element = "uuid"

    @classmethod
    def of(cls, values: Iterable[UUID]) -> "Uuids":
        return cls(value.bytes for value in values)


class Bigints(BinaryArray):
    """`bigint[]`."""

    element = "int8"

    @classmethod
    def of(cls, values: Iterable[int]) -> "Bigints":
        return cls(value.to_bytes(8, "big", signed=True) for value in values)


class Texts(BinaryArray):
    """`text[]`, of ASCII alone: a database and its connections may have any encoding."""

    element = "text"

    @classmethod
    def of(cls, values: Iterable[str]) -> "Texts":
        return cls(value.encode("ascii") for value in values)


class Byteas(BinaryArray):
    """`bytea[]`."""

    element = "bytea"


def _dumper_of(kind: type[BinaryArray]) -> type[Dumper]:
    info = psycopg.adapters.types[kind.element]

    class ArrayDumper(Dumper):
        format = Format.BINARY
        oid = info.array_oid

        def dump(self, obj: BinaryArray) -> bytes:
            sized = [part for element in obj for part in (_SIZE.pack(len(element)), element)]
            return _SHAPE.pack(1, 0, info.oid, len(obj), 1) + b"".join(sized)

    return ArrayDumper


for _kind in (Uuids, Bigints, Texts, Byteas):
    psycopg.adapters.register_dumper(_kind, _dumper_of(_kind))
