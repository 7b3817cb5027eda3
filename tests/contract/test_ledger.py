"""What the relay's ledger promises: the same suite for PostgreSQL and the in-memory twin."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial

import pytest
from uuid_utils.compat import uuid7

from events.chain import GENESIS
from events.memory import MemoryStore
from events.postgres import PostgresStore
from events.store import EventStore
from tests.builders import PING, given, memory_store, submitted
from tests.contract.test_store import SCRIBE
from write_side.checkpoints import COMMANDS, FACTS, HEARTBEAT_S, Checkpoint, LeadershipLost, OpenLedger, open_ledger
from write_side.memory import MemoryLedgers

PATIENCE_S = 20.0
SILENCE_MAX_S = 2.0
HEAD = bytes(range(32))


@dataclass
class Database:
    """A log, and the ledger of its relays, whose leader may be silent for `SILENCE_MAX_S`."""

    store: EventStore
    open: OpenLedger


@pytest.fixture(params=["memory", "postgres"])
async def database(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    if request.param == "memory":
        memory: MemoryStore = memory_store()
        yield Database(memory, MemoryLedgers(memory, silence_max_s=SILENCE_MAX_S).open)
        return
    url = request.getfixturevalue("migrated_database_url")
    store = PostgresStore(url, SCRIBE)
    yield Database(store, partial(open_ledger, url, silence_max_s=SILENCE_MAX_S))
    await store.close()


async def test_a_new_ledger_stands_at_the_beginning_of_the_log(database: Database) -> None:
    async with database.open() as ledger:
        await ledger.lead()

        assert await ledger.read() == {COMMANDS: Checkpoint(0, GENESIS), FACTS: Checkpoint(0, GENESIS)}


async def test_each_checkpoint_moves_on_its_own_and_outlives_the_connection(database: Database) -> None:
    async with database.open() as ledger:
        await ledger.lead()
        await ledger.move(COMMANDS, Checkpoint(7, GENESIS))
        await ledger.move(FACTS, Checkpoint(3, HEAD))

    async with database.open() as ledger:
        await ledger.lead()
        assert await ledger.read() == {COMMANDS: Checkpoint(7, GENESIS), FACTS: Checkpoint(3, HEAD)}


@pytest.mark.parametrize("position", [4, 5])
async def test_a_checkpoint_never_moves_back_nor_twice_to_the_same_place(database: Database, position: int) -> None:
    async with database.open() as ledger:
        await ledger.lead()
        await ledger.move(FACTS, Checkpoint(5, HEAD))

        with pytest.raises(LeadershipLost):
            await ledger.move(FACTS, Checkpoint(position, GENESIS))

        assert (await ledger.read())[FACTS] == Checkpoint(5, HEAD)


async def test_one_leads_and_the_others_wait_for_its_end(database: Database) -> None:
    async with database.open() as second:
        async with database.open() as first:
            await first.lead()
            waiting = asyncio.create_task(second.lead())
            for _ in range(4):
                done, _ = await asyncio.wait({waiting}, timeout=SILENCE_MAX_S / 2)
                assert not done
                await first.keep_alive()
        async with asyncio.timeout(PATIENCE_S):
            await waiting
        await second.move(FACTS, Checkpoint(1, HEAD))


async def test_a_leader_that_falls_silent_loses_the_lead_and_moves_nothing_any_more(database: Database) -> None:
    """What SIGSTOP does to a relay: its successor leads, and the woken one is told so at its next word."""
    async with database.open() as frozen, database.open() as successor:
        await frozen.lead()
        async with asyncio.timeout(PATIENCE_S):
            await successor.lead()

        with pytest.raises(LeadershipLost):
            await frozen.move(FACTS, Checkpoint(9, HEAD))

        await successor.move(FACTS, Checkpoint(1, HEAD))
        assert (await successor.read())[FACTS].position == 1


async def test_who_waits_for_more_is_woken_by_an_append(database: Database) -> None:
    async with database.open() as ledger:
        await ledger.lead()
        waiting = asyncio.create_task(ledger.wait_for_more())
        await asyncio.sleep(0)

        job_id = uuid7()
        started_at = asyncio.get_running_loop().time()
        await given(database.store, submitted(PING, job_id=job_id), job_id=job_id)
        await waiting

        assert asyncio.get_running_loop().time() - started_at < HEARTBEAT_S / 2


async def test_what_was_appended_before_the_wait_is_not_slept_through(database: Database) -> None:
    async with database.open() as ledger:
        await ledger.lead()
        job_id = uuid7()
        await given(database.store, submitted(PING, job_id=job_id), job_id=job_id)

        started_at = asyncio.get_running_loop().time()
        await ledger.wait_for_more()

        assert asyncio.get_running_loop().time() - started_at < HEARTBEAT_S / 2


async def test_a_quiet_log_is_waited_for_no_longer_than_a_heartbeat(database: Database) -> None:
    async with database.open() as ledger:
        await ledger.lead()

        async with asyncio.timeout(PATIENCE_S):
            await ledger.wait_for_more()
