"""What the instances predict, and how it turned out: the live error histogram."""

import itertools
import math
from collections.abc import Iterable, Mapping

from ares.gateway.pool.instance import Instance
from ares.gateway.records.metrics import Metrics
from ares.gateway.records.window import Window
from ares.gateway.session.session import Session
from ares.protocol import messages

# Where predictions are judged: the first one at or after so many output tokens.
POSITIONS = (0, 64, 256, 1024, 4096)


def plausible(quantiles: tuple[float, float, float]) -> bool:
    """Whether a prediction can be meant: finite, not negative, in order."""
    return (
        all(math.isfinite(q) for q in quantiles)
        and quantiles[0] >= 0.0
        and all(a <= b for a, b in itertools.pairwise(quantiles))
    )


def predicted(load: messages.Telemetry) -> float | None:
    """Return the tokens that an instance's requests are expected to generate yet: the sum of their medians.

    None where it predicts nothing, or nothing finite.
    """
    medians = [row.remaining[1] for row in load.rows if row.remaining is not None and plausible(row.remaining)]
    return _finite(sum(medians)) if medians else None


def predicted_peak(load: messages.Telemetry) -> float | None:
    """Return the most tokens that an instance will hold at once if nothing joins it and the medians come true.

    A request of n tokens that has p left holds n + k in k steps while k < p, and none after; one without a prediction
    is taken to keep its n. None where nothing is predicted, or nothing finite.
    """
    known = [(row.remaining[1], row.resident) for row in load.rows if row.remaining is not None]
    known = [(left, resident) for left, resident in known if math.isfinite(left)]
    if not known:
        return None
    rest = sum(row.resident for row in load.rows) - sum(resident for _, resident in known)
    peak = held = 0.0
    # The last to end first: those up to the n-th still run when the n-th ends, each grown by as much as it has.
    for count, (left, resident) in enumerate(sorted(known, reverse=True), 1):
        held += resident
        peak = max(peak, held + count * max(left, 0.0))
    return _finite(rest + peak)


def _finite(tokens: float) -> float | None:
    return tokens if math.isfinite(tokens) else None


def rows_by_key(instances: Iterable[Instance]) -> dict[str, messages.Row]:
    """Return the newest row of every request of every instance."""
    return {row.key: row for i in instances if i.state.telemetry is not None for row in i.state.telemetry.rows}


class PredictionScores:
    """Remembers what was predicted of each running sequence, and adds the errors to the metrics when it has ended."""

    def __init__(self, metrics: Metrics, recent: Window) -> None:
        self._metrics = metrics
        self._recent = recent
        # By sequence: for each of POSITIONS, the output tokens at the prediction and its median.
        self._seen: dict[str, dict[int, tuple[int, float]]] = {}

    def look(self, sequences: Iterable[Session], rows: Mapping[str, messages.Row]) -> None:
        """Take note of the newest predictions."""
        for sequence in sequences:
            row = rows.get(sequence.key or "")
            if row is None or row.remaining is None or row.state != "running" or not math.isfinite(row.remaining[1]):
                continue
            output = max(0, row.resident - len(sequence.prompt))
            position = max(p for p in POSITIONS if p <= output)
            self._seen.setdefault(sequence.id, {}).setdefault(position, (output, row.remaining[1]))

    def finished(self, sequence: Session) -> None:
        """Judge what was predicted of an output that came to its own end."""
        for position, (output, median) in self._seen.pop(sequence.id, {}).items():
            error = median - (len(sequence.emitted) - output)
            side = "over" if error > 0 else "under"
            self._metrics.prediction_error.labels(str(position), side).observe(abs(error))
            self._recent.add(error)

    def forget(self, sequence: Session) -> None:
        """Drop a sequence that was cancelled or failed."""
        self._seen.pop(sequence.id, None)
