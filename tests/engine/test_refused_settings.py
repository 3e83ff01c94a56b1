"""Every flag of vLLM is decided on: refused by name, set by ARES, or passed on for a reason."""

import re
from pathlib import Path
from typing import Any

import pytest

from ares.engine import launcher, refused_settings
from ares.engine.front_end_flags import FLAGS
from ares.engine.refused_settings import REFUSED, RefusedSettingError

# The reasons for which flags of the engine are passed on to it.
PASSED_ON: dict[str, tuple[str, ...]] = {
    "the model, its files and how they are loaded; gateways compare them (gateway/pool/compatibility.py)": (
        *("allow-deprecated-quantization", "config-format", "download-dir", "dtype", "hf-config-path", "hf-overrides"),
        *("hf-token", "ignore-patterns", "language-model-only", "load-format", "max-parallel-loading-workers"),
        *("model-class-overrides", "model-impl", "model-loader-extra-config", "pt-load-map-location", "quantization"),
        *("quantization-config", "safetensors-load-strategy", "safetensors-prefetch-block-size"),
        *("safetensors-prefetch-num-threads", "trust-remote-code", "use-tqdm-on-load"),
    ),
    "where weights lie; KV and tokens stay the same": (
        *("cpu-offload-gb", "cpu-offload-params", "enable-cumem-allocator", "engram-config", "offload-backend"),
        *("offload-group-size", "offload-num-in-group", "offload-params", "offload-prefetch-step"),
    ),
    "kernels, compilation and graphs: they round, moved or not": (
        *("additional-config", "attention-backend", "attention-config", "compilation-config", "kernel-config"),
        *("cudagraph-capture-sizes", "disable-cascade-attn", "enable-flashinfer-autotune", "enforce-eager"),
        *("gdn-prefill-backend", "ir-op-priority", "kda-decode-backend", "kda-prefill-backend", "linear-backend"),
        *("mamba-backend", "mamba-ssu-algorithm", "max-cudagraph-capture-size", "moe-backend", "optimization-level"),
        *("monokernel", "performance-mode", "sparse-indexer-topk-backend", "use-fp64-gumbel"),
    ),
    "the KV cache: its size is reported and forecast, its layout is compared by NIXL's handshake and by the gateway": (
        *("block-size", "disable-hybrid-kv-cache-manager", "disable-sliding-window", "gpu-memory-utilization"),
        *("device-memory-utilization",),
        *("kv-cache-dtype", "kv-cache-dtype-skip-layers", "kv-cache-memory-bytes", "num-gpu-blocks-override"),
    ),
    "the prefix cache; what it holds is never taken for granted": (
        *("enable-mamba-shared-prefix-checkpoint", "enable-prefix-caching", "prefix-cache-retention-interval"),
        *("prefix-caching-hash-algo", "prefix-match-unit", "swa-bounded-replay"),
    ),
    "the state of Mamba layers, which NIXL transfers as it is; rounding at random differs, moved or not": (
        *("enable-mamba-cache-stochastic-rounding", "mamba-block-size", "mamba-cache-dtype", "mamba-cache-mode"),
        *("mamba-cache-philox-rounds", "mamba-ssm-cache-dtype"),
    ),
    "layers that share KV have none of their own, so that skipping them in a prefill leaves nothing out": (
        "kv-sharing-fast-prefill",
    ),
    "how requests are batched; telemetry counts what there is": (
        *("async-scheduling", "enable-chunked-prefill", "long-prefill-token-threshold"),
        *("long-prefill-token-threshold-adaptive", "max-model-len", "max-num-active-seqs", "max-num-batched-tokens"),
        *("max-num-scheduled-tokens", "max-num-seqs", "scheduler-reserve-full-isl", "stream-interval", "watermark"),
    ),
    "ranks of one host, on which moves are tested (tensor parallelism), and experts on them": (
        *("all2all-backend", "device-ids", "disable-custom-all-reduce", "enable-batch-sharded-sampling"),
        *("enable-ep-weight-filter", "enable-eplb", "enable-expert-parallel", "enable-hc-sp", "eplb-config"),
        *("expert-placement-strategy", "tensor-parallel-size"),
    ),
    "processes, threads and their limits": (
        *("cpu-distributed-timeout-seconds", "distributed-timeout-seconds", "enable-shm-tensor-arena", "numa-bind"),
        *("fail-on-environ-validation", "numa-bind-cpus", "numa-bind-nodes", "renderer-num-workers"),
        *("worker-extension-cls",),
    ),
    "LoRA adapters: instances say which they have": (
        *("enable-lora", "enable-mixed-moe-lora-format", "enable-moe-shared-loras", "fully-sharded-loras"),
        *("lora-dtype", "lora-target-modules", "max-cpu-loras", "max-lora-rank", "max-loras", "specialize-active-lora"),
    ),
    "drafts: what is not exact with them is not moved": (
        *("spec-method", "spec-model", "spec-tokens", "speculative-config"),
    ),
    "grammars and reasoning: carried, or such requests are not moved": (
        *("reasoning-config", "structured-outputs-config"),
    ),
    "draws without a seed of the request, which no two runs have in common": ("seed",),
    "an encoder of images is loaded and profiled with the model, although no request uses it": (
        *("limit-mm-per-prompt", "mm-device-do-normalize", "mm-encoder-attn-backend", "mm-encoder-attn-dtype"),
        *("mm-encoder-fp8-scale-path", "mm-encoder-fp8-scale-save-margin", "mm-encoder-fp8-scale-save-path"),
        *("mm-encoder-tp-mode", "mm-ipc-gpu-memory-gb", "mm-processor-cache-gb", "mm-processor-cache-type"),
        *("mm-processor-device", "mm-processor-kwargs", "mm-shm-cache-max-object-size-mb", "skip-mm-profiling"),
    ),
    "what an instance logs, traces and counts": (
        *("collect-detailed-traces", "cudagraph-metrics", "custom-histogram-buckets", "disable-log-stats"),
        *("enable-layerwise-nvtx-tracing", "enable-logging-iteration-details", "enable-mfu-metrics"),
        *("jit-monitor-mode", "jit-monitor-verbose", "kv-cache-metrics", "kv-cache-metrics-sample", "log-config-file"),
        *("log-level", "logging-config", "watchdog-config"),
        *("kv-events-config", "otlp-traces-endpoint", "profiler-config", "show-hidden-metrics-for-version"),
    ),
}
ELSEWHERE = {
    "parallel.py": ("data-parallel-size", "nnodes", "pipeline-parallel-size"),
    # Unless they are given; --worker-cls goes without a predictor then.
    "launcher.py sets it": ("scheduling-policy", "worker-cls"),
    # A word without a flag; refused by `refused_settings.check_parsed`.
    "no flag": ("model-tag",),
}
# Of 0.33; 0.32 does not have them.
NEWER = {"monokernel", "sleep-mode-backend", "watchdog-config"}
VALUES: dict[str, list[str]] = {
    "fault-tolerance-config": ['{"engine_recovery_timeout_sec": 5}'],
    "aux-output-config": ['{"max_bytes": 5}'],
    "convert": ["embed"],
    "data-parallel-backend": ["ray"],
    "dcp-comm-backend": ["a2a"],
    "default-mm-loras": ['{"image": "/a"}'],
    "diffusion-config": ["{}"],
    "distributed-executor-backend": ["ray"],
    "ec-manager-config": ['{"encoder_cache_manager_cls": "a.B"}'],
    "ec-transfer-config": ['{"ec_connector": "ECExampleConnector", "ec_role": "ec_both"}'],
    "kv-offloading-backend": ["lmcache"],
    "kv-transfer-config": ['{"kv_connector": "NixlConnector", "kv_role": "kv_both"}'],
    "media-io-kwargs": ['{"image": {"a": 1}}'],
    "mm-hasher-algorithm": ["sha256"],
    "mm-tensor-ipc": ["torch_shm"],
    "per-request-spec-decode-metrics": ["summary"],
    "pooler-config": ['{"pooling_type": "MEAN"}'],
    "runner": ["pooling"],
    "video-pruning-method": ["vidcom2"],
    "video-pruning-rate": ["0.5"],
    "watermark-config": ['{"algorithm": "gumbel"}'],
    "weight-transfer-config": ['{"backend": "nccl"}'],
}


@pytest.fixture(scope="module")
def parser() -> Any:
    pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
    from ares.engine import vllm_api as vllm

    return vllm.make_arg_parser(vllm.FlexibleArgumentParser())


@pytest.fixture(scope="module")
def defaults(parser: Any) -> Any:
    return parser.parse_args([])


def decided() -> list[str]:
    """Return the names of all flags that are decided on."""
    return [*FLAGS, *REFUSED, *(name for names in (*PASSED_ON.values(), *ELSEWHERE.values()) for name in names)]


def test_every_flag_of_vllm_is_decided_on(parser: Any, defaults: Any) -> None:
    """Where it fails for a new vLLM: read what the flag does, and refuse it, or pass it on with a reason."""
    every = {name.replace("_", "-") for name in vars(defaults)} | {"device-memory-utilization"}
    # Some have no default, and some names are of one flag.
    every |= {name.removeprefix("no-") for name in re.findall(r"--([a-z0-9][a-z0-9-]*)", parser.format_usage())}
    known = decided()
    assert sorted(every - set(known)) == [], "not decided on"
    assert sorted(set(known) - every - NEWER) == [], "not a flag of vLLM any more"
    assert len(known) == len(set(known)), "decided on twice"


@pytest.fixture(scope="module")
def switches(parser: Any, defaults: Any) -> set[str]:
    """Flags without a value; of some, vLLM's default is None."""
    both = set(re.findall(r"--([a-z0-9-]+) \| --no-", parser.format_help()))
    return both | {name.replace("_", "-") for name, value in vars(defaults).items() if isinstance(value, bool)}


def _given(name: str, switches: set[str]) -> list[str]:
    """Return a flag with a value that is not its default."""
    if name in switches:
        return [f"--{name}"]
    return [f"--{name}", *VALUES.get(name, ["7"])]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_it_is_refused_by_name_with_what_to_do(name: str, parser: Any, defaults: Any, switches: set[str]) -> None:
    if name in NEWER and not hasattr(defaults, name.replace("-", "_")):
        pytest.skip("a flag of a newer vLLM")
    words = _given(name, switches)
    with pytest.raises(RefusedSettingError) as parsed:
        refused_settings.check_parsed(parser.parse_args(words), defaults)
    said = str(parsed.value)
    assert said.startswith(f"--{name}: ")
    assert any(advice in said for advice in ("leave", "start one", "without ARES", "use --tensor", "give "))
    if REFUSED[name].with_key is None:
        for word in (f"--{name}", f"--{name.replace('-', '_')}"):
            with pytest.raises(RefusedSettingError, match=f"--{name}: "):
                refused_settings.check(["--seed", "1", word, *words[1:]])


def test_values_that_work_are_passed_on(parser: Any, defaults: Any) -> None:
    words = ["--runner", "generate", "--convert=none", "-dcp", "1", "--distributed-executor-backend", "mp"]
    words += ["--no-enable-sleep-mode", "--no-enable-dbo", "--seed", "3", "--enable-lora", "-tp", "2"]
    words += ["--watermark-config", '{"algorithm": "gumbel", "deduplicate_contexts": "none"}']
    refused_settings.check(words)
    refused_settings.check_parsed(parser.parse_args(words), defaults)
    refused_settings.check_parsed(defaults, defaults)


def test_all_of_their_spellings_are_refused(parser: Any, defaults: Any) -> None:
    for words in (["-dcp", "2"], ["--kv_transfer_config.kv_role=kv_both"], ["--kv-offloading-size=4"]):
        with pytest.raises(RefusedSettingError):
            refused_settings.check(words)
    for words in (["--kv-offloading-s", "4"], ["--logits-processor", "a.B"]):
        with pytest.raises(RefusedSettingError, match=words[0]):
            refused_settings.check_parsed(parser.parse_args(words), defaults)


def test_a_word_without_a_flag_is_not_dropped(parser: Any, defaults: Any) -> None:
    """vLLM would take it for the model; here the model is given, and vLLM's server ignores the word."""
    with pytest.raises(RefusedSettingError, match="'other/model' belongs to no flag: give the model as --model"):
        refused_settings.check_parsed(parser.parse_args(["other/model", "--seed", "1"]), defaults)


def test_a_worker_refuses_them_before_its_model_is_resolved(tmp_path: Path) -> None:
    flags = ("--kv-offloading-size", "4")
    settings = launcher.WorkerSettings("no/model", "decode", "d", "127.0.0.1", 0, vllm_flags=flags)
    with pytest.raises(RefusedSettingError, match="--kv-offloading-size: KV offloading cannot be combined with moves"):
        launcher.serve(settings)
