"""The decision log: JSON lines, each a decision with everything that it was made from, so that it can be made again."""

import logging
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ares.gateway.view import View
from ares.policy import Cluster, RebalanceSettings
from ares.policy.entrance import Candidates, Entrance, Entry, Progress
from ares.policy.moves import Move
from ares.policy.rescue import Rescue, RescueSettings

logger = logging.getLogger(__name__)

_encode = msgspec.json.Encoder(enc_hook=lambda value: value.tolist()).encode


class DecisionLog:
    """Appends decisions to a file; without one it does nothing. A disk that fails ends the log, not the service."""

    def __init__(self, file: Path | None) -> None:
        self._file = file.open("ab") if file is not None else None

    def entries(
        self,
        preset: str,
        entrance: Entrance,
        credit: float,
        view: View,
        candidates: Candidates,
        decided: list[Entry],
    ) -> None:
        """Log a decision of the entrance; `credit` is that of the oldest before it."""
        self._write(
            "entrance",
            preset,
            credit=credit,
            admission=entrance.admission,
            suspension=entrance.suspension,
            cluster=view.cluster,
            running=view.running,
            candidates=candidates,
            decided=decided,
        )

    def moves(
        self,
        preset: str,
        view: View,
        settings: RebalanceSettings,
        lead: RescueSettings,
        rescues: list[Rescue],
        decided: list[Move],
    ) -> None:
        """Log the moves of a period; a period without anything to decide is left out."""
        if len(view.sequences):
            self._write(
                "moves",
                preset,
                settings=settings,
                lead=lead,
                cluster=view.cluster,
                running=view.running,
                rescues=rescues,
                decided=decided,
            )

    def _write(self, kind: str, preset: str, **record: Any) -> None:
        if self._file is None:
            return
        try:
            plain = {name: _plain(value) for name, value in record.items()}
            self._file.write(_encode({"kind": kind, "time": time.time(), "preset": preset, **plain}) + b"\n")
            self._file.flush()
        except OSError:
            logger.exception("the decision log ends here; serving goes on")
            self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _plain(value: Any) -> Any:
    """Replace arrays by lists, with None for what JSON has no number for."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            return np.where(np.isfinite(value), value, None).tolist()  # type: ignore[call-overload]
        return value.tolist()
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return [_plain(one) for one in value] if isinstance(value, list) else value


_INTEGERS = {"capacity_tokens", "promised_tokens", "location", "resident_tokens", "waiting_tokens"}
_INTEGERS |= {"generated", "tokens", "rank"}
_BOOLEANS = {"open", "movable", "late", "suspended"}
_PLAIN = {"instances", "requests", "levels", "transfer_bytes_s", "token_bytes"}


def _arrays(read: dict[str, Any]) -> dict[str, Any]:
    """Make arrays of lists; a None within one is what outlasts every horizon."""
    made: dict[str, Any] = {}
    for name, value in read.items():
        if name in _PLAIN:
            made[name] = tuple(value) if isinstance(value, list) else value
        elif value is None or isinstance(value, dict):
            made[name] = value
        else:
            kind = np.int64 if name in _INTEGERS else np.bool_ if name in _BOOLEANS else np.float64
            made[name] = np.array(value, dtype=kind)
    return made


def read_cluster(record: dict[str, Any]) -> Cluster:
    """Return the cluster of a logged decision."""
    made = Cluster(**_arrays(record["cluster"]))
    if made.remaining_tokens is None:
        return made
    # An empty list has lost its second dimension.
    return replace(made, remaining_tokens=made.remaining_tokens.reshape(-1, len(made.levels)))


def read_progress(read: dict[str, Any]) -> Progress:
    """Return the progress of a logged decision."""
    return Progress(**_arrays(read))


def read_candidates(record: dict[str, Any]) -> Candidates:
    """Return the candidates of a logged decision."""
    read = dict(record["candidates"])
    progress = read_progress(read.pop("progress"))
    return Candidates(progress=progress, **_arrays(read))
