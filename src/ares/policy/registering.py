"""One decorator for the policies of a preset, whichever part they are: the base class of a policy decides that."""

from collections.abc import Callable
from typing import Any

from ares.policy.admission.base import ADMISSIONS
from ares.policy.copies.base import COPIERS
from ares.policy.dispatch.base import DISPATCHERS
from ares.policy.prefill.base import PREFILLS
from ares.policy.rebalance.base import REBALANCERS
from ares.policy.registry import Class, Registry

REGISTRIES: dict[str, Registry[Any]] = {
    registry.base.part: registry for registry in (DISPATCHERS, ADMISSIONS, REBALANCERS, PREFILLS, COPIERS)
}
"""The registry of each part of a preset."""


def register(name: str) -> Callable[[Class], Class]:
    """Register the decorated class as the prefill, dispatch, admission, rebalance or copy policy `name`."""

    def registered(policy: Class) -> Class:
        for registry in REGISTRIES.values():
            if isinstance(policy, type) and issubclass(policy, registry.base):
                return registry.register(name)(policy)
        raise TypeError(
            f"{policy.__name__} must be a subclass of ares.policy.Prefill, Dispatch, Admission, Rebalance or Copies"
        )

    return registered
