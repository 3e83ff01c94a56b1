"""What cost models leave unexplained, drawn again."""

import numpy as np
import pytest

from ares.bench.live.spread import Spread


def spread(tokens: list[int], factor: list[float]) -> Spread:
    count = len(tokens)
    return Spread(np.array(tokens), np.array(factor), np.full(count, 0.3), np.array([-0.05, 0.05]), 0.5)


def test_streams_of_one_length_have_the_spread_of_all_of_them() -> None:
    """Most outputs end at their limit: their factors are drawn from all of these, not from the first ones in order."""
    one = spread([128] * 40, np.linspace(0.8, 1.2, 40).tolist())
    tokens, generator = np.full(4000, 128), np.random.default_rng(0)
    decode, gaps = one.apply(generator, tokens, np.full(4000, 10.2), np.full(4000, 0.2))
    assert decode.mean() == pytest.approx(10.2, rel=0.005)
    assert np.percentile(decode, [1, 99]) == pytest.approx([8.2, 12.2], abs=0.15)
    assert (gaps == 0.3).all()


def test_a_stream_is_drawn_from_those_of_about_its_length() -> None:
    one = spread([*range(100), *range(1000, 1100)], [0.5] * 100 + [2.0] * 100)
    tokens = np.array([20, 1050])
    decode, _ = one.apply(np.random.default_rng(0), tokens, np.array([4.0, 4.0]), np.zeros(2))
    assert decode == pytest.approx([2.0, 8.0], abs=0.06)


def test_a_long_stop_stays_what_it_was_and_one_token_is_no_stream() -> None:
    one = spread([10] * 9, [1.0] * 9)
    decode, gaps = one.apply(np.random.default_rng(0), np.array([10, 1]), np.array([9.0, 0.0]), np.array([7.0, 0.0]))
    assert gaps.tolist() == [7.0, 0.0]
    assert decode[1] == 0.0
