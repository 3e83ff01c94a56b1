"""Outputs of transferred KV against outputs without a transfer: equal, or different more often than chance explains."""

import math
from dataclasses import dataclass

# Where tokens may differ by chance: below this probability it is no chance.
_SIGNIFICANT = 0.01


@dataclass(frozen=True, slots=True)
class Divergence:
    """How many outputs differ from their reference.

    Attributes
    ----------
    outputs, different
        Outputs after a transfer, and those of them that differ from their reference.
    control, control_different
        Outputs without a transfer, and those of them that differ from the same references.
    first
        Where the first different token was, in output tokens; None where none differs.
    """

    outputs: int
    different: int
    control: int = 0
    control_different: int = 0
    first: int | None = None

    @property
    def by_chance(self) -> float:
        """Probability that so many of those that differ are transferred ones by chance (Fisher's exact test)."""
        total, differ = self.outputs + self.control, self.different + self.control_different
        ways = math.comb(total, self.outputs)
        most = min(self.outputs, differ)
        more = range(self.different, most + 1)
        return sum(math.comb(differ, k) * math.comb(total - differ, self.outputs - k) for k in more) / ways

    @property
    def significant(self) -> bool:
        """Whether the transfers are the cause."""
        return bool(self.different) and self.by_chance < _SIGNIFICANT

    def text(self) -> str:
        """Return it in words."""
        if not self.different and not self.control_different:
            return "tokens equal"
        at = f", first at token {self.first}" if self.first is not None else ""
        found = f"{self.different} of {self.outputs} outputs differ{at}"
        return found + (f"; without a transfer {self.control_different} of {self.control}" if self.control else "")


def add(parts: list[Divergence]) -> Divergence:
    """Return the sum of several."""
    firsts = [each.first for each in parts if each.first is not None]
    return Divergence(
        sum(each.outputs for each in parts),
        sum(each.different for each in parts),
        sum(each.control for each in parts),
        sum(each.control_different for each in parts),
        min(firsts, default=None),
    )
