"""Changes of role: an instance that prefills is to decode, or the other way round, or to do both.

The instance keeps its role and reports it to every gateway (engine/role_state.py). A gateway orders the change in its
turn (control/closing.py), so that no two of them give away the last two instances of a role at the same time. From then
on each gateway sends no new work that the next role excludes, and moves its requests away where that is decoding
(control/drain.py); the instance changes when nothing of it is left, or at the deadline keeps its role. So no request
is aborted for it.
"""

import asyncio
import logging
from typing import Literal

from ares.gateway.control.closing import Closing, ClosingError
from ares.gateway.pool.instance import Instance, excluded_by
from ares.gateway.pool.pool import Pool
from ares.gateway.records.metrics import Metrics
from ares.gateway.tuning import DEFAULT, Tuning
from ares.protocol.messages import Role

logger = logging.getLogger(__name__)

Trigger = Literal["commanded", "planned"]
# By the URL of each instance: its role, and the one that it is about to have.
Seen = dict[str, tuple[Role, Role | None]]


class RoleError(ClosingError):
    """The role cannot be changed."""


class RoleChanges:
    """Orders changes of role.

    Parameters
    ----------
    pool, metrics
        The gateway's.
    closing
        The gateway's turn to close instances.
    tuning
        The gateway's times and limits.
    """

    def __init__(
        self,
        pool: Pool,
        metrics: Metrics,
        closing: Closing,
        tuning: Tuning = DEFAULT,
    ) -> None:
        self._pool, self._metrics, self._closing = pool, metrics, closing
        self._tuning = tuning

    def refusal(self, instance: Instance, role: Role) -> RoleError | None:
        """Return why the instance cannot be ordered to have the role now; None where it can."""
        name, hello = instance.name, instance.state.hello
        if hello is None or not instance.health.healthy:
            return RoleError(503, "instance_not_ready", f"{name} does not report, so that it cannot be told its role")
        if not hello.roles:
            why = "does not say that it can change its role (an earlier ARES?)"
            return RoleError(409, "role_fixed", f"{name} {why}: restart it with --role {role}")
        if role not in hello.roles:
            why = f"was started with --fixed-role and remains {instance.role}"
            return RoleError(409, "role_fixed", f"{name} {why}: restart it without, or with --role {role}")
        if instance.next_role not in (None, role) and role != instance.role:
            why = f"is about to become {instance.next_role} instead of {instance.role}"
            advice = f"wait for that, or end it: ares role {name} {instance.role}"
            return RoleError(409, "role_changing", f"{name} {why}: {advice}")
        if role == (instance.next_role or instance.role):
            now = "is about to have" if instance.next_role else "has"
            return RoleError(409, "role_unchanged", f"{name} {now} the role {role} already")
        if (lost := self._pool.lost_without(instance, excluded_by(role))) is not None:
            return RoleError(409, "last_instance", f"{name} is {lost}; give another instance that role first, or both")
        return None

    def seen(self) -> Seen:
        """Return the roles of all instances, as far as is known now."""
        return {i.url: (i.role, i.next_role) for i in self._pool.instances}

    async def order(
        self, instance: Instance, role: Role, deadline_s: float, trigger: Trigger, seen: Seen | None = None
    ) -> None:
        """Order an instance to have a role; its telemetry reports how that goes.

        Where `seen` is given, the order holds only while all roles are still those: another gateway may have changed
        one meanwhile.

        Raises
        ------
        ClosingError
            It cannot be, or the instance refused it or did not answer. Nothing was changed, as far as is known.
        """
        if (error := self.refusal(instance, role)) is not None:
            raise error
        async with self._closing.turn():
            if (error := self.refusal(instance, role)) is not None:  # by what has come meanwhile
                raise error
            if seen is not None and seen != self.seen():
                raise RoleError(409, "role_changing", "another role has changed meanwhile")
            await self._tell(instance, role, deadline_s)
        self._metrics.role_changes.labels(trigger, role).inc()
        logger.info("%s is to become %s (%s); deadline %g s", instance.name, role, trigger, deadline_s)

    async def _tell(self, instance: Instance, role: Role, deadline_s: float) -> None:
        try:
            answer = await instance.change_role(role, deadline_s, self._tuning.role_answer_s)
        except TimeoutError:
            why = f"{instance.name} did not answer; ares status shows its role"
            raise RoleError(503, "instance_not_ready", why) from None
        if answer.refused:
            raise RoleError(409, "role_changing", f"{instance.name} refuses: {answer.refused}")

    async def run(self) -> None:
        """End changes that would leave nobody for some work, because others are lost meanwhile; until cancelled."""
        while True:
            await asyncio.sleep(self._tuning.drain_period_s)
            for instance in self._pool.instances:
                if instance.next_role is not None and instance.open:
                    try:
                        await self._keep_last(instance, instance.next_role)
                    except Exception:  # only this attempt fails, not the service (I7)
                        logger.exception("cannot look after the change of role of %s", instance.name)
                        self._metrics.faults.labels("role").inc()

    async def _keep_last(self, instance: Instance, next_role: Role) -> None:
        ending = (work for work in excluded_by(next_role) if work not in excluded_by(instance.role))
        if all(any(i.takes(work) for i in self._pool.instances) for work in ending):
            return
        logger.warning("%s remains %s: no other instance does that work any more", instance.name, instance.role)
        try:
            await instance.change_role(instance.role, 0.0, self._tuning.role_answer_s)
        except TimeoutError:
            logger.warning("%s did not answer", instance.name)
