"""The decision log: JSON lines, each a decision with everything that it was made from, so that it can be made again."""

import itertools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from ares.gateway.control.snapshot import ClusterSnapshot
from ares.policy import (
    Admission,
    AdmissionDecision,
    Candidates,
    Cluster,
    Dispatch,
    MigrationDecision,
    Places,
    Policy,
    Prefill,
    Progress,
    Rebalance,
)
from ares.policy.cluster import FloatArray
from ares.policy.oom_avoidance import OomAction, OomAvoidanceSettings

logger = logging.getLogger(__name__)

PLACE, PREFILL = "place", "prefill"
"""The kinds of what dispatch and prefill policies decide."""
_encode = msgspec.json.Encoder(enc_hook=lambda value: value.tolist()).encode


class DecisionLog:
    """Appends decisions to a file; without one it does nothing. A disk that fails ends the log, not the service.

    Attributes
    ----------
    keeps
        Whether to log a decision, by its kind and whether anything was decided: all of them by default.
    """

    def __init__(self, file: Path | None) -> None:
        self.keeps: Callable[[str, bool], bool] = lambda kind, decides: True
        self._file = file.open("ab") if file is not None else None

    def prefill(
        self, preset: str, policy: Prefill, memory: dict[str, float], places: Places, tokens: int, chosen: int | None
    ) -> None:
        """Log where a prompt is computed, if anywhere; `memory` is the policy's before it."""
        decided = [] if chosen is None else [{"kind": PREFILL, "index": 0, "instance": chosen}]
        self._write(
            "prefill",
            preset,
            prefill=_named(policy),
            memory=memory,
            places=places,
            tokens=tokens,
            decided=decided,
        )

    def dispatch(
        self,
        preset: str,
        policy: Dispatch,
        memory: dict[str, float],
        snapshot: ClusterSnapshot,
        tokens: int,
        remaining: FloatArray | None,
        chosen: int | None,
    ) -> None:
        """Log where dispatch has put a request, if anywhere; `memory` is the policy's before it."""
        decided = [] if chosen is None else [{"kind": PLACE, "index": 0, "instance": chosen}]
        self._write(
            "dispatch",
            preset,
            dispatch=_named(policy),
            memory=memory,
            cluster=snapshot.cluster,
            tokens=tokens,
            remaining=remaining,
            decided=decided,
        )

    def admissions(
        self,
        preset: str,
        policy: Admission,
        memory: dict[str, float],
        ended: list[int],
        snapshot: ClusterSnapshot,
        candidates: Candidates,
        decided: list[AdmissionDecision],
    ) -> None:
        """Log a decision of admission: the policy's memory before it, and the outputs that had ended since the last."""
        self._write(
            "admission",
            preset,
            admission=_named(policy),
            memory=memory,
            ended=ended,
            cluster=snapshot.cluster,
            running=snapshot.running,
            candidates=candidates,
            decided=decided,
        )

    def moves(
        self,
        preset: str,
        snapshot: ClusterSnapshot,
        policy: Rebalance,
        oom_avoidance: OomAvoidanceSettings | None,
        oom_actions: list[OomAction],
        decided: list[MigrationDecision],
        failed: str | None = None,
    ) -> None:
        """Log the moves of a period; a period without anything to decide is left out.

        `oom_avoidance` is None where out-of-memory avoidance was off; `failed` is the kind of the policy's fault.
        """
        if len(snapshot.sessions):
            self._write(
                "moves",
                preset,
                rebalance=_named(policy),
                oom_avoidance=oom_avoidance,
                cluster=snapshot.cluster,
                running=snapshot.running,
                oom_actions=oom_actions,
                failed=failed,
                decided=decided,
            )

    def _write(self, kind: str, preset: str, **record: Any) -> None:
        if self._file is None or not self.keeps(kind, bool(record["decided"] or record.get("oom_actions"))):
            return
        try:
            plain = {name: _plain(value) for name, value in record.items()}
            self._file.write(_encode({"kind": kind, "time": time.time(), "preset": preset, **plain}) + b"\n")
            self._file.flush()
        except OSError:
            logger.exception("the decision log ends here; serving continues")
            self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _named(policy: Policy) -> dict[str, Any]:
    """Return the name and the settings that a policy can be made again from."""
    return {"name": policy.name, "settings": _plain(policy.settings)}


def _plain(value: Any) -> Any:
    """Replace arrays by lists, with None for what JSON has no number for."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            return np.where(np.isfinite(value), value, None).tolist()  # type: ignore[call-overload]
        return value.tolist()
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return [_plain(one) for one in value] if isinstance(value, list) else value


_INTEGER_ARRAYS = {"capacity_tokens", "promised_tokens", "location", "resident_tokens"}
_INTEGER_ARRAYS |= {"generated", "tokens", "rank", "cached_tokens", "queued_tokens"}
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


# The inner loops that decide are compiled, without checks of their own: what is read must be what a gateway could log.
# The largest count (exact in a double), setting, and number of points of a horizon.
MAXIMUM_TOKENS, _MAXIMUM_SETTING, _MAXIMUM_POINTS = 1 << 53, 1e6, 10_000
_LARGEST_BLOCK = 1 << 16
_NO_COLUMNS_OF_PLACES = {"instances", "transfer_s"}
_STEP_TIME_MODEL = ("step_base_s", "step_request_s", "step_token_s")
_OF_INSTANCES = ("capacity_tokens", "promised_tokens", "open", "cached_tokens", *_STEP_TIME_MODEL)
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
    made = Places(requests=requests, transfer_s=float(transfer_s), **_arrays(read))
    _check(made, [field.name for field in fields(made) if field.name not in _NO_COLUMNS_OF_PLACES], len(made.instances))
    for name in ("base_s", "token_s", "step_s", "slack_s"):
        values = getattr(made, name)
        if not ((values >= 0) & (values <= _MAXIMUM_SETTING)).all():
            raise ValueError(f"{name} is out of range")
    if not 0 <= made.transfer_s <= _MAXIMUM_SETTING:
        raise ValueError(f"transfer_s is {transfer_s!r}")
    return made


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
