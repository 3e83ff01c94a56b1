"""`ares replay`: make logged decisions again, under the same preset or another."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ares import plugins
from ares.gateway.records.decision_log import PLACE, PREFILL, copy_action, role_action
from ares.gateway.records.logged_decisions import (
    MAXIMUM_TOKENS,
    read_candidates,
    read_cluster,
    read_copyable,
    read_places,
    read_progress,
    read_role_pool,
    read_settings,
)
from ares.policy import (
    REGISTRIES,
    Admission,
    Candidates,
    Cluster,
    Copies,
    DecisionError,
    Dispatch,
    Policy,
    Prefill,
    Preset,
    Rebalance,
    choose_instance,
    choose_place,
    decide_admissions,
    decide_copies,
    decide_moves,
)
from ares.policy.cluster import FloatArray
from ares.policy.oom_avoidance import OomAvoidanceSettings, avoid_oom, exclude_conflicts
from ares.policy.registry import Registry
from ares.policy.roles import ROLE_POLICIES, Roles, plan_roles
from ares.policy.settings import make_settings
from ares.text_files import TextFileError, read_lines
from ares.yaml_text import WRONG_VALUES


class ReplayError(ValueError):
    """The log cannot be read; the message names the line."""


class UnknownPolicyError(ValueError):
    """A logged policy is not registered here."""


# Roles are no part of a preset: they are planned by the logged policy under any.
_KNOWN: dict[str, Registry[Any]] = {**REGISTRIES, ROLE_POLICIES.base.part: ROLE_POLICIES}
# Errors of lines that are no decisions.
_MALFORMED = (msgspec.DecodeError, *WRONG_VALUES)


@dataclass(slots=True)
class Replayed:
    """The results of a replay.

    Attributes
    ----------
    decisions, same
        Decisions replayed, and those with the logged result.
    logged, made
        Actions by kind, as logged and as replayed.
    differences
        One entry for each decision with another result.
    """

    decisions: int = 0
    same: int = 0
    logged: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)
    differences: list[dict[str, Any]] = field(default_factory=list)


def replay(log: Path, other: str | None, progress: Callable[[int], None] = lambda _: None) -> Replayed:
    """Replay every decision of a log.

    Parameters
    ----------
    log
        Written by ``ares gateway --decision-log``.
    other
        A preset, or the YAML file of one, to decide by instead of the logged policies.
    progress
        Called with the number of characters read so far.

    Raises
    ------
    ReplayError
        The log is not one, or names a policy that is not registered here.
    ValueError
        There is no such preset.
    """
    chosen = plugins.preset(other) if other is not None else None
    policies = _Policies(chosen)
    result = Replayed()
    read = 0
    for number, line in enumerate(_lines(log), 1):
        read += len(line) + 1
        if not line.strip():
            continue
        try:
            record = msgspec.json.decode(line)
            logged = [_action(one) for one in (*record.get("oom_actions", ()), *record["decided"])]
            made = _MAKE[record["kind"]](record, policies)
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
    """Return the action of a decision, without its reason and gain."""
    if "request" in one:
        kind = "avoid_oom" if "gain" not in one else "move"
        return {"kind": kind, "request": one["request"], "instance": one["target"]}
    if not isinstance(one["kind"], str):
        raise TypeError("a kind must be a string")
    tokens = {"tokens": one["tokens"]} if "tokens" in one else {}
    return {"kind": one["kind"], "request": one["index"], "instance": one["instance"], **tokens}


class _Policies:
    """The policies of a log, or of a preset instead: each one object for all decisions, since it may have memory.

    Parameters
    ----------
    chosen
        The preset to decide by; None: by what is logged.
    """

    def __init__(self, chosen: Preset | None) -> None:
        self.chosen = chosen
        self._made: dict[tuple[str, str, Any], Any] = {}

    def find(self, part: str, record: dict[str, Any], *, logged: bool = False) -> Any:
        """Return the policy that decides a record; with the logged memory, where it is the logged policy.

        That is the one of the chosen preset, if there is one and `logged` is not set.
        """
        if logged := logged or self.chosen is None:
            name, settings = _logged_policy(part, record)
        else:
            name, settings = getattr(self.chosen, part), getattr(self.chosen, f"{part}_settings")
        if (part, name, settings) not in self._made:
            self._made[part, name, settings] = _KNOWN[part].make(name, settings)
        policy: Policy = self._made[part, name, settings]
        if logged and (memory := record.get("memory")) is not None:
            # An empty one too: of the first decision of each process of a gateway, and after a switch of presets.
            policy.remember(memory)
        return policy


def _logged_policy(part: str, record: dict[str, Any]) -> tuple[str, Any]:
    """Return the name and the settings of the policy that a record was decided by."""
    name = record[part]["name"]
    if not isinstance(name, str):
        raise TypeError("the name of a policy must be a string")
    if name not in _KNOWN[part]:
        raise UnknownPolicyError(f"decided by the {part} policy {name!r}, which is not known here: "
                                 "give the file that registers it, --policy FILE")  # fmt: skip
    return name, make_settings(_KNOWN[part][name].Settings, record[part]["settings"])


def _prefill(record: dict[str, Any], policies: _Policies) -> list[dict[str, Any]]:
    places, tokens = read_places(record), _tokens(record["tokens"])
    policy: Prefill = policies.find("prefill", record)
    if not policy.sees_prefixes:
        places = replace(places, open=places.open & ~places.decodes)
    chosen = choose_place(policy, places, tokens)
    return [] if chosen is None else [{"kind": PREFILL, "request": 0, "instance": chosen}]


def _resumption(record: dict[str, Any], policies: _Policies) -> list[dict[str, Any]]:
    """Return where a request resumes: by the cost model of `least_time`, whatever the preset."""
    chosen = choose_place(policies.find("prefill", record, logged=True), read_places(record), _tokens(record["tokens"]))
    return [] if chosen is None else [{"kind": PREFILL, "request": 0, "instance": chosen}]


def _placement(record: dict[str, Any], policies: _Policies) -> list[dict[str, Any]]:
    cluster = read_cluster(record)
    remaining = record["remaining"]
    if remaining is not None:
        remaining = np.array(remaining, np.float64)
        if remaining.shape != (len(cluster.levels),):
            raise ValueError(f"remaining has shape {remaining.shape}")
    return _placed(policies.find("dispatch", record), cluster, [_tokens(record["tokens"])], [remaining])


def _tokens(read: object) -> int:
    if not isinstance(read, int) or not 0 <= read < MAXIMUM_TOKENS:
        raise ValueError(f"tokens is {read!r}")
    return read


def _placed(
    policy: Dispatch, cluster: Cluster, tokens: Iterable[int], remaining: Iterable[FloatArray | None]
) -> list[dict[str, Any]]:
    chosen = [choose_instance(policy, cluster, *one) for one in zip(tokens, remaining, strict=True)]
    return [{"kind": PLACE, "request": n, "instance": place} for n, place in enumerate(chosen) if place is not None]


def _admissions(record: dict[str, Any], policies: _Policies) -> list[dict[str, Any]]:
    cluster = read_cluster(record)
    candidates = read_candidates(record, cluster)
    if policies.chosen is not None and not policies.chosen.queues_requests:
        return _dispatched(policies.find("dispatch", record), cluster, candidates)
    ended = [_tokens(one) for one in record["ended"]]
    running = read_progress(record["running"], len(cluster.requests))
    policy: Admission = policies.find("admission", record)
    decided = decide_admissions(policy, cluster, candidates, running, ended)
    return [{"kind": one.kind, "request": one.index, "instance": one.instance} for one in decided]


def _dispatched(policy: Dispatch, cluster: Cluster, candidates: Candidates) -> list[dict[str, Any]]:
    """Return where dispatch would have placed the candidates at once."""
    placed = _placed(policy, cluster, candidates.tokens.tolist(), candidates.remaining_tokens)
    return [one | {"kind": "admit"} for one in placed]


def _moves(record: dict[str, Any], policies: _Policies) -> list[dict[str, Any]]:
    cluster, chosen = read_cluster(record), policies.chosen
    running = read_progress(record["running"], len(cluster.requests))
    avoids = record["oom_avoidance"] is not None if chosen is None else chosen.avoids_oom
    oom_avoidance = read_settings(OomAvoidanceSettings, record["oom_avoidance"] or {})
    oom_actions = avoid_oom(cluster, oom_avoidance, running) if avoids else []
    policy: Rebalance = policies.find("rebalance", record)
    # A fault, such as a late answer, need not come again.
    failed = chosen is None and record["failed"] is not None
    asked = [] if failed else decide_moves(policy, cluster)
    moves = [
        {"kind": "move", "request": one.request, "instance": one.target}
        for one in exclude_conflicts(asked, oom_actions)
    ]
    return [{"kind": "avoid_oom", "request": one.request, "instance": one.target} for one in oom_actions] + moves


def _copies(record: dict[str, Any], policies: _Policies) -> list[dict[str, Any]]:
    cluster = read_cluster(record)
    copyable = read_copyable(record, cluster)
    if policies.chosen is not None and not policies.chosen.copies_requests:
        return []
    policy: Copies = policies.find("copies", record)
    return [_action(copy_action(one)) for one in decide_copies(policy, cluster, copyable)]


def _roles(record: dict[str, Any], policies: _Policies) -> list[dict[str, Any]]:
    policy: Roles = policies.find("roles", record, logged=True)
    change = plan_roles(policy, read_role_pool(record)).change
    return [] if change is None else [_action(role_action(change))]


_MAKE: dict[str, Callable[[dict[str, Any], _Policies], list[dict[str, Any]]]] = {
    "prefill": _prefill,
    "dispatch": _placement,
    "admission": _admissions,
    "moves": _moves,
    "resumption": _resumption,
    "copies": _copies,
    "roles": _roles,
}
