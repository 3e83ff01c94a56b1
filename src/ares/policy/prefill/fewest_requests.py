"""`fewest_requests`: the open prefill instance with the fewest requests; of several, the one chosen longest ago."""

from ares.policy.prefill.base import InTurns, Places, register


@register("fewest_requests")
class FewestRequests(InTurns):
    """The fewest requests."""

    def choose(self, places: Places, tokens: int) -> int | None:
        """Return the index of the instance with the fewest requests."""
        return self.best(places, places.open & ~places.decodes, places.requests + places.decoding)
