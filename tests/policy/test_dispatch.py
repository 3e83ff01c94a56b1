"""Dispatchers as the gateway calls them."""

from dataclasses import replace

import numpy as np
import pytest

from ares.policy import DISPATCHERS, PRESETS, dispatcher
from tests.policy.test_rebalance import cluster


def test_every_preset_names_a_dispatcher() -> None:
    view = cluster([0, 0, 1], [100, 100, 100], None, [10_000] * 2)
    for chosen in PRESETS.values():
        assert dispatcher(chosen.dispatch).choose(view, 10, None) in {0, 1}
    with pytest.raises(ValueError, match="unknown dispatch 'x'; known: balanceroute, forecast, least_loaded"):
        dispatcher("x")


def test_forecast_sees_growth_where_least_loaded_sees_today() -> None:
    """Instance 0 holds more today but empties soon; instance 1 will grow for long."""
    view = cluster([0] * 4 + [1] * 4, [500] * 4 + [400] * 4, [20.0] * 4 + [9000.0] * 4, [100_000] * 2)
    assert dispatcher("least_loaded").choose(view, 10, None) == 1
    assert dispatcher("forecast").choose(view, 10, None) == 0


@pytest.mark.parametrize("name", DISPATCHERS)
def test_closed_instances_get_nothing(name: str) -> None:
    view = cluster([0], [100], [50.0], [10_000] * 3)
    only = replace(view, open=np.array([False, False, True]))
    assert [dispatcher(name).choose(only, 10, None) for _ in range(3)] == [2, 2, 2]
    assert dispatcher(name).choose(replace(view, open=np.zeros(3, np.bool_)), 10, None) is None
