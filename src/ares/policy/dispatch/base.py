"""What a dispatch policy is: it chooses the decode instance that a request enters first.

The simulator's event loop has some rules of this package built in, compiled: a class names the one that its `choose`
follows; every other class is called in Python.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from ares.policy.base import DecisionError, Policy, is_index, raised
from ares.policy.cluster import Cluster, FloatArray
from ares.policy.registry import Class, Registry

# Values of `Dispatch.rule`: rules that the simulator has built in. CALL_CHOOSE: none, `choose` is called.
CALL_CHOOSE, ROUND_ROBIN, LEAST_LOADED, SMALLEST_PEAK = range(4)


class Dispatch(Policy):
    """Base class of a dispatch policy; one object chooses for request after request.

    Attributes
    ----------
    sees_requests
        Whether it looks at the running requests; otherwise the cluster has the load of each instance as its
        `promised_tokens` and no rows, which costs little at every arrival.
    rule
        The rule in the simulator's event loop that `choose` follows, or `CALL_CHOOSE`; a
        subclass with a `choose` of its own is called unless it names a rule too.
    """

    part: ClassVar[str] = "dispatch"
    sees_requests: ClassVar[bool] = False
    rule: ClassVar[int] = CALL_CHOOSE

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "choose" in vars(cls):
            for name, usual in (("rule", CALL_CHOOSE), ("quick", False)):
                if name not in vars(cls):
                    setattr(cls, name, usual)

    @classmethod
    def sees_prefixes(cls, settings: Any) -> bool:
        """Return whether it looks at `Cluster.cached_tokens` with these settings; otherwise there are none."""
        return False

    def choose(self, cluster: Cluster, tokens: int, remaining: FloatArray | None) -> int | None:
        """Return the index of an open instance, or None where there is none.

        Parameters
        ----------
        cluster
            The decode pool; see `sees_requests`.
        tokens
            Tokens of the request's KV.
        remaining
            Quantiles of what it will generate, at the cluster's levels, shape (Q,); None: unknown.
        """
        raise NotImplementedError


DISPATCHERS: Registry[Dispatch] = Registry(Dispatch, "choose(self, cluster, tokens, remaining)")


def register(name: str) -> Callable[[Class], Class]:
    """Register the decorated class as the dispatch policy `name`."""
    return DISPATCHERS.register(name)


def dispatcher(name: str, settings: Any = None) -> Dispatch:
    """Make the policy called `name`, ready to choose; ValueError lists the known names, DecisionError: it cannot be."""
    return DISPATCHERS.make(name, settings)


def choose_instance(policy: Dispatch, cluster: Cluster, tokens: int, remaining: FloatArray | None) -> int | None:
    """Call a policy for an instance.

    Raises
    ------
    DecisionError
        It raised, or what it returned is not an open instance.
    """
    try:
        chosen: Any = policy.choose(cluster, tokens, remaining)
    except Exception as error:
        raise raised(policy, error) from error
    count = len(cluster.instances)
    if chosen is None:
        if cluster.open.any():
            raise _wrong(policy, "no_instance", "chose no instance, and some are open")
        return None
    if not is_index(chosen, count):
        raise _wrong(policy, "unknown_instance", f"chose {str(chosen)[:80]}: give an index from 0 to {count - 1}")
    index = int(chosen)
    if not cluster.open[index]:
        raise _wrong(policy, "closed_instance", f"chose {index}, which takes no requests now")
    return index


def _wrong(policy: Dispatch, kind: str, message: str) -> DecisionError:
    return DecisionError(policy.name, kind, message, policy.part)
