"""Where the instances of an application are: each says so again and again, and is forgotten when it stops."""

import time
from collections.abc import Callable

# Whether a silent instance lives its gateways find out themselves, much sooner: forgetting it early would only drain
# instances that live while Ray's own processes are busy.
FORGET_S = 30.0
# A new directory, after the one before it has died, is complete when every instance has had time to announce itself.
COMPLETE_S = 10.0


class Directory:
    """The addresses of an application's instances. It keeps nothing: a new one is told all of it within seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._announced: dict[str, float] = {}

    def announce(self, url: str) -> None:
        """Take note that an instance is at a URL."""
        self._announced[url] = self._clock()

    def withdraw(self, url: str) -> None:
        """Forget an instance that has ended."""
        self._announced.pop(url, None)

    def urls(self) -> tuple[list[str], bool]:
        """Return the URLs of the instances, and whether there are no others."""
        now = self._clock()
        self._announced = {url: at for url, at in self._announced.items() if now - at < FORGET_S}
        return sorted(self._announced), now - self._since >= COMPLETE_S
