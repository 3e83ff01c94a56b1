"""What an engine runs with, as it reports it (`messages.Hello`): versions and the settings of vLLM.

Gateways compare it: no request moves between instances that differ in what decides KV or tokens
(gateway/pool/compatibility.py).
"""

import hashlib
import importlib.metadata
import os
from pathlib import Path
from typing import Any

from ares.models import fingerprint

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


def _quantization(model: Any) -> str:
    method = str(model.quantization or "none")
    return method if model.quantization_config is None else f"{method} {_digest(model.quantization_config)}"


def _digest(settings: Any) -> str:
    """Return what tells settings apart, without showing them: a watermark's key is among them."""
    return "none" if settings is None else hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


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
    cache, model = vllm_config.cache_config, vllm_config.model_config
    folder = Path(model.model)
    backends = vllm_config.kv_transfer_config.get_from_extra_config("backends", ["UCX"])
    return {
        "model_runner": "V2" if vllm_config.use_v2_model_runner else "V1",
        "scheduling": "asynchronous" if vllm_config.scheduler_config.async_scheduling else "synchronous",
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_cache_dtype": str(cache.cache_dtype),
        "kv_unquantized": ",".join(sorted(cache.kv_cache_dtype_skip_layers)) or "none",
        "quantization": _quantization(model),
        "model_folder": str(model.model),
        "model_configuration": fingerprint.of_configuration(Path(model.hf_config_path or folder), model.hf_overrides),
        "weights": "dummy" if vllm_config.load_config.load_format == "dummy" else fingerprint.of_weights(folder),
        "sliding_windows": "off" if model.disable_sliding_window else "on",
        "state_dtype": f"{cache.mamba_cache_dtype}, {cache.mamba_ssm_cache_dtype}",
        "attention_backend": str(getattr(vllm_config.attention_config.backend, "name", None) or "auto"),
        "watermark": _digest(vllm_config.watermark_config),
        "noise": "fp64" if model.use_fp64_gumbel else "fp32",
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
