"""What a prefill policy is: it chooses the instance that computes a prompt, which may be the one to decode on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ares.policy.base import DecisionError, Policy, is_index, raised
from ares.policy.cluster import BoolArray, FloatArray, IntArray
from ares.policy.registry import Class, Registry

# Whose turns are known; instances that restart may have new names each time.
_MOST_NAMES = 1024


@dataclass(frozen=True, slots=True)
class Places:
    """Where a prompt can be computed: N instances, those that prefill first, as it finds them when it arrives.

    A decode instance that computes a prompt goes on decoding meanwhile (chunked prefill), and needs no transfer.

    Attributes
    ----------
    instances
        Names of the instances, length N.
    open
        Whether an instance takes the request, shape (N,).
    requests
        Prompts that each instance still has to compute, those just sent included, shape (N,).
    decoding
        Requests that generate tokens on each, and wait while it computes a prompt, shape (N,).
    cached_tokens
        Tokens of the prompt, from the first on, that each is thought to have cached, shape (N,).
    queued_tokens
        Tokens of those prompts that are not cached, shape (N,).
    base_s, token_s
        Time to compute n tokens of a prompt: base + token x n seconds, shape (N,) each.
    decodes
        Whether the request would also be decoded there, shape (N,).
    step_s, slack_s
        Of those: the time of a step now, and by how much it may grow, seconds, shape (N,) each.
    transfer_s
        Seconds to bring the KV of one token from a prefill instance to the decode instance.
    """

    instances: tuple[str, ...]
    open: BoolArray
    requests: IntArray
    decoding: IntArray
    cached_tokens: IntArray
    queued_tokens: IntArray
    base_s: FloatArray
    token_s: FloatArray
    decodes: BoolArray
    step_s: FloatArray
    slack_s: FloatArray
    transfer_s: float = 0.0


class Prefill(Policy):
    """Base class of a prefill policy; one object chooses for prompt after prompt, and must be quick.

    Attributes
    ----------
    sees_prefixes
        Whether it looks at what is cached; otherwise there are only prefill instances, and nothing counts as cached.
    """

    part: ClassVar[str] = "prefill"
    sees_prefixes: ClassVar[bool] = False
    quick: ClassVar[bool] = True

    def choose(self, places: Places, tokens: int) -> int | None:
        """Return the index of an open place, or None where there is none.

        Parameters
        ----------
        places
            The instances.
        tokens
            Tokens of the prompt.
        """
        raise NotImplementedError


PREFILLS: Registry[Prefill] = Registry(Prefill, "choose(self, places, tokens)")


def register(name: str) -> Callable[[Class], Class]:
    """Register the decorated class as the prefill policy `name`."""
    return PREFILLS.register(name)


def prefill_policy(name: str, settings: Any = None) -> Prefill:
    """Make the policy called `name`, ready to choose; ValueError lists the known names, DecisionError: it cannot be."""
    return PREFILLS.make(name, settings)


def choose_place(policy: Prefill, places: Places, tokens: int) -> int | None:
    """Call a policy for a place.

    Raises
    ------
    DecisionError
        It raised, or what it returned is not an open place.
    """
    try:
        chosen: Any = policy.choose(places, tokens)
    except Exception as error:
        raise raised(policy, error) from error
    count = len(places.instances)
    if chosen is None:
        if places.open.any():
            raise _wrong(policy, "no_instance", "chose no instance, and some are open")
        return None
    if not is_index(chosen, count):
        raise _wrong(policy, "unknown_instance", f"chose {str(chosen)[:80]}: give an index from 0 to {count - 1}")
    if not places.open[int(chosen)]:
        raise _wrong(policy, "closed_instance", f"chose {int(chosen)}, which takes no requests now")
    return int(chosen)


def _wrong(policy: Prefill, kind: str, message: str) -> DecisionError:
    return DecisionError(policy.name, kind, message, policy.part)


class InTurns(Prefill):
    """Chooses by costs; of equally good instances, the one that was chosen longest ago."""

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        # By name: the number of its newest choice, the oldest first.
        self._last: dict[str, float] = {}

    def best(self, places: Places, among: BoolArray, *costs: FloatArray | IntArray) -> int | None:
        """Return the place with the least cost, and note that it was chosen; None where `among` has none.

        Parameters
        ----------
        among
            Whether a place may be chosen, shape (N,).
        costs
            What decides, the most important first, shape (N,) each.
        """
        indices = np.flatnonzero(among).tolist()
        if not indices:
            return None
        names = places.instances
        best = min(indices, key=lambda n: (*(float(cost[n]) for cost in costs), self._last.get(names[n], 0.0)))
        newest = next(reversed(self._last.values()), 0.0)
        self._last.pop(names[best], None)
        self._last[names[best]] = newest + 1.0
        if len(self._last) > _MOST_NAMES:
            del self._last[next(iter(self._last))]
        return int(best)

    def memory(self) -> dict[str, float]:
        """Return when each instance was chosen last, in numbers of choices."""
        return dict(self._last)

    def remember(self, memory: Mapping[str, float]) -> None:
        """Restore it."""
        self._last = dict(memory)
