"""Predicted remaining tokens of the instances' requests, and their errors: the live error histogram."""

import itertools
import math
from collections.abc import Iterable, Mapping

from ares.gateway.pool.instance import Instance
from ares.gateway.records.metrics import Metrics
from ares.gateway.records.window import Window
from ares.gateway.session.session import Session
from ares.policy.kv_layout import KvLayout
from ares.protocol import messages

_PLAIN = KvLayout(1)
# The predictions that are scored: the first one at or after so many output tokens.
POSITIONS = (0, 64, 256, 1024, 4096)


def plausible(quantiles: tuple[float, float, float]) -> bool:
    """Whether a prediction is possible: finite, not negative, in order."""
    return (
        all(math.isfinite(q) for q in quantiles)
        and quantiles[0] >= 0.0
        and all(a <= b for a, b in itertools.pairwise(quantiles))
    )


def predicted_remaining(load: messages.Telemetry) -> float | None:
    """Return the tokens that an instance's requests will still generate: the sum of the medians of their predictions.

    None where it predicts nothing, or nothing finite.
    """
    medians = [row.remaining[1] for row in load.rows if row.remaining is not None and plausible(row.remaining)]
    return _finite(sum(medians)) if medians else None


def predicted_peak(load: messages.Telemetry, layout: KvLayout = _PLAIN) -> float | None:
    """Return the most tokens that an instance will have in KV at once if nothing joins it and the medians come true.

    A request with n tokens of which p remain has n + k after k steps while k < p, and none after; a request without a
    prediction counts with n throughout. Tokens are KV tokens (policy/kv_layout.py), as the capacity is. None where
    nothing is predicted, or nothing finite.
    """
    known = [(row.remaining[1], layout.kv_tokens(row.resident)) for row in load.rows if row.remaining is not None]
    known = [(left, resident) for left, resident in known if math.isfinite(left)]
    if not known:
        return None
    rest = sum(layout.kv_tokens(row.resident) for row in load.rows) - sum(resident for _, resident in known)
    peak = allocated = 0.0
    # The last to end first: the first n still run when the n-th ends, each grown by as many tokens.
    for count, (left, resident) in enumerate(sorted(known, reverse=True), 1):
        allocated += resident
        peak = max(peak, allocated + count * max(left, 0.0))
    return _finite(rest + peak)


def _finite(tokens: float) -> float | None:
    return tokens if math.isfinite(tokens) else None


def rows_by_key(instances: Iterable[Instance]) -> dict[str, messages.Row]:
    """Return the newest row of every request of every instance."""
    return {row.key: row for i in instances if i.state.telemetry is not None for row in i.state.telemetry.rows}


class PredictionScores:
    """Records the predictions of each running session, and adds their errors to the metrics when it has ended."""

    def __init__(self, metrics: Metrics, recent: Window) -> None:
        self._metrics = metrics
        self._recent = recent
        # By session: for each of POSITIONS, the output tokens at the prediction and its median.
        self._recorded: dict[str, dict[int, tuple[int, float]]] = {}

    def record(self, sessions: Iterable[Session], rows: Mapping[str, messages.Row]) -> None:
        """Record the newest predictions."""
        for session in sessions:
            row = rows.get(session.key or "")
            if row is None or row.remaining is None or row.state != "running" or not math.isfinite(row.remaining[1]):
                continue
            output = max(0, row.resident - len(session.prompt))
            position = max(p for p in POSITIONS if p <= output)
            self._recorded.setdefault(session.id, {}).setdefault(position, (output, row.remaining[1]))

    def score(self, session: Session) -> None:
        """Add the errors of the predictions of a complete output to the metrics."""
        for position, (output, median) in self._recorded.pop(session.id, {}).items():
            error = median - (len(session.emitted) - output)
            side = "over" if error > 0 else "under"
            self._metrics.prediction_error.labels(str(position), side).observe(abs(error))
            self._recent.add(error)

    def forget(self, session: Session) -> None:
        """Drop a session that was cancelled or failed."""
        self._recorded.pop(session.id, None)
