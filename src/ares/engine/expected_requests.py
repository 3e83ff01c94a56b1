"""The requests that are about to come to an instance: gateways announce them, the engine thread waits for them."""

# A gateway that announces more, or for longer, is not believed: what is expected costs the engine thread a little.
MOST = 64
LONGEST_S = 5.0


class ExpectedRequests:
    """Announced requests that have not come yet. The control channel's thread adds, the engine thread takes."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def add(self, key: str, within_s: float, now: float) -> None:
        """Expect request `key` for `within_s`, at most `LONGEST_S`; where there are `MOST` others, not at all."""
        for other in [other for other, until in list(self._until.items()) if until <= now]:
            self.arrived(other)
        if len(self._until) < MOST:
            self._until[key] = now + min(within_s, LONGEST_S)

    def arrived(self, key: str) -> None:
        """Note that request `key` is here."""
        self._until.pop(key, None)

    def until(self, now: float) -> float:
        """Return when the last of them is given up; `now` where none is expected."""
        return max([now, *list(self._until.values())])
