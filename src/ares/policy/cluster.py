"""The state that every decision starts from."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Cluster:
    """One consistent view of the decode pool: I instances, R running requests.

    Attributes
    ----------
    instances
        Names of the decode instances, length I.
    capacity_tokens
        KV capacity of each instance in tokens, shape (I,).
    promised_tokens
        Tokens promised to moves that are still in flight towards an instance, shape (I,).
    open
        Whether an instance takes requests (healthy and not draining), shape (I,).
    requests
        Identifiers of the running requests, length R.
    location
        Index of the instance each request runs on, shape (R,).
    resident_tokens
        Tokens whose KV each request holds (prompt and generated), shape (R,).
    movable
        Whether a request may be moved now: its state is carried exactly, it is not in a hand-over,
        and its cooldown is over, shape (R,).
    """

    instances: tuple[str, ...]
    capacity_tokens: IntArray
    promised_tokens: IntArray
    open: BoolArray
    requests: tuple[str, ...]
    location: IntArray
    resident_tokens: IntArray
    movable: BoolArray

    def load_tokens(self) -> IntArray:
        """Resident tokens of each instance with what is promised to it, shape (I,)."""
        resident = np.bincount(self.location, weights=self.resident_tokens, minlength=len(self.instances))
        return resident.astype(np.int64) + self.promised_tokens
