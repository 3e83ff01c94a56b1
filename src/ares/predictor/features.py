"""The features of a request: its newest state, its history, its position.

Training runs the code of the decode worker over recorded outputs, so that both have the same features.
"""

import math
from typing import Any

import numpy as np
import torch

from ares.predictor.dataset import Pairs

# Number of earlier states that the newest is compared with: a text that repeats itself returns to earlier states.
_RING = 16
_KNOTS = 12
# Log of one more than the largest position that the knots cover.
_LONGEST = math.log(32769)
# Log position knots, log of the prompt's length, three similarities.
SCALARS = _KNOTS + 4


class History:
    """The running average and the newest states of up to `slots` requests; torch tensors on one device.

    The average travels with a request that moves; the newest states do not, whose absence costs nothing.
    """

    def __init__(self, slots: int, hidden_size: int, device: Any = "cpu") -> None:
        # States seen here, and states in the average, which may have begun elsewhere.
        self._count = torch.zeros(slots, dtype=torch.float32, device=device)
        self._averaged = torch.zeros(slots, dtype=torch.float32, device=device)
        self._mean = torch.zeros(slots, hidden_size, dtype=torch.float32, device=device)
        self._ring = torch.zeros(slots, _RING, hidden_size, dtype=torch.float16, device=device)

    def clear(self, slots: list[int]) -> None:
        """Forget the requests in these slots."""
        self._count[slots] = 0
        self._averaged[slots] = 0
        self._mean[slots] = 0
        self._ring[slots] = 0

    def averages(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how many states each request has had, [batch], and their average, [batch, d]."""
        return self._averaged[slots], self._mean[slots]

    def resume(self, slots: torch.Tensor, averaged: torch.Tensor, mean: torch.Tensor) -> None:
        """Begin with averages from elsewhere (`averages`); the slots are empty."""
        self._averaged[slots] = averaged.float()
        self._mean[slots] = mean

    def update(self, slots: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new states.

        Parameters
        ----------
        slots
            [batch] int64, one request each.
        states
            [batch, d] float32, standardised.

        Returns
        -------
        mean
            [batch, d] average of the request's states, the new one included.
        similarity
            [batch, 3] cosine of the new state with the earlier ones: to the last, the largest, the mean; 0 where
            there is none.
        """
        count = self._count[slots]
        unit = torch.nn.functional.normalize(states, dim=1)
        # Slots of the ring that are not filled yet are zero, and so is their product.
        cosines = torch.einsum("brd,bd->br", self._ring[slots].float(), unit)
        filled = count.clamp(max=_RING)
        last = cosines.gather(1, ((count.long() - 1) % _RING)[:, None])[:, 0]
        empty = torch.arange(_RING, device=states.device)[None] >= filled[:, None]
        largest = cosines.masked_fill(empty, -1.0).amax(1) * (count > 0)
        similarity = torch.stack([last, largest, cosines.sum(1) / filled.clamp(min=1)], 1)
        averaged = self._averaged[slots] + 1
        mean = self._mean[slots] + (states - self._mean[slots]) / averaged[:, None]
        self._mean[slots] = mean
        self._averaged[slots] = averaged
        self._ring[slots, count.long() % _RING] = unit.to(self._ring.dtype)
        self._count[slots] = count + 1
        return mean, similarity


def scalars(position: torch.Tensor, prompt_length: torch.Tensor, similarity: torch.Tensor) -> torch.Tensor:
    """Return [batch, SCALARS]: the position on smooth knots over its logarithm, the prompt's length, the similarity."""
    knots = torch.linspace(0, _LONGEST, _KNOTS, device=position.device)
    distance = (torch.log1p(position.float())[:, None] - knots) / (_LONGEST / (_KNOTS - 1))
    return torch.cat([torch.exp(-(distance**2)), torch.log1p(prompt_length.float())[:, None] / 5 - 1, similarity], 1)


def standardised(states: torch.Tensor, center: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return states as float32, normalised by the training set's mean and spread, and clipped."""
    return ((states.float() - center) / scale).clamp(-8, 8)


def compact(mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return averages [batch, d] in a byte a number: [batch, d] int8, and the size of a step, [batch]."""
    step = mean.abs().amax(1).clamp(min=1e-6) / 127
    return torch.round(mean / step[:, None]).to(torch.int8), step


def expand(numbers: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Return the averages that `compact` was given, each number within half a step."""
    return numbers.float() * step[:, None]


def of_pairs(
    pairs: Pairs,
    center: torch.Tensor,
    scale: torch.Tensor,
    before: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the features of recorded pairs: [pairs, 2 d] newest and mean state, and [pairs, SCALARS].

    `before` are the averages of each output that has pairs, [outputs] and [outputs, d], before its first pair.
    """
    states = standardised(torch.from_numpy(pairs.states), center, scale)
    similarity = torch.zeros(len(pairs), 3)
    mean = torch.zeros_like(states)
    if len(pairs):
        # The n-th pair of every output at once.
        starts = np.flatnonzero(np.diff(pairs.output, prepend=-1))
        outputs = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(pairs))))
        order = np.arange(len(pairs)) - starts[outputs]
        history = History(len(starts), states.shape[1])
        if before is not None:
            history.resume(torch.arange(len(starts)), *before)
        for n in range(int(order.max()) + 1):
            rows = torch.from_numpy(np.flatnonzero(order == n))
            slots = torch.from_numpy(outputs)[rows]
            mean[rows], similarity[rows] = history.update(slots, states[rows])
    position, prompt_length = torch.from_numpy(pairs.position), torch.from_numpy(pairs.prompt_length)
    return torch.cat([states, mean], 1), scalars(position, prompt_length, similarity)
