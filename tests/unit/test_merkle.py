"""The tree over the log is that of RFC 9162: held against the definition, written out plainly here."""

from hashlib import sha256

import pytest

from events.merkle import Paths, Tree, leads_to, leaf_hash

LEAVES = [leaf_hash(position, sha256(b"%d" % position).digest()) for position in range(1, 71)]


def defined(leaves: list[bytes]) -> bytes:
    """MTH of RFC 9162 section 2.1.1, of leaves that are hashed already."""
    if not leaves:
        return sha256().digest()
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while 2 * split < len(leaves):
        split *= 2
    return sha256(b"\x01" + defined(leaves[:split]) + defined(leaves[split:])).digest()


def test_a_leaf_is_the_position_and_the_facts_hash() -> None:
    assert leaf_hash(258, bytes(32)) == sha256(b"\x00" + b"\x00\x00\x00\x00\x00\x00\x01\x02" + bytes(32)).digest()


@pytest.mark.parametrize("size", range(len(LEAVES) + 1))
def test_the_root_is_as_defined_however_the_leaves_came(size: int) -> None:
    tree = Tree()
    for first in range(0, size, 7):
        tree = tree.with_leaves(LEAVES[first : min(first + 7, size)])

    assert tree.size == size
    assert tree.root == defined(LEAVES[:size])


@pytest.mark.parametrize("before", [0, 1, 2, 5, 8, 31, 32, 33, 64, 69])
def test_a_path_shows_each_leaf_that_came_after_a_tree_and_nothing_else(before: int) -> None:
    for size in range(before + 1, len(LEAVES) + 1):
        paths = Paths(Tree().with_leaves(LEAVES[:before]), LEAVES[before:size])
        root = defined(LEAVES[:size])
        for index in range(before, size):
            path = paths.of(index)
            assert leads_to(root, LEAVES[index], index, size, path)
            assert not leads_to(root, LEAVES[index - 1], index, size, path)
            assert not leads_to(root, LEAVES[index], index, size, path[:-1]) or size == 1
            assert not leads_to(root, LEAVES[index], index, size, [*path, root])
            assert not leads_to(root, LEAVES[index], size, size, path)
            if size > 1:
                assert not leads_to(root, LEAVES[index], index ^ 1, size, path)


def test_what_was_in_the_tree_before_has_no_path_here() -> None:
    paths = Paths(Tree().with_leaves(LEAVES[:5]), LEAVES[5:9])

    for index in (4, 9):
        with pytest.raises(IndexError):
            paths.of(index)
