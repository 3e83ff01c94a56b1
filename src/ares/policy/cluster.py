"""The state that every decision starts from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Cluster:
    """One consistent view of the decode pool: I instances, R requests at them.

    Requests at an instance are those that run there, wait in its queue (preempted ones too), or are on their way to it
    from prefill. All count with the tokens that they need there, so that a request which waits is not counted again.

    Attributes
    ----------
    instances
        Names of the decode instances, length I.
    capacity_tokens
        KV capacity of each instance in tokens, shape (I,).
    promised_tokens
        Tokens of each instance that are not those of a request below, shape (I,): mostly reserved for moves in flight
        towards it. Where dispatch gets a cluster without requests, the whole load.
    open
        Whether an instance takes requests (healthy and not draining), shape (I,).
    requests
        Identifiers of the requests at the instances, length R.
    location
        Index of the instance that each request is at, shape (R,).
    resident_tokens
        Tokens (prompt and generated) whose KV each request holds, or will hold once it runs, shape (R,).
    movable
        Whether a request may be moved now, shape (R,): its sampling state can be restored exactly, no move of it is
        under way, and its cooldown is over.
    remaining_tokens
        Quantiles of the tokens each request will still generate, increasing along a row, shape (R, Q); NaN in rows
        without a prediction, None where there is no predictor.
    levels
        The levels of those quantiles, length Q; (0.5,) for point predictions.
    step_base_s, step_request_s, step_token_s
        Step-time model: base + request x running requests + token x resident tokens, seconds, shape (I,) each. None:
        unknown, so that policies compare tokens.
    transfer_bytes_s
        Bytes per second at which KV moves between instances.
    token_bytes
        KV bytes of one token.
    stall_s
        Seconds for which a move stops a stream, besides the transfer.
    block_tokens
        Tokens of a KV block; memory is allocated in whole blocks. 1 counts single tokens.
    commanded
        Whether a request may be moved only where its instance would otherwise run out of memory (oom_avoidance.py),
        because an operator's command has just moved it there, shape (R,); such a row is not `movable`. None: there is
        no such request.
    cached_tokens
        For a decision about one request: how many of its tokens, from the first on, each instance has cached, shape
        (I,). None: unknown, or of no interest.
    """

    instances: tuple[str, ...]
    capacity_tokens: IntArray
    promised_tokens: IntArray
    open: BoolArray
    requests: Sequence[str] | IntArray
    location: IntArray
    resident_tokens: IntArray
    movable: BoolArray
    remaining_tokens: FloatArray | None = None
    levels: tuple[float, ...] = (0.1, 0.5, 0.9)
    step_base_s: FloatArray | None = None
    step_request_s: FloatArray | None = None
    step_token_s: FloatArray | None = None
    transfer_bytes_s: float = 1e10
    token_bytes: float = 57344.0
    block_tokens: int = 1
    commanded: BoolArray | None = None
    stall_s: float = 0.1
    cached_tokens: IntArray | None = None

    def remaining_or_infinite(self) -> tuple[FloatArray, tuple[float, ...]]:
        """Return `remaining_tokens` and `levels`; without a predictor infinite medians, shape (R, 1)."""
        if self.remaining_tokens is None:
            return np.full((len(self.location), 1), np.inf), (0.5,)
        return self.remaining_tokens, self.levels

    def load_tokens(self) -> IntArray:
        """Tokens of each instance, promised ones included, shape (I,)."""
        resident = np.bincount(self.location, weights=self.resident_tokens, minlength=len(self.instances))
        return resident.astype(np.int64) + self.promised_tokens
