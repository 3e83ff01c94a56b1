"""Logged decisions read again (decision_log.py), and checked: what is read must be what a gateway could log."""

import itertools
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np

from ares.policy import Candidates, Cluster, Copyable, Places, Progress
from ares.policy.roles import RolePool

_INTEGER_ARRAYS = {"capacity_tokens", "promised_tokens", "location", "resident_tokens"}
_INTEGER_ARRAYS |= {"generated", "tokens", "rank", "cached_tokens", "queued_tokens", "under_way"}
_BOOLEAN_ARRAYS = {"open", "movable", "commanded", "suspended", "excluded", "decodes"}
_NO_ARRAYS = {"instances", "requests", "levels", "transfer_bytes_s", "token_bytes", "block_tokens", "stall_s"}


def _arrays(read: dict[str, Any]) -> dict[str, Any]:
    """Make arrays of lists; a None within one is what outlasts every horizon."""
    made: dict[str, Any] = {}
    for name, value in read.items():
        if name in _NO_ARRAYS:
            made[name] = tuple(value) if isinstance(value, list) else value
        elif value is None or isinstance(value, dict):
            made[name] = value
        else:
            kind = np.int64 if name in _INTEGER_ARRAYS else np.bool_ if name in _BOOLEAN_ARRAYS else np.float64
            made[name] = np.array(value, dtype=kind)
    return made


# The inner loops that decide are compiled, without checks of their own.
# The largest count (exact in a double), setting, and number of points of a horizon.
MAXIMUM_TOKENS, _MAXIMUM_SETTING, _MAXIMUM_POINTS = 1 << 53, 1e6, 10_000
_LARGEST_BLOCK = 1 << 16
_NO_COLUMNS_OF_PLACES = {"instances", "transfer_s"}
_STEP_TIME_MODEL = ("step_base_s", "step_request_s", "step_token_s")
_OF_INSTANCES = ("capacity_tokens", "promised_tokens", "open", "cached_tokens", *_STEP_TIME_MODEL)
_OF_ROLES = ("busy", "queued_s", "requests", "tokens", "capacity_tokens")
_OF_REQUESTS = ("location", "resident_tokens", "movable", "commanded")
Settings = TypeVar("Settings")


def read_cluster(record: dict[str, Any]) -> Cluster:
    """Return the cluster of a logged decision; ValueError or TypeError where it cannot be one."""
    read = dict(record["cluster"])
    if "placed" in read:  # its name in logs of version 0.1
        read["commanded"] = read.pop("placed")
    read.pop("waiting_tokens", None)  # of logs from before every waiting request was a row; it was never set
    made = Cluster(**_arrays(read))
    if not isinstance(made.instances, tuple) or not isinstance(made.requests, tuple):
        raise TypeError("instances and requests must be lists")
    if not made.levels or not all(a < b for a, b in itertools.pairwise((0.0, *made.levels, 1.0))):
        raise ValueError(f"levels {made.levels}")
    if type(made.block_tokens) is not int or not 1 <= made.block_tokens <= _LARGEST_BLOCK:
        raise ValueError(f"block_tokens is {made.block_tokens!r}")
    for name in ("transfer_bytes_s", "token_bytes"):
        if not 0 < getattr(made, name) < np.inf:
            raise ValueError(f"{name} is {getattr(made, name)}")
    if not 0 <= made.stall_s <= _MAXIMUM_SETTING:
        raise ValueError(f"stall_s is {made.stall_s}")
    if made.remaining_tokens is not None:
        # An empty list has lost its second dimension.
        made = replace(made, remaining_tokens=made.remaining_tokens.reshape(-1, len(made.levels)))
    _check(made, _OF_INSTANCES, len(made.instances))
    _check(made, (*_OF_REQUESTS, "remaining_tokens"), len(made.requests))
    if len(made.location) and made.location.max() >= len(made.instances):
        raise ValueError("a request runs on no instance")
    for name in _STEP_TIME_MODEL:
        values = getattr(made, name)
        if values is not None and not ((values >= 0) & (values <= _MAXIMUM_SETTING)).all():
            raise ValueError(f"{name} is out of range")
    return made


def read_places(record: dict[str, Any]) -> Places:
    """Return the places of a logged decision of prefill; ValueError or TypeError where they cannot be any."""
    read = dict(record["places"])
    transfer_s = read.pop("transfer_s", 0.0)
    if None in read.values():
        raise TypeError("each instance must have all of its figures")
    # The name is that of each request in a cluster, and here a number for each instance.
    requests = np.array(read.pop("requests"), dtype=np.int64)
    # Logs of earlier versions have what decodes on an instance among its requests.
    read.setdefault("decoding", [0] * len(requests))
    made = Places(requests=requests, transfer_s=float(transfer_s), **_arrays(read))
    # Of a request that resumes, no objective bounds it.
    made = replace(made, slack_s=np.nan_to_num(made.slack_s, nan=_MAXIMUM_SETTING))
    _check(made, [field.name for field in fields(made) if field.name not in _NO_COLUMNS_OF_PLACES], len(made.instances))
    for name in ("base_s", "token_s", "step_s", "slack_s"):
        values = getattr(made, name)
        if not ((values >= 0) & (values <= _MAXIMUM_SETTING)).all():
            raise ValueError(f"{name} is out of range")
    if not 0 <= made.transfer_s <= _MAXIMUM_SETTING:
        raise ValueError(f"transfer_s is {transfer_s!r}")
    return made


def read_copyable(record: dict[str, Any], cluster: Cluster) -> Copyable:
    """Return what a logged decision of copies was made from besides its cluster."""
    read = dict(record["copyable"])
    requests, instances = len(cluster.requests), len(cluster.instances)
    read.setdefault("under_way_tokens", [0] * instances)  # not in logs of earlier versions
    for name in ("requests", "takes"):
        read[name] = np.array(read[name], np.bool_)
    for name in ("copied_to", "under_way", "under_way_tokens"):
        read[name] = np.array(read[name], np.int64)
    read["cached_tokens"] = np.array(read["cached_tokens"], np.int64).reshape(-1, instances)
    for name in ("token_s", "token_bytes"):
        read[name] = _number(name, read[name])
    # What is owed is below 0.
    read["link_bytes"] = _number("link_bytes", read["link_bytes"], -float(MAXIMUM_TOKENS))
    made = Copyable(**read)
    _check(made, ("requests", "copied_to"), requests)
    _check(made, ("takes", "under_way", "under_way_tokens"), instances)
    if type(made.processes) is not int or made.processes < 1:
        raise ValueError(f"processes is {made.processes!r}")
    cached = made.cached_tokens
    if len(cached) != requests or (cached.size and not 0 <= cached.min() <= cached.max() < MAXIMUM_TOKENS):
        raise ValueError("cached_tokens is out of range")
    if requests and not -1 <= made.copied_to.min() <= made.copied_to.max() < instances:
        raise ValueError("a copy is on no instance")
    return made


def read_role_pool(record: dict[str, Any]) -> RolePool:
    """Return the pool of a logged plan of roles."""
    read = dict(record["pool"])
    if not isinstance(read["instances"], list) or not isinstance(read["changing"], bool) or len(read["step_s"]) != 3:
        raise TypeError("instances must be a list, changing true or false, and step_s three numbers")
    for name in _OF_ROLES:
        read[name] = np.array(read[name], np.float64)
    for name in ("decodes", "able"):
        read[name] = np.array(read[name], np.bool_)
    for name in ("elapsed_s", "waiting_tokens"):
        read[name] = _number(name, read[name])
    for name in ("ttft_s", "tpot_s"):  # an objective that nothing bounds has no number in JSON
        read[name] = np.inf if read[name] is None else _number(name, read[name])
    read["step_s"] = tuple(_number("step_s", one) for one in read["step_s"])
    made = RolePool(**read | {"instances": tuple(read["instances"])})
    _check(made, ("decodes", "able", *_OF_ROLES), len(made.instances))
    for name in _OF_ROLES:
        values = getattr(made, name)
        if not ((values >= 0) & (values < MAXIMUM_TOKENS)).all():
            raise ValueError(f"{name} is out of range")
    return made


def _number(name: str, value: Any, least: float = 0.0) -> float:
    """Return a number of a log; ValueError or TypeError where it cannot be one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}")
    if not least <= value < MAXIMUM_TOKENS:
        raise ValueError(f"{name} is {value!r}")
    return float(value)


def read_progress(read: dict[str, Any], count: int) -> Progress:
    """Return the progress of so many requests of a logged decision."""
    made = Progress(**_arrays(read))
    made = replace(made, gap_s=np.nan_to_num(made.gap_s, nan=np.inf))
    _check(made, [field.name for field in fields(made)], count)
    return made


def read_candidates(record: dict[str, Any], cluster: Cluster) -> Candidates:
    """Return the candidates of a logged decision about a cluster."""
    read = dict(record["candidates"])
    count = len(read["requests"])
    progress = read_progress(read.pop("progress"), count)
    made = Candidates(progress=progress, **_arrays(read))
    made = replace(made, remaining_tokens=made.remaining_tokens.reshape(-1, len(cluster.levels)))
    _check(made, ("tokens", "remaining_tokens", "rank", "waited_s", "suspended"), count)
    if made.excluded is not None and made.excluded.shape != (count, len(cluster.instances)):
        raise ValueError(f"excluded has shape {made.excluded.shape}")
    cached = made.cached_tokens
    if cached is not None and (
        cached.shape != (count, len(cluster.instances))
        or (cached.size and not 0 <= cached.min() <= cached.max() < MAXIMUM_TOKENS)
    ):
        raise ValueError("cached_tokens is out of range")
    return made


def read_settings(kind: type[Settings], read: dict[str, Any]) -> Settings:
    """Return settings of a logged decision."""
    made = kind(**read)
    for field in fields(made):  # type: ignore[arg-type] # all settings are dataclasses
        value = getattr(made, field.name)
        most = _MAXIMUM_POINTS if field.name == "points" else _MAXIMUM_SETTING
        if not isinstance(value, int if field.type is int else int | float) or not abs(value) <= most:
            raise ValueError(f"{field.name} is {value!r}")
    return made


def _check(made: Any, names: Iterable[str], count: int) -> None:
    """Check the lengths of arrays, and that what counts tokens does."""
    for name in names:
        array = getattr(made, name)
        if array is None:
            continue
        if array.ndim != 1 + (name == "remaining_tokens") or len(array) != count:
            raise ValueError(f"{name} has shape {array.shape}, expected {count} entries")
        if (
            name in _INTEGER_ARRAYS
            and name != "rank"
            and count
            and not 0 <= array.min() <= array.max() < MAXIMUM_TOKENS
        ):
            raise ValueError(f"{name} is out of range")
