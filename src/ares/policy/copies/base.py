"""What a copy policy is: it chooses which running requests get a warm copy of their KV, and on which instance.

A warm copy is full KV blocks of a running request in the prefix cache of another instance, where they are evictable.
Where the request loses its instance or is suspended, it can resume there and compute only the tokens after them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ares.policy.base import DecisionError, Policy, is_index, raised
from ares.policy.cluster import BoolArray, Cluster, IntArray
from ares.policy.registry import Class, Registry


@dataclass(frozen=True, slots=True)
class Copyable:
    """What a copy policy sees besides the cluster of I instances and R requests.

    Attributes
    ----------
    requests
        Whether a request may be copied now, shape (R,): it decodes, can be resumed exactly, and no copy of it is under
        way.
    cached_tokens
        Tokens of each request, from the first on, that each instance is thought to have cached, shape (R, I). Only
        those of requests that may be copied, and not where they run, matter.
    copied_to
        Index of the instance that the newest copy of each request went to, shape (R,); -1: there is none.
    takes
        Whether an instance keeps what is copied to it, shape (I,): it caches prefixes and takes requests.
    under_way, under_way_tokens
        Copies to each instance that have not ended, and the tokens that they bring, shape (I,) each.
    token_s
        Seconds to compute one token of a prompt.
    token_bytes
        Bytes of KV of one token.
    link_bytes
        Bytes that may be transferred now: what the budget has gained since the last decision, less what it owes.
    processes
        Processes of the gateway that copy, each for its own requests: each may use this part of the budget of memory.
    """

    requests: BoolArray
    cached_tokens: IntArray
    copied_to: IntArray
    takes: BoolArray
    under_way: IntArray
    under_way_tokens: IntArray
    token_s: float
    token_bytes: float
    link_bytes: float
    processes: int = 1


@dataclass(frozen=True, slots=True)
class CopyDecision:
    """One decided copy: indices into the cluster it was decided on, and how many tokens are not there yet."""

    request: int
    target: int
    tokens: int
    reason: str


class Copies(Policy):
    """Base class of a copy policy; one object decides period after period."""

    part: ClassVar[str] = "copies"

    @classmethod
    def copies(cls, settings: Any) -> bool:
        """Return whether it ever copies anything with these settings; if not, it is never called."""
        return True

    @classmethod
    def link_bytes_s(cls, settings: Any) -> float:
        """Return the budget of the link, in bytes per second."""
        return float(getattr(settings, "link_bytes_s", 0.0))

    def decide(self, cluster: Cluster, copyable: Copyable) -> list[CopyDecision]:
        """Return the copies to make now, best first; no request twice."""
        raise NotImplementedError


COPIERS: Registry[Copies] = Registry(Copies, "decide(self, cluster, copyable)")


def register(name: str) -> Callable[[Class], Class]:
    """Register the decorated class as the copy policy `name`."""
    return COPIERS.register(name)


def copier(name: str, settings: Any = None) -> Copies:
    """Make the policy called `name`, ready to decide; ValueError lists the known names, DecisionError: it cannot be."""
    return COPIERS.make(name, settings)


def decide_copies(policy: Copies, cluster: Cluster, copyable: Copyable) -> list[CopyDecision]:
    """Call a policy for its copies.

    Raises
    ------
    DecisionError
        It raised, or what it returned is no list of copies that can be made.
    """
    try:
        copies: Any = policy.decide(cluster, copyable)
    except Exception as error:
        raise raised(policy, error) from error
    if not isinstance(copies, list) or not all(isinstance(one, CopyDecision) for one in copies):
        message = f"must return a list of CopyDecision, not {str(copies)[:80]}"
        raise DecisionError(policy.name, "not_copies", message, policy.part)
    seen: set[int] = set()
    for one in copies:
        if wrong := _wrong(one, cluster, copyable, seen):
            raise DecisionError(policy.name, wrong[0], f"ordered {one}: {wrong[1]}"[:300], policy.part)
        seen.add(int(one.request))
    return copies


def _wrong(one: CopyDecision, cluster: Cluster, copyable: Copyable, seen: set[int]) -> tuple[str, str] | None:
    """Return the kind of fault and a sentence where a copy cannot be made, else None."""
    rows, count = len(cluster.location), len(cluster.instances)
    if not is_index(one.request, rows):
        return "unknown_request", f"request must be an index from 0 to {rows - 1}"
    if not is_index(one.target, count):
        return "unknown_instance", f"target must be an index from 0 to {count - 1}"
    held = int(cluster.resident_tokens[one.request])
    checks = (
        ("repeated", one.request in seen, "the request is ordered twice"),
        ("same_instance", cluster.location[one.request] == one.target, "it runs there"),
        ("not_copyable", not copyable.requests[one.request], "the request cannot be copied now"),
        ("closed_target", not copyable.takes[one.target], "the target keeps no copies now"),
        ("tokens", not is_index(one.tokens, held + 1) or not one.tokens, f"tokens must be from 1 to {held}"),
        ("reason", not isinstance(one.reason, str) or not one.reason, "it needs a reason"),
    )
    return next(((kind, message) for kind, wrong, message in checks if wrong), None)
