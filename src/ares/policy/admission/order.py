"""The order in which waiting requests enter decode, and who is preempted when memory runs out.

`fcfs` is vLLM's order: first come first served, and the newest running request is preempted. `volume` lets in the
request with the smallest predicted memory-time first, and preempts the largest. Under both a class of smaller rank goes
first, and a request that has missed its first token goes behind those that have not. Starvation is bounded by a second
lane: a fixed share of the admitted memory-time goes to the request that has waited longest.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

QUEUES = ("fcfs", "volume")
Number = TypeVar("Number", float, NDArray[np.float64])


def memory_time(resident: Number, remaining: Number) -> Number:
    """Token-steps of KV that a request will hold until it ends: p (n + p / 2)."""
    return remaining * (resident + remaining / 2.0)
