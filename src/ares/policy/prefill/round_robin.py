"""`round_robin`: open prefill instances in turn, whatever their load."""

from ares.policy.prefill.base import InTurns, Places, register


@register("round_robin")
class RoundRobin(InTurns):
    """The one that was chosen longest ago."""

    def choose(self, places: Places, tokens: int) -> int | None:
        """Return the index of the next open instance."""
        return self.best(places, places.open & ~places.decodes)
