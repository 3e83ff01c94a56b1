"""The pools of a gateway with several models: an instance belongs to the one whose model it says it serves.

An instance that has not said so yet is watched in the first pool, which takes it over into its own when it has.
"""

from collections.abc import Iterator

from ares.gateway.pool.discovery import Served, another_model, same_name
from ares.gateway.pool.instance import Instance
from ares.gateway.pool.pool import Pool
from ares.protocol import messages


class Pools:
    """The pools, each with the model that its instances serve; of a gateway with one model there is one."""

    def __init__(self) -> None:
        self._pools: dict[str, tuple[Served, Pool]] = {}

    def __len__(self) -> int:
        return len(self._pools)

    def __iter__(self) -> Iterator[Pool]:
        return (pool for _, pool in self._pools.values())

    def append(self, served: Served, pool: Pool) -> None:
        """Add a pool; those before it stay first."""
        self._pools[served.names[0]] = served, pool

    def instances(self) -> list[Instance]:
        """Return the instances of all pools, each once: not what one has handed over and still waits for."""
        return [i for pool in self for i in pool.instances if i.named or self._named_at(i.url) is None]

    def _named_at(self, url: str) -> Pool | None:
        """Return the pool that is to have the instance at a URL; None where nothing names it."""
        return next((pool for pool in self if (found := pool.at(url)) is not None and found.named), None)

    # --- what names instances (discovery/membership.py) ---

    def add(self, url: str, why: str) -> None:
        """Watch an instance from now on, in the pool that has it already or else in the first; see `Pool.add`."""
        known = (pool for pool in self if pool.at(url) is not None)
        (self._named_at(url) or next(known, None) or next(iter(self))).add(url, why)

    def remove(self, url: str, why: str, deadline_s: float) -> None:
        """Let an instance go, wherever it is; see `Pool.remove`."""
        for pool in self:
            pool.remove(url, why, deadline_s)

    # --- which pool an instance belongs to (discovery.py) ---

    def take(self, served: Served, url: str, found: messages.Description) -> bool:
        """Take an instance out of the pool of a model, and into the pool of its own, if there is one for it.

        Returns
        -------
        bool
            Whether it belongs to another pool.
        """
        own = self._of(found)
        if own is None or own is served:
            return False
        (_, here), (_, there) = self._pools[served.names[0]], self._pools[own.names[0]]
        instance = here.at(url)
        if instance is not None and instance.named:
            why = f"it serves {own.names[0]}"
            there.add(url, why)
            if instance.description is None:  # it has done nothing here
                here.drop(instance)
            else:
                here.remove(url, why, 0.0)
        return True

    def difference(self, served: Served, found: messages.Description) -> str | None:
        """Return why an instance, in the pool of a model, belongs to none; None where it belongs to that one."""
        if self._of(found) is served:
            return None
        if len(self) == 1:
            return another_model(found, served)
        known = ", ".join(self._pools)
        if not found.models:
            return f"it does not report which model it serves (an earlier ARES?); here it may be any of {known}"
        return f"{', '.join(found.models)} instead of one of {known}"

    def _of(self, found: messages.Description) -> Served | None:
        """Return the model that an instance serves: the one with a name of it, or the only one that it may be."""
        able = [served for served, _ in self._pools.values() if another_model(found, served) is None]
        named = [served for served in able if same_name(found, served)]
        chosen = named or able
        return chosen[0] if len(chosen) == 1 else None
