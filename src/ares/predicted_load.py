"""What an instance's requests still need by their predictions: tokens to generate, and KV memory at its peak.

Both an instance, for routers of others, and a gateway compute it, from the same telemetry.
"""

import itertools
import math

from ares.policy.kv_layout import KvGroup, KvLayout
from ares.protocol import messages

_PLAIN = KvLayout(1)


def layout_of(hello: messages.Hello) -> KvLayout:
    """Return how many KV blocks a request holds on an instance."""
    groups = [KvGroup(group.block_size, group.window, group.fixed_blocks) for group in hello.kv_groups]
    return KvLayout.of(hello.block_size, groups)


def plausible(quantiles: tuple[float, float, float]) -> bool:
    """Whether a prediction is possible: finite, not negative, in order."""
    return (
        all(math.isfinite(q) for q in quantiles)
        and quantiles[0] >= 0.0
        and all(a <= b for a, b in itertools.pairwise(quantiles))
    )


def predicted_remaining(load: messages.Telemetry) -> float | None:
    """Return the tokens that an instance's requests will still generate: the sum of the medians of their predictions.

    None where it predicts nothing, or nothing finite.
    """
    medians = [row.remaining[1] for row in load.rows if row.remaining is not None and plausible(row.remaining)]
    return _finite(sum(medians)) if medians else None


def predicted_peak(load: messages.Telemetry, layout: KvLayout = _PLAIN) -> float | None:
    """Return the most tokens that an instance will have in KV at once if nothing joins it and the medians come true.

    A request with n tokens of which p remain has n + k after k steps while k < p, and none after; a request without a
    prediction counts with n throughout. Tokens are KV tokens (policy/kv_layout.py), as the capacity is. None where
    nothing is predicted, or nothing finite.
    """
    known = [(row.remaining[1], layout.kv_tokens(row.resident)) for row in load.rows if row.remaining is not None]
    known = [(left, resident) for left, resident in known if math.isfinite(left)]
    if not known:
        return None
    rest = sum(layout.kv_tokens(row.resident) for row in load.rows) - sum(resident for _, resident in known)
    peak = allocated = 0.0
    # The last to end first: the first n still run when the n-th ends, each grown by as many tokens.
    for count, (left, resident) in enumerate(sorted(known, reverse=True), 1):
        allocated += resident
        peak = max(peak, allocated + count * max(left, 0.0))
    return _finite(rest + peak)


def _finite(tokens: float) -> float | None:
    return tokens if math.isfinite(tokens) else None
