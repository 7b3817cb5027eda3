"""The tree over all facts of the log: a Merkle tree as in RFC 9162 section 2.1. A few hashes show that a fact is in it.

A leaf is a position and the hash of the fact there. What is kept of a tree are its peaks, the roots of the perfect trees that
it consists of: enough to go on from, and to show what comes after, without the leaves before.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from hashlib import sha256

_LEAF, _NODE = b"\x00", b"\x01"


def leaf_hash(position: int, fact_hash: bytes) -> bytes:
    return sha256(_LEAF + position.to_bytes(8, "big") + fact_hash).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return sha256(_NODE + left + right).digest()


@dataclass(frozen=True, slots=True)
class Tree:
    """A tree of `size` leaves. `peaks` are of its perfect trees, the largest first: one for each bit that is set in `size`."""

    size: int = 0
    peaks: tuple[bytes, ...] = ()

    @property
    def root(self) -> bytes:
        """The Merkle tree hash."""
        if not self.peaks:
            return sha256().digest()
        return reduce(lambda right, left: node_hash(left, right), reversed(self.peaks))

    def with_leaves(self, leaves: Iterable[bytes]) -> "Tree":
        size, peaks = self.size, list(self.peaks)
        for leaf in leaves:
            node, carry = leaf, size
            while carry & 1:
                node, carry = node_hash(peaks.pop(), node), carry >> 1
            peaks.append(node)
            size += 1
        return Tree(size, tuple(peaks))


class Paths:
    """Inclusion paths (RFC 9162 section 2.1.3.1) of the leaves that made `before` grow, in the tree that they made of it."""

    def __init__(self, before: Tree, leaves: Sequence[bytes]) -> None:
        self._before = before
        self._leaves = leaves
        self._size = before.size + len(leaves)
        self._known: dict[tuple[int, int], bytes] = dict(zip(_spans(before.size), before.peaks, strict=True))

    def of(self, index: int) -> list[bytes]:
        """From the leaf up: the hashes that lead to the root. `index` counts all leaves, from 0."""
        if not self._before.size <= index < self._size:
            raise IndexError(index)
        path: list[bytes] = []
        first, end = 0, self._size
        while end - first > 1:
            middle = first + _left_size(end - first)
            if index < middle:
                path.append(self._hash(middle, end))
                end = middle
            else:
                path.append(self._hash(first, middle))
                first = middle
        return path[::-1]

    def _hash(self, first: int, end: int) -> bytes:
        """Of the leaves from `first` to before `end`. What lies before ours is a peak of the tree before, or made of some."""
        if end - first == 1 and first >= self._before.size:
            return self._leaves[first - self._before.size]
        if (first, end) not in self._known:
            middle = first + _left_size(end - first)
            self._known[first, end] = node_hash(self._hash(first, middle), self._hash(middle, end))
        return self._known[first, end]


def leads_to(root: bytes, leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bool:
    """Whether a path shows that the leaf is in the tree (RFC 9162 section 2.1.3.2)."""
    if not 0 <= index < size:
        return False
    node, at, last = leaf, index, size - 1
    for other in path:
        if last == 0:
            return False
        if at & 1 or at == last:
            node = node_hash(other, node)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            node = node_hash(node, other)
        at, last = at >> 1, last >> 1
    return last == 0 and node == root


def _left_size(size: int) -> int:
    """The largest power of two below `size`."""
    return 1 << (size - 1).bit_length() - 1


def _spans(size: int) -> list[tuple[int, int]]:
    """The leaves that each peak of a tree is made of: first, and one past the last."""
    spans: list[tuple[int, int]] = []
    first = 0
    for bit in reversed(range(size.bit_length())):
        if size >> bit & 1:
            spans.append((first, first + (1 << bit)))
            first += 1 << bit
    return spans
