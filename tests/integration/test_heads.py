"""The keeper of heads: what it signs, where it is written, and what it refuses to sign."""

import stat
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from uuid_utils.compat import uuid7

from app.audit.keys import ENDORSED_AS, KeyProblem, load_public, load_signer, make_key, public_path, verifiers
from app.migrate import APP_ROLE, READER_ROLE
from events.chain import GENESIS, next_head
from events.heads import Head, LogState, is_signed, read_head
from events.memory import MemoryStore
from events.record import StoredFact, hash_of
from tests.builders import NOW, PING, Clock, at, dispatched, given, memory_store, submitted
from write_side.head_keeper import HeadKeeper, LogDiffers, NotWrittenOutside
from write_side.heads import HeadFile, HeadTable, open_heads

FACTS_MAX = 10
EVERY = timedelta(seconds=60)


@dataclass
class Keeping:
    """A log in memory, the table of its heads in PostgreSQL, and files for them."""

    table: HeadTable
    folder: Path
    log: MemoryStore = field(default_factory=memory_store)
    clock: Clock = field(default_factory=Clock)
    read_from: list[int] = field(default_factory=list)

    @property
    def key(self) -> Path:
        return self.folder / "heads.key"

    @property
    def files(self) -> list[HeadFile]:
        return [HeadFile(self.folder / "outside" / "heads.jsonl"), HeadFile(self.folder / "elsewhere" / "heads.jsonl")]

    def keeper(self) -> HeadKeeper:
        if not self.key.exists():
            make_key(self.key)
        keys = verifiers(load_public(public_path(self.key)))
        return HeadKeeper(self, self.table, self.files, load_signer(self.key), keys, FACTS_MAX, EVERY, self.clock)

    async def happened(self, jobs: int) -> None:
        """So many jobs began: two facts each."""
        for _ in range(jobs):
            job_id = uuid7()
            await given(self.log, submitted(PING, job_id=job_id), dispatched(PING, job_id=job_id), job_id=job_id)

    async def heads(self) -> list[Head]:
        return [read_head(line) async for line in self.table.lines()]

    # The log as the keeper reads it.

    async def read_all(self, after: int, limit: int) -> Sequence[StoredFact]:
        self.read_from.append(after)
        behind = [stored for stored in self.log._log if stored.position > after]
        return behind[:limit]

    async def log_id(self) -> UUID:
        return await self.log.log_id()

    async def head(self) -> int:
        return self.log._log[-1].position if self.log._log else 0

    async def read(self, stream_ids: Sequence[UUID]) -> dict[UUID, Sequence[StoredFact]]:
        return dict(await self.log.read(stream_ids))

    async def stream_ids(self, after: UUID | None, limit: int) -> Sequence[UUID]:
        return await self.log.stream_ids(after, limit)


@pytest.fixture
async def keeping(migrated_database_url: str, tmp_path: Path) -> AsyncIterator[Keeping]:
    async with open_heads(migrated_database_url) as table:
        yield Keeping(table, tmp_path)


async def signed(keeping: Keeping, jobs: int) -> HeadKeeper:
    keeper = keeping.keeper()
    await keeper.take_up()
    await keeping.happened(jobs)
    await keeper.tick()
    return keeper


# --- What is signed ---------------------------------------------------------------------------------------------------


async def test_a_head_is_signed_every_so_many_facts_and_after_a_while(keeping: Keeping) -> None:
    keeper = await signed(keeping, 12)
    assert [head.state.position for head in await keeping.heads()] == [10, 20]

    keeping.clock.move_to(NOW + EVERY)
    await keeper.tick()
    await keeper.tick()

    heads = await keeping.heads()
    assert [(head.number, head.state.position, head.state.tree.size) for head in heads] == [
        (1, 10, 10),
        (2, 20, 20),
        (3, 24, 24),
    ]
    assert (keeper.counters.signed, keeper.counters.facts) == (3, 24)
    assert all(is_signed(head, keeper.keys) for head in heads)
    assert [head.previous for head in heads] == [GENESIS.hex(), heads[0].digest, heads[1].digest]


async def test_the_running_hash_in_a_head_is_the_relays(keeping: Keeping) -> None:
    await signed(keeping, 5)

    head = GENESIS
    for stored in keeping.log._log:
        head = next_head(head, stored.position, hash_of(stored.state))
    assert (await keeping.heads())[-1].state.log_head == head


async def test_nothing_new_is_nothing_to_sign(keeping: Keeping) -> None:
    keeper = await signed(keeping, 5)
    keeping.clock.move_to(at(10_000))

    await keeper.tick()

    assert len(await keeping.heads()) == 1


async def test_positions_without_a_fact_are_named(keeping: Keeping) -> None:
    await keeping.happened(2)
    keeping.log._log = [
        StoredFact(position, *row)
        for position, row in zip(
            (3, 4, 9, 10), [(s.stream_id, s.stream_version, s.topic, s.state) for s in keeping.log._log], strict=True
        )
    ]
    keeper = keeping.keeper()
    await keeper.take_up()

    await keeper.tick()

    (head,) = await keeping.heads()
    assert (list(head.holes), head.state.tree.size, head.state.position) == ([(1, 2), (5, 8)], 4, 10)


async def test_it_goes_on_from_the_last_head_and_reads_nothing_of_the_log_before(keeping: Keeping) -> None:
    await signed(keeping, 10)
    keeping.read_from.clear()

    await signed(keeping, 5)

    assert min(keeping.read_from) == 19, "it looks whether the last fact is there still"
    third = (await keeping.heads())[2]
    state = LogState().with_facts((stored.position, hash_of(stored.state)) for stored in keeping.log._log)
    assert third.state == state


async def test_only_one_signs(keeping: Keeping, migrated_database_url: str) -> None:
    async with open_heads(migrated_database_url) as other:
        assert await keeping.table.become_keeper()
        assert not await other.become_keeper()


# --- Where it is written ----------------------------------------------------------------------------------------------


async def test_every_file_has_the_lines_of_the_table(keeping: Keeping) -> None:
    await signed(keeping, 10)

    lines = [line async for line in keeping.table.lines()]
    assert [list(file.lines()) for file in keeping.files] == [lines, lines]


async def test_a_file_that_was_away_shows_and_comes_up_to_date_when_it_is_back(keeping: Keeping) -> None:
    keeper = await signed(keeping, 5)
    away = keeping.files[1].path
    away.rename(keeping.folder / "kept")
    away.parent.rmdir()
    away.parent.touch()

    await keeping.happened(5)
    with pytest.raises(NotWrittenOutside, match=str(away)):
        await keeper.tick()
    assert len(await keeping.heads()) == len(list(keeping.files[0].lines())) == 2

    away.parent.unlink()
    away.parent.mkdir()
    (keeping.folder / "kept").rename(away)
    await keeping.happened(5)
    await keeper.tick()
    assert len(list(keeping.files[1].lines())) == 3


async def test_a_line_that_a_crash_left_half_written_is_passed_over(keeping: Keeping) -> None:
    keeper = await signed(keeping, 5)
    file = keeping.files[0]
    with file.path.open("ab") as opened:
        opened.write(file.path.read_bytes()[:100])

    await keeping.happened(5)
    await keeper.tick()

    whole = [line for line in file.lines() if line.endswith("}")]
    assert whole == [line async for line in keeping.table.lines()]


# --- What is not signed -----------------------------------------------------------------------------------------------


async def test_a_log_that_lost_its_last_signed_fact_is_not_signed(keeping: Keeping) -> None:
    keeper = await signed(keeping, 5)
    del keeping.log._log[-1]

    with pytest.raises(LogDiffers, match="position 10"):
        await keeper.tick()
    keeping.log._log.append(keeping.log._log[-1])
    again = keeping.keeper()
    await again.take_up()
    with pytest.raises(LogDiffers, match="position 10"):
        await again.tick()


async def test_heads_that_the_table_lost_are_put_back_from_a_file(keeping: Keeping, migrated_database_url: str) -> None:
    await signed(keeping, 15)
    lines = [line async for line in keeping.table.lines()]
    execute(migrated_database_url, "DELETE FROM log_heads WHERE number > 1")

    await signed(keeping, 5)

    assert [line async for line in keeping.table.lines()][:3] == lines
    assert len(await keeping.heads()) == 4


async def test_a_log_that_is_not_what_a_head_outside_says_is_not_signed(keeping: Keeping, migrated_database_url: str) -> None:
    """As a database would be that was put back to an older state without `lookup restore`."""
    await signed(keeping, 15)
    execute(migrated_database_url, "DELETE FROM log_heads WHERE number > 1")
    del keeping.log._log[12:]

    with pytest.raises(LogDiffers, match="Head 2 in"):
        await keeping.keeper().take_up()


async def test_a_head_of_the_table_that_is_signed_by_a_stranger_is_not_gone_on_from(
    keeping: Keeping, migrated_database_url: str, tmp_path: Path
) -> None:
    await signed(keeping, 5)
    make_key(tmp_path / "stranger")
    (head,) = await keeping.heads()
    forged = load_signer(tmp_path / "stranger").signed(head)
    execute(migrated_database_url, "UPDATE log_heads SET line = %s", forged.line)

    with pytest.raises(LogDiffers, match="not signed by a key of ours"):
        await keeping.keeper().take_up()


async def test_a_restored_log_goes_on_with_a_head_that_says_so(keeping: Keeping, migrated_database_url: str) -> None:
    """The backup was made after the first head; the second and third are of facts that are lost."""
    await signed(keeping, 15)
    first, _, third = await keeping.heads()
    execute(migrated_database_url, "DELETE FROM log_heads WHERE number > 1")
    del keeping.log._log[12:]
    old_id = await keeping.log.log_id()
    keeping.log._log_id = UUID(int=99)

    keeper = keeping.keeper()
    await keeper.take_up()
    await keeping.happened(5)
    keeping.clock.move_to(NOW + EVERY)
    for number, stored in enumerate(keeping.log._log[12:], start=31):
        keeping.log._log[keeping.log._log.index(stored)] = StoredFact(
            number, stored.stream_id, stored.stream_version, stored.topic, stored.state
        )
    await keeper.tick()

    heads = await keeping.heads()
    restored = heads[1]
    assert [head.number for head in heads] == [1, 4, 5]
    assert (restored.restored_from, restored.log_id) == ((old_id, 1), UUID(int=99))
    assert (restored.state, restored.previous) == (first.state, third.digest)
    assert [read_head(line).number for line in keeping.files[0].lines()] == [1, 2, 3, 4, 5]


# --- Keys -------------------------------------------------------------------------------------------------------------


def test_a_private_key_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "heads.key"
    made = make_key(path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_signer(path).key_id == made.key_id
    path.chmod(0o640)
    with pytest.raises(KeyProblem, match="Others may read"):
        load_signer(path)


def test_no_key_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(KeyProblem, match="`lookup audit keygen` makes one"):
        load_signer(tmp_path / "heads.key")


def test_a_key_is_not_written_over_by_accident(tmp_path: Path) -> None:
    make_key(tmp_path / "heads.key")

    with pytest.raises(KeyProblem, match="There is a key already"):
        make_key(tmp_path / "heads.key")


async def test_after_a_rotation_the_old_key_is_known_and_has_endorsed_the_new_one(keeping: Keeping) -> None:
    await signed(keeping, 5)
    old_id = load_signer(keeping.key).key_id

    new = make_key(keeping.key, rotate=True)
    await signed(keeping, 5)

    keys = load_public(public_path(keeping.key))
    heads = await keeping.heads()
    assert list(keys) == [old_id, new.key_id]
    assert [head.key_id for head in heads] == [old_id, new.key_id]
    assert all(is_signed(head, verifiers(keys)) for head in heads)
    assert new.endorsed_by == old_id
    assert keys[old_id].verify(bytes.fromhex(new.endorsement or ""), ENDORSED_AS + bytes.fromhex(new.public))


@pytest.mark.parametrize("content", ["", "no key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_what_is_no_key_is_told(tmp_path: Path, content: str) -> None:
    path = tmp_path / "heads.key"
    path.write_text(content)
    path.chmod(0o600)

    with pytest.raises(KeyProblem, match="is no private key"):
        load_signer(path)


def test_a_public_key_that_is_not_the_one_that_it_is_called_is_not_taken(tmp_path: Path) -> None:
    """Who knows a key by its id has to get that key."""
    trusted, stranger = make_key(tmp_path / "trusted"), make_key(tmp_path / "stranger")
    path = public_path(tmp_path / "trusted")
    path.write_text(replace(trusted, public=stranger.public).line + "\n")

    with pytest.raises(KeyProblem, match="is no file of public keys"):
        load_public(path)


# --- Rights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "allowed"), [(APP_ROLE, {"SELECT", "INSERT"}), (READER_ROLE, {"SELECT"})], ids=["app", "reader"]
)
def test_no_role_that_serves_can_change_or_delete_a_head(migrated_database_url: str, role: str, allowed: set[str]) -> None:
    statements = {
        "SELECT": "SELECT * FROM log_heads",
        "INSERT": "INSERT INTO log_heads VALUES (1, 1, '{}')",
        "UPDATE": "UPDATE log_heads SET line = ''",
        "DELETE": "DELETE FROM log_heads",
        "TRUNCATE": "TRUNCATE log_heads",
    }
    may: set[str] = set()
    with psycopg.connect(make_conninfo(migrated_database_url), autocommit=True) as database:
        database.execute(f"SET ROLE {role}")
        for name, statement in statements.items():
            try:
                database.execute(statement)
                may.add(name)
            except psycopg.errors.InsufficientPrivilege:
                pass

    assert may == allowed


def execute(database_url: str, statement: str, *values: str) -> None:
    with psycopg.connect(database_url) as database:
        database.execute(statement, values)
