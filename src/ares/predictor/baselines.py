"""Baselines of the predictor, fitted on the same training prompts.

Each gives quantiles at `hazard.LEVELS` for pairs; the caller bounds them by the tokens that the limit allows.
"""

import copy
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from ares.predictor.dataset import Pairs
from ares.predictor.hazard import LEVELS
from ares.predictor.metrics import Array
from ares.predictor.training import Data, TrainingSettings, predict, train

NAMES = (
    "global-median",
    "residual-life",
    "max-tokens",
    "prompt-only",
    "prompt-only-conditional",
    "auxiliary",
    "auxiliary-l1",
    "auxiliary-prompt-l1",
)
_LEVELS = np.array(LEVELS)


class Baseline(Protocol):
    """A fitted baseline."""

    parameters: int

    def quantiles(self, pairs: Pairs) -> Array:
        """Return [pairs, levels]."""
        ...


class GlobalMedian:
    """The remaining lengths of the training set, whatever the request."""

    parameters = len(LEVELS)

    def __init__(self, training: Pairs) -> None:
        self._quantiles = np.quantile(training.remaining.astype(float), _LEVELS)

    def quantiles(self, pairs: Pairs) -> Array:
        """Return the same row for every pair."""
        return np.tile(self._quantiles, (len(pairs), 1))


class MaxTokens:
    """What the request may still generate: what a router without a predictor must assume."""

    parameters = 0

    def quantiles(self, pairs: Pairs) -> Array:
        """Return the tokens that the limit still allows, at every level."""
        return np.tile(pairs.room[:, None].astype(float), len(LEVELS))


class ResidualLife:
    """Remaining lengths of training outputs that were at least as long as this one; no model at all.

    The Kaplan-Meier curve of the training outputs' lengths, censored ones counted as such, conditioned on the tokens
    so far.
    """

    def __init__(self, training: Pairs) -> None:
        first = np.flatnonzero(np.diff(training.output, prepend=-1))
        length = (training.position + training.remaining)[first]
        censored = training.censored[first]
        times = np.unique(length)
        at_risk = len(length) - np.searchsorted(np.sort(length), times)
        ended = np.array([np.sum((length == t) & ~censored) for t in times])
        self._times = times.astype(float)
        self._survival = np.cumprod(1 - ended / at_risk)
        self.parameters = len(times)

    def quantiles(self, pairs: Pairs) -> Array:
        """Return the conditional quantiles; where the curve ends above a level, the room."""
        result: Array = np.empty((len(pairs), len(LEVELS)))
        positions, rows = np.unique(pairs.position, return_inverse=True)
        for n, position in enumerate(positions):
            start = np.searchsorted(self._times, position, side="right")
            alive = self._survival[start - 1] if start else 1.0
            chosen = np.searchsorted(-self._survival[start:], -alive * (1 - _LEVELS) - 1e-12) + start
            ends = np.where(chosen < len(self._times), self._times[np.minimum(chosen, len(self._times) - 1)], np.inf)
            result[rows == n] = ends - position
        return np.minimum(result, pairs.room[:, None])


class PromptOnly:
    """A network with the first state alone: one prediction at the end of prefill, which then counts down.

    With an auxiliary encoder's states and the paper's head it is what TetriInfer and mu-Serve predict with, and what
    the paper's 49.42 % compare with.
    """

    def __init__(self, pairs: Pairs, settings: TrainingSettings, encoder_parameters: int = 0) -> None:
        """`encoder_parameters` are those of the model that the states come from, where it is not the served one."""
        first = pairs.only(pairs.position == 0)
        # All of its states are first ones.
        self._checkpoint, _ = train(first, replace(settings, first=0))
        self._first = first
        self._conditional = False
        self.parameters = encoder_parameters + sum(p.numel() for p in self._checkpoint.network.parameters())

    def conditional(self) -> "PromptOnly":
        """Return the same, conditioned on the output not having ended yet."""
        other = copy.copy(self)
        other._conditional = True  # noqa: SLF001 - its own class
        return other

    def quantiles(self, pairs: Pairs) -> Array:
        """Return the prediction from the first state of each pair's output, minus the tokens since."""
        data = Data.of(self._first, self._checkpoint.center, self._checkpoint.scale)
        of_output = dict(zip(self._first.output.tolist(), predict(self._checkpoint.network, data), strict=True))
        total = np.stack([of_output[n] for n in pairs.output.tolist()])
        position = pairs.position[:, None].astype(float)
        if not self._conditional:
            counted: Array = np.maximum(total - position, 0.5)
            return counted
        result: Array = np.empty_like(total)
        for n, row in enumerate(total):
            passed = np.interp(position[n, 0], row, _LEVELS, left=0.0, right=LEVELS[-1])
            result[n] = np.interp(passed + (1 - passed) * _LEVELS, _LEVELS, row)
        left: Array = np.maximum(result - position, 0.5)
        return left


class Auxiliary:
    """A pretrained encoder that re-reads the text, with a head like ours trained on the same data.

    Represents TetriInfer, mu-Serve and S3. With our head it also has the position, the prompt's length, the history of
    earlier embeddings, a distribution and censoring, which those lack. With the paper's head it has what they have: the
    embedding and L1. See `auxiliary.py`.
    """

    def __init__(self, pairs: Pairs, embedded: Any, encoder_parameters: int, settings: TrainingSettings) -> None:
        """`embedded` is [pairs, d] float16, in the order of `pairs`."""
        self._embedded = with_embeddings(pairs, embedded)
        self._checkpoint, _ = train(self._embedded, settings)
        self.parameters = encoder_parameters + sum(p.numel() for p in self._checkpoint.network.parameters())

    def quantiles(self, pairs: Pairs) -> Array:
        """Return the head's prediction; `pairs` must be among those it was made with."""
        place = {key: n for n, key in enumerate(zip(self._embedded.output, self._embedded.position, strict=True))}
        rows = np.array([place[key] for key in zip(pairs.output, pairs.position, strict=True)], np.int64)
        data = Data.of(
            self._embedded.only(rows), self._checkpoint.center, self._checkpoint.scale, self._checkpoint.network.first
        )
        return predict(self._checkpoint.network, data)


def with_embeddings(pairs: Pairs, embedded: Any) -> Pairs:
    """Return pairs whose states are an encoder's: [pairs, d] float16, in their order."""
    return replace(pairs, source=replace(pairs.source, hidden_size=embedded.shape[1]), states=embedded)
