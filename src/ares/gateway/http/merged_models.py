"""One status of several models: instances and requests say which model they are of, counts are sums."""

from collections.abc import Sequence
from typing import Any

Status = dict[str, Any]

COUNTS = ("suspensions", "waiting", "backlog", "backlog_tokens", "suspended")
"""What is counted in each process for each model, and shown as sums."""
OF_EACH = (*COUNTS, "controller", "settings", "roles")
"""What is shown of each model by itself, too."""


def merged(names: Sequence[str], statuses: Sequence[Status]) -> Status:
    """Return what is shown of all models, by the status of each and their names."""
    whole: Status = {count: sum(one[count] for one in statuses) for count in COUNTS}
    for rows in ("instances", "requests"):
        whole[rows] = [row | {"model": name} for name, one in zip(names, statuses, strict=True) for row in one[rows]]
    whole["controller"] = controller([one["controller"] for one in statuses], {one["gateway"] for one in statuses})
    return whole


def controller(controllers: Sequence[Status], names: set[str]) -> Status:
    """Return where moves are decided: here where any of the gateways of these names does."""
    here = [one for one in controllers if one["where"] == "here" or one["holder"] in names]
    if not here:
        return controllers[0]
    return {"where": "here", "holder": None, "missed_periods": 0}
