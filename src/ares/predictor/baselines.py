"""Baselines of the predictor, fitted on the same training prompts.

Each gives quantiles at `hazard.LEVELS` for pairs; the caller bounds them by the tokens that the limit allows.
"""

import copy
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
    """Our network with the first hidden state alone: one prediction at the end of prefill, which then counts down."""

    def __init__(self, pairs: Pairs, settings: TrainingSettings) -> None:
        first = pairs.only(pairs.position == 0)
        self._checkpoint, _ = train(first, settings)
        self._first = first
        self._conditional = False
        self.parameters = sum(p.numel() for p in self._checkpoint.network.parameters())

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
        self._pairs, self._embedded = pairs, embedded
        self._checkpoint, _ = train(self._with_embeddings(pairs), settings)
        self.parameters = encoder_parameters + sum(p.numel() for p in self._checkpoint.network.parameters())

    def quantiles(self, pairs: Pairs) -> Array:
        """Return the head's prediction; `pairs` must be among those it was made with."""
        data = Data.of(self._with_embeddings(pairs), self._checkpoint.center, self._checkpoint.scale)
        return predict(self._checkpoint.network, data)

    def _with_embeddings(self, pairs: Pairs) -> Pairs:
        from dataclasses import replace

        where = {key: n for n, key in enumerate(zip(self._pairs.output, self._pairs.position, strict=True))}
        rows = np.array([where[key] for key in zip(pairs.output, pairs.position, strict=True)], np.int64)
        source = replace(pairs.source, hidden_size=self._embedded.shape[1])
        return replace(pairs, source=source, states=self._embedded[rows])
