"""`least_loaded`, with what an instance has cached of the request."""

from dataclasses import replace

import numpy as np
import pytest

from ares.policy import PRESETS, Cluster, choose_instance, dispatcher
from ares.policy.dispatch.least_loaded import LeastLoadedSettings


def cluster(*loads: int) -> Cluster:
    none = np.zeros(0, np.int64)
    names = tuple(f"d{n}" for n in range(len(loads)))
    closed = np.ones(len(loads), np.bool_)
    return Cluster(names, np.full(len(loads), 10_000), np.array(loads), closed, (), none, none, none.astype(np.bool_))


@pytest.mark.parametrize(("cached", "chosen"), [([0, 0], 1), ([1500, 0], 1), ([2500, 0], 0), ([2500, 1000], 1)])
def test_cached_tokens_weigh_as_much_as_load(cached: list[int], chosen: int) -> None:
    seen = replace(cluster(5000, 3000), cached_tokens=np.array(cached))
    policy = dispatcher("least_loaded", LeastLoadedSettings(cached_weight=1.0))
    assert choose_instance(policy, seen, 3000, None) == chosen
    assert choose_instance(policy, cluster(5000, 3000), 3000, None) == 1
    assert choose_instance(dispatcher("least_loaded"), seen, 3000, None) == 1


def test_presets_that_look_at_prefixes() -> None:
    looking = {name for name, one in PRESETS.items() if one.sees_prefixes}
    assert looking == {"static-prefix", "least-time", "ares-prefix"}
    with pytest.raises(ValueError, match="cached_weight"):
        LeastLoadedSettings(cached_weight=1.5)
