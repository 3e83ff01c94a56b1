"""The models of a gateway: which one a request is for, and what operators see of all of them."""

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ares.config import GatewayConfig
from ares.gateway.openai.body import BadRequestError
from ares.gateway.openai.parsing import Parsers
from ares.gateway.pool.instance import Instance
from ares.gateway.processes.shared_counts import SharedCounts
from ares.gateway.service import Gateway, unknown_model
from ares.gateway.session.session import Session
from ares.gateway.tuning import DEFAULT, Tuning


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the gateway of a model is made from: its settings, its folder, its parsers if it has any."""

    config: GatewayConfig
    folder: Path
    parsers: Parsers | None = None


class Models:
    """The gateways of all models, from `start` to `stop`.

    Parameters
    ----------
    served
        One or several models; the first one is asked for what is not of one model.
    tuning
        Times and limits that are no settings.
    counts
        Those that the processes of the gateway share; None: it is the only one.

    Attributes
    ----------
    first
        The gateway of the first model, which finds the instances of all.
    """

    def __init__(
        self, served: Sequence[ServedModel], tuning: Tuning = DEFAULT, counts: SharedCounts | None = None
    ) -> None:
        first, *others = served
        self.first = Gateway(first.config, first.folder, tuning, first.parsers, counts)
        self._gateways = [self.first] + [
            Gateway(one.config, one.folder, tuning, one.parsers, first=self.first) for one in others
        ]

    def __iter__(self) -> Iterator[Gateway]:
        return iter(self._gateways)

    @property
    def several(self) -> bool:
        """Whether there is more than one model."""
        return len(self._gateways) > 1

    async def start(self) -> None:
        """Start all of them."""
        for gateway in self._gateways:
            await gateway.start()

    async def stop(self) -> None:
        """Stop all of them; what they share, last."""
        for gateway in reversed(self._gateways):
            await gateway.stop()

    # --- of requests ---

    def of(self, name: str | None) -> Gateway:
        """Return the gateway of the model, or of the LoRA adapter, that a request names.

        A name of a model comes before one of an adapter, and a model before the ones after it. Where there is one model
        alone, what a request names is checked by `Gateway.adapter`.

        Raises
        ------
        BadRequestError
            Nothing is served under the name; or there is none, and there are several models.
        """
        if not self.several:
            return self.first
        if not name:
            raise BadRequestError(f"model: say which one; served are {', '.join(self.names)}", "model")
        by_name = (gateway for gateway in self._gateways if name in gateway.names)
        by_adapter = (gateway for gateway in self._gateways if name in gateway.pool.adapters)
        found = next(by_name, None) or next(by_adapter, None)
        if found is None:
            raise unknown_model(name)
        return found

    @property
    def names(self) -> list[str]:
        """The name of each model, by which replies call it."""
        return [gateway.names[0] for gateway in self._gateways]

    # --- of all models ---

    @property
    def sessions(self) -> Mapping[str, Session]:
        """The running sessions, by their ids."""
        return ChainMap(*(gateway.sessions for gateway in self._gateways))

    def of_session(self, session: Session) -> Gateway:
        """Return the gateway that runs a session."""
        return next(gateway for gateway in self._gateways if gateway.sessions.get(session.id) is session)

    @property
    def instances(self) -> list[Instance]:
        """All instances."""
        return self.first.pools.instances()

    def of_instance(self, instance: Instance) -> Gateway:
        """Return the gateway in whose pool an instance is."""
        return next((gateway for gateway in self._gateways if gateway.pool.watches(instance)), self.first)

    def at(self, url: str) -> Instance | None:
        """Return what is watched at a URL, however that is spelled; one that stays comes before one that leaves."""
        found = [instance for pool in self.first.pools if (instance := pool.at(url)) is not None]
        return min(found, key=lambda instance: instance.leaving, default=None)

    @property
    def retry_after_s(self) -> int:
        """Whole seconds after which a refused client may try again, whichever model it wants."""
        return max(gateway.retry_after_s for gateway in self._gateways)
