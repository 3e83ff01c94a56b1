"""The messages between gateways and instances, each typed and checked on arrival; no message carries code.

The gateway subscribes and sends commands. The instance answers the first `Subscribe` with its `Hello`, then sends
`Telemetry` at the interval that was asked for, `KvReceived` for each request whose KV it pulled, `Predicted` for each
request that it only prefilled, `StepTokens` after each step with new tokens of requests that ask for them
(`fields.STEP_TOKENS`), and one `CutResult`, `CopyResult`, `LeaseResult` or `RoleResult` for each `Cut`, `Copy`, `Lease`
or `ChangeRole`.
To a gateway that has sent `FollowKvEvents` it also sends `KvEvents`: what enters and leaves its prefix cache.
A learner (docs/learning.md) subscribes as a gateway does. It takes recorded states with `TakeRecorded`, answered by
`Recorded`, and sends a new checkpoint of the predictor in one `CheckpointPart` after the other, each answered by
`CheckpointReceived`.
How messages travel is in `protocol/rpc.py`. The commands can move to vLLM's generic connector call (RFC #51639) when it
lands.

Several gateways may subscribe to one instance. All keys of a gateway begin with its name and a slash (`owner`), so that
an instance knows which requests and which pinned KV belong to a gateway that has disconnected.

Some tags are earlier names of their messages (`admitted`, `handover`). They stay, so that gateways and instances of
different versions understand each other.
"""

from typing import Annotated, Any, Literal, get_args

import msgspec

from ares.protocol.fields import CutOutcome, RequestState

Role = Literal["prefill", "decode", "both"]
ROLES: tuple[Role, ...] = get_args(Role)

# The levels of the quantiles in `Row.remaining`.
REMAINING_LEVELS = (0.1, 0.5, 0.9)

# Sums and products of these over everything that fits a message stay exact in 64 bits. No time or rate may be
# infinite or NaN.
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
_Tokens = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_Size = Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=1e18)]
# Output tokens that a `CutResult` repeats: more than can be in flight between the engine and the gateway in one step.
CUT_TAIL_TOKENS = 64
# A gateway remembers a thousand keys, and each report of an instance has all of its requests.
LONGEST_KEY = 1024
_ShortKey = Annotated[str, msgspec.Meta(max_length=LONGEST_KEY)]
# The SHA-256 of a checkpoint's file, in hexadecimal; empty: no predictor.
_Version = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?$")]
LARGEST_PART_BYTES = 1 << 20
LARGEST_CHECKPOINT_BYTES = 64 << 20
# Tokens of one request in a step; with drafts there are several.
LARGEST_STEP_TOKENS = 1024
_Forecast = Annotated[str, msgspec.Meta(max_length=4096)]
_Part = Annotated[bytes, msgspec.Meta(max_length=LARGEST_PART_BYTES)]
_CheckpointSize = Annotated[int, msgspec.Meta(ge=0, le=LARGEST_CHECKPOINT_BYTES)]


class Description(msgspec.Struct, frozen=True, omit_defaults=True):
    """An instance's reply to `GET /ares/v1/instance`, which a gateway reads before it subscribes.

    `boot` differs after every restart. `models` are the names that it serves its model under, a folder by its absolute
    path; `shape` holds numbers of the model's configuration (`ares.models.resolve.shape`); `adapters` are the names of
    its LoRA adapters. An instance of an earlier version sends none of the three.
    """

    name: str
    role: Role
    boot: str
    control_address: str
    models: list[str] = []
    shape: dict[str, int] = {}
    adapters: list[str] = []


class Peer(msgspec.Struct, frozen=True):
    """How to reach the NIXL side channel of an instance.

    The names are vLLM's own (`kv_transfer_params`, v1/nixl/pull_scheduler.py, 0.32).
    """

    engine_id: str
    host: str
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    tp_size: _Size = 1
    dcp_size: _Size = 1
    pp_size: _Size = 1


class Subscribe(msgspec.Struct, frozen=True, tag="subscribe"):
    """Ask for a `Hello` (the first time) and for `Telemetry` every `interval_s` seconds; repeated to stay subscribed.

    `gateway` is the name that the sender's keys begin with; empty for a sender without one.
    """

    interval_s: float
    gateway: str = ""


class Connect(msgspec.Struct, frozen=True, tag="connect"):
    """Do the NIXL handshake with these peers now, so that the first pull does not wait for it."""

    peers: list[Peer]


class Cut(msgspec.Struct, frozen=True, tag="cut"):
    """End request `key` after the tokens emitted and in flight, keep its KV pinned, and answer with a `CutResult`."""

    call: _Count
    key: str


class Copy(msgspec.Struct, frozen=True, tag="copy"):
    """Pin the full KV blocks of running request `key`, at most `most` tokens, and answer with a `CopyResult`.

    The pin is released like that of a request called `pin`; request `key` continues.
    """

    call: _Count
    key: str
    pin: str
    most: _Tokens


class Release(msgspec.Struct, frozen=True, tag="release"):
    """Free the KV of request `key` if it is pinned, and do not pin it later: no instance will pull it."""

    key: str


class Expect(msgspec.Struct, frozen=True, tag="expect"):
    """Request `key` is about to come, within `within_s`: let it into the next step, where waiting delays no step."""

    key: _ShortKey
    within_s: _Amount


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Report to every gateway that the instance takes no new work, or takes work again.

    After `deadline_s` each gateway ends its streams that are left there, and resumes them elsewhere; None: never.
    """

    draining: bool
    deadline_s: _Amount | None = None


class ChangeRole(msgspec.Struct, frozen=True, tag="change_role"):
    """Become an instance of this role once the work that it excludes has ended here; answer with a `RoleResult`.

    Where some is left after `deadline_s`, the instance keeps its role. Its own role ends a change that is under way.
    """

    call: _Count
    role: Role
    deadline_s: _Amount


class Lease(msgspec.Struct, frozen=True, tag="lease"):
    """Let only gateway `holder` decide migrations for `ttl_s` seconds, 0 to end that; answer with a `LeaseResult`."""

    call: _Count
    holder: str
    ttl_s: float


class TakeRecorded(msgspec.Struct, frozen=True, tag="take_recorded"):
    """Answer with a `Recorded`: the oldest shard of recorded states that is not in `stored`.

    `stored` are names of shards that `learner` has stored: the instance deletes them. While an instance belongs to one
    learner, since that one asks it or sends to it, it refuses others.
    """

    call: _Count
    learner: _ShortKey
    stored: Annotated[list[_ShortKey], msgspec.Meta(max_length=64)] = []


class CheckpointPart(msgspec.Struct, frozen=True, tag="checkpoint_part"):
    """A part of a new checkpoint of the predictor, from byte `offset` on; answer with a `CheckpointReceived`.

    When all `size` bytes are there, the workers check and load the checkpoint and then predict with it, which
    `Telemetry.predictor` reports. A `version` that is empty ends predictions. Other learners than the one to which the
    instance belongs are refused.
    """

    call: _Count
    learner: _ShortKey
    version: _Version
    offset: _CheckpointSize = 0
    size: _CheckpointSize = 0
    data: _Part = b""


class FollowKvEvents(msgspec.Struct, frozen=True, tag="follow_kv_events"):
    """Send the batches of KV events that are kept, from number `since` on, and from then on each new one.

    With `paced` no more than one message of them: the gateway asks again for those after it (`KvEvents.end`), and gets
    new ones once it has all.
    """

    since: _Count = 0
    paced: bool = False


Command = (
    Subscribe
    | Connect
    | Cut
    | Copy
    | Release
    | Expect
    | Drain
    | ChangeRole
    | Lease
    | TakeRecorded
    | CheckpointPart
    | FollowKvEvents
)


class KvGroup(msgspec.Struct, frozen=True, array_like=True):
    """A KV cache group of vLLM: layers with one block table.

    `window` is how many tokens their attention reaches back (0: all), `fixed_blocks` how many blocks a request holds at
    any length (0: as many as its tokens take).
    """

    block_size: Annotated[int, msgspec.Meta(ge=1, lt=1 << 20)]
    window: _Count = 0
    fixed_blocks: _Count = 0


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The identity and the limits of an instance. `boot` differs after every restart.

    `token_bytes` is the KV of one token, `pull_within_step_bytes` the largest pull within a scheduling step,
    `prefix_caching` whether KV that is copied ahead of a request is kept for it; `carries` names the state that a
    request keeps when it resumes here (`fields.CARRIES_OUTPUT` and the like). `leases` is whether it answers a
    `Lease`. `max_num_seqs` and `max_num_batched_tokens` bound a step's batch. `kv_groups` are the KV cache groups
    whose blocks come from the pool of `kv_blocks`; none means a single one that grows with every token.
    `configuration` is what the engine runs with: no request moves between instances that differ in what decides KV
    or tokens. `learns` is whether it answers a `TakeRecorded` and a `CheckpointPart`. `roles` are those that it can
    have: it answers a `ChangeRole` if there are any. `expects` is whether it understands an `Expect`, `step_tokens`
    whether it sends `StepTokens`, and `kv_events` whether it answers a `FollowKvEvents`. Instances of earlier versions
    do not send `leases` and what follows it.
    """

    name: str
    role: Role
    boot: str
    peer: Peer
    block_size: Annotated[int, msgspec.Meta(ge=1, lt=1 << 20)]
    kv_blocks: _Size
    max_model_len: _Size
    versions: dict[str, str]
    token_bytes: _Amount = 0.0
    pull_within_step_bytes: _Count = 0
    prefix_caching: bool = False
    carries: list[str] = []
    leases: bool = False
    max_num_seqs: _Count = 0
    max_num_batched_tokens: _Count = 0
    kv_groups: list[KvGroup] = []
    configuration: dict[str, str] = {}
    learns: bool = False
    kv_events: bool = False
    roles: list[Role] = []
    expects: bool = False
    step_tokens: bool = False


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One request on an instance: `resident` of its tokens have KV there, `output` of them were generated there.

    `remaining` are quantiles of the tokens still to come, at REMAINING_LEVELS; None without a prediction.
    """

    key: str
    resident: _Tokens
    output: _Tokens
    state: RequestState
    remaining: tuple[float, float, float] | None = None


class Telemetry(msgspec.Struct, frozen=True, tag="telemetry", rename={"resources": "held"}):
    """The load of an instance.

    `running` and `waiting` are requests; `pinned` are requests that have ended here, and copies, whose KV waits to be
    pulled.
    `step_time_s` is a moving average over recent steps, `pull_bytes_per_s` over recent pulls of KV, 0 before the first;
    `busy_s` is the time of all steps so far, and `prompt_tokens` how many tokens of prompts they have computed.
    `draining`: the instance takes no new requests, and those that can migrate are to leave; after `drain_left_s` the
    others are to leave too. `resources` counts the connector's objects apart from KV blocks, to find leaks. `predictor`
    is the version of the checkpoint that predicts; `predictor_refused` the newest version that the workers refused, and
    why, as one sentence. `prefilling` is how many of its requests are only prefilled here. `role` is its role now, None
    from an instance of an earlier version, and `next_role` the one that it is about to have, in at most `role_left_s`.
    """

    sequence: _Count
    kv_blocks_used: _Tokens
    running: _Tokens
    waiting: _Tokens
    pinned: _Tokens
    step_time_s: _Amount
    steps: _Count
    preemptions: _Count
    rows: list[Row]
    busy_s: _Amount = 0.0
    pull_bytes_per_s: _Amount = 0.0
    draining: bool = False
    resources: dict[str, int] = {}
    drain_left_s: _Amount | None = None
    predictor: _Version = ""
    predictor_refused: tuple[_Version, str] = ("", "")
    prefilling: _Tokens = 0
    role: Role | None = None
    next_role: Role | None = None
    role_left_s: _Amount = 0.0
    prompt_tokens: _Count = 0

    @property
    def left(self) -> int:
        """Requests that are still on the instance, and pins that are not pulled yet."""
        return self.running + self.waiting + self.pinned


class KvReceived(msgspec.Struct, frozen=True, tag="admitted"):
    """Request `key` has its KV: that of `pulled` tokens came from the source (0 where the pull failed).

    `queued_s` is the time that it waited for a scheduling step with room for it.
    """

    key: _ShortKey
    pulled: _Tokens
    failed: bool
    queued_s: _Amount = 0.0


class Predicted(msgspec.Struct, frozen=True, tag="predicted"):
    """The prediction for request `key`, which is only prefilled here: remaining tokens at REMAINING_LEVELS.

    Sent before the prefill's reply. The request's own limit is not applied yet: a prefill does not know it.
    `forecast`, with what else its predictor knows of the request, is for the instances that it goes to
    (`fields.FIRST_FORECAST`), and means nothing to a gateway.
    """

    key: _ShortKey
    remaining: tuple[float, float, float]
    forecast: _Forecast = ""


class NewTokens(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New tokens of request `key`: the instance had generated `position` of its tokens before them."""

    key: str
    position: _Tokens
    token_ids: Annotated[list[_Tokens], msgspec.Meta(max_length=LARGEST_STEP_TOKENS)]


class StepTokens(msgspec.Struct, frozen=True, tag="step_tokens"):
    """What a step has generated for requests of the gateway that this is sent to.

    The replies of these requests have the same tokens, in larger chunks and at the latest with their ends: a message
    that is lost delays tokens.
    """

    rows: list[NewTokens]


class CutResult(msgspec.Struct, frozen=True, tag="handover", rename={"kv_transfer_params": "transfer"}):
    """The answer to a `Cut`.

    Attributes
    ----------
    outcome
        How the cut ended.
    output_tokens
        How many tokens the request generated on this instance.
    tail
        The last of those tokens, so that the target can start before the stream has delivered them.
    kv_transfer_params
        vLLM's, for the target, where the outcome is `PINNED`.
    """

    call: _Count
    key: str
    outcome: CutOutcome
    output_tokens: _Tokens = 0
    tail: list[_Tokens] = []
    kv_transfer_params: dict[str, Any] = {}


class CopyResult(msgspec.Struct, frozen=True, tag="copied", rename={"kv_transfer_params": "transfer"}):
    """The answer to a `Copy`: how many `tokens` are pinned as `pin`, and vLLM's kv_transfer_params for them."""

    call: _Count
    pin: str
    tokens: _Tokens = 0
    kv_transfer_params: dict[str, Any] = {}


class LeaseResult(msgspec.Struct, frozen=True, tag="leased"):
    """The answer to a `Lease`: whether it is granted, and the lease's holder now, empty for none."""

    call: _Count
    holder: str
    granted: bool


class RoleResult(msgspec.Struct, frozen=True, tag="role"):
    """The answer to a `ChangeRole`: the role now, and the next one; `refused` is why it was not taken."""

    call: _Count
    role: Role
    next_role: Role | None = None
    refused: str = ""


class Recorded(msgspec.Struct, frozen=True, tag="recorded"):
    """The answer to a `TakeRecorded`: a shard (`predictor/shards.py`), and how many others there are.

    `name` is empty where there is none. `refused` is why this learner gets none; earlier versions do not send it.
    """

    call: _Count
    name: _ShortKey = ""
    data: bytes = b""
    left: _Count = 0
    refused: str = ""


class CheckpointReceived(msgspec.Struct, frozen=True, tag="checkpoint_received"):
    """The answer to a `CheckpointPart`: how many bytes of the checkpoint are there; `refused` is why none are kept."""

    call: _Count
    received: _CheckpointSize = 0
    refused: str = ""


class KvEvents(msgspec.Struct, frozen=True, tag="kv_events"):
    """Batches of KV events, in vLLM's encoding (`protocol/kv_events.py`), numbered from `sequence` on.

    An empty batch stands for events that are lost. `kept_from` is the number of the oldest batch that is kept.
    The answer to a paced `FollowKvEvents` has `end`, the number of the next batch to come.
    """

    sequence: _Count
    kept_from: _Count
    batches: list[bytes]
    end: _Count | None = None


Event = (
    Hello
    | Telemetry
    | KvReceived
    | Predicted
    | StepTokens
    | CutResult
    | CopyResult
    | LeaseResult
    | RoleResult
    | Recorded
    | CheckpointReceived
    | KvEvents
)


def owner(key: str) -> str:
    """Return the name of the gateway that made a request's or a pin's key."""
    return key.partition("/")[0]
