"""The load of decode as a role policy sees it, from a view of the decode pool; the same in gateway and simulator."""

import numpy as np

from ares.policy.admission.forecast import GRID
from ares.policy.cluster import Cluster, FloatArray
from ares.policy.cost_model import default_tpot_s
from ares.policy.forecast import plain_forecast

# Standard deviations above the expectation.
_DEVIATIONS = 1.0


def decode_load(cluster: Cluster) -> tuple[FloatArray, FloatArray]:
    """Return the requests of each instance, and a high forecast of the tokens that they will take, shape (I,) each."""
    instances = len(cluster.instances)
    requests = np.bincount(cluster.location, minlength=instances).astype(np.float64)
    if cluster.remaining_tokens is None:
        return requests, cluster.load_tokens().astype(np.float64)
    # Plain numpy: every few seconds it is quick enough, and nothing has to be compiled for it.
    peak: FloatArray = plain_forecast(cluster, GRID).high(_DEVIATIONS).max(axis=1)
    return requests, peak


def mean_step(cluster: Cluster) -> tuple[float, float, float]:
    """Return base, time of a request and time of a token of a decode step, as means; zeros where they are unknown."""
    if cluster.step_base_s is None or cluster.step_request_s is None or cluster.step_token_s is None:
        return 0.0, 0.0, 0.0
    return float(cluster.step_base_s.mean()), float(cluster.step_request_s.mean()), float(cluster.step_token_s.mean())


def objective_s(tpot_s: float | None, step_s: tuple[float, float, float], capacity_tokens: float) -> float:
    """Return the objective of the time per token; where none is set, by a step at full memory."""
    if tpot_s is not None:
        return tpot_s
    base_s, _, token_s = step_s
    return default_tpot_s(base_s, token_s, capacity_tokens) or float("inf")
