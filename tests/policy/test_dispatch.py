"""Dispatchers as the gateway calls them."""

from dataclasses import replace

import numpy as np
import pytest

from ares.policy import DISPATCHERS, PRESETS, dispatcher
from ares.policy.dispatch.forecast import ForecastDispatchSettings
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


def test_forecast_weighs_what_is_cached_as_admission_does() -> None:
    view = cluster([0, 1], [3000, 2900], [500.0] * 2, [100_000] * 2)
    seen = replace(view, cached_tokens=np.array([200, 0]))
    weighing = dispatcher("forecast", ForecastDispatchSettings(cached_weight=1.0))
    short = np.full(len(view.levels), 10.0)
    assert [one.choose(seen, 400, short) for one in (dispatcher("forecast"), weighing)] == [1, 0]
    assert weighing.choose(view, 400, short) == 1
    assert weighing.choose(replace(seen, cached_tokens=np.array([50, 0])), 400, short) == 1
    with pytest.raises(ValueError, match="cached_weight"):
        ForecastDispatchSettings(cached_weight=17.0)


@pytest.mark.parametrize("name", DISPATCHERS)
def test_closed_instances_get_nothing(name: str) -> None:
    view = cluster([0], [100], [50.0], [10_000] * 3)
    only = replace(view, open=np.array([False, False, True]))
    assert [dispatcher(name).choose(only, 10, None) for _ in range(3)] == [2, 2, 2]
    assert dispatcher(name).choose(replace(view, open=np.zeros(3, np.bool_)), 10, None) is None
