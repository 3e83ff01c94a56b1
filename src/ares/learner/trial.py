"""The statistics of a trial: two predictors on the same outputs, pair by pair.

The loss of a pair is the CRPS: twice the mean pinball loss over `hazard.LEVELS`, in tokens. Pairs of one output, and
outputs of one prompt, are not independent, so that intervals come from resampling whole prompts (a cluster bootstrap).

A challenger is looked at several times while outputs arrive, and each look is a chance to be wrong. With five looks at
150, 300, 600, 1200 and 2400 outputs, each with an interval of 99 %, the chance that any of them is clear of zero on one
side where there is no difference is at most 5 x 0.5 % = 2.5 % (the union bound, which holds however the looks depend on
each other). A champion is compared with the curve without end, once every `check_outputs` new outputs; there the
interval is 99.9 %: one that is exactly as good as the curve falls back to it by chance at most once in 2,000
comparisons on average, and then loses nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

CURVE, CHAMPION, CHALLENGER = "curve", "champion", "challenger"
_RESAMPLES, _AT_ONCE = 10_000, 500
_LONGEST = 0.2


@dataclass(frozen=True, slots=True)
class Scored:
    """One output, judged: its number of pairs, and by predictor the sum of their losses."""

    prompt: str
    length: int
    pairs: int
    losses: dict[str, float]


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean difference of two losses, and its interval.

    Attributes
    ----------
    mean, low, high
        Tokens; below zero where the first predictor is better.
    outputs, prompts
        How many there were.
    """

    mean: float
    low: float
    high: float
    outputs: int
    prompts: int

    @property
    def better(self) -> bool:
        """Whether the first one is better, with the interval clear of zero."""
        return self.high < 0

    @property
    def worse(self) -> bool:
        """Whether it is worse, with the interval clear of zero."""
        return self.low > 0

    def numbers(self, name: str) -> dict[str, float]:
        """Return mean and interval by their names in an event, which begin with a given one."""
        return {name: round(self.mean, 4), f"{name}_low": round(self.low, 4), f"{name}_high": round(self.high, 4)}

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def mean(scored: Sequence[Scored], predictor: str) -> float:
    """Return the mean loss over all pairs, in tokens."""
    return sum(one.losses[predictor] for one in scored) / max(1, sum(one.pairs for one in scored))


def difference(scored: Sequence[Scored], first: str, second: str, confidence: float, seed: int = 0) -> Difference:
    """Return the difference of two predictors' losses, first minus second.

    The interval is that of a percentile bootstrap over prompts, from 10,000 resamples; the same for the same seed.
    """
    _, group = np.unique([one.prompt for one in scored], return_inverse=True)
    count = int(group.max()) + 1
    above = np.bincount(group, [one.losses[first] - one.losses[second] for one in scored], count)
    below = np.bincount(group, [one.pairs for one in scored], count)
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(_RESAMPLES // _AT_ONCE):  # a part at a time, for their memory
        drawn = generator.integers(count, size=(_AT_ONCE, count))
        means.append(above[drawn].sum(1) / below[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(float(above.sum() / below.sum()), float(low), float(high), len(scored), count)


def longest(scored: Sequence[Scored], share: float = _LONGEST) -> list[Scored]:
    """Return the longest outputs, a fifth of them."""
    least = np.quantile([one.length for one in scored], 1 - share)
    return [one for one in scored if one.length >= least]


class Verdict(Enum):
    """What a look at a trial decides."""

    PROMOTE = auto()
    REJECT = auto()
    CONTINUE = auto()


@dataclass(frozen=True, slots=True)
class Look:
    """One look: the challenger against the champion, on all outputs, and on the long ones alone."""

    verdict: Verdict
    overall: Difference
    long: Difference
    curve: Difference


def look(scored: Sequence[Scored], confidence: float, fewest_prompts: int, *, last: bool, seed: int = 0) -> Look:
    """Judge a challenger.

    It is promoted where its loss is lower with the interval clear of zero, and neither for long outputs nor against the
    curve clearly higher. It is rejected where its loss is clearly higher, or the last look has not promoted it. A
    difference over fewer than `fewest_prompts` distinct prompts decides nothing, since a few look alike when they are
    resampled: where long outputs of so few seem worse, the next looks wait for more of them.
    """
    overall = difference(scored, CHALLENGER, CHAMPION, confidence, seed)
    long = difference(longest(scored), CHALLENGER, CHAMPION, confidence, seed)
    curve = difference(scored, CHALLENGER, CURVE, confidence, seed)
    verdict = Verdict.CONTINUE
    if overall.prompts >= fewest_prompts:
        worse_for_long = long.worse and (long.prompts >= fewest_prompts or not last)
        if overall.better and not worse_for_long and not curve.worse:
            verdict = Verdict.PROMOTE
        elif overall.worse:
            verdict = Verdict.REJECT
    if last and verdict is Verdict.CONTINUE:
        verdict = Verdict.REJECT
    return Look(verdict, overall, long, curve)
