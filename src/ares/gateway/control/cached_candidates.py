"""What decode instances have cached of the requests that wait for admission.

Looking that up takes time for each request and instance, in the gateway's event loop: a decision looks up some, the
longest known ones last, and takes the others as they were last. An older figure costs time and never a token.
"""

import time
from collections.abc import Sequence

import numpy as np

from ares.gateway.control.prefill_choice import cached_tokens
from ares.gateway.pool.instance import Instance
from ares.gateway.session.session import Session
from ares.policy.cluster import IntArray

# Seconds that a decision may spend on it, and for which a figure is used before it is looked up again.
_LOOKS_UP_S = 0.002
_KNOWN_S = 1.0


class CachedCandidates:
    """Knows for a while what was found."""

    def __init__(self) -> None:
        # By session: when it was looked up, and what was found, the oldest first.
        self._found: dict[str, tuple[float, IntArray]] = {}
        self._names: tuple[str, ...] = ()

    def of(self, sessions: Sequence[Session], instances: Sequence[Instance]) -> IntArray:
        """Return how many of the tokens of each session each instance is thought to have cached, shape (W, I).

        What has never been looked up counts as not cached.
        """
        names = tuple(instance.name for instance in instances)
        found = self._found if names == self._names else {}
        waiting = {session.id: session for session in sessions}
        new = [one for one in waiting if one not in found]
        known = {one: seen for one, seen in found.items() if one in waiting}
        begun = time.monotonic()
        due = [*new, *(one for one, (seen_at, _) in known.items() if begun - seen_at > _KNOWN_S)]
        for one in due:
            known.pop(one, None)
            known[one] = (begun, cached_tokens(waiting[one].placement, instances))
            if time.monotonic() - begun > _LOOKS_UP_S:
                break
        self._found, self._names = known, names
        cached = np.zeros((len(waiting), len(instances)), np.int64)
        for row, one in enumerate(waiting):
            if one in known:
                cached[row] = known[one][1]
        return cached
