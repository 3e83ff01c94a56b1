"""`past-future`: admission after the Past-Future scheduler of LightLLM (Gong et al., ASPLOS 2025, arXiv 2507.10150).

From the source (the abstract, and the published code of LightLLM, `ContinuesBatchQueue`; the text of the paper could
not be read): requests are served first come, first served. The lengths of outputs that have ended are the distribution
of those to come. A request enters when the peak of the memory of the batch with it, over all future moments, stays
within the memory. With the requests in order of what they have left, longest first, request i of n tokens that has r
left ends when i requests are there: the peak is the maximum over i of i r_i + n_1 + ... + n_i.

Reconstructed here: the length of an output is drawn once for a request, at a quantile that depends on its identifier
alone, from those of the past that are longer than what it has generated; with `draws` > 1 the largest peak of several
draws counts. Where no output of the past is longer, it is taken to be 1.1 times as long as now (as in the code), and
at least `unknown_tokens` long before any has ended. Of several instances where it fits, the one with the smallest peak
takes it. Left out: the limits of batch size and prefill tokens, which the engines keep themselves.
"""

import bisect
import zlib
from collections import deque
from dataclasses import dataclass

import numpy as np

from ares.policy.admission.base import Admission, AdmissionDecision, Candidates, Progress, register
from ares.policy.cluster import Cluster, FloatArray, IntArray
from ares.policy.settings import in_range


@dataclass(frozen=True, slots=True)
class PastFutureSettings:
    """Settings of `past-future`.

    Attributes
    ----------
    remembered
        How many of the newest outputs make the distribution.
    draws
        Draws of all lengths; the largest of their peaks counts.
    reserve
        Share of memory that is left free.
    unknown_tokens
        Assumed length of an output before any has ended.
    """

    remembered: int = 1000
    draws: int = 1
    reserve: float = 0.03
    unknown_tokens: float = 2048.0

    def __post_init__(self) -> None:
        in_range(self, reserve=1.0, draws=100.0)
        if self.draws < 1 or self.remembered < 1:
            raise ValueError("settings draws and remembered must be at least 1")


def future_peak(tokens: FloatArray, left: FloatArray) -> float:
    """Return the most tokens that a batch will hold.

    Parameters
    ----------
    tokens
        What each request holds now, shape (N,).
    left
        What each will still generate, shape (N,).
    """
    if not len(tokens):
        return 0.0
    order = np.argsort(-left, kind="stable")
    return float((left[order] * np.arange(1, len(order) + 1) + np.cumsum(tokens[order])).max())


@register("past-future")
class PastFuture(Admission):
    """First come, first served, where the future peak of memory fits."""

    Settings = PastFutureSettings
    settings: PastFutureSettings
    quick = True

    def __init__(self, settings: PastFutureSettings | None = None) -> None:
        super().__init__(settings)
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    def learn(self, output_tokens: int) -> None:
        """Add an output to the past, and forget the oldest."""
        if len(self._recent) == self.settings.remembered:
            del self._sorted[bisect.bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(output_tokens)
        bisect.insort(self._sorted, output_tokens)

    def left(self, request: object, generated: int, draw: int) -> float:
        """Return the drawn number of tokens that a request will still generate."""
        first = bisect.bisect_right(self._sorted, generated)
        longer = len(self._sorted) - first
        if not longer:
            known = 0.0 if self._sorted else self.settings.unknown_tokens
            return max(1.1 * generated, known, generated + 1.0) - generated
        share = zlib.crc32(f"{request} {draw}".encode()) / 2**32
        return float(self._sorted[first + int(share * longer)] - generated)

    def decide(self, cluster: Cluster, candidates: Candidates, running: Progress) -> list[AdmissionDecision]:
        """Admit requests, oldest first, until one fits nowhere."""
        count = len(cluster.instances)
        draws = range(self.settings.draws)
        rows = self._all_left(cluster.requests, running.generated)
        resident = [cluster.resident_tokens[cluster.location == i].astype(np.float64) for i in range(count)]
        left = [rows[cluster.location == i] for i in range(count)]
        limit = cluster.capacity_tokens * (1.0 - self.settings.reserve) - cluster.promised_tokens
        outside = self._all_left(candidates.requests, candidates.progress.generated)
        decisions: list[AdmissionDecision] = []
        for request in np.argsort(-candidates.waited_s, kind="stable").tolist():
            best, best_share, best_peak = -1, np.inf, 0.0
            for instance in np.flatnonzero(cluster.open).tolist():
                if candidates.excluded is not None and candidates.excluded[request, instance]:
                    continue
                tokens = np.append(resident[instance], candidates.tokens[request])
                after = np.vstack([left[instance], outside[request]])
                peak = max(future_peak(tokens, after[:, draw]) for draw in draws)
                # A request always fits an empty instance: more room will never come.
                fits = peak <= limit[instance] or not len(resident[instance])
                share = peak / max(limit[instance], 1.0)
                if fits and share < best_share:
                    best, best_share, best_peak = instance, share, peak
            if best < 0:
                break
            resident[best] = np.append(resident[best], candidates.tokens[request])
            left[best] = np.vstack([left[best], outside[request]])
            kind = "resume" if candidates.suspended[request] else "admit"
            reason = f"future peak {best_peak:.0f} of {limit[best]:.0f} tokens"
            decisions.append(AdmissionDecision(kind, request, best, reason))  # type: ignore[arg-type]
        return decisions

    def _all_left(self, requests: object, generated: IntArray) -> FloatArray:
        """Return the drawn remaining tokens of requests, shape (N, draws)."""
        drawn = [
            [self.left(request, int(so_far), draw) for draw in range(self.settings.draws)]
            for request, so_far in zip(requests, generated, strict=True)  # type: ignore[call-overload]
        ]
        return np.array(drawn, np.float64).reshape(-1, self.settings.draws)
