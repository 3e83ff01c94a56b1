"""Fixtures of the tests of routes."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.gateway.fakes import FakeInstance, instances
from tests.gateway.http.service import Service, serving
from tests.gateway.running import IMPATIENT, VOCABULARY
from tests.waiting import eventually


@pytest.fixture
async def service(fakes: list[FakeInstance], model_folder: Path) -> AsyncIterator[Service]:
    async with serving(fakes, model_folder, tuning=IMPATIENT) as made:
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in made.gateway.pool.instances), 15)
        yield made


@pytest.fixture(scope="module")
async def shared(model_folder: Path) -> AsyncIterator[Service]:
    """One service for all tests that leave its instances as they are."""
    async with (
        instances("prefill", "decode", "decode", vocabulary=VOCABULARY) as fakes,
        serving(fakes, model_folder) as made,
    ):
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in made.gateway.pool.instances), 15)
        yield made
