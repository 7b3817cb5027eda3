"""The self-check against real servers: it names the one byte that was changed, and says nothing of a service under load."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from uuid_utils.compat import uuid7

from app.doctor.consultation import consult
from app.metrics import exposition
from app.self_check import SelfCheck, last_check, last_slot
from app.settings import Settings
from app.wiring import Wiring
from events.ending import end
from events.record import Cause
from events.store import AppendUnit, NewFacts, StreamHead
from projections import replay
from projections.comparison import Comparer, Name
from tests.builders import DOCUMENT, PING, RDAP, completed, counts, dispatched, eventually, failed, job_completed, submitted

PATIENCE_S = 30.0


class House:
    """A log, and a relay and a projector at work on it."""

    def __init__(self, database_url: str, redis_url: str) -> None:
        self.wiring = Wiring(Settings(database_url=database_url, redis_url=redis_url, self_check_rate=1e6))
        self._at_work = [asyncio.create_task(part()) for part in (self.wiring.relay, self.wiring.projector)]

    async def happened(self, job_id: UUID) -> None:
        at = datetime.now(UTC)
        await (await self.wiring.documents()).put(job_id, DOCUMENT)
        facts = [
            submitted(PING, RDAP, job_id=job_id, when=at),
            dispatched(PING, RDAP, job_id=job_id, when=at),
            completed(PING, job_id=job_id, when=at),
            failed(RDAP, job_id=job_id, when=at),
            job_completed(counts(succeeded=1, failed=1), job_id=job_id, when=at),
        ]
        await self.wiring.store.append(AppendUnit([NewFacts(job_id, StreamHead(), facts)], Cause("test", job_id)))

    async def projected(self) -> None:
        head = await self.wiring.store.head()
        async with asyncio.timeout(PATIENCE_S):
            while True:
                one = (await self.wiring.views.standing()).of("job_status")
                if one is not None and one.checkpoint == head:
                    return
                await asyncio.sleep(0.02)

    async def checked(self) -> SelfCheck:
        return await (await self.wiring.self_checker()).run()

    async def key_of(self, job_id: UUID) -> str:
        one = (await self.wiring.views.standing()).of("job_status")
        assert one is not None
        return self.wiring.keys.job(one.name, job_id)

    async def generations(self) -> set[str]:
        standing = await self.wiring.views.standing()
        return {one.name for one in standing.fed}

    async def projector_stops(self) -> None:
        await end([self._at_work.pop()], PATIENCE_S)
        await self.wiring.redis.delete(self.wiring.keys.lease)  # As time does.

    def projector_starts(self) -> None:
        self._at_work.append(asyncio.create_task(self.wiring.projector()))

    async def close(self) -> None:
        await end(self._at_work, PATIENCE_S)
        await self.wiring.aclose()


class Waiting(Comparer):
    """`waits` counts how often the two generations did not stand at the same position."""

    waits = 0

    async def _ask(self, first: int, bases: Sequence[str], names: Sequence[Name]) -> list[str] | None:
        told = await super()._ask(first, bases, names)
        self.waits += told is None
        return told


@pytest.fixture
async def house(migrated_database_url: str, redis_url: str) -> AsyncIterator[House]:
    house = House(migrated_database_url, redis_url)
    yield house
    await house.close()


async def test_one_changed_byte_is_found_and_named_and_the_doctor_tells(house: House) -> None:
    sound, spoiled = uuid7(), uuid7()
    for job_id in (sound, spoiled):
        await house.happened(job_id)
    await house.projected()
    before = await house.generations()
    well = await house.checked()
    key = await house.key_of(spoiled)
    value: Any = await house.wiring.redis.get(key)
    await house.wiring.redis.set(key, value.replace(b'"duration', b'"Duration'), keepttl=True)

    found = await house.checked()

    assert (well.differing, well.named) == ({}, [])
    assert well.compared >= 2
    assert (found.differing, found.named) == ({"job_status": 1}, [f"job_status:{spoiled}"])
    assert await last_check(house.wiring.redis) == found
    assert await house.generations() == before
    report = await consult(house.wiring, second_look_after_s=0.1)
    assert [finding.about for finding in report.findings["self-check failed"]] == ["job_status"]
    assert str(spoiled) in report.findings["self-check failed"][0].problem
    metrics = exposition(await house.wiring.projection_readings()["self_check"]()).decode()
    assert "lookup_self_check_differing 1" in metrics
    assert f"lookup_self_check_compared {found.compared}" in metrics


async def test_a_service_under_load_gives_no_false_alarm(house: House) -> None:
    await house.happened(uuid7())
    going_on = True

    async def keep_coming() -> int:
        jobs = 0
        while going_on:
            await house.happened(uuid7())
            jobs += 1
        return jobs

    coming = asyncio.create_task(keep_coming())
    try:
        found = [await house.checked() for _ in range(3)]
    finally:
        going_on = False
        jobs = await coming

    assert [check.differing for check in found] == [{}, {}, {}]
    assert found[-1].position > found[0].position
    assert jobs > 10


async def test_documents_are_compared_only_where_both_stand_at_the_same_position(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Views that move on too fast to be met are passed: until they have come as far, they are expected to be otherwise."""
    monkeypatch.setattr(replay, "CHASES_MAX", 0)
    await house.happened(uuid7())
    await house.projected()
    await house.projector_stops()
    await house.happened(uuid7())
    comparer = Waiting(house.wiring.redis, house.wiring.keys)
    checker = replace(await house.wiring.self_checker(), comparer=comparer)

    checking = asyncio.create_task(checker.run())
    await eventually(lambda: comparer.waits > 0 or checking.done(), patience_s=PATIENCE_S)
    house.projector_starts()
    async with asyncio.timeout(PATIENCE_S):
        found = await checking

    assert (found.differing, found.position) == ({}, await house.wiring.store.head())
    assert comparer.waits


@pytest.mark.parametrize(
    ("now", "slot"),
    [
        (datetime(2026, 5, 6, 2, 59, tzinfo=UTC), datetime(2026, 5, 5, 3, tzinfo=UTC)),
        (datetime(2026, 5, 6, 3, 0, tzinfo=UTC), datetime(2026, 5, 6, 3, tzinfo=UTC)),
        (datetime(2026, 5, 6, 23, 59, tzinfo=UTC), datetime(2026, 5, 6, 3, tzinfo=UTC)),
    ],
)
def test_it_is_due_once_a_night(now: datetime, slot: datetime) -> None:
    assert last_slot(now, 3, timedelta(days=1)) == slot
