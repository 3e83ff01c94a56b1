"""Whether the nodes of a cluster suffice for an application: Serve itself would wait for ever, and not say for what."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


class CapacityError(ValueError):
    """The nodes do not suffice; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Need:
    """Actors of a kind, each of which needs CPUs and GPUs on one node; at most `per_node` of them on a node."""

    what: str
    count: int
    cpus: float
    gpus: float
    per_node: int | None = None

    def fit(self, node: "Node") -> float:
        """Return how many of them an empty node takes."""
        most = math.inf if self.per_node is None else self.per_node
        for has, needs in ((node.cpus, self.cpus), (node.gpus, self.gpus)):
            if needs:
                most = min(most, has // needs)
        return most


@dataclass(frozen=True, slots=True)
class Node:
    """A node, with what it has in all."""

    name: str
    cpus: float
    gpus: float


def check(needs: Sequence[Need], nodes: Sequence[Node]) -> None:
    """Raise CapacityError where an application cannot run on these nodes, even if nothing else does."""
    have = ", ".join(f"{node.name}: {node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in nodes)
    add = f"add nodes, ask for less, or set wait_for_nodes: true where an autoscaler adds them (nodes: {have})"
    for need in needs:
        room = sum(need.fit(node) for node in nodes)
        if room < need.count:
            limit = f", at most {need.per_node} on a node" if need.per_node is not None else ""
            raise CapacityError(
                f"{need.what}: {need.count} with {need.cpus:g} CPUs and {need.gpus:g} GPUs each{limit} do not fit, "
                f"only {room:g} do: {add}"
            )
    for what, name in (("cpus", "CPUs"), ("gpus", "GPUs")):
        wanted = sum(need.count * getattr(need, what) for need in needs)
        has = sum(getattr(node, what) for node in nodes)
        if wanted > has:
            raise CapacityError(
                f"{' and '.join(need.what for need in needs)} need {wanted:g} {name} together, and the "
                f"cluster has {has:g}: {add}"
            )
