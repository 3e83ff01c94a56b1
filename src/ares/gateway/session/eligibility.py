"""Whether an instance can continue a request: one check for admission, moves, drains and resumption after a loss."""

from typing import Protocol

from ares.gateway.openai.sampling import Sampling
from ares.gateway.pool import compatibility
from ares.gateway.pool.compatibility import Decides, Values
from ares.gateway.pool.state import InstanceState
from ares.protocol.fields import CARRIES_SEED

_WITHOUT_SEED = Decides.KV | Decides.TOKENS
_ANEW_WITH_SEED = Decides.TOKENS | Decides.DRAWS


class Started(Protocol):
    """A request (`Placement`): its prompt, its sampling, and the settings of the instance where its tokens began."""

    prompt: list[int]
    sampling: Sampling
    began_with: Values | None


def why_ineligible(request: Started, state: InstanceState, kv: Values | None) -> str | None:
    """Say why an instance cannot continue a request, as the end of a sentence about it; None where it can.

    Parameters
    ----------
    request, state
        The request, and the instance.
    kv
        Settings of the instance whose KV it would pull; None: it computes the tokens again.
    """
    sampling = request.sampling
    if lacking := state.lacks(sampling.needs):
        return f"does not restore {', '.join(sorted(lacking))} of the request"
    if not state.serves(sampling.adapter):
        return f"does not have the adapter {sampling.adapter}"
    most = len(request.prompt) + sampling.maximum_tokens
    if not state.fits(most):
        return f"takes sequences of fewer tokens than the {most} that this one may get (--max-model-len)"
    seeded = CARRIES_SEED in sampling.needs
    differs = compatibility.difference(state.settings, kv, compatibility.ALL if seeded else _WITHOUT_SEED)
    differs = differs or compatibility.difference(
        state.settings, request.began_with, _ANEW_WITH_SEED if seeded else Decides.TOKENS
    )
    return f"differs in what decides KV or tokens from where the request was: {differs}" if differs else None
