"""`ares replay`: make logged decisions again, under the same preset or another."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ares.gateway.decisions import read_candidates, read_cluster, read_progress, read_settings
from ares.policy import Dispatch, Preset, RebalanceSettings, SuspendSettings, dispatcher, preset, rebalancer
from ares.policy.admission import AdmissionSettings, Entrance
from ares.policy.rescue import RescueSettings, beside, rescue
from ares.text_files import TextFileError, read_lines


class ReplayError(ValueError):
    """The log cannot be read; the message names the line."""


# What comes of a line that is no decision, by the time that it is decided again.
_MALFORMED = (
    msgspec.DecodeError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(slots=True)
class Replayed:
    """What came out.

    Attributes
    ----------
    decisions, same
        Decisions made again, and those that came out as logged.
    logged, made
        Decided actions by kind, as logged and as made again.
    differences
        One entry for each decision that came out otherwise.
    """

    decisions: int = 0
    same: int = 0
    logged: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)
    differences: list[dict[str, Any]] = field(default_factory=list)


def replay(log: Path, other: str | None, progress: Callable[[int], None] = lambda _: None) -> Replayed:
    """Make every decision of a log again.

    Parameters
    ----------
    log
        Written by ``ares gateway --decision-log``.
    other
        A preset to decide by instead of the logged one.
    progress
        Told the number of characters read so far.

    Raises
    ------
    ReplayError
        The log is not one.
    ValueError
        There is no such preset.
    """
    if other is not None:
        preset(other)
    result = Replayed()
    robin: dict[str, Dispatch] = {}
    read = 0
    for number, line in enumerate(_lines(log), 1):
        read += len(line) + 1
        if not line.strip():
            continue
        try:
            record = msgspec.json.decode(line)
            name = other or record["preset"]
            chosen = preset(name)
            logged = [_action(one) for one in (*record.get("rescues", ()), *record["decided"])]
            if record["kind"] == "entrance":
                dispatch = robin.setdefault(name, dispatcher(chosen.dispatch))
                made = _entrance(record, chosen, dispatch, like=other is None)
            else:
                made = _moves(record, chosen, like=other is None)
            when = float(record["time"])
        except _MALFORMED as error:
            raise ReplayError(f"{log}:{number}: not a logged decision: {error!r}") from error
        result.decisions += 1
        result.same += made == logged
        result.logged.update(one["kind"] for one in logged)
        result.made.update(one["kind"] for one in made)
        if made != logged:
            result.differences.append({"line": number, "time": when, "logged": logged, "made": made})
        progress(read)
    return result


def _lines(log: Path) -> Iterator[str]:
    try:
        yield from read_lines(log)
    except TextFileError as error:
        raise ReplayError(str(error)) from None


def _action(one: dict[str, Any]) -> dict[str, Any]:
    """Name what was decided, without the numbers behind it."""
    if "request" in one:
        kind = "rescue" if "gain" not in one else "move"
        return {"kind": kind, "request": one["request"], "instance": one["target"]}
    if not isinstance(one["kind"], str):
        raise TypeError("a kind must be a string")
    return {"kind": one["kind"], "request": one["index"], "instance": one["instance"]}


def _entrance(record: dict[str, Any], chosen: Preset, dispatch: Dispatch, *, like: bool) -> list[dict[str, Any]]:
    cluster = read_cluster(record)
    candidates = read_candidates(record, cluster)
    if chosen.admission == "open":
        places = [dispatch(cluster, int(tokens)) for tokens in candidates.tokens]
        return [{"kind": "enter", "request": n, "instance": place} for n, place in enumerate(places)]
    admission, suspension = chosen.admission_settings, chosen.suspend_settings if chosen.suspends else None
    if like:
        admission = read_settings(AdmissionSettings, record["admission"])
        suspended = record["suspension"]
        suspension = read_settings(SuspendSettings, suspended) if suspended is not None else None
    running = read_progress(record["running"], len(cluster.requests))
    entrance = Entrance(admission, suspension, record["queue"] if like else chosen.queue)
    entrance.age_credit = float(record["credit"])
    decided = entrance.decide(cluster, candidates, running)
    return [{"kind": one.kind, "request": one.index, "instance": one.instance} for one in decided]


def _moves(record: dict[str, Any], chosen: Preset, *, like: bool) -> list[dict[str, Any]]:
    cluster = read_cluster(record)
    settings = read_settings(RebalanceSettings, record["settings"]) if like else chosen.settings
    lead = read_settings(RescueSettings, record["lead"])
    running = read_progress(record["running"], len(cluster.requests))
    rescues = rescue(cluster, lead, running) if chosen.suspends else []
    moves = [
        {"kind": "move", "request": one.request, "instance": one.target}
        for one in beside(rebalancer(chosen.rebalance)(cluster, settings), rescues)
    ]
    return [{"kind": "rescue", "request": one.request, "instance": one.target} for one in rescues] + moves
