"""The order in which waiting requests enter decode, and which one is preempted when memory runs out.

`fcfs` is vLLM's order: first come first served, and the newest running request is preempted. `shortest_memory_time`
admits the request with the smallest predicted memory-time first, and preempts the largest. Under both a class of
smaller rank goes first, and a request that has missed its TTFT goes behind those that have not. Starvation is bounded:
a fixed share of the admitted memory-time goes to the request that has waited longest.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

ORDERS = ("fcfs", "shortest_memory_time")
Number = TypeVar("Number", float, NDArray[np.float64])


def memory_time(resident: Number, remaining: Number) -> Number:
    """Token-steps of KV that a request will hold until it ends: p (n + p / 2)."""
    return remaining * (resident + remaining / 2.0)


def check_order(order: str) -> None:
    """Raise ValueError where there is no such order."""
    if order not in ORDERS:
        raise ValueError(f"setting order must be one of {', '.join(ORDERS)}, not {order!r}")


def is_by_memory_time(order: str) -> bool:
    """Return whether an order is by memory-time."""
    return order == "shortest_memory_time"
