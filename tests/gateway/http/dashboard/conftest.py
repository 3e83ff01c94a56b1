"""A browser and a stage: the page, and a feed that a test plays by hand."""

from collections.abc import AsyncIterator

import pytest

from tests.gateway.http.dashboard.browser import Browser, NoBrowserError, browser
from tests.gateway.http.dashboard.stage import Stage


@pytest.fixture(scope="package")
async def page(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    try:
        async with browser(tmp_path_factory.mktemp("browser")) as started:
            yield started
    except NoBrowserError as reason:
        pytest.skip(str(reason))


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with Stage().open() as opened:
        yield opened
