"""What learners of the predictor report: the newest report of each, and its events in the log and the metrics."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ares.gateway.records.metrics import Metrics
from ares.gateway.tuning import DEFAULT, Tuning
from ares.names import short_version
from ares.protocol.learner_report import EVENTS, Event, Report

logger = logging.getLogger(__name__)

_ALARMING = frozenset({"demoted", "rolled_back", "refused", "error"})


@dataclass(slots=True)
class LearnerState:
    """The newest report of one learner, received at `at` of the gateway's clock."""

    report: Report
    at: float
    silent: bool = False


class Learners:
    """The learners that report to this gateway; a few, for each has a folder of its own and usually there is one.

    Parameters
    ----------
    metrics
        Counts the events.
    tuning
        How many are kept, and when a report is old.
    clock
        Seconds, monotonic.
    """

    def __init__(self, metrics: Metrics, tuning: Tuning = DEFAULT, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._tuning = tuning
        self._clock = clock
        self._started = clock()
        self._learners: dict[str, LearnerState] = {}
        self.revision = 0
        """Grows with each report."""

    def take(self, report: Report) -> None:
        """Take a report in place of the learner's last one; where there are too many learners, the oldest one goes."""
        now = self._clock()
        before = self._learners.pop(report.learner, None)
        if before is None:
            self._make_room()
            self._begin(report, now)
        else:
            if before.silent:
                logger.info("learner %s reports again, after %.0f s", report.learner, now - before.at)
            known = {_identity(event) for event in before.report.events}
            self._record([event for event in report.events if _identity(event) not in known])
        self._learners[report.learner] = LearnerState(report, now)
        self.revision += 1

    def newest_first(self) -> list[tuple[Report, float]]:
        """Return the reports with their ages in seconds."""
        now = self._clock()
        return [(known.report, now - known.at) for known in reversed(self._learners.values())]

    def as_json(self) -> list[dict[str, Any]]:
        """Return the reports, the newest first, each with its age and whether that makes it old."""
        return [
            report.as_json() | {"age_s": age_s, "old": age_s > self._tuning.learner_old_s}
            for report, age_s in self.newest_first()
        ]

    def ages(self) -> dict[str, float]:
        """Return the age of each report in seconds, by learner."""
        return {report.learner: age_s for report, age_s in self.newest_first()}

    def check(self) -> None:
        """Log learners that have fallen silent, once each."""
        now = self._clock()
        for name, known in self._learners.items():
            if not known.silent and now - known.at > self._tuning.learner_old_s:
                known.silent = True
                logger.warning("learner %s: no report for %.0f s", name, now - known.at)

    def _make_room(self) -> None:
        while len(self._learners) >= self._tuning.kept_learners:
            name, known = next(iter(self._learners.items()))
            del self._learners[name]
            logger.warning(
                "learner %s: forgotten after %.0f s without a report, for there are more than %d learners",
                name,
                self._clock() - known.at,
                self._tuning.kept_learners,
            )

    def _begin(self, report: Report, now: float) -> None:
        """Log a learner that is new here, and of its events those since this gateway started."""
        # By the learner's own clock, so that it need not agree with the one here.
        new = [event for event in report.events if report.time - event.time <= now - self._started]
        champion = short_version(report.champion.version) or "a curve"
        logger.info(
            "learner %s reports: %s, the champion is %s, %d events before this gateway started",
            report.learner,
            report.doing,
            champion,
            len(report.events) - len(new),
        )
        self._record(new)

    def _record(self, events: list[Event]) -> None:
        for event in events:
            level = logging.WARNING if event.event in _ALARMING else logging.INFO
            logger.log(level, "predictor %s %s: %s", short_version(event.version) or "-", event.event, event.text)
            self._metrics.predictor_events.labels(event.event if event.event in EVENTS else "other").inc()


def _identity(event: Event) -> tuple[float, str, str]:
    return event.time, event.event, event.version
