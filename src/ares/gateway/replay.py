"""`ares replay`: make logged decisions again, under the same preset or another."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ares import plugins
from ares.gateway.decisions import read_candidates, read_cluster, read_progress, read_settings
from ares.policy import (
    REBALANCERS,
    DecisionError,
    Dispatch,
    Preset,
    Rebalance,
    SuspendSettings,
    decide_moves,
    dispatcher,
    rebalancer,
)
from ares.policy.admission import AdmissionSettings, Entrance
from ares.policy.rescue import RescueSettings, beside, rescue
from ares.policy.settings import make_settings
from ares.text_files import TextFileError, read_lines


class ReplayError(ValueError):
    """The log cannot be read; the message names the line."""


class UnknownPolicyError(ValueError):
    """A logged policy is not registered here."""


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
        A preset, or the YAML file of one, to decide by instead of what is logged.
    progress
        Told the number of characters read so far.

    Raises
    ------
    ReplayError
        The log is not one, or names a policy that is not registered here.
    ValueError
        There is no such preset.
    """
    chosen = plugins.preset(other) if other is not None else None
    dispatch = dispatcher(chosen.dispatch) if chosen is not None else None
    policies: dict[tuple[str, Any], Rebalance] = {}
    result = Replayed()
    read = 0
    for number, line in enumerate(_lines(log), 1):
        read += len(line) + 1
        if not line.strip():
            continue
        try:
            record = msgspec.json.decode(line)
            logged = [_action(one) for one in (*record.get("rescues", ()), *record["decided"])]
            if record["kind"] == "entrance":
                made = _entrance(record, chosen, dispatch)
            else:
                made = _moves(record, chosen, policies)
            when = float(record["time"])
        except (UnknownPolicyError, DecisionError) as error:
            raise ReplayError(f"{log}:{number}: {error}") from None
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


def _entrance(record: dict[str, Any], chosen: Preset | None, dispatch: Dispatch | None) -> list[dict[str, Any]]:
    cluster = read_cluster(record)
    candidates = read_candidates(record, cluster)
    if chosen is not None and dispatch is not None and chosen.admission == "open":
        places = [dispatch(cluster, int(tokens)) for tokens in candidates.tokens]
        return [{"kind": "enter", "request": n, "instance": place} for n, place in enumerate(places)]
    if chosen is not None:
        suspension = chosen.suspend_settings if chosen.suspends else None
        entrance = Entrance(chosen.admission_settings, suspension, chosen.queue)
    else:
        admission, suspended = read_settings(AdmissionSettings, record["admission"]), record["suspension"]
        suspension = read_settings(SuspendSettings, suspended) if suspended is not None else None
        entrance = Entrance(admission, suspension, record["queue"])
    running = read_progress(record["running"], len(cluster.requests))
    entrance.age_credit = float(record["credit"])
    decided = entrance.decide(cluster, candidates, running)
    return [{"kind": one.kind, "request": one.index, "instance": one.instance} for one in decided]


def _moves(
    record: dict[str, Any], chosen: Preset | None, policies: dict[tuple[str, Any], Rebalance]
) -> list[dict[str, Any]]:
    cluster = read_cluster(record)
    running = read_progress(record["running"], len(cluster.requests))
    name, settings = _logged_policy(record) if chosen is None else (chosen.rebalance, chosen.settings)
    rescued = record["lead"] is not None if chosen is None else chosen.suspends
    lead = read_settings(RescueSettings, record["lead"] or {})
    rescues = rescue(cluster, lead, running) if rescued else []
    if (name, settings) not in policies:  # one for all of its decisions, since it may remember
        policies[name, settings] = rebalancer(name, settings)
    # A fault, such as a late answer, need not come again.
    failed = chosen is None and record["failed"] is not None
    asked = [] if failed else decide_moves(policies[name, settings], cluster)
    moves = [{"kind": "move", "request": one.request, "instance": one.target} for one in beside(asked, rescues)]
    return [{"kind": "rescue", "request": one.request, "instance": one.target} for one in rescues] + moves


def _logged_policy(record: dict[str, Any]) -> tuple[str, Any]:
    """Return the name and the settings of the policy that a record was decided by."""
    name = record["rebalance"]["name"]
    if not isinstance(name, str):
        raise TypeError("the name of a policy must be a string")
    if name not in REBALANCERS:
        raise UnknownPolicyError(f"decided by the rebalance policy {name!r}, which is not known here: "
                                 "give the file that registers it, --policy FILE")  # fmt: skip
    return name, make_settings(REBALANCERS[name].Settings, record["rebalance"]["settings"])
