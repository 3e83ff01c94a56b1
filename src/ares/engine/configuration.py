"""What an engine runs with, as it reports it to `ares check` (`messages.Hello`): versions and the settings of vLLM."""

import importlib.metadata
import os
from pathlib import Path
from typing import Any

# Network devices with RDMA; the folder of the kernel's RDMA subsystem.
_RDMA = Path("/sys/class/infiniband")


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of packages, without those that are not installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def rdma_devices() -> list[str]:
    """Return the names of this host's RDMA devices, InfiniBand and RoCE."""
    return sorted(device.name for device in _RDMA.iterdir()) if _RDMA.is_dir() else []


def describe(vllm_config: Any, *, predicts: bool) -> dict[str, str]:
    """Return what decides which requests can move, whether tokens stay equal, and what can be checked.

    Parameters
    ----------
    vllm_config
        vLLM's VllmConfig.
    predicts
        Whether the instance runs a predictor.
    """
    speculative = vllm_config.speculative_config
    cache = vllm_config.cache_config
    backends = vllm_config.kv_transfer_config.get_from_extra_config("backends", ["UCX"])
    return {
        "model_runner": "V2" if vllm_config.use_v2_model_runner else "V1",
        "scheduling": "asynchronous" if vllm_config.scheduler_config.async_scheduling else "synchronous",
        "dtype": str(vllm_config.model_config.dtype).removeprefix("torch."),
        "kv_cache_dtype": str(cache.cache_dtype),
        "quantization": str(vllm_config.model_config.quantization or "none"),
        "speculative_decoding": "off" if speculative is None else str(speculative.method),
        "lora": "off" if vllm_config.lora_config is None else "on",
        "batch_invariant": "on" if os.environ.get("VLLM_BATCH_INVARIANT") == "1" else "off",
        "predictor": "on" if predicts else "off",
        "development_mode": "on" if os.environ.get("VLLM_SERVER_DEV_MODE") == "1" else "off",
        "device": str(vllm_config.device_config.device_type),
        "nixl_backends": ",".join(backends),
        "ucx_tls": os.environ.get("UCX_TLS", ""),
        "rdma_devices": ",".join(rdma_devices()),
    }
