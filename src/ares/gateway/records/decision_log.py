"""The decision log: JSON lines, each a decision with everything that it was made from, so that it can be made again."""

import logging
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ares.gateway.control.snapshot import ClusterSnapshot
from ares.policy import (
    Admission,
    AdmissionDecision,
    Candidates,
    Copies,
    Copyable,
    CopyDecision,
    Dispatch,
    MigrationDecision,
    Places,
    Policy,
    Prefill,
    Rebalance,
)
from ares.policy.cluster import FloatArray
from ares.policy.oom_avoidance import OomAction, OomAvoidanceSettings
from ares.policy.roles import RoleChange, RolePlan, RolePool, Roles

logger = logging.getLogger(__name__)

PLACE, PREFILL, COPY = "place", "prefill", "copy"
"""The kinds of what dispatch, prefill and copy policies decide."""
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
        self,
        preset: str,
        policy: Prefill,
        memory: dict[str, float],
        places: Places,
        tokens: int,
        chosen: int | None,
        *,
        resumes: bool = False,
    ) -> None:
        """Log where a prompt, or a request that resumes, is computed, if anywhere; `memory`: the policy's before it."""
        decided = [] if chosen is None else [{"kind": PREFILL, "index": 0, "instance": chosen}]
        self._write(
            "resumption" if resumes else "prefill",
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

    def copies(
        self,
        preset: str,
        policy: Copies,
        memory: dict[str, float],
        snapshot: ClusterSnapshot,
        copyable: Copyable,
        decided: list[CopyDecision],
    ) -> None:
        """Log the copies of a period; `memory` is the policy's before it."""
        self._write(
            "copies",
            preset,
            copies=_named(policy),
            memory=memory,
            cluster=snapshot.cluster,
            copyable=copyable,
            decided=[copy_action(one) | {"reason": one.reason} for one in decided],
        )

    def roles(self, preset: str, policy: Roles, memory: dict[str, float], pool: RolePool, plan: RolePlan) -> None:
        """Log a plan of roles; `memory` is the policy's before it."""
        decided = [] if plan.change is None else [role_action(plan.change)]
        self._write("roles", preset, roles=_named(policy), memory=memory, pool=pool, plan=plan, decided=decided)

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


def copy_action(one: CopyDecision) -> dict[str, Any]:
    """Return what the log has of a copy, without its reason."""
    return {"kind": COPY, "index": int(one.request), "instance": int(one.target), "tokens": int(one.tokens)}


def role_action(change: RoleChange) -> dict[str, Any]:
    """Return what the log has of a change of role."""
    return {"kind": f"become_{change.to}", "index": 0, "instance": int(change.instance)}


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
