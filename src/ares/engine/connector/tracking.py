"""What the connector's scheduler side remembers from step to step."""

import time
from dataclasses import dataclass, field
from typing import Any

from ares.engine.prediction.mailbox import Prediction
from ares.engine.vllm_api import NixlConnectorMetadata
from ares.protocol import fields, messages


@dataclass(slots=True)
class Cut:
    """Who asked for a cut, and in which call."""

    sender: bytes
    call: int


@dataclass(slots=True)
class Tracked:
    """A request between `on_new_request` and its end. `key` is None for requests that did not come from a gateway."""

    request: Any
    key: str | None
    arrived: float = field(default_factory=time.perf_counter)
    queued_s: float = 0.0
    local: int = 0
    pulled: int = 0
    admitted: bool = False
    cut: Cut | None = None
    # Nobody wants its KV any more: do not pin it when it ends.
    unwanted: bool = False
    # Its limit was lowered since its gateway is gone.
    abandoned: bool = False
    prediction: Prediction | None = None
    # Tokens of its output that other instances generated (engine/connector/resume_output.py); None until it was looked
    # at.
    restored: int | None = None

    @property
    def output(self) -> int:
        """Tokens generated on this instance."""
        return int(self.request.num_output_tokens) - (self.restored or 0)

    @property
    def ahead(self) -> bool:
        """Whether it only brings KV here."""
        return bool((self.request.kv_transfer_params or {}).get(fields.PRECOPY))

    def remaining(self) -> tuple[float, float, float] | None:
        """Return what is predicted for now."""
        if self.prediction is None or self.ahead:
            return None
        return self.prediction.after(self.output, self.request.max_tokens - self.request.num_output_tokens)


@dataclass(slots=True)
class Load:
    """Counters that the engine thread keeps for the telemetry."""

    step_time_s: float = 0.0
    busy_s: float = 0.0
    steps: int = 0
    preemptions: int = 0
    last_schedule: float | None = None


class ConnectorMetadata(NixlConnectorMetadata):  # type: ignore[misc]
    """vLLM's metadata for one step with our orders to the workers.

    Attributes
    ----------
    release
        vLLM's ids of finished requests whose pinned blocks nobody will pull.
    orphaned
        Those whose gateway is gone: nobody but a target that pulls already wants their blocks.
    connect
        Peers to shake hands with.
    pull_now
        vLLM's ids of requests whose KV must be here before this step's forward pass.
    """

    release: frozenset[str] = frozenset()
    orphaned: frozenset[str] = frozenset()
    connect: tuple[messages.Peer, ...] = ()
    pull_now: frozenset[str] = frozenset()


@dataclass(slots=True)
class Orders:
    """What the next step's metadata tells the workers."""

    release: set[str] = field(default_factory=set)
    orphaned: set[str] = field(default_factory=set)
    connect: list[messages.Peer] = field(default_factory=list)
    pull_now: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.release or self.orphaned or self.connect or self.pull_now)

    def added_to(self, meta: NixlConnectorMetadata) -> ConnectorMetadata:
        """Return vLLM's metadata with these orders in it."""
        full = ConnectorMetadata()
        full.__dict__.update(meta.__dict__)
        full.release = frozenset(self.release)
        full.orphaned = frozenset(self.orphaned)
        full.connect = tuple(self.connect)
        full.pull_now = frozenset(self.pull_now)
        return full
