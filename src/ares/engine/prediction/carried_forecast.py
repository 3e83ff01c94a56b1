"""The forecast from a request's first state, as text: it travels with its request from instance to instance.

A prefill instance makes it, gateways keep it, and every later instance begins with it. It counts only where the same
network would have made it: instances with another checkpoint forecast from the first state that they see.
"""

import base64
import binascii
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What gateways take (`messages.Predicted`); that of the largest checkpoint is longer, and stays where it is.
LONGEST = 4096


@dataclass(frozen=True, slots=True)
class CarriedForecast:
    """A forecast: [edges] chances to have ended, and the position of the state that it was made from."""

    position: int
    ended: NDArray[np.float32]


def encode(forecaster: str, forecast: CarriedForecast) -> str:
    """Return a forecast as text, empty where it would be too long; `forecaster` is the id of what has made it."""
    # As the chances to go on, whose small ones are told apart in half precision.
    text = base64.b64encode((1 - forecast.ended).astype("<f2").tobytes()).decode()
    whole = f"{forecaster}:{forecast.position}:{text}"
    return whole if len(whole) <= LONGEST else ""


def decode(text: Any, forecaster: str, edges: int) -> CarriedForecast | None:
    """Return a forecast; None where there is none, or not one that `forecaster` would have made."""
    if not isinstance(text, str) or not forecaster:
        return None
    made_by, _, rest = text.partition(":")
    position, _, encoded = rest.partition(":")
    if made_by != forecaster or not position.isdecimal() or len(position) > 9:
        return None
    try:
        ended = 1 - np.frombuffer(base64.b64decode(encoded, validate=True), "<f2").astype(np.float32)
    except (binascii.Error, ValueError):
        return None
    if ended.shape != (edges,) or not ((ended >= 0) & (ended <= 1)).all():
        return None
    return CarriedForecast(int(position), ended)
