"""Peers for the lookups of all end-to-end tests: started once, in this process, so that a check can ask what they served."""

from collections.abc import AsyncIterator

import pytest

from tests.e2e.served import Served, serving_peers


@pytest.fixture(scope="session")
async def peers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with serving_peers(tmp_path_factory.mktemp("peers")) as served:
        yield served
