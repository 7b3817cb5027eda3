"""A part that ends in an error is started again, and its log can still be read afterwards."""

import asyncio
import logging
from pathlib import Path

import pytest

from app import parts
from app.audit.keys import KeyProblem, load_signer
from app.parts import Part
from events.ending import end
from tests.builders import eventually


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PAUSE_FIRST_S", 0.001)
    monkeypatch.setattr(parts, "PAUSE_MAX_S", 0.001)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def test_an_error_that_stays_is_told_once_and_another_one_too(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """A keeper without a key tries every few seconds, for as long as nobody makes one."""
    key = tmp_path / "heads.key"

    async def sign_heads() -> None:
        load_signer(key)

    part = Part("keeper.heads", sign_heads)
    running = asyncio.create_task(part.keep_running())
    try:
        await eventually(lambda: part.starts >= 5)
        without_key = warnings_of(caplog)
        assert (part.state, part.detail) == ("retrying", KeyProblem.__name__)
        key.write_bytes(b"no key")
        key.chmod(0o600)
        starts = part.starts
        await eventually(lambda: part.starts >= starts + 5)
    finally:
        await end([running], 5.0)

    assert len(without_key) == 1
    assert "There is no key to sign heads with" in without_key[0]
    assert "`lookup audit keygen` makes one" in without_key[0]
    told = warnings_of(caplog)
    assert len(told) == 2
    assert "is no private key" in told[1]


async def test_an_error_after_a_steady_run_is_told_anew(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "STEADY_AFTER_S", -1.0)

    async def fail() -> None:
        raise OSError

    part = Part("relay", fail)
    running = asyncio.create_task(part.keep_running())
    try:
        await eventually(lambda: part.starts >= 4)
    finally:
        await end([running], 5.0)

    assert len(warnings_of(caplog)) >= 3
