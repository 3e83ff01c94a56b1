"""How a request's KV is transferred in a move: all of it after the request has stopped, or most of it before.

Live pre-copy (Clark et al., "Live Migration of Virtual Machines", NSDI 2005; for KV caches, Llumnix, OSDI 2024) moves
the full blocks while the request keeps decoding. It pins blocks at the source and costs the target one row in one step,
so it must shorten the stall by more than a client would notice: half the time between two tokens.
"""

import math
from dataclasses import dataclass
from typing import Literal

Mode = Literal["stop_and_copy", "pre_copy"]
STOP_AND_COPY: Mode = "stop_and_copy"
PRE_COPY: Mode = "pre_copy"
# Steps of the source between the snapshot of its full blocks and the cut, besides those of the copy itself.
_STEPS_AROUND = 3
# Steps of the target that a pre-copy must save.
_WORTH_STEPS = 0.5


@dataclass(frozen=True, slots=True)
class Link:
    """The measured transfer of KV to one target.

    Attributes
    ----------
    token_bytes
        KV of one token.
    bytes_per_s
        Speed of a pull; 0 where none was measured.
    within_step_bytes
        Largest pull that the target makes within a scheduling step; a larger one runs concurrently with its steps.
    step_s
        Step time of the target.
    block_tokens
        Tokens of a KV block; a pre-copy transfers full blocks only.
    """

    token_bytes: float
    bytes_per_s: float
    within_step_bytes: int
    step_s: float
    block_tokens: int


def copy_stall_s(tokens: float, link: Link) -> float:
    """Return by how many seconds the copy of `tokens` delays the first token at the target.

    A pull within the step delays it by its own time. A concurrent pull is noticed when a step ends, so that the
    token waits for whole steps.
    """
    size = tokens * link.token_bytes
    seconds = size / link.bytes_per_s
    if size <= link.within_step_bytes or link.step_s <= 0:
        return seconds
    return math.ceil(seconds / link.step_s) * link.step_s


def choose_mode(tokens: int, link: Link) -> Mode:
    """Return how to move a request with so many resident tokens: by pre-copy where that saves half a step."""
    full = tokens - tokens % link.block_tokens
    if not full or link.bytes_per_s <= 0 or link.step_s <= 0:
        return STOP_AND_COPY
    ahead_s = full * link.token_bytes / link.bytes_per_s
    rest = tokens - full + _STEPS_AROUND + ahead_s / link.step_s
    saved_s = copy_stall_s(tokens, link) - copy_stall_s(rest, link)
    return PRE_COPY if saved_s > _WORTH_STEPS * link.step_s else STOP_AND_COPY
