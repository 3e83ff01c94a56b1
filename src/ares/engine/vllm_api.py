"""Every vLLM name below the public surface that ARES touches, read from vLLM 0.32.0 and 0.33.0.

tests/engine/test_compatibility.py checks each name and each attribute listed here, in the installed vLLM and in the
published one of the other supported release, so that another version fails with a clear message instead of misbehaving.
"""

# ruff: noqa: E402 - a version without some of these names is refused first
from ares.engine import vllm_version

vllm_version.check()

from vllm import LLM, SamplingParams
from vllm.config import AttentionConfig, CacheConfig, LoadConfig, ModelConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole, KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlBaseConnector, NixlPullConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats
from vllm.entrypoints.launchers.api_server.entry import run_server
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.utils import check_sequence_repetition
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CircularBufferSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.structured_output.request import StructuredOutputRequest
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch
from vllm.v1.worker.gpu_model_runner import AsyncGPUModelRunnerOutput, GPUModelRunner

RELEASE = vllm_version.release(vllm_version.installed())
if RELEASE >= (0, 33):
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.common.startup import cli_env_setup
else:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

# The attributes that we override or read, by class; the compatibility test looks each one up.
ATTRIBUTES: dict[type, tuple[str, ...]] = {
    NixlPullConnectorScheduler: (
        "on_new_request",
        "get_num_new_matched_tokens",
        "update_state_after_alloc",
        "build_connector_meta",
        "request_finished",
        "update_connector_output",
        "has_pending_push_work",
        "get_exchange_clipped_blocks",
        "_get_remote_prefill_token_count",
        "_truncate_request_for_prefill",
        "set_xfer_handshake_metadata",
        "shutdown",
    ),
    NixlPullConnectorWorker: (
        "start_load_kv",
        "get_transfer_results",
        "_ensure_handshake",
        "_handle_failed_transfer",
        "_log_failure",
        "_mark_remote_engine_invalid",
        "_read_blocks_for_req",
    ),
    NixlPullConnector: (
        "bind_kv_cache_manager",
        "build_connector_worker_meta",
        "get_transfer_results",
        "start_load_kv",
    ),
    # For the hidden-state hook (engine/prediction/hidden_states.py).
    PlatformWorker: ("load_model", "compile_or_warm_up_model", "execute_model", "sample_tokens", "shutdown"),
    # For where an output ends (engine/prediction/recorder.py).
    SamplingParams: ("eos_token_id", "stop_token_ids", "max_tokens", "extra_args"),
    AsyncOutput: ("get_output",),
    AsyncGPUModelRunnerOutput: ("get_output",),
    Request: ("num_tokens", "num_output_tokens", "is_finished"),
    # For requests that are waited for (engine/connector/late_scheduling.py).
    EngineCoreProc: ("_process_input_queue", "_handle_client_request"),
    # For resuming output (engine/connector/resume_output.py).
    StructuredOutputGrammar: ("accept_tokens",),
    StructuredOutputManager: ("accept_tokens",),
    InputBatch: ("add_request",),
    VllmConfig: ("use_v2_model_runner",),
    # For the forecast of blocks over groups (engine/connector/kv_groups.py).
    UniformTypeKVCacheSpecs: ("first_spec",),
    # For pinned and exported blocks (engine/connector/precopy_pins.py, exported_kv.py).
    KVCacheManager: ("get_blocks", "get_block_ids_for_computed_tokens"),
    SingleTypeKVCacheManager: ("get_num_skipped_tokens",),
    BlockPool: ("touch", "free_blocks", "get_num_free_blocks"),
}
# Attributes that exist only on objects: looked up in the source of the class that sets them.
INSTANCE_ATTRIBUTES: dict[type, tuple[str, ...]] = {
    NixlPullConnectorScheduler: (
        "_reqs_in_batch",
        "_reqs_need_recv",
        "_reqs_not_processed",
        "_has_mamba",
        "side_channel_host",
        "side_channel_port",
        "transfer_tp_size",
        "use_host_buffer",
    ),
    NixlPullConnectorWorker: (
        "_registered_descs",
        "_remote_agents",
        "dst_xfer_side_handles",
        "_handshake_futures",
        "_reqs_to_send",
        "_reqs_to_process",
        "_recving_metadata",
        "_recving_transfers",
        "_recv_failures",
        "_ready_requests",
        "_invalid_remote_engines",
        "nixl_wrapper",
    ),
    EngineCoreProc: ("batch_queue", "input_queue"),
    SchedulerOutput: (
        "finished_req_ids",
        "scheduled_new_reqs",
        "scheduled_cached_reqs",
        "num_scheduled_tokens",
        "scheduled_spec_decode_tokens",
    ),
    NewRequestData: ("req_id", "prompt_token_ids", "sampling_params", "num_computed_tokens"),
    CachedRequestData: ("req_ids", "resumed_req_ids", "num_computed_tokens", "num_output_tokens"),
    ModelRunnerOutput: ("req_ids", "sampled_token_ids"),
    AsyncOutput: ("model_runner_output",),
    AsyncGPUModelRunnerOutput: ("_model_runner_output",),
    PlatformWorker: ("model_runner", "vllm_config", "device", "rank"),
    KVCacheManager: ("block_pool", "coordinator"),
    KVCacheCoordinator: ("single_type_managers",),
    SingleTypeKVCacheManager: ("block_size",),
    BlockPool: ("num_gpu_blocks", "null_block"),
    KVCacheBlock: ("block_id", "is_null"),
    KVConnectorOutput: ("finished_sending", "kv_connector_stats"),
    # For what gateways compare instances by (engine/configuration.py).
    AttentionConfig: ("backend",),
    CacheConfig: ("cache_dtype", "kv_cache_dtype_skip_layers", "mamba_cache_dtype", "mamba_ssm_cache_dtype"),
    LoadConfig: ("load_format",),
    ModelConfig: (
        "disable_sliding_window",
        "dtype",
        "hf_config_path",
        "hf_overrides",
        "model",
        "quantization",
        "quantization_config",
        "use_fp64_gumbel",
    ),
    VllmConfig: ("attention_config", "load_config", "speculative_config", "watermark_config"),
    NixlKVConnectorStats: ("data",),
    StructuredOutputRequest: ("grammar", "reasoning_ended"),
    KVCacheConfig: ("num_blocks", "kv_cache_groups", "kv_cache_tensors"),
    KVCacheGroupSpec: ("kv_cache_spec", "host_resident"),
    SlidingWindowSpec: ("block_size", "sliding_window", "extra_retained_tokens"),
    ChunkedLocalAttentionSpec: ("block_size", "attention_chunk_size"),
    CircularBufferSpec: ("block_size",),
    MambaSpec: ("block_size", "mamba_cache_mode", "num_speculative_blocks", "num_prefill_checkpoint_blocks"),
    InputBatch: ("generators",),
    CachedRequestState: ("generator", "output_token_ids", "sampling_params"),
    GPUModelRunner: ("input_batch", "requests"),
    Request: (
        "_output_token_ids",
        "prompt_token_ids",
        "sampling_params",
        "structured_output_request",
        "max_tokens",
        "stop_reason",
        "kv_transfer_params",
        "num_output_placeholders",
        "num_computed_tokens",
        "num_in_flight_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "output_token_ids",
        "status",
    ),
}

__all__ = [
    "ATTRIBUTES",
    "INSTANCE_ATTRIBUTES",
    "LLM",
    "RELEASE",
    "AsyncOutput",
    "CachedRequestData",
    "ChunkedLocalAttentionSpec",
    "CircularBufferSpec",
    "EngineCoreProc",
    "FlexibleArgumentParser",
    "KVConnectorRole",
    "KVConnectorWorkerMetadata",
    "MambaSpec",
    "ModelRunnerOutput",
    "NewRequestData",
    "NixlBaseConnector",
    "NixlConnectorMetadata",
    "NixlPullConnector",
    "NixlPullConnectorScheduler",
    "NixlPullConnectorWorker",
    "PlatformWorker",
    "Request",
    "RequestStatus",
    "SamplingParams",
    "SchedulerOutput",
    "SlidingWindowSpec",
    "StructuredOutputManager",
    "TopKTopPSampler",
    "UniformTypeKVCacheSpecs",
    "base_worker",
    "check_sequence_repetition",
    "cli_env_setup",
    "current_platform",
    "make_arg_parser",
    "run_server",
    "validate_parsed_serve_args",
]
