from collections.abc import Iterator

import pytest

from tests.engine.test_control import Instance


@pytest.fixture
def instance() -> Iterator[Instance]:
    """An instance's end of the control channel, without an engine."""
    made = Instance()
    yield made
    made.channel.close()
