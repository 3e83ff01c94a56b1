"""The forecast from the first state of a request, and what it still says later on.

A prompt tells more of its answer's length than any later state does: the distribution that the first state gives, given
that the output has not ended since, is where all later predictions start from. It travels with its request
(engine/prediction/carried_forecast.py). Where it is not there, the first state that the instance sees is taken.
"""

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ares.predictor import features
from ares.predictor.dataset import Pairs
from ares.predictor.networks import LOGIT_SCALE, HazardNetwork

# Chances below this are not told apart.
_SMALLEST = 1e-6
_LARGEST_LOGIT = 8.0
# Later pairs of each output that the network also learns from, as if they were its first.
_LATER = 2


def logits(ended: torch.Tensor, grid: torch.Tensor, elapsed: torch.Tensor) -> torch.Tensor:
    """Return what a forecast says later, as inputs of a network.

    Parameters
    ----------
    ended
        [batch, bins + 1] the chance to have ended before each edge of `grid`, as it was forecast.
    elapsed
        [batch] tokens generated since then.

    Returns
    -------
    torch.Tensor
        [batch, bins] logits of the hazards given that the output has not ended since, divided by LOGIT_SCALE.
    """
    survived = torch.log((1 - ended).clamp(min=_SMALLEST))
    edges = grid[None] + elapsed.float()[:, None]
    # Within a bin, and behind the last, the hazard per token is constant.
    index = (torch.searchsorted(grid, edges, right=True) - 1).clamp(0, len(grid) - 2)
    low, high = survived.gather(1, index), survived.gather(1, index + 1)
    at_edge = low + (high - low) * (edges - grid[index]) / (grid[index + 1] - grid[index])
    passed = (at_edge[:, :-1] - at_edge[:, 1:]).clamp(min=1e-5)
    hazards = torch.log(-torch.expm1(-passed)) + passed
    return hazards.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT) / LOGIT_SCALE


def forecast(network: Any, states: torch.Tensor, position: torch.Tensor, prompt_length: torch.Tensor) -> torch.Tensor:
    """Return [batch, bins + 1], the forecast from the first states of requests: [batch, d], standardised."""
    return network.distribution(*inputs(states, position, prompt_length))


def inputs(
    states: torch.Tensor, position: torch.Tensor, prompt_length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the features of requests without a history: [batch, 2 d] and [batch, SCALARS]."""
    nothing = torch.zeros(len(states), 3, device=states.device)
    return torch.cat([states, states], 1), features.scalars(position, prompt_length, nothing)


def starts(pairs: Pairs) -> NDArray[np.int64]:
    """Return [pairs]: the row of the first pair of each pair's output."""
    first = np.flatnonzero(np.diff(pairs.output, prepend=-1))
    return np.repeat(first, np.diff(np.append(first, len(pairs))))


def of_pairs(network: HazardNetwork, states: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Return [pairs, bins] logits of the forecast from each output's first pair; `states` are [pairs, d]."""
    at = starts(pairs)
    first, place = np.unique(at, return_inverse=True)
    given = states[first], torch.from_numpy(pairs.position[first]), torch.from_numpy(pairs.prompt_length[first])
    with torch.no_grad():
        ended = forecast(network, *given)
    elapsed = torch.from_numpy(pairs.position - pairs.position[at])
    return logits(ended[place], network.grid, elapsed)


def sample(pairs: Pairs, seed: int) -> NDArray[np.int64]:
    """Return rows to learn forecasts from first states from: the first pair of each output, and some later ones.

    The first state that an instance sees may be a later one.
    """
    first = np.unique(starts(pairs))
    counts = np.diff(np.append(first, len(pairs)))
    generator = np.random.default_rng(seed)
    return np.unique(np.concatenate([first, *(first + generator.integers(0, counts) for _ in range(_LATER))]))


def part_of(pairs: Pairs, count: int) -> NDArray[np.int64]:
    """Return [pairs]: in which of `count` parts a pair is, all pairs of a prompt in the same."""
    of_output = [hashlib.sha256(f"part {prompt}".encode()).digest()[0] % count for prompt in pairs.prompts]
    result: NDArray[np.int64] = np.array(of_output, np.int64)[pairs.output]
    return result
