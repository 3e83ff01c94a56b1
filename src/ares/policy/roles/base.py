"""What a role policy is: it says how many instances of each role the load needs, and which one is to change."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from ares.policy.base import DecisionError, Policy, is_finite, is_index, raised
from ares.policy.cluster import BoolArray, FloatArray
from ares.policy.registry import Class, Registry

ChangeTo = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class RolePool:
    """One view of all instances that either prefill or decode: N of them, by the role that they have or will have.

    Attributes
    ----------
    instances
        Names of the instances, length N.
    decodes
        Whether an instance decodes, shape (N,); the others prefill.
    able
        Whether it takes new work and can change its role, shape (N,).
    changing
        Whether a change of any instance is under way.
    elapsed_s
        Seconds since the view before this one.
    busy
        Share of that time in which it computed, shape (N,); of instances that prefill.
    queued_s
        Seconds that it will take for the prompts that it has, shape (N,); 0 for instances that decode.
    requests, tokens
        Requests that decode there, and a high forecast of the KV tokens that they will take at the same time, those on
        their way to it included, shape (N,) each; also where an instance is to decode no more.
    capacity_tokens
        KV capacity in tokens, shape (N,).
    waiting_tokens
        KV tokens of the requests that wait for memory outside of decode.
    step_s
        Time of a decode step: base + request x requests + token x tokens seconds, as a mean over instances.
    ttft_s, tpot_s
        Objectives: time to the first token, and of each further one.
    others_decode
        Whether an instance that does both takes work, too.
    """

    instances: tuple[str, ...]
    decodes: BoolArray
    able: BoolArray
    changing: bool
    elapsed_s: float
    busy: FloatArray
    queued_s: FloatArray
    requests: FloatArray
    tokens: FloatArray
    capacity_tokens: FloatArray
    waiting_tokens: float
    step_s: tuple[float, float, float]
    ttft_s: float
    tpot_s: float
    others_decode: bool = False


@dataclass(frozen=True, slots=True)
class RoleChange:
    """Instance `instance` (an index) is to have the role `to`."""

    instance: int
    to: ChangeTo


@dataclass(frozen=True, slots=True)
class RolePlan:
    """What a role policy has decided.

    Attributes
    ----------
    prefill, decode
        Instances of each role that the load needs, in fractions; more or fewer than there are.
    towards
        The role that one more instance should have; None: neither.
    reason
        Why, as one sentence.
    change
        Which instance is to change its role now; None: none.
    """

    prefill: float
    decode: float
    towards: ChangeTo | None
    reason: str
    change: RoleChange | None = None


class Roles(Policy):
    """Base class of a role policy; one object plans view after view, and must be quick."""

    part: ClassVar[str] = "roles"
    quick: ClassVar[bool] = True

    def plan(self, pool: RolePool) -> RolePlan:
        """Return what the load needs, and at most one change."""
        raise NotImplementedError

    def change_not_made(self) -> None:
        """Note that the change of the newest plan was not made: it was refused, or only advised."""


ROLE_POLICIES: Registry[Roles] = Registry(Roles, "plan(self, pool)")


def register(name: str) -> Callable[[Class], Class]:
    """Register the decorated class as the role policy `name`."""
    return ROLE_POLICIES.register(name)


def role_policy(name: str, settings: Any = None) -> Roles:
    """Make the policy called `name`; ValueError lists the known names, DecisionError: it cannot be."""
    return ROLE_POLICIES.make(name, settings)


def plan_roles(policy: Roles, pool: RolePool) -> RolePlan:
    """Call a policy for a plan.

    Raises
    ------
    DecisionError
        It raised, or its plan is not one: it changes an instance that cannot change, or the last one of its role.
    """
    try:
        plan = policy.plan(pool)
    except Exception as error:
        raise raised(policy, error) from error
    if not (is_finite(plan.prefill) and is_finite(plan.decode)):
        raise _wrong(policy, "not_finite", "needs a number of instances that is not finite")
    change = plan.change
    if change is None:
        return plan
    if not is_index(change.instance, len(pool.instances)):
        raise _wrong(policy, "unknown_instance", f"changes an instance that is not there: {change.instance!r}")
    index = int(change.instance)
    if not pool.able[index] or bool(pool.decodes[index]) == (change.to == "decode"):
        raise _wrong(policy, "unable_instance", f"changes {pool.instances[index]}, which cannot become {change.to}")
    if int(np.sum(pool.decodes == pool.decodes[index])) < 2:
        raise _wrong(policy, "last_instance", f"changes {pool.instances[index]}, the last one of its role")
    return plan


def _wrong(policy: Roles, kind: str, message: str) -> DecisionError:
    return DecisionError(policy.name, kind, message, policy.part)
