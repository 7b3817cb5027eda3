"""Writes of one batch become fewer, and come to the same: held against the store's twin, which makes each of them."""

import random

import pytest

from projections.memory import MemoryGeneration
from projections.writes import Count, Expire, KeepLast, Put, Rank, Remove, Unrank, UnrankBelow, Write, coalesce


def made(writes: list[Write]) -> tuple[object, ...]:
    """What a store holds when these were made one by one."""
    generation = MemoryGeneration("g1", "log", {})
    generation.apply("view", writes)
    sets = {name: held for name, held in generation.sets.items() if held}
    return generation.values, sets, dict(generation.counts), generation.expiries


def test_the_last_value_is_written_and_counts_add_up() -> None:
    writes: list[Write] = [Put("a", b"1"), Count("c", "x", 2), Put("a", b"2", 7), Count("c", "x", -1), Count("c", "y", 1)]

    assert coalesce(writes) == [Put("a", b"2", 7), Count("c", "x", 1), Count("c", "y", 1)]


def test_a_removed_key_is_removed_before_it_is_written_anew() -> None:
    assert coalesce([Count("c", "x", 2), Remove("c"), Count("c", "x", 1)]) == [Remove("c"), Count("c", "x", 1)]


def test_a_view_that_ranks_and_trims_at_each_fact_trims_once_a_batch() -> None:
    writes: list[Write] = []
    for score in range(100):
        writes += [Rank("", f"m{score}", score), UnrankBelow("", score - 50), KeepLast("", 20)]

    fewer = coalesce(writes)

    assert fewer[-2:] == [UnrankBelow("", 49), KeepLast("", 20)]
    assert len(fewer) == 102
    assert made(fewer) == made(writes)


def test_an_expiry_is_never_earlier_than_it_was_said_before() -> None:
    assert coalesce([Expire("a", 9), Expire("a", 4)]) == [Expire("a", 9)]


@pytest.mark.parametrize("seed", range(200))
def test_fewer_writes_come_to_the_same(seed: int) -> None:
    """Scores rise with time, as `KeepLast` asks."""
    chance = random.Random(seed)
    writes: list[Write] = []
    for moment in range(chance.randint(1, 60)):
        key, member = chance.choice("ab"), chance.choice("mnopq")
        kinds: list[Write] = [
            Put(f"v{key}", member.encode(), moment),
            Rank(key, member, moment),
            Rank(key, member, moment),
            Unrank(key, member),
            UnrankBelow(key, moment - chance.randint(0, 20)),
            KeepLast(key, chance.choice([2, 3])),
            Count(f"c{key}", member, chance.randint(-2, 2)),
            Expire(key, moment),
            Remove(chance.choice([key, f"c{key}", f"v{key}"])),
        ]
        writes.append(chance.choice(kinds))

    assert made(coalesce(writes)) == made(writes)
