"""Whether an instance can continue a request: one check for admission, moves, drains and resumption after a loss."""

from typing import TYPE_CHECKING

from ares.gateway.pool import likeness
from ares.gateway.pool.likeness import Decides, Values
from ares.gateway.pool.state import InstanceState
from ares.protocol.fields import CARRIES_SEED

if TYPE_CHECKING:
    from ares.gateway.session.placement import Placement

_WITHOUT_SEED = Decides.KV | Decides.TOKENS
_ANEW_WITH_SEED = Decides.TOKENS | Decides.DRAWS


def unfit(placement: "Placement", state: InstanceState, kv: Values | None) -> str | None:
    """Say why an instance cannot continue a request, as the end of a sentence about it; None where it can.

    Parameters
    ----------
    placement
        The request's.
    state
        The instance's.
    kv
        Settings of the instance whose KV it would pull; None: it computes the tokens again.
    """
    sampling = placement.sampling
    if lacking := state.lacks(sampling.needs):
        return f"does not restore {', '.join(sorted(lacking))} of the request"
    if not state.serves(sampling.adapter):
        return f"does not have the adapter {sampling.adapter}"
    most = len(placement.prompt) + sampling.maximum_tokens
    if not state.fits(most):
        return f"takes sequences of fewer tokens than the {most} that this one may get (--max-model-len)"
    seeded = CARRIES_SEED in sampling.needs
    differs = likeness.difference(state.settings, kv, likeness.ALL if seeded else _WITHOUT_SEED)
    differs = differs or likeness.difference(
        state.settings, placement.began_with, _ANEW_WITH_SEED if seeded else Decides.TOKENS
    )
    return f"differs in what decides KV or tokens from where the request was: {differs}" if differs else None
