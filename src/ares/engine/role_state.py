"""The role of an instance, and its change: the instance keeps it, and tells every gateway in its telemetry.

An engine can prefill and decode at any time: a role says which work gateways send to it. From the order of a change on
they send none that the next role excludes, and move away what decodes there, where it is not to decode any more; the
role changes when nothing of it is left. What comes late does no harm: it is computed, and moved away too.
"""

import logging
from dataclasses import dataclass

import msgspec

from ares.protocol import messages
from ares.protocol.messages import Role

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Change:
    to: Role
    deadline: float


class RoleState:
    """The role of one instance. Times are those of `time.monotonic`.

    Parameters
    ----------
    role
        Its first role.
    able
        The roles that it can have.

    Attributes
    ----------
    role
        Its role now.
    """

    def __init__(self, role: Role, able: list[Role]) -> None:
        self.role = role
        self._able = able
        self._change: _Change | None = None

    @property
    def next_role(self) -> Role | None:
        """The role that it is about to have."""
        return self._change.to if self._change is not None else None

    def order(self, command: messages.ChangeRole, now: float) -> messages.RoleResult:
        """Begin a change, end it where the order is the role that it has still, or say why not."""
        refused = ""
        if command.role not in self._able:
            refused = f"it keeps the role {self.role}"
        elif command.role == self.role:
            self._change = None
        elif self._change is not None and self._change.to != command.role:
            refused = f"it is about to become {self._change.to}"
        elif self._change is None:
            logger.info("about to become %s instead of %s", command.role, self.role)
            self._change = _Change(command.role, now + command.deadline_s)
        return messages.RoleResult(command.call, self.role, self.next_role, refused)

    def report(self, load: messages.Telemetry, now: float) -> messages.Telemetry:
        """Change the role, or give that up, by the newest load; return the load with the role in it."""
        change, role = self._change, self.role
        if change is not None:
            decoding = load.running + load.waiting - load.prefilling
            ends_prefill = change.to == "decode" and load.prefilling > 0
            ends_decode = change.to == "prefill" and decoding > 0
            if not (ends_prefill or ends_decode):
                self.role, self._change = change.to, None
                logger.info("became %s instead of %s", change.to, role)
            elif now > change.deadline:
                self._change = None
                logger.warning("remains %s: requests were left when it was to become %s", role, change.to)
        change = self._change
        left_s = max(0.0, change.deadline - now) if change is not None else 0.0
        return msgspec.structs.replace(load, role=self.role, next_role=self.next_role, role_left_s=left_s)
