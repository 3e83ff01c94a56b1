"""Mock instances that tests steer: `ares.mock_engine`, stepped as a test says, with faults at every point."""

from tests.gateway.fakes.instance import FakeInstance, free_port, instances
from tests.gateway.fakes.tokens import EOS, FIRST_ORDINARY, expected

__all__ = ["EOS", "FIRST_ORDINARY", "FakeInstance", "expected", "free_port", "instances"]
