"""The simulated predictor."""

import numpy as np

from ares.simulator.prediction import predict
from ares.simulator.state import HAS_PREDICTION, LONGEST, SIGMA_END, SIGMA_START, SIGMA_TOKENS, State, allocate


def make() -> State:
    state = allocate(3, 1, 0, 1, 16)
    state.output[:] = 9000
    for column, value in ((HAS_PREDICTION, 1), (SIGMA_START, 0.9), (SIGMA_END, 0.1), (SIGMA_TOKENS, 3500)):
        state.scalars[column] = value
    state.scalars[LONGEST] = 9000
    return state


def test_a_prediction_depends_on_nothing_but_request_and_length() -> None:
    """Draws are kept for an epoch: whatever was asked before, the same question has the same answer."""
    random, used = np.random.default_rng(0), make()
    got, expected = np.empty(3), np.empty(3)
    for _ in range(300):
        request, generated = int(random.integers(3)), int(random.integers(9000))
        predict(used, request, generated, got)
        predict(make(), request, generated, expected)
        np.testing.assert_array_equal(got, expected)
        assert (np.diff(got) >= 0).all()
