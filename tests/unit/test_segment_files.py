"""A segment file alone: what is written is read back, and what is taken out of it is nothing that was hashed."""

from pathlib import Path
from uuid import UUID

import pytest

from events.record import StoredFact
from events.segment_files import BLOCK_FACTS, Document, Segment, digest_of, rewrite_segment, segment_files, write_segment
from tests.builders import JOB, PING, given, memory_store, submitted
from write_side.erasure_table import erased

LOG = UUID(int=1)
NO_TEXT = Document(f"{JOB}/00", b"\xff\x00raw\n\xfe")


async def rows() -> list[StoredFact]:
    store = memory_store()
    await given(store, submitted(PING))
    (row,) = await store.read_all(0, 1)
    return [row]


async def test_documents_that_are_no_text_come_back_byte_for_byte(tmp_path: Path) -> None:
    header = write_segment(tmp_path, LOG, await rows(), [NO_TEXT, Document(f"{JOB}/01", b'{"a":1}')])

    found = Segment(tmp_path / header.name).documents([NO_TEXT.key, f"{JOB}/01", "elsewhere"])

    assert found == {NO_TEXT.key: NO_TEXT.body, f"{JOB}/01": b'{"a":1}'}


async def test_pages_are_read_across_blocks(tmp_path: Path) -> None:
    (row,) = await rows()
    many = [row._replace(position=position) for position in range(1, 2 * BLOCK_FACTS + 2)]
    header = write_segment(tmp_path, LOG, many, [])

    page = list(Segment(tmp_path / header.name).rows(BLOCK_FACTS - 2, 2 * BLOCK_FACTS))

    assert [read.position for read in page] == list(range(BLOCK_FACTS - 1, 2 * BLOCK_FACTS + 2))


async def test_an_erasure_leaves_name_and_digest_and_is_seen_by_who_had_it_open(tmp_path: Path) -> None:
    header = write_segment(tmp_path, LOG, await rows(), [NO_TEXT])
    reader = Segment(tmp_path / header.name)
    assert b"198.51.100.7" in next(reader.rows()).state

    rewrite_segment(Segment(tmp_path / header.name), erased, lambda _: False)

    assert b"198.51.100.7" not in next(reader.rows()).state
    assert reader.documents([NO_TEXT.key]) == {}
    assert [path.name for path in segment_files(tmp_path)] == [header.name]
    assert digest_of(reader.rows()) == header.sha256


async def test_nothing_that_was_hashed_can_be_taken_out(tmp_path: Path) -> None:
    header = write_segment(tmp_path, LOG, await rows(), [])
    path = tmp_path / header.name
    before = path.read_bytes()

    with pytest.raises(ValueError, match="never erased"):
        rewrite_segment(Segment(path), lambda row: row._replace(state=row.state.replace(b"Ping", b"RDAP")), lambda _: True)

    assert path.read_bytes() == before
