"""A decision that overfills an instance is noticed."""

from typing import Any

import pytest

from ares_dev.chaos.decisions import overfull


def record(decided: list[dict[str, Any]], oom_actions: list[dict[str, Any]]) -> dict[str, Any]:
    cluster = {
        "instances": ["decode-0", "decode-1"],
        "capacity_tokens": [1000, 1000],
        "promised_tokens": [0, 100],
        "open": [True, True],
        "requests": ["a", "b", "c"],
        "location": [0, 0, 1],
        "resident_tokens": [300, 200, 500],
        "movable": [True, True, True],
        "remaining_tokens": [[1.0, 2.0, 3.0]] * 3,
        "levels": [0.1, 0.5, 0.9],
    }
    return {"kind": "moves", "cluster": cluster, "decided": decided, "oom_actions": oom_actions}


@pytest.mark.parametrize(
    ("decided", "oom_actions", "said"),
    [
        ([{"request": 0, "target": 1}], [], []),
        ([{"request": 0, "target": 1}], [{"request": 1, "target": -1}], []),
        # 500 there, 100 on their way, 300 decided just before.
        ([{"request": 0, "target": 1}, {"request": 1, "target": 1}], [], ["b (200 tokens) makes 1100 of 1000"]),
        ([{"request": 1, "target": 1}], [{"request": 0, "target": 1}], ["b (200 tokens) makes 1100 of 1000"]),
    ],
)
def test_moves_that_do_not_fit(
    decided: list[dict[str, Any]], oom_actions: list[dict[str, Any]], said: list[str]
) -> None:
    found = list(overfull(record(decided, oom_actions)))
    assert len(found) == len(said)
    assert all(found[n].startswith(one) for n, one in enumerate(said))
