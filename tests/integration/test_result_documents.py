"""Result documents in a real PostgreSQL: what was put is found, whole or not at all, also just after and by somebody else."""

from collections.abc import AsyncIterator
from hashlib import sha256

import psycopg
import pytest
from uuid_utils.compat import uuid7

from events.facts import ResultReference
from results import postgres as module
from results.postgres import PostgresDocuments

DOCUMENT = b'{"registrar":"Example"}'


@pytest.fixture
async def documents(migrated_database_url: str) -> AsyncIterator[PostgresDocuments]:
    opened = PostgresDocuments(migrated_database_url)
    await opened.open()
    yield opened
    await opened.close()


@pytest.fixture
async def elsewhere(migrated_database_url: str) -> AsyncIterator[PostgresDocuments]:
    """The same store, opened by another process."""
    opened = PostgresDocuments(migrated_database_url)
    await opened.open()
    yield opened
    await opened.close()


def delete(database_url: str, reference: ResultReference) -> None:
    with psycopg.connect(database_url) as conn:
        assert conn.execute("DELETE FROM result_documents WHERE key = %s", (reference.location.key,)).rowcount == 1


def damage(database_url: str, reference: ResultReference, body: bytes) -> None:
    with psycopg.connect(database_url) as conn:
        changed = conn.execute("UPDATE result_documents SET body = %s WHERE key = %s", (body, reference.location.key))
        assert changed.rowcount == 1


async def test_a_document_is_found_by_another_process(documents: PostgresDocuments, elsewhere: PostgresDocuments) -> None:
    reference = await documents.put(uuid7(), DOCUMENT)

    assert await elsewhere.get([reference]) == {reference.location.key: DOCUMENT}
    assert reference.sha256 == sha256(DOCUMENT).hexdigest()


async def test_a_document_of_this_process_is_given_once_from_memory_and_then_from_the_database(
    documents: PostgresDocuments, migrated_database_url: str
) -> None:
    reference = await documents.put(uuid7(), DOCUMENT)
    delete(migrated_database_url, reference)

    assert await documents.get([reference]) == {reference.location.key: DOCUMENT}
    assert await documents.get([reference]) == {}


async def test_some_from_memory_and_some_from_the_database_are_one_answer(
    documents: PostgresDocuments, elsewhere: PostgresDocuments
) -> None:
    ours, theirs = await documents.put(uuid7(), DOCUMENT), await elsewhere.put(uuid7(), DOCUMENT)

    assert await documents.get([ours, theirs]) == {ours.location.key: DOCUMENT, theirs.location.key: DOCUMENT}


@pytest.mark.parametrize("body", [b"no zstd", b"\x28\xb5\x2f\xfd\x04\x00\x01\x00\x00"], ids=["not compressed", "another"])
async def test_a_damaged_document_is_not_given(
    documents: PostgresDocuments, elsewhere: PostgresDocuments, migrated_database_url: str, body: bytes
) -> None:
    reference = await documents.put(uuid7(), DOCUMENT)
    damage(migrated_database_url, reference, body)

    assert await elsewhere.get([reference]) == {}


async def test_no_more_is_kept_in_memory_than_the_bound(migrated_database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JUST_STORED_BYTES_MAX", 2 * len(DOCUMENT))
    documents = PostgresDocuments(migrated_database_url)
    await documents.open()
    references = [await documents.put(uuid7(), DOCUMENT) for _ in range(3)]
    for reference in references:
        delete(migrated_database_url, reference)

    found = await documents.get(references)
    await documents.close()

    assert list(found) == [reference.location.key for reference in references[1:]]


async def test_what_no_view_will_show_takes_no_room_in_memory(documents: PostgresDocuments, migrated_database_url: str) -> None:
    raw = await documents.put(uuid7(), DOCUMENT, shown=False)
    delete(migrated_database_url, raw)

    assert await documents.get([raw]) == {}
