"""The order in which waiting requests enter decode, and who is preempted when memory runs out.

`fcfs` is vLLM's order: first come first served, and the newest running request is preempted. `volume` lets in the
request with the smallest predicted memory-time first, and preempts the largest. Under both a class of smaller rank goes
first, and a request that has missed its first token goes behind those that have not. Starvation is bounded by a second
lane: a fixed share of the admitted memory-time goes to the request that has waited longest.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

ORDERS = ("fcfs", "volume")
Number = TypeVar("Number", float, NDArray[np.float64])


def memory_time(resident: Number, remaining: Number) -> Number:
    """Token-steps of KV that a request will hold until it ends: p (n + p / 2)."""
    return remaining * (resident + remaining / 2.0)


def check_order(order: str) -> None:
    """Raise ValueError where there is no such order."""
    if order not in ORDERS:
        raise ValueError(f"setting order must be one of {', '.join(ORDERS)}, not {order!r}")


def is_by_volume(order: str) -> bool:
    """Tell whether an order is that by memory-time."""
    return order == "volume"
