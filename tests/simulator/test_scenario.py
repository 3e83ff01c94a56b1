"""A scenario refuses what the simulator cannot show."""

import pytest

from ares.simulator.scenario import Scenario


def scenario(*settings: str) -> Scenario:
    return Scenario("paper", None, None, 1, 2, "llama-8b-rtx4090", None, "exact", 1.0, settings=settings)


def test_warm_copies_are_refused_unless_their_budget_is_zero() -> None:
    with pytest.raises(ValueError, match=r"preset ares: copies most_saved needs .*set copies.link_bytes_s=0"):
        scenario("copies.link_bytes_s=1e8").policy("ares")
    assert not scenario("copies.link_bytes_s=0").policy("ares").copies_requests


def test_what_needs_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="looks at what is cached"):
        scenario().policy("ares-prefix")
