"""What a predictor knows of a request apart from its newest state, as text: it travels from instance to instance.

That is the forecast from the request's first state and the average of its states. A prefill instance sends them behind
the prefill, and the source of a move with the request's KV; gateways keep the newest, and every later instance begins
with it. It counts only where the same network would have made it: instances with another checkpoint begin with the
first state that they see.
"""

import base64
import binascii
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What gateways take of a prefill (`messages.Predicted`).
LONGEST = 4096
# And with the KV of a request that moves: more than the average takes at a hidden size of 12,000.
LONGEST_OF_MOVE = 16384


@dataclass(frozen=True, slots=True)
class Carried:
    """What is known of a request.

    Attributes
    ----------
    forecaster
        The id of what has made it (`Predictor.forecaster`).
    position
        Tokens generated before the first state.
    ended
        [edges] the forecast from that state: the chances to have ended. Empty where the network makes none.
    averaged
        How many states are in the average; 0: there is none.
    mean, step
        [d] int8, the average in units of `step`.
    """

    forecaster: str
    position: int
    ended: NDArray[np.float32]
    averaged: int
    mean: NDArray[np.int8]
    step: float


def encode(carried: Carried, longest: int = LONGEST) -> str:
    """Return it as text of `longest` characters at most: without the average or empty where it would be longer."""
    # As the chances to go on, whose small ones are told apart in half precision.
    forecast = _text((1 - carried.ended).astype("<f2").tobytes())
    short = f"{carried.forecaster}:{carried.position}:{forecast}"
    if carried.averaged:
        mean = np.array(carried.step, "<f4").tobytes() + carried.mean.astype(np.int8).tobytes()
        whole = f"{short}:{carried.averaged}:{_text(mean)}"
        if len(whole) <= longest:
            return whole
    return short if len(short) <= longest else ""


def decode(text: Any, forecaster: str, edges: int, hidden_size: int) -> Carried | None:
    """Return what was encoded; None where there is nothing, or not what `forecaster` would have made."""
    if not isinstance(text, str) or not forecaster:
        return None
    made_by, *parts = text.split(":")
    if made_by != forecaster or len(parts) not in {2, 4}:
        return None
    position, forecast, averaged, mean = (*parts, "0", "")[:4]
    if not (_is_count(position) and _is_count(averaged)):
        return None
    try:
        ended = 1 - np.frombuffer(base64.b64decode(forecast, validate=True), "<f2").astype(np.float32)
        numbers = base64.b64decode(mean, validate=True)
    except (binascii.Error, ValueError):
        return None
    if ended.shape != (edges,) or not ((ended >= 0) & (ended <= 1)).all():
        return None
    if not int(averaged):
        return Carried(made_by, int(position), ended, 0, np.zeros(hidden_size, np.int8), 0.0)
    if len(numbers) != 4 + hidden_size:
        return None
    step = float(np.frombuffer(numbers[:4], "<f4")[0])
    # A standardised state is at most 8 (features.standardised), and so is an average.
    if not (math.isfinite(step) and 0 <= step <= 1):
        return None
    return Carried(made_by, int(position), ended, int(averaged), np.frombuffer(numbers[4:], np.int8), step)


def _is_count(text: str) -> bool:
    return text.isdecimal() and text.isascii() and len(text) <= 9


def _text(numbers: bytes) -> str:
    return base64.b64encode(numbers).decode()
