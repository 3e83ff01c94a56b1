"""The learner's report to the gateways (`protocol/learner_report.py`), small enough for one request."""

import json
import time
from typing import Any

from ares.learner.learning import Learning
from ares.learner.state import CURVE
from ares.protocol.learner_report import LARGEST_REPORT_BYTES, LONGEST_NAME, MOST_INSTANCES, NEWEST_EVENTS

_NO_MODEL = "not known yet"


def build(learning: Learning, doing: str, instances: dict[str, str]) -> dict[str, Any]:
    """Return the report.

    Parameters
    ----------
    doing
        What the learner does now, in a word.
    instances
        By name, the version that each instance runs.
    """
    state, planner = learning.state, learning.planner
    challenger = None if state.challenger is None else _described(learning, state.challenger)
    return {
        "learner": state.name,
        "model": (state.model or learning.settings.model or "").strip()[:LONGEST_NAME] or _NO_MODEL,
        "time": time.time(),
        "frozen": state.frozen,
        "champion": _described(learning, state.champion) | {"since": state.since},
        "challenger": challenger,
        "doing": doing,
        "outputs": {"recorded": planner.have, "needed": planner.needed, "dropped": dict(learning.store.dropped)},
        "losses": list(learning.losses),
        "instances": dict(list(instances.items())[:MOST_INSTANCES]),
        "events": learning.history.events[-NEWEST_EVENTS:],
    }


def encoded(report: dict[str, Any]) -> bytes:
    """Return the report as JSON; the oldest losses and events are left out where it would be too large."""
    report = dict(report)
    while True:
        body = json.dumps(report).encode()
        if len(body) <= LARGEST_REPORT_BYTES or not (report["losses"] or report["events"] or report["instances"]):
            return body
        for name in ("losses", "events"):
            report[name] = report[name][len(report[name]) // 2 + 1 :]
        if not report["losses"] and not report["events"]:
            report["instances"] = {}


def _described(learning: Learning, version: str) -> dict[str, Any]:
    if version == CURVE:
        return {"version": "", "kind": "curve", "trained_outputs": 0, "since": learning.state.since}
    known = learning.versions[version]
    return {"version": version, "kind": "network", "trained_outputs": known.outputs, "since": known.trained}
