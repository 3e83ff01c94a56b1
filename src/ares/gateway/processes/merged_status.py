"""One status of all processes of an address: requests of all, instances once, counts as sums."""

from collections.abc import Sequence
from typing import Any

import msgspec

from ares.gateway.http import merged_models
from ares.gateway.records.window import WINDOW_VALUES, Recent

Status = dict[str, Any]


class Part(msgspec.Struct, frozen=True):
    """What one process knows.

    Attributes
    ----------
    process
        Its number.
    pid
        Its process id.
    gateway
        Its name as a gateway.
    status
        Its own status.
    recent
        The values in its windows of recent measurements, by name.
    moves_ended
        How many of its moves have ended; the status has the last of them.
    learners_revision
        Grows with each report of a learner that it has got.
    """

    process: int
    pid: int
    gateway: str
    status: Status
    recent: dict[str, list[float]]
    moves_ended: int
    learners_revision: int


def merged(parts: Sequence[Part], name: str, kept_migrations: int) -> Status:
    """Return the status of an address.

    Parameters
    ----------
    parts
        Those of the processes that answered, the asked one first: what all of them know is taken from it.
    name
        Of the address.
    kept_migrations
        So many of the moves that ended last are shown.
    """
    statuses = [part.status for part in parts]
    first = statuses[0]
    recent = Recent(WINDOW_VALUES * len(parts))
    for part in parts:
        recent.extend(part.recent)
    moves = sorted((move for s in statuses for move in s["migrations"]), key=lambda move: move["started_at"])
    whole = first | {
        "gateway": name,
        "controller": merged_models.controller([s["controller"] for s in statuses], {part.gateway for part in parts}),
        "instances": _instances(statuses),
        "requests": [row for s in statuses for row in s["requests"]],
        "recent": recent.summary(),
        "migrations": moves[-kept_migrations:],
        "learners": next((s["learners"] for s in statuses if s["learners"]), []),
        "learner_ages_s": _first_of_each([s["learner_ages_s"] for s in statuses]),
        "process": {"tasks": sum(s["process"]["tasks"] for s in statuses)},
        "connectors": _first_of_each([s["connectors"] for s in statuses]),
        "processes": [_process(part) for part in sorted(parts, key=lambda part: part.process)],
    }
    if "models" in first:
        whole["models"] = _models(parts)
    return whole | {count: sum(s[count] for s in statuses) for count in merged_models.COUNTS}


def _process(part: Part) -> Status:
    """Return what is shown of a process by itself."""
    decode = [row for row in part.status["instances"] if row["role"] != "prefill"]
    return {
        "process": part.process,
        "gateway": part.gateway,
        "pid": part.pid,
        "ready": any(row["why"] is None for row in decode),
        "requests": len(part.status["requests"]),
        "tasks": part.status["process"]["tasks"],
    }


def _models(parts: Sequence[Part]) -> list[Status]:
    """Return what is shown of each model by itself, as all processes count it."""
    names = {part.gateway for part in parts}
    made = []
    for rows in zip(*(part.status["models"] for part in parts), strict=True):
        counted = {count: sum(row[count] for row in rows) for count in merged_models.COUNTS}
        decided = merged_models.controller([row["controller"] for row in rows], names)
        made.append(rows[0] | counted | {"controller": decided})
    return made


def _instances(statuses: Sequence[Status]) -> list[Status]:
    """Return every instance once, as the first process that hears it describes it."""
    found: dict[str, list[Status]] = {}
    for row in (row for s in statuses for row in s["instances"]):
        found.setdefault(row["url"], []).append(row)
    made = []
    for rows in found.values():
        row = dict(next((row for row in rows if row["healthy"]), rows[0]))
        if "sessions" in row:
            row["sessions"] = sum(one.get("sessions", 0) for one in rows)
        row["left"] = max((one["left"] for one in rows if one["left"] is not None), default=None)
        made.append(row)
    return made


def _first_of_each(maps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for one in maps:
        whole = one | whole
    return whole
