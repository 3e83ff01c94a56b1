"""What admission reads and writes, as plain arrays: from telemetry in the gateway, from its state in the simulator.

N requests, outside decode or running; I instances; K points of the horizon; Q quantiles; S rows an instance at most.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

F8 = NDArray[np.float64]
I8 = NDArray[np.int64]

# Values of `Requests.status`. A caller may have more for requests that are neither waiting nor suspended.
ADMITTED, WAITING, SUSPENDED, ADMISSION_STATES = range(4)

# Kinds of decision, the first column of `decided`.
ADMIT, RESUME, SUSPEND = range(3)

# Why a request is admitted or resumes, the fourth column of `decided`; for a suspension: the request it makes room for.
FITS, OLDEST, ROOM_MADE, DUE, RUNS_AGAIN = range(5)


class Requests(NamedTuple):
    """All requests, by index; times are seconds on one clock.

    Attributes
    ----------
    tokens
        KV tokens, shape (N,).
    remaining
        Quantiles of the tokens that each will still generate, shape (N, Q).
    generated
        Output tokens so far, shape (N,).
    arrived_s, first_token_s
        Arrival, and first token (NaN: none yet), shape (N,).
    waiting_since_s
        Since when it waits: its arrival, or its suspension, shape (N,).
    ttft_s, tpot_s, gap_s
        Objectives: time to first token, seconds per token, longest gap in its stream (infinite: none), shape (N,).
    longest_gap_s
        Longest gap in its stream so far, shape (N,).
    rank
        Rank of its class: a smaller one goes before every larger one, shape (N,).
    status
        `WAITING` (prefilled, and not admitted yet), `SUSPENDED`, or another value: it is admitted, shape (N,). Written:
        `ADMITTED` where a request is admitted.
    movable
        1 where a running request may be suspended, shape (N,); written.
    excluded
        1 for instances that may not take a request, shape (N, I), or (0, 0) where none is excluded.
    cached
        Tokens of each request, from the first on, that each instance has cached, shape (N, I), or (0, 0): none.
    """

    tokens: I8
    remaining: F8
    generated: I8
    arrived_s: F8
    first_token_s: F8
    waiting_since_s: F8
    ttft_s: F8
    tpot_s: F8
    gap_s: F8
    longest_gap_s: F8
    rank: I8
    status: I8
    movable: I8
    excluded: I8
    cached: I8


class Instances(NamedTuple):
    """The decode instances.

    Attributes
    ----------
    expected, variance
        Forecast of the KV tokens and its variance, shape (I, K); updated as requests enter and leave.
    memory
        KV capacity in tokens, shape (I,).
    closed
        1 for instances that take no requests, shape (I,).
    load
        Requests that run, are on their way or wait there, shape (I,).
    step_base_s, step_request_s, step_token_s
        Step-time model, shape (I,) each.
    row_request, row_count
        The running requests of each instance, shape (I, S), and how many they are, shape (I,).
    """

    expected: F8
    variance: F8
    memory: I8
    closed: I8
    load: I8
    step_base_s: F8
    step_request_s: F8
    step_token_s: F8
    row_request: I8
    row_count: I8


class Queue(NamedTuple):
    """Requests outside decode.

    Attributes
    ----------
    order
        The waiting ones in the order in which they enter (order.py), indices into `Requests`.
    by_age
        The same, the oldest first.
    suspended
        The suspended ones.
    """

    order: I8
    by_age: I8
    suspended: I8


class Horizon(NamedTuple):
    """How the forecast is made.

    Attributes
    ----------
    steps
        Steps ahead, increasing from 0, shape (K,).
    weights
        Probability that each quantile stands for, shape (Q,).
    block_tokens
        Tokens of a KV block; 1 counts single tokens.
    """

    steps: F8
    weights: F8
    block_tokens: int


class LoopSettings(NamedTuple):
    """Settings of admission and suspension (settings.py, suspension.py), as numbers; `suspends` is 0 or 1."""

    deviations: float
    headroom: float
    tpot_margin: float
    age_share: float
    cached_weight: float
    suspends: float
    after_s: float
    least_slack_s: float
    least_gap_s: float
    urgent_s: float
    urgent_steps: float
    longest_s: float
    longest_missed_s: float
    ratio: float
