"""Every preset gets the same requests under the same conditions."""

import pytest

from ares.bench.live import load
from ares.bench.live.load import Planned


def test_what_one_run_has_cached_is_of_no_use_to_another() -> None:
    planned = [Planned("r0", 0.5, {"prompt": [1, 2], "max_tokens": 3}), Planned("r1", 1.5, {"messages": []})]
    runs = [load.salted(planned, salt) for salt in ("0-static-rr", "0-ares", "1-ares")]
    salts = [{each.body["cache_salt"] for each in run} for run in runs]
    assert salts == [{"0-static-rr"}, {"0-ares"}, {"1-ares"}]
    for run in runs:
        assert [(each.name, each.at_s) for each in run] == [("r0", 0.5), ("r1", 1.5)]
        assert [{**each.body, "cache_salt": None} for each in run] == [
            {**each.body, "cache_salt": None} for each in planned
        ]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_each_preset_is_as_often_first_second_and_so_on(count: int) -> None:
    presets = [f"preset-{number}" for number in range(count)]
    rounds = [load.order(presets, number) for number in range(2 * count)]
    assert rounds[0] == presets
    for place in range(count):
        assert sorted(one[place] for one in rounds) == sorted(presets * 2)
