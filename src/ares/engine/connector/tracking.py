"""The state that the connector's scheduler side keeps from step to step."""

import time
from dataclasses import dataclass, field
from typing import Any

from ares.engine.prediction import carried_forecast
from ares.engine.prediction.metadata import Prediction
from ares.engine.vllm_api import NixlConnectorMetadata
from ares.protocol import fields, messages


@dataclass(slots=True)
class PendingCut:
    """A `messages.Cut` that is not answered yet: its sender and its call number."""

    sender: bytes
    call: int


@dataclass(slots=True)
class TrackedRequest:
    """A request between `on_new_request` and its end.

    Attributes
    ----------
    request
        vLLM's Request.
    key
        The gateway's key of it; None for a request that did not come from a gateway.
    arrived
        When it arrived (`time.perf_counter`).
    queued_s
        How long it waited until it was scheduled.
    local_tokens, pulled_tokens
        Tokens whose KV was in this instance's prefix cache, and tokens whose KV is pulled.
    cached_tokens
        Tokens of its prompt that the prefix cache held when it was first scheduled.
    kv_received
        Whether its `messages.KvReceived` has been sent.
    cut
        The cut that it is to answer when it ends.
    release_kv
        Whether its KV is not to be pinned when it ends, since no instance will pull it.
    gateway_expired
        Whether its limit was lowered because its gateway did not connect again.
    prediction
        The newest one.
    resumed_tokens
        Tokens of its output that other instances generated (engine/connector/resume_output.py); None until it is
        scheduled for the first time.
    sent_tokens
        Tokens that its gateway has been sent over the control channel.
    """

    request: Any
    key: str | None
    arrived: float = field(default_factory=time.perf_counter)
    queued_s: float = 0.0
    local_tokens: int = 0
    pulled_tokens: int = 0
    cached_tokens: int | None = None
    kv_received: bool = False
    cut: PendingCut | None = None
    release_kv: bool = False
    gateway_expired: bool = False
    prediction: Prediction | None = None
    resumed_tokens: int | None = None
    sent_tokens: int = 0

    @property
    def output_tokens(self) -> int:
        """How many tokens were generated on this instance."""
        return int(self.request.num_output_tokens) - (self.resumed_tokens or 0)

    def new_tokens(self) -> messages.NewTokens | None:
        """Return the tokens since the last call; None where there are none."""
        output, sent = self.output_tokens, self.sent_tokens
        if self.key is None or output <= sent:
            return None
        self.sent_tokens = output
        return messages.NewTokens(self.key, sent, list(self.request.output_token_ids[sent - output :]))

    @property
    def is_precopy(self) -> bool:
        """Whether it has no client and only copies KV to this instance."""
        return bool((self.request.kv_transfer_params or {}).get(fields.PRECOPY))

    @property
    def is_prefill(self) -> bool:
        """Whether it is only prefilled here, for another instance to decode."""
        params = self.request.kv_transfer_params or {}
        return self.request.max_tokens == 1 and bool(params.get(fields.DO_REMOTE_DECODE))

    def remaining(self) -> tuple[float, float, float] | None:
        """Return the newest prediction, counted down to the tokens generated since; None without one."""
        if self.prediction is None or self.is_precopy:
            return None
        return self.prediction.after(self.output_tokens, self.request.max_tokens - self.request.num_output_tokens)

    def carried(self) -> str:
        """Return what the next instance is to know; before the first prediction here, what came with the request."""
        if self.prediction is not None and self.prediction.carried is not None:
            return carried_forecast.encode(self.prediction.carried, carried_forecast.LONGEST_OF_MOVE)
        came = (self.request.kv_transfer_params or {}).get(fields.FIRST_FORECAST)
        return came if isinstance(came, str) and len(came) <= carried_forecast.LONGEST_OF_MOVE else ""


class ConnectorMetadata(NixlConnectorMetadata):  # type: ignore[misc]
    """vLLM's metadata for one step with our commands to the workers.

    Attributes
    ----------
    release
        vLLM's ids of finished requests whose pinned blocks no instance will pull.
    orphaned
        vLLM's ids of finished requests whose gateway has disconnected: their lease is shortened, and only a target that
        pulls already extends it.
    connect
        Peers to do the NIXL handshake with.
    pull_now
        vLLM's ids of requests whose KV must be here before this step's forward pass.
    """

    release: frozenset[str] = frozenset()
    orphaned: frozenset[str] = frozenset()
    connect: tuple[messages.Peer, ...] = ()
    pull_now: frozenset[str] = frozenset()


@dataclass(slots=True)
class WorkerCommands:
    """Commands that wait for the next step's metadata (`ConnectorMetadata` describes them)."""

    release: set[str] = field(default_factory=set)
    orphaned: set[str] = field(default_factory=set)
    connect: list[messages.Peer] = field(default_factory=list)
    pull_now: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.release or self.orphaned or self.connect or self.pull_now)

    def added_to(self, meta: NixlConnectorMetadata) -> ConnectorMetadata:
        """Return vLLM's metadata with these commands in it."""
        full = ConnectorMetadata()
        full.__dict__.update(meta.__dict__)
        full.release = frozenset(self.release)
        full.orphaned = frozenset(self.orphaned)
        full.connect = tuple(self.connect)
        full.pull_now = frozenset(self.pull_now)
        return full
