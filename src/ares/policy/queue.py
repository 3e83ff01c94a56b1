"""The order in which waiting requests enter decode, and who gives way when memory runs out.

`fcfs` is vLLM's order: first come first served, and the newest running request is preempted. `volume` lets in the
request with the smallest predicted memory-time first, and preempts the largest. Starvation is bounded by a second
lane: a fixed share of the admitted memory-time goes to whoever has waited longest.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

QUEUES = ("fcfs", "volume")
Number = TypeVar("Number", float, NDArray[np.float64])


def memory_time(resident: Number, remaining: Number) -> Number:
    """Token-steps of KV that a request will hold until it ends: p (n + p / 2)."""
    return remaining * (resident + remaining / 2.0)
