"""Remaining output lengths without a predictor, estimated from the lengths of recent outputs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from ares.gateway.session.length_features import LengthFeatures
from ares.policy import length_curves, residual_life
from ares.policy.compiling import compiled
from ares.policy.length_cells import LengthCells
from ares.policy.length_curves import ENDED_TO_RUNNING
from ares.protocol.messages import REMAINING_LEVELS

# Curves that are kept until outputs change them; 2 KB each.
_CURVES = 4096


class Compiled(NamedTuple):
    """The functions of policy/residual_life.py and policy/length_curves.py, compiled or plain."""

    remember: Callable[..., None] = residual_life.remember
    expect: Callable[..., None] = residual_life.expect
    add: Callable[..., None] = length_curves.add
    compose: Callable[..., None] = length_curves.compose
    expect_by_curve: Callable[..., None] = length_curves.expect


@dataclass(eq=False, slots=True)
class _Curve:
    """The curve of requests of the same cells, as of so many outputs."""

    cells: residual_life.I8
    longer: residual_life.F8
    outputs: int = -1


class LengthHistory:
    """Lengths of recent outputs, and the remaining lengths estimated from them.

    `running` is how many requests run: while few outputs have ended for each, those are the short ones, and all
    requests are taken alike.

    Of requests of which something is known, by length curves (policy/length_curves.py). Of others by the lengths of all
    outputs (policy/residual_life.py), until an output was cut: only length curves can use those.
    """

    def __init__(self) -> None:
        self._recent = np.zeros(residual_life.REMEMBERED, np.int64)
        self._sorted = np.zeros(residual_life.REMEMBERED, np.int64)
        self._quantiles = np.empty(len(REMAINING_LEVELS))
        self.running = 0
        self._nothing_known = LengthFeatures()
        self._outputs = self._ended = 0
        self._cells = LengthCells()
        self._curves: dict[tuple[int, ...], _Curve] = {}
        # That of the cells, and that of the cells which `_curves` were found by.
        self._version = self._curves_version = 0
        self._use(Compiled())

    def compile(self) -> None:
        """Use compiled code from now on, fast enough for all running requests; where streams run, `prepare` first."""
        self._use(prepare())

    def _use(self, code: Compiled) -> None:
        self._remember, self._compose = code.remember, code.compose
        self._expect, self._expect_by_curve = code.expect, code.expect_by_curve
        self._cells.insert = code.add

    def add(self, tokens: int, features: LengthFeatures | None = None, was_cut: bool = False) -> None:
        """Add the length of an output.

        Parameters
        ----------
        features
            What is known of its request; None: nothing.
        was_cut
            Whether it would have become longer: it reached its limit, or its client left.
        """
        if not was_cut:
            self._remember(self._recent, self._sorted, self._ended, tokens)
            self._ended += 1
        self._outputs += 1
        self._cells.add(features.keys if features is not None else (), tokens, was_cut)
        self._version = self._cells.version

    def remaining(self, generated: int, features: LengthFeatures | None = None) -> tuple[float, float, float]:
        """Return quantiles of the tokens that follow `generated` ones, at `messages.REMAINING_LEVELS`."""
        quantiles = self._quantiles
        self.expect(generated, features, REMAINING_LEVELS, quantiles)
        low, middle, high = quantiles.tolist()
        return low, middle, high

    def expect(
        self, generated: int, features: LengthFeatures | None, levels: tuple[float, ...], quantiles: residual_life.F8
    ) -> None:
        """Write quantiles of the tokens that follow `generated` ones, at Q `levels`; shape (Q,)."""
        if features is None:
            features = self._nothing_known
        if not features.keys and self._ended == self._outputs:
            self._expect(self._sorted, self._ended, generated, levels, quantiles)
        else:
            curve = features.curve if features.cells_version == self._version else self._find(features)
            if curve.outputs != self._outputs:
                settled = self._outputs >= ENDED_TO_RUNNING * self.running
                self._compose(self._cells.lengths, curve.cells if settled else curve.cells[:1], curve.longer)
                curve.outputs = self._outputs
            self._expect_by_curve(curve.longer, generated, levels, quantiles)

    def _find(self, features: LengthFeatures) -> _Curve:
        """Return the curve of a request's cells, one for all requests of the same cells."""
        if self._curves_version != self._version or len(self._curves) >= _CURVES:
            self._curves.clear()
            self._curves_version = self._version
        cells = tuple(self._cells.find(features.keys))
        curve = self._curves.get(cells)
        if curve is None:
            curve = self._curves[cells] = _Curve(np.array(cells, np.int64), np.empty(len(length_curves.LAST)))
        features.curve, features.cells_version = curve, self._version
        return curve


@cache
def prepare() -> Compiled:
    """Compile the estimate where numba is installed."""
    code = Compiled(*(compiled(function) for function in Compiled()))
    recent, ordered = np.zeros(1, np.int64), np.zeros(1, np.int64)
    quantiles = np.empty(len(REMAINING_LEVELS))
    code.remember(recent, ordered, 0, 0)
    code.expect(ordered, 1, 0, REMAINING_LEVELS, quantiles)
    lengths, longer = length_curves.make(1), np.empty(len(length_curves.LAST))
    code.add(lengths, 0, 1, False)
    code.compose(lengths, np.zeros(1, np.int64), longer)
    code.expect_by_curve(longer, 0, REMAINING_LEVELS, quantiles)
    return code
