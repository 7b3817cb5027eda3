"""The table of dead letters on a real PostgreSQL: once, in order, exact, and with just the rights that each role needs."""

from collections.abc import AsyncIterator
from datetime import timedelta
from uuid import UUID

import psycopg
import pytest
from psycopg import sql

from app.migrate import APP_ROLE, READER_ROLE, RETENTION_ROLE
from tests.builders import NOW
from write_side.dead_letters import (
    DeadLetters,
    Decision,
    Keep,
    LetterCount,
    LetterState,
    counts,
    oldest_waiting,
    open_letters,
)

QUEUE = "lookup.outcomes"


@pytest.fixture
async def letters(migrated_database_url: str) -> AsyncIterator[DeadLetters]:
    async with open_letters(migrated_database_url) as opened:
        yield opened


def letter(number: int, *, reason: str = "unparsable", died_after_s: float = 0.0) -> Keep:
    return Keep(
        message=f"message {number}",
        queue=QUEUE,
        reason=reason,
        body=b"body %d" % number,
        headers={"number": str(number)},
        job_id=UUID(int=number),
        command_id=None,
        service="Ping",
        attempt=1,
        deliveries=1,
        died_at=NOW + timedelta(seconds=died_after_s),
    )


async def test_a_letter_that_is_drained_twice_is_one_row(letters: DeadLetters) -> None:
    first = await letters.keep([letter(1), letter(2)])
    second = await letters.keep([letter(2), letter(3)])

    assert (first, second) == (2, 1)
    assert await letters.counts() == [LetterCount(LetterState.WAITING, "unparsable", QUEUE, 3)]


async def test_letters_come_in_the_order_in_which_they_died_not_in_which_they_were_drained(letters: DeadLetters) -> None:
    """A drain that died gives its letters back late: those of one job must still come in their order."""
    await letters.keep([letter(3, died_after_s=3), letter(1, died_after_s=1)])
    await letters.keep([letter(2, died_after_s=2)])

    listed = await letters.list(LetterState.WAITING, after=0, limit=10)
    paged = [one.body async for page in letters.pages(up_to=await letters.last_id()) for one in page]

    assert [one.message for one in listed] == ["message 1", "message 2", "message 3"]
    assert paged == [b"body 1", b"body 2", b"body 3"]


async def test_a_list_goes_on_behind_a_letter(letters: DeadLetters) -> None:
    await letters.keep([letter(number, died_after_s=number) for number in range(1, 6)])
    first = await letters.list(LetterState.WAITING, after=0, limit=2)

    then = await letters.list(LetterState.WAITING, after=first[-1].id, limit=2)

    assert [one.message for one in (*first, *then)] == [f"message {number}" for number in range(1, 5)]


async def test_a_decision_is_written_down_once(letters: DeadLetters) -> None:
    await letters.keep([letter(1), letter(2)])
    (one, two) = await letters.list(LetterState.WAITING, after=0, limit=2)
    discarded = Decision(LetterState.DISCARDED, NOW, "alice", "noise")

    decided = await letters.decide([one.id], discarded)
    late = await letters.decide([one.id, two.id], Decision(LetterState.RETRIED, NOW, "bob", None))

    read = await letters.read(one.id)
    assert (decided, late) == (1, 1)
    assert read is not None
    assert (read.state, read.decided_at, read.decided_by, read.why) == ("discarded", NOW, "alice", "noise")
    assert {(count.state, count.count) for count in await letters.counts()} == {("discarded", 1), ("retried", 1)}


async def test_only_what_waits_grows_old(letters: DeadLetters, migrated_database_url: str) -> None:
    assert await oldest_waiting(migrated_database_url) is None
    await letters.keep([letter(1, died_after_s=1), letter(2, died_after_s=2)])
    (oldest, _) = await letters.list(LetterState.WAITING, after=0, limit=2)

    before = await oldest_waiting(migrated_database_url)
    await letters.decide([oldest.id], Decision(LetterState.RETRIED, NOW, "alice", None))

    assert before == NOW + timedelta(seconds=1)
    assert await oldest_waiting(migrated_database_url) == NOW + timedelta(seconds=2)
    assert sum(count.count for count in await counts(migrated_database_url)) == 2


async def test_only_one_decides_at_a_time(letters: DeadLetters, migrated_database_url: str) -> None:
    async with open_letters(migrated_database_url) as other:
        assert await letters.become_decider()
        assert not await other.become_decider()


STATEMENTS = {
    "read": "SELECT body FROM dead_letters",
    "keep": "INSERT INTO dead_letters (message, queue, reason, body, headers, died_at) VALUES ('m','q','r','','{}',now())",
    "decide": "UPDATE dead_letters SET state = 'retried', decided_at = now(), decided_by = 'x', why = 'y'",
    "rewrite": "UPDATE dead_letters SET body = ''",
    "delete": "DELETE FROM dead_letters",
}


@pytest.mark.parametrize(
    ("role", "allowed"),
    [(APP_ROLE, {"read", "keep", "decide"}), (READER_ROLE, {"read"}), (RETENTION_ROLE, {"read", "delete"})],
)
def test_a_role_may_do_with_letters_what_its_part_needs_and_no_more(
    role: str, allowed: set[str], migrated_database_url: str
) -> None:
    done: set[str] = set()
    with psycopg.connect(migrated_database_url, autocommit=True) as conn:
        conn.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
        for name, statement in STATEMENTS.items():
            try:
                conn.execute(sql.SQL(statement))
            except psycopg.errors.InsufficientPrivilege:
                continue
            done.add(name)

    assert done == allowed
