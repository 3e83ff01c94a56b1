"""Faults on command, for chaos tests: `POST /simulate/faults` with any of these fields; loopback only."""

import time
from typing import Annotated, Literal

import msgspec

from ares.protocol import messages
from ares.protocol.fields import RequestState

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400)]


class Faults(msgspec.Struct, forbid_unknown_fields=True):
    """What goes wrong. A field that is not given stays as it is.

    Attributes
    ----------
    freeze_s
        Now and for so long: no steps, no telemetry, no answers (SIGSTOP, seen from outside).
    refuse
        Answer new requests with 503.
    drop_streams
        Now: reset the connection of every running request.
    predictions
        What is predicted instead: not a number, negative, or huge.
    telemetry
        What is reported instead: for ever the newest message, nothing running and all free, nothing free, numbers that
        cannot be, or nothing at all.
    slow
        Factor on the time of every step.
    die, restart_after_s
        Now: lose all connections, requests and KV at once (SIGKILL, seen from outside), and come back so much later
        with a new boot id; never, where no time is given.
    """

    freeze_s: _Seconds = 0.0
    refuse: bool = False
    drop_streams: bool = False
    predictions: Literal["nan", "negative", "huge"] | None = None
    telemetry: Literal["constant", "empty", "full", "absurd", "silent"] | None = None
    slow: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 1.0
    die: bool = False
    restart_after_s: _Seconds | None = None


# What no instance can be: the fields of its telemetry.
ABSURD = {
    "kv_blocks_used": -5,
    "running": 1 << 62,
    "waiting": -1,
    "step_time_s": float("nan"),
    "steps": -(1 << 62),
    "busy_s": float("inf"),
    "rows": [messages.Row("nobody", (1 << 63) + 1, -3, RequestState.RUNNING, (1e308, 1e308, 1e308))],
}
PREDICTIONS: dict[str, tuple[float, float, float]] = {
    "nan": (float("nan"), float("nan"), float("nan")),
    "negative": (-300.0, -200.0, -100.0),
    "huge": (1e300, 1e300, float("inf")),
}


def lied(
    lie: str | None, load: messages.Telemetry, before: messages.Telemetry | None, kv_blocks: int
) -> messages.Telemetry | None:
    """Return what is reported instead of a load, by `Faults.telemetry`; None for nothing.

    Parameters
    ----------
    before
        The newest load that was not a repetition.
    kv_blocks
        Of the instance.
    """
    match lie:
        case "silent":
            return None
        case "constant":
            return msgspec.structs.replace(before or load, sequence=load.sequence)
        case "empty":
            return msgspec.structs.replace(load, kv_blocks_used=0, running=0, waiting=0, pinned=0, rows=[])
        case "full":
            return msgspec.structs.replace(load, kv_blocks_used=kv_blocks)
        case "absurd":
            return msgspec.structs.replace(load, **ABSURD)
    return load


class FaultState:
    """The faults of one instance; read by its loop and by its control thread."""

    def __init__(self) -> None:
        self.current = Faults()
        self._frozen_until = 0.0

    def change(self, body: bytes) -> Faults:
        """Take the fields of a JSON body, and return all; msgspec.DecodeError where they are wrong."""
        asked = msgspec.json.decode(body or b"{}", type=Faults)
        given = msgspec.json.decode(body or b"{}", type=dict[str, object])
        changes = {name: getattr(asked, name) for name in given}
        self.current = msgspec.structs.replace(self.current, **changes)
        if "freeze_s" in given:
            self._frozen_until = time.monotonic() + asked.freeze_s
        done = msgspec.structs.replace(self.current)
        self.current.freeze_s, self.current.drop_streams, self.current.die = 0.0, False, False
        return done

    @property
    def frozen_s(self) -> float:
        """For how much longer nothing happens."""
        return max(0.0, self._frozen_until - time.monotonic())

    def thaw(self) -> None:
        """End a freeze."""
        self._frozen_until = 0.0
