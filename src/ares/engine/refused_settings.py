"""Settings of vLLM's engine that instances cannot honour (0.32): each refused by name, with why and what to do instead.

A setting is refused where requests would get other tokens once they are moved, where moves or telemetry would break,
or where it would have no effect. What spreads one engine over ranks and hosts is in parallel.py, flags of the front end
are in front_end_flags.py. Every other flag is passed on, each for a reason: `tests/engine/test_refused_settings.py`
lists them all, so that a flag of a new vLLM has to be decided on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ares.engine.given_flags import GivenFlag, each

_OWN = "ares worker sets --kv-transfer-config itself, and other connectors cannot be combined with moves: leave it out"
_OFFLOADING = (
    "KV offloading cannot be combined with moves: vLLM's OffloadingConnector stores the blocks of a finished request a "
    "step after they were freed, and inside of its MultiConnector it does not learn which of them NIXL has been given "
    "to write to meanwhile, so that it could cache the KV of another request (v1/offloading/scheduler.py, 0.32; 0.33 "
    "has that repaired, but the two have not been run together there); leave --kv-offloading-size out"
)
_CONTEXT = (
    "a block then holds tokens of several ranks, but moves count in blocks of one (vLLM's NIXL connector itself takes "
    "prefill context parallelism for prefill alone); use --tensor-parallel-size instead"
)
_OF_CONTEXT = "it is of context parallelism, with which requests cannot be moved; leave it out"
_RANKS = "it is of one engine with several data parallel ranks; start one `ares worker` for each rank instead"
_HOSTS = "it is of one engine on several hosts; start one `ares worker` on each host instead"
_RAY = (
    "an instance's workers are processes of its own host, which inherit its environment; leave it out (or give mp or "
    "uni), and start one `ares worker` on each host"
)
_MEDIA = "the instances are given text alone, so it would have no effect; leave it out"
_POOLING = (
    "pooling models are not served: the gateway's routes generate text; serve them with `vllm serve`, without ARES"
)
_FIELDS = "requests to the gateway and its replies have no field for it; leave it out"
_ENCODER = "its encoder cache would be filled by another instance, but the gateway sends text alone; leave it out"
_SLEEP = (
    "a sleeping instance has discarded the KV that others are to pull, and NIXL still has its old addresses; leave it "
    "out, and drain and stop an instance that is not needed (ares drain)"
)
_OF_SLEEP = "it is of sleep mode, which discards KV that others are to pull; leave it out"
_QUEUE = (
    "an instance cannot tell a request that resumes from a new one, and would refuse both; leave it out, and bound "
    "what waits at the gateway (maximum_waiting, docs/operations.md)"
)
_WEIGHTS = (
    "weights that change while the engine runs differ between instances, and from the KV that was computed before; "
    "leave it out, and start instances with the new weights"
)
_PROCESSORS = "what they keep of a request is not known, so it is lost in a move; leave it out (logit_bias is moved)"
_SCHEDULER = "cuts and pins of KV rely on the order of steps in vLLM's own scheduler; leave it out"
_REPLAY = (
    "it writes a request's state only every few steps, counted from its prompt's end: a moved one would lose the steps "
    "in between; leave it out"
)
_TOKENIZER = "an instance needs its tokenizer, for bad_words and structured outputs; leave it out"


@dataclass(frozen=True, slots=True)
class Refused:
    """A setting that is refused.

    Attributes
    ----------
    why
        Why, and what to do.
    taken
        Values that work, as text.
    with_key
        Key and value in an object, with which that works.
    """

    why: str
    taken: tuple[str, ...] = ()
    with_key: tuple[str, str] | None = None


def _all(why: str, *names: str, taken: tuple[str, ...] = ()) -> dict[str, Refused]:
    return {name: Refused(why, taken) for name in names}


REFUSED: dict[str, Refused] = {
    "kv-transfer-config": Refused(f"{_OWN} ({_OFFLOADING})"),
    **_all(_OFFLOADING, "kv-offloading-backend", "kv-offloading-size"),
    **_all(_CONTEXT, "decode-context-parallel-size", "prefill-context-parallel-size", taken=("1",)),
    **_all(
        _OF_CONTEXT,
        "cp-kv-cache-interleave-size",
        "dcp-comm-backend",
        "dcp-kv-cache-interleave-size",
        "dcp-q-replicate",
    ),
    **_all(
        _RANKS,
        "aggregate-engine-logging",
        "data-parallel-address",
        "data-parallel-backend",
        "data-parallel-external-lb",
        "data-parallel-hybrid-lb",
        "data-parallel-multi-port-external-lb",
        "data-parallel-rank",
        "data-parallel-rpc-port",
        "data-parallel-size-local",
        "data-parallel-start-rank",
        "dbo-decode-token-threshold",
        "dbo-prefill-token-threshold",
        "disable-nccl-for-dp-synchronization",
        "dp-sync-interval",
        "elastic-ep-max-dp-size",
        "enable-dbo",
        "enable-elastic-ep",
        "enable-fault-tolerance",
        "fault-tolerance-config",
        "prefill-schedule-interval",
        "ubatch-size",
    ),
    **_all(_HOSTS, "master-addr", "master-port", "node-rank"),
    "distributed-executor-backend": Refused(_RAY, ("mp", "uni", "None")),
    "ray-workers-use-nsight": Refused(_RAY),
    **_all(
        _MEDIA,
        "allowed-local-media-path",
        "allowed-media-domains",
        "default-mm-loras",
        "disable-chunked-mm-input",
        "ec-manager-config",
        "enable-mm-embeds",
        "enable-tower-connector-lora",
        "interleave-mm-strings",
        "media-io-kwargs",
        "mm-hasher-algorithm",
        "mm-tensor-ipc",
        "video-pruning-method",
        "video-pruning-rate",
    ),
    "mm-encoder-only": Refused("an instance that has only the encoder generates no text; leave it out"),
    "ec-transfer-config": Refused(_ENCODER),
    "enable-prompt-embeds": Refused("the gateway takes prompts as text and tokens alone; leave it out"),
    "runner": Refused(_POOLING, ("auto", "generate")),
    "convert": Refused(_POOLING, ("auto", "none")),
    **_all(_POOLING, "io-processor-plugin", "max-lora-cls-labels", "pooler-config"),
    "diffusion-config": Refused(
        "diffusion models change tokens that were sent already within a step, so that a request cannot be cut between "
        "two tokens; serve them with `vllm serve`, without ARES"
    ),
    **_all(
        _FIELDS,
        "aux-output-config",
        "enable-return-routed-experts",
        "enable-trace-replay",
        "per-request-spec-decode-metrics",
        "return-sampling-mask",
    ),
    "enable-sleep-mode": Refused(_SLEEP),
    **_all(
        _OF_SLEEP,
        "enable-nccl-comm-suspend",
        "sleep-mode-backend",
        "sleep-mode-offload-cudagraph",
        "sleep-preserve-parameter-names",
    ),
    **_all(_QUEUE, "max-num-queued-reqs", "max-num-queued-tokens"),
    "weight-transfer-config": Refused(_WEIGHTS),
    "logits-processors": Refused(_PROCESSORS),
    "scheduler-cls": Refused(_SCHEDULER),
    **_all(_REPLAY, "replayssm-buffer-len", "use-replayssm"),
    "skip-tokenizer-init": Refused(_TOKENIZER),
    "watermark-config": Refused(
        "which contexts it skips as repeated depends on which tokens are output, and a move does not carry that: give "
        '"deduplicate_contexts": "none" in it, or leave it out',
        with_key=("deduplicate_contexts", "none"),
    ),
}
"""By their long names, with dashes."""


class RefusedSettingError(ValueError):
    """A setting cannot be honoured; the message says why, and what to do."""


def check(flags: Sequence[str]) -> None:
    """Check flags of vLLM, those of its file among them (given_flags.py), before it is imported.

    Raises
    ------
    RefusedSettingError
        One of them is refused.
    """
    for given in each(flags):
        if given.on and (refused := REFUSED.get(given.name)) is not None and refused.with_key is None:
            _check(given, refused)


def check_parsed(args: Any, defaults: Any) -> None:
    """Check what vLLM read from its flags, shortened ones too.

    Parameters
    ----------
    args, defaults
        vLLM's parsed arguments, and those without any flag.

    Raises
    ------
    RefusedSettingError
        One of them is refused, or a word belongs to no flag.
    """
    if (word := getattr(args, "model_tag", None)) is not None:
        raise RefusedSettingError(f"{word!r} belongs to no flag: give the model as --model, and no other words")
    for name, refused in REFUSED.items():
        value = getattr(args, name.replace("-", "_"), None)
        if repr(value) == repr(getattr(defaults, name.replace("-", "_"), None)):
            continue
        if refused.with_key is not None and _holds(value, *refused.with_key):
            continue
        _check(GivenFlag(name, str(value)), refused)


def _check(given: GivenFlag, refused: Refused) -> None:
    if given.value not in refused.taken:
        raise RefusedSettingError(f"--{given.name}: {refused.why}")


def _holds(value: Any, key: str, wanted: str) -> bool:
    return isinstance(value, dict) and value.get(key) == wanted
