"""Llumnix's rule, on a cluster that can be worked out by hand."""

from dataclasses import replace

import numpy as np

from ares.policy import rebalancer
from ares.policy.rebalance.llumnix import LlumnixSettings
from tests.policy.test_rebalance import cluster

# Freeness: (1000 - 980) / 2 = 10, (1000 - 940) / 3 = 20, (1000 - 100) / 1 = 900, (1000 - 700) / 1 = 300.
VIEW = cluster([0, 0, 1, 1, 1, 2, 3], [580, 400, 500, 240, 200, 100, 700], None, [1000] * 4)


def decided(view: object = VIEW, **settings: float) -> list[tuple[int, int, int]]:
    moves = rebalancer("llumnix", LlumnixSettings(**settings)).decide(view)  # type: ignore[arg-type]
    return [(move.request, move.source, move.target) for move in moves]


def test_the_least_free_gives_its_shortest_to_the_most_free() -> None:
    # (900 - 400) / 2 = 250 and (300 - 200) / 2 = 50 steps after, above the threshold of 48.
    assert decided() == [(1, 0, 2), (4, 1, 3)]
    assert decided(threshold_steps=15.0) == [(1, 0, 2)]
    assert decided(threshold_steps=60.0) == [(1, 0, 2)], "the second target would fall below it"
    assert decided(threshold_steps=5.0) == []


def test_what_cannot_move_and_who_takes_none_are_left_out() -> None:
    assert decided(replace(VIEW, movable=np.arange(7) != 1)) == [(0, 0, 2), (4, 1, 3)]
    assert decided(replace(VIEW, open=np.array([True, True, False, True]))) == []
    assert decided(replace(VIEW, promised_tokens=np.array([0, 0, 800, 0]))) == []


def test_a_request_that_waits_for_memory_counts_with_what_it_waits_for() -> None:
    location, resident = [0, 0, 1, 1, 1, 2, 3, 3], [580, 400, 500, 240, 200, 100, 700, 290]
    view = cluster(location, resident, None, [1000] * 4, movable=np.arange(8) != 7)
    assert decided(view) == [(6, 3, 2)], "instance 3 has 10 tokens left for two requests: fewest of all"
