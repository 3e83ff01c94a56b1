"""What requests are meant to achieve: classes of service, by configuration and by request."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Objective:
    """One class of service.

    Attributes
    ----------
    name
        Of the class.
    ttft_s
        Time to first token.
    tpot_s
        Seconds a token; None: one and a half times a step at full memory, which every healthy instance meets.
    gap_s
        Longest gap of its stream; infinite: only the other objectives bound it.
    rank
        Waiting requests of a smaller rank are admitted before all of a larger one.
    """

    name: str = "default"
    ttft_s: float = 20.0
    tpot_s: float | None = None
    gap_s: float = math.inf
    rank: int = 0


ORDINARY = Objective()
