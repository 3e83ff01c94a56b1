"""The load of each decode instance, for dispatch: it decides at every arrival, and must not read all requests then."""

import time
from collections.abc import Iterable, Sequence

from ares.gateway.pool.instance import Instance
from ares.gateway.session.session import Session

# Share of the time that reading all requests may take: the start of a thousand streams would take the square of it.
_SHARE = 0.05


class InstanceLoads:
    """KV tokens on each instance, in whole blocks, which are what runs out.

    They are those of our own sessions, or what the instance reports, where that is more because other gateways use it
    too. What was read is used for a while, with what has been sent to the instances since.
    """

    def __init__(self) -> None:
        self._own: dict[Instance, int] = {}
        self._reported: dict[Instance, int] = {}
        self._block = 0
        self._valid_until = 0.0

    def read(
        self, instances: Sequence[Instance], sessions: Iterable[Session], block: int, others: Sequence[int] = ()
    ) -> list[int]:
        """Return the tokens on each instance, in blocks of so many tokens.

        `others` is how many tokens the other processes of the gateway, if there are any, have placed on each.
        """
        begun = time.perf_counter()
        if begun >= self._valid_until or block != self._block or self._own.keys() != set(instances):
            self._block = block
            self._own = dict.fromkeys(instances, 0)
            for session in sessions:
                self.add(session.instance or session.destination, session.tokens)
            self._reported = {instance: self._report(instance) for instance in instances}
            self._valid_until = begun + (time.perf_counter() - begun) / _SHARE
        return [
            max(self._own[instance] + placed, self._reported[instance])
            for instance, placed in zip(instances, others or [0] * len(instances), strict=True)
        ]

    def add(self, instance: Instance | None, tokens: int) -> None:
        """Count a session with so many tokens on an instance; on another one than those that were read, it is none."""
        if instance in self._own:
            self._own[instance] += in_blocks(instance.state.layout.kv_tokens(tokens), self._block)

    def _report(self, instance: Instance) -> int:
        load, kv_tokens = instance.state.telemetry, instance.state.layout.kv_tokens
        return sum(in_blocks(kv_tokens(row.resident), self._block) for row in load.rows) if load else 0


def in_blocks(tokens: int, block: int) -> int:
    """Return the tokens that fit the KV blocks allocated for a session with so many tokens, the next token included."""
    return -(-(tokens + 1) // block) * block if tokens else 0
