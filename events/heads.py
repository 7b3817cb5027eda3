"""Heads: what the whole log amounts to at a position, signed. Whoever keeps one can tell later whether the log is still that.

A head is a JSON object on a line. What is signed is `SIGNED_AS` and then the compact JSON of all its members but `checksums`
and `signature`, sorted by name. Heads are numbered, each with the digest of the one before: none can be taken out unseen.
"""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from hashlib import sha256
from typing import Any
from uuid import UUID

import orjson

from events.chain import GENESIS, next_head
from events.merkle import Tree, leaf_hash

SIGNED_AS = b"distributed-lookup log head v1\n"
CHECKSUM_BYTES = 4
LINE_BYTES_MAX = 1_048_576

Span = tuple[int, int]
"""First and last position of a hole."""


class UnreadableHead(ValueError):  # noqa: N818 - what it is, in our words
    """A line that is no head, or says two things at once; the message says which."""


@dataclass(frozen=True, slots=True)
class LogState:
    """What the log amounts to up to a position: the running hash that the relay keeps too, and the tree over all facts."""

    position: int = 0
    log_head: bytes = GENESIS
    tree: Tree = field(default_factory=Tree)

    def with_facts(self, facts: Iterable[tuple[int, bytes]]) -> "LogState":
        """After more facts: (position, fact hash) of each, in order."""
        stand, log_head = self.position, self.log_head
        leaves: list[bytes] = []
        for position, fact_hash in facts:
            stand, log_head = position, next_head(log_head, position, fact_hash)
            leaves.append(leaf_hash(position, fact_hash))
        return LogState(stand, log_head, self.tree.with_leaves(leaves))


@dataclass(frozen=True, slots=True)
class Head:
    """A signed head. It vouches for all facts up to `state.position`.

    `checksums` are the first bytes of the leaf of each fact since the head before, and `holes` the positions that no fact has:
    they say *where* a log differs, which a hash over all of it cannot. `restored_from` is set where a log goes on that was
    restored from a backup of another: (that log's id, the number of the head that the backup had come to, 0 for none).
    """

    number: int
    log_id: UUID
    state: LogState
    holes: Sequence[Span]
    checksums: bytes
    at: datetime
    previous: str
    key_id: str
    restored_from: tuple[UUID, int] | None = None
    signature: bytes = b""

    @property
    def signed_bytes(self) -> bytes:
        return SIGNED_AS + _canonical(self._members())

    @property
    def digest(self) -> str:
        """What the next head says of this one."""
        return sha256(self.signed_bytes).hexdigest()

    @property
    def line(self) -> str:
        """As it is written down, without the line feed."""
        checksums = base64.b64encode(self.checksums).decode()
        return orjson.dumps(self.members | {"checksums": checksums}, option=orjson.OPT_SORT_KEYS).decode()

    @property
    def members(self) -> dict[str, Any]:
        """The signed members and the signature: all that is needed to check it."""
        return self._members() | {"signature": self.signature.hex()}

    def _members(self) -> dict[str, Any]:
        state = self.state
        members: dict[str, Any] = {
            "v": 1,
            "number": self.number,
            "log_id": str(self.log_id),
            "position": state.position,
            "facts": state.tree.size,
            "log_head": state.log_head.hex(),
            "root": state.tree.root.hex(),
            "peaks": [peak.hex() for peak in state.tree.peaks],
            "holes": [list(span) for span in self.holes],
            "checksums_sha256": sha256(self.checksums).hexdigest(),
            "at": self.at.isoformat(),
            "previous": self.previous,
            "key": self.key_id,
        }
        if self.restored_from is not None:
            log_id, number = self.restored_from
            members["restored_from"] = {"log_id": str(log_id), "number": number}
        return members


@dataclass(frozen=True, slots=True)
class Signer:
    """Signs heads. `key_id` is the fingerprint of the public key."""

    key_id: str
    sign: Callable[[bytes], bytes]

    def signed(self, head: Head) -> Head:
        named = replace(head, key_id=self.key_id)
        return replace(named, signature=self.sign(named.signed_bytes))


Verify = Callable[[bytes, bytes], bool]
"""(signature, signed bytes) -> whether a key made it."""
PublicKeys = Mapping[str, Verify]


def is_signed(head: Head, keys: PublicKeys) -> bool:
    verify = keys.get(head.key_id)
    return verify is not None and verify(head.signature, head.signed_bytes)


def read_head(line: str | bytes) -> Head:
    """The head of a line. Raises `UnreadableHead` for what is none, or does not agree with itself."""
    try:
        told = orjson.loads(line)
        head = _head_of(told)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableHead("It is no head.") from error
    if head.members != {name: value for name, value in told.items() if name != "checksums"}:
        raise UnreadableHead("Its members do not agree with each other.")
    return head


def _head_of(told: Mapping[str, Any]) -> Head:
    restored = told.get("restored_from")
    tree = Tree(told["facts"], tuple(bytes.fromhex(peak) for peak in told["peaks"]))
    if tree.size.bit_count() != len(tree.peaks):
        raise ValueError(tree.size)
    return Head(
        number=told["number"],
        log_id=UUID(told["log_id"]),
        state=LogState(told["position"], bytes.fromhex(told["log_head"]), tree),
        holes=[(first, last) for first, last in told["holes"]],
        checksums=base64.b64decode(told["checksums"], validate=True),
        at=datetime.fromisoformat(told["at"]),
        previous=told["previous"],
        key_id=told["key"],
        restored_from=None if restored is None else (UUID(restored["log_id"]), restored["number"]),
        signature=bytes.fromhex(told["signature"]),
    )


def checksum(position: int, fact_hash: bytes) -> bytes:
    return leaf_hash(position, fact_hash)[:CHECKSUM_BYTES]


def _canonical(members: Mapping[str, Any]) -> bytes:
    return orjson.dumps(members, option=orjson.OPT_SORT_KEYS)
