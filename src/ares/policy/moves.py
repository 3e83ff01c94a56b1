"""A decided move, and the knobs that decide it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RebalanceSettings:
    """The knobs of a rebalancer. The paper names none of the values; these are ours.

    Attributes
    ----------
    theta
        An instance is overloaded above (1 + theta) times the mean load.
    minimum_gain
        Smallest worthwhile cut of the spread, as a share of the squared mean load: stops moves that only jitter.
    reserve
        Share of a target's KV that a move never fills, left for the growth of what runs there.
    moves_per_round
        Most moves one decision may order; one for every 32 instances where that is more. No instance gives twice,
        takes twice, or does both in a round.
    cooldown_s
        Seconds during which a request that was moved is not moved again; the caller marks its row as not movable.
    horizon, points
        Steps ahead that the forecast covers, and the points of its geometric grid; horizon 0 is today's load alone.
    decay
        Steps ahead at which the forecast counts a quarter of the present.
    amortise, stall_s
        A request moves only if its predicted remaining time exceeds `amortise` times its transfer and stall.
    deviations
        Standard deviations above the expectation that count as safe for memory.
    memory_weight
        Weight of forecast memory beyond the limit, against the spread of step time.
    sources, targets
        How many of the most and of the least loaded instances one decision looks at.
    """

    theta: float = 0.1
    minimum_gain: float = 0.01
    reserve: float = 0.1
    moves_per_round: int = 2
    cooldown_s: float = 10.0
    horizon: int = 4000
    points: int = 64
    decay: float = 1000.0
    amortise: float = 4.0
    stall_s: float = 0.1
    deviations: float = 1.3
    memory_weight: float = 4.0
    sources: int = 4
    targets: int = 8


@dataclass(frozen=True, slots=True)
class Move:
    """One decided move: indices into the cluster it was decided on, and the numbers behind it."""

    request: int
    source: int
    target: int
    gain: float
    reason: str
