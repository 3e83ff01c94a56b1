from collections.abc import Iterator

import pytest

from tests.engine.control_channel import Gateway, Instance


@pytest.fixture
def instance() -> Iterator[Instance]:
    """An instance's end of the control channel, without an engine."""
    made = Instance()
    yield made
    made.channel.close()


@pytest.fixture
def gateway(instance: Instance) -> Iterator[Gateway]:
    """A gateway's end of that channel."""
    made = Gateway(instance.address)
    yield made
    made.close()
