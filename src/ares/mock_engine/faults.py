"""Faults on request, for chaos tests: `POST /simulate/faults` with any of these fields; loopback only."""

import random
import time
from typing import Annotated, Literal

import msgspec

from ares.protocol import messages
from ares.protocol.fields import RequestState

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400)]


class Faults(msgspec.Struct, forbid_unknown_fields=True):
    """The faults of an instance. A field that is not given stays as it is.

    Attributes
    ----------
    freeze_s
        From now on for this long: no steps, no telemetry, no answers (SIGSTOP, seen from outside).
    refuse
        Answer new requests with 503.
    drop_streams
        Now: reset the connection of every running request.
    predictions
        What is predicted instead: not a number, negative, or huge.
    telemetry
        What is reported instead: the newest message again and again (`constant`), nothing running and all blocks free
        (`empty`), no block free (`full`), impossible numbers (`absurd`), or nothing at all (`silent`).
    lose_tokens
        Share of the messages with the tokens of a step that is lost.
    slow
        Factor on the time of every step.
    wrong_kv
        Send other KV than that of the request to instances that pull it: their tokens are wrong.
    die, restart_after_s
        Now: lose all connections, requests and KV at once (SIGKILL, seen from outside), and restart after that time
        with a new boot id; never, where no time is given.
    """

    freeze_s: _Seconds = 0.0
    refuse: bool = False
    drop_streams: bool = False
    predictions: Literal["nan", "negative", "huge"] | None = None
    telemetry: Literal["constant", "empty", "full", "absurd", "silent"] | None = None
    lose_tokens: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    slow: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 1.0
    wrong_kv: bool = False
    die: bool = False
    restart_after_s: _Seconds | None = None


# Impossible values of the telemetry's fields.
_ABSURD = {
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


def faulty_telemetry(
    fault: str | None, telemetry: messages.Telemetry, previous: messages.Telemetry | None, kv_blocks: int
) -> messages.Telemetry | None:
    """Return the message that is sent in place of the true one; None where nothing is sent.

    Parameters
    ----------
    fault
        As `Faults.telemetry`.
    telemetry
        The true message.
    previous
        The newest message that was not a repetition.
    kv_blocks
        KV capacity of the instance.
    """
    match fault:
        case "silent":
            return None
        case "constant":
            return msgspec.structs.replace(previous or telemetry, sequence=telemetry.sequence)
        case "empty":
            return msgspec.structs.replace(telemetry, kv_blocks_used=0, running=0, waiting=0, pinned=0, rows=[])
        case "full":
            return msgspec.structs.replace(telemetry, kv_blocks_used=kv_blocks)
        case "absurd":
            return msgspec.structs.replace(telemetry, **_ABSURD)
    return telemetry


class FaultState:
    """The faults of one instance; its event loop and its control thread read them."""

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
        """Seconds that a freeze still lasts."""
        return max(0.0, self._frozen_until - time.monotonic())

    def loses_tokens(self) -> bool:
        """Whether the message with the tokens of this step is lost."""
        return random.random() < self.current.lose_tokens  # noqa: S311 - a fault, not a secret

    def thaw(self) -> None:
        """End a freeze."""
        self._frozen_until = 0.0
