"""Residuals of a run's streams against its cost models, to be resampled: steps on a shared machine have jitter.

The simulator's steps take the time of a model. Three things that a client sees are not in it: a whole stream that is a
little slower or faster than the model (its neighbours on the machine), the longest of its ordinary pauses, and the
variation of hand-overs. All three are taken from streams of about the same length: they average out over long ones.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

# Streams of the nearest lengths from which one of them is drawn.
_NEAREST = 9


@dataclass(frozen=True, slots=True)
class Spread:
    """One entry for each stream that was observed, in order of length, shape (S,).

    Attributes
    ----------
    tokens
        Its output tokens.
    factor
        Mean pause between its tokens, stops left out, over the time of the model for the batches that it was in.
    pause_s
        The longest of these pauses.
    hand_over_s
        How much longer than its model a hand-over from prefill took, shape (H,), whatever the length. The mean is
        negative where KV is pulled within the step that admits the request: the simulator pulls it in the one before.
    usual_s
        Up to here, a stop is a hand-over.
    """

    tokens: NDArray[np.int64]
    factor: FloatArray
    pause_s: FloatArray
    hand_over_s: FloatArray
    usual_s: float

    def apply(
        self,
        generator: np.random.Generator,
        tokens: NDArray[np.int64],
        decode_s: FloatArray,
        stop_s: FloatArray,
    ) -> tuple[FloatArray, FloatArray]:
        """Add drawn residuals to simulated streams.

        Parameters
        ----------
        generator
            Source of the draws.
        tokens
            Output tokens of each stream, shape (R,).
        decode_s
            Simulated seconds from its first token to its last, shape (R,).
        stop_s
            Longest simulated stop, the hand-over included, shape (R,).

        Returns
        -------
        tuple
            Both times with residuals; the second is at least the longest ordinary pause.
        """
        count = len(tokens)
        several = tokens > 1
        late = generator.choice(self.hand_over_s, count) * several
        # Many outputs have the same length, their limit: then one of all these.
        first, behind = (np.searchsorted(self.tokens, tokens, side=side) for side in ("left", "right"))
        around = first + (generator.random(count) * (behind - first)).astype(np.int64)
        half = min(_NEAREST, len(self.tokens)) // 2
        drawn = around + generator.integers(-half, half + 1, count)
        drawn = np.clip(drawn, 0, len(self.tokens) - 1)
        stop = np.where(stop_s <= self.usual_s, stop_s + late, stop_s)
        # A stop is not a step, and is not scaled.
        steps = np.maximum(decode_s - stop_s, 0.0)
        decode = np.where(several, np.maximum(stop_s + late, 0.0) + steps * self.factor[drawn], decode_s)
        return decode, np.where(several, np.maximum(stop, self.pause_s[drawn]), stop_s)
