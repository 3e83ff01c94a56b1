"""The messages between the gateway and the instances: msgpack over one ZeroMQ socket an instance.

The instance binds a ROUTER, the gateway connects a DEALER. The gateway subscribes, repeats the subscription as a
heartbeat, and sends commands; the instance answers with its `Hello`, then sends `Telemetry` at the asked interval,
`Admitted` for each request whose KV it pulled, `Predicted` for each that it only prefilled, one `Handover` for each
`Cut` and one `Copied` for each `Copy`. Every message is typed and checked by msgspec on arrival; nothing on this wire
carries code. The commands are shaped so that they can move onto vLLM's generic connector call (RFC #51639) when it
lands.
"""

from typing import Annotated, Any, Literal

import msgspec

Role = Literal["prefill", "decode", "both"]
# `copying`: no request of a client, but KV that comes ahead of one (`Copy`).
RequestState = Literal["waiting", "loading", "running", "copying"]

# What is beyond cannot be meant, and is refused on arrival: the arithmetic of decisions never meets it.
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e15)]

# A larger message than this is a mistake or an attack: telemetry of 4,096 requests is below 400 kB.
MAX_MESSAGE_BYTES = 4 << 20
# The levels of the quantiles in `Row.remaining`.
REMAINING_LEVELS = (0.1, 0.5, 0.9)
# An instance forgets a subscriber that has been silent for this long.
SUBSCRIPTION_TTL_S = 10.0


class Peer(msgspec.Struct, frozen=True):
    """How to reach the NIXL side channel of an instance.

    The names are vLLM's own (`kv_transfer_params`, v1/nixl/pull_scheduler.py, 0.32).
    """

    engine_id: str
    host: str
    port: int
    tp_size: int = 1
    dcp_size: int = 1
    pp_size: int = 1


class Subscribe(msgspec.Struct, frozen=True, tag="subscribe"):
    """Send me a `Hello` (the first time) and `Telemetry` every `interval_s` seconds; repeat to stay subscribed."""

    interval_s: float


class Connect(msgspec.Struct, frozen=True, tag="connect"):
    """Do the NIXL handshake with these peers now, so that the first pull does not wait for it."""

    peers: list[Peer]


class Cut(msgspec.Struct, frozen=True, tag="cut"):
    """End request `key` at what is emitted and in flight, keep its KV pinned, and answer with a `Handover`."""

    call: int
    key: str


class Copy(msgspec.Struct, frozen=True, tag="copy"):
    """Pin the full KV blocks of running request `key`, at most `most` tokens, and answer with a `Copied`.

    The pin is released like that of a request called `pin`; request `key` goes on.
    """

    call: int
    key: str
    pin: str
    most: int


class Release(msgspec.Struct, frozen=True, tag="release"):
    """Nobody will pull the KV of request `key`: free it if it is pinned, and do not pin it later."""

    key: str


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Tell every gateway that the instance takes no new work, or that it does again."""

    draining: bool


Command = Subscribe | Connect | Cut | Copy | Release | Drain


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Who the instance is. `boot` differs after every restart.

    `token_bytes` is the KV of one token, `pull_within_step_bytes` the largest pull within a scheduling step,
    `prefix_caching` whether KV that is copied ahead of a request stays here for it; `carries` names state that a
    request does not lose by coming here: ``output`` (which of its tokens are output), ``seed``, ``structured_outputs``.
    """

    name: str
    role: Role
    boot: str
    peer: Peer
    block_size: Positive
    kv_blocks: Positive
    max_model_len: Positive
    versions: dict[str, str]
    token_bytes: Amount = 0.0
    pull_within_step_bytes: Count = 0
    prefix_caching: bool = False
    carries: list[str] = []


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One request on an instance: `resident` tokens hold KV, `output` were generated on this instance.

    `remaining` is how many more are expected, at REMAINING_LEVELS; None where nothing predicts them.
    """

    key: str
    resident: Count
    output: Count
    state: RequestState
    remaining: tuple[float, float, float] | None = None


class Telemetry(msgspec.Struct, frozen=True, tag="telemetry"):
    """The load of an instance.

    `step_time_s` is a moving average over recent steps, `pull_bytes_per_s` over recent pulls of KV, 0 before the first;
    `busy_s` is the time of all steps so far.
    `draining`: nothing new shall come, and what can move shall leave.
    """

    sequence: int
    kv_blocks_used: Count
    running: Count
    waiting: Count
    pinned: Count
    step_time_s: Amount
    steps: Count
    preemptions: Count
    rows: list[Row]
    busy_s: Amount = 0.0
    pull_bytes_per_s: Amount = 0.0
    draining: bool = False

    @property
    def left(self) -> int:
        """Requests that are still here, and KV that others have not pulled yet."""
        return self.running + self.waiting + self.pinned


class Admitted(msgspec.Struct, frozen=True, tag="admitted"):
    """Request `key` has its KV: `pulled` tokens came from the source (0 where the pull failed).

    `queued_s` is the time it waited for a scheduling step with room for it.
    """

    key: str
    pulled: Count
    failed: bool
    queued_s: Amount = 0.0


class Predicted(msgspec.Struct, frozen=True, tag="predicted"):
    """What is expected of request `key`, which was only prefilled here: remaining tokens at REMAINING_LEVELS.

    Sent before the prefill's reply. The request's own limit, which a prefill is not told, is not applied yet.
    """

    key: str
    remaining: tuple[float, float, float]


class Handover(msgspec.Struct, frozen=True, tag="handover"):
    """The answer to a `Cut`.

    Attributes
    ----------
    outcome
        `pinned`: the request ended here and its KV waits to be pulled; `finished`: it ended by itself or was
        aborted first; `not_running`: nothing of it is in flight (waiting, preempted, still loading), nothing was
        changed; `unknown`: no such request, nothing was changed.
    output_tokens
        Tokens the request generated on this instance in all.
    tail
        The last of those tokens, so that the target can start before the stream has delivered them.
    transfer
        vLLM's kv_transfer_params for the target, where the outcome is `pinned`.
    """

    call: int
    key: str
    outcome: Literal["pinned", "finished", "not_running", "unknown"]
    output_tokens: Count = 0
    tail: list[int] = []
    transfer: dict[str, Any] = {}


class Copied(msgspec.Struct, frozen=True, tag="copied"):
    """The answer to a `Copy`: `tokens` whose KV waits under `pin`, 0 where nothing was pinned; how to pull it."""

    call: int
    pin: str
    tokens: Count = 0
    transfer: dict[str, Any] = {}


Event = Hello | Telemetry | Admitted | Predicted | Handover | Copied

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event).decode
