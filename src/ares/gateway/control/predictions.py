"""Predicted remaining tokens of the instances' requests, and their errors: the live error histogram."""

import math
from collections.abc import Iterable, Mapping

from ares.gateway.pool.instance import Instance
from ares.gateway.records.metrics import Metrics
from ares.gateway.records.window import Window
from ares.gateway.session.session import Session
from ares.gateway.tuning import DEFAULT
from ares.names import short_version
from ares.protocol import messages

# The predictions that are scored: the first one at or after so many output tokens.
POSITIONS = (0, 64, 256, 1024, 4096)


def rows_by_key(instances: Iterable[Instance]) -> dict[str, messages.Row]:
    """Return the newest row of every request of every instance."""
    return {row.key: row for i in instances if i.state.telemetry is not None for row in i.state.telemetry.rows}


def _part(output: int, reasoning_tokens: int | None) -> str:
    """Return in which part of an output a prediction was made, after so many tokens of it."""
    if reasoning_tokens is None:
        return "output"
    return "reasoning" if output < reasoning_tokens else "answer"


def _version(session: Session) -> str:
    """Return the version of the predictor where a session runs, short; empty where the instance reports none."""
    load = session.instance.state.telemetry if session.instance is not None else None
    return short_version(load.predictor) if load is not None else ""


class PredictionScores:
    """Records the predictions of each running session, and adds their errors to the metrics when it has ended.

    The metrics have the errors of the `kept_versions` versions of the predictor that were scored last.
    """

    def __init__(self, metrics: Metrics, recent: Window, kept_versions: int = DEFAULT.kept_versions) -> None:
        self._metrics = metrics
        self._recent = recent
        self._kept_versions = kept_versions
        # The one that was scored last comes last.
        self._versions: dict[str, None] = {}
        # By session: for each of POSITIONS, the output tokens at the prediction, its median, and the predictor.
        self._recorded: dict[str, dict[int, tuple[int, float, str]]] = {}

    def record(self, sessions: Iterable[Session], rows: Mapping[str, messages.Row]) -> None:
        """Record the newest predictions."""
        for session in sessions:
            row = rows.get(session.key or "")
            if row is None or row.remaining is None or row.state != "running" or not math.isfinite(row.remaining[1]):
                continue
            output = max(0, row.resident - len(session.prompt))
            position = max(p for p in POSITIONS if p <= output)
            self._recorded.setdefault(session.id, {}).setdefault(
                position, (output, row.remaining[1], _version(session))
            )

    def score(self, session: Session, reasoning_tokens: int | None = None) -> None:
        """Add the errors of the predictions of a complete output to the metrics.

        `reasoning_tokens` is how many of its tokens, the first ones, belong to its reasoning; None: it is not known.
        """
        for position, (output, median, version) in self._recorded.pop(session.id, {}).items():
            error = median - (len(session.emitted) - output)
            side = "over" if error > 0 else "under"
            self._keep(version)
            labels = str(position), side, _part(output, reasoning_tokens), version
            self._metrics.prediction_error.labels(*labels).observe(abs(error))
            self._recent.add(error)

    def _keep(self, version: str) -> None:
        """Keep the series of a version, and of too many drop those of the one that was scored longest ago."""
        self._versions.pop(version, None)
        self._versions[version] = None
        if len(self._versions) > self._kept_versions:
            oldest = next(iter(self._versions))
            del self._versions[oldest]
            self._metrics.prediction_error.remove_by_labels({"version": oldest})

    def forget(self, session: Session) -> None:
        """Drop a session that was cancelled or failed."""
        self._recorded.pop(session.id, None)
