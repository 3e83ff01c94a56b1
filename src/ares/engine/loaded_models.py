"""Which models and LoRA adapters an instance cannot serve as they are given, before they are loaded."""

import json
from pathlib import Path
from typing import Any

# In `layer_types` of a model's config.json: LFM2.
_CONVOLUTION = "conv"


def unsupported(settings: Any, *, on_cpu: bool) -> str | None:
    """Say what is not supported and what to do instead; None where everything is.

    Parameters
    ----------
    settings
        vLLM's parsed arguments of `vllm serve` (0.32).
    on_cpu
        Whether vLLM computes on a CPU.
    """
    if settings.kv_transfer_config is not None and _CONVOLUTION in _layer_types(Path(settings.model)):
        return (
            f"{settings.model} has short convolutions, whose state vLLM's NIXL connector cannot transfer (it can for "
            "Mamba 1, Mamba 2 and GDN: v1/ssm_conv_transfer_utils.py, 0.32); serve it with `vllm serve`, without ARES"
        )
    if settings.kv_transfer_config is not None and "kv_lora_rank" in _config(Path(settings.model)):
        return (
            f"{settings.model} has multi-head latent attention (MLA): moved requests got other tokens than unmoved "
            "ones in our tests (docs/configurations.md); serve it with `vllm serve`, without ARES"
        )
    adapters = settings.lora_modules or []
    if on_cpu and adapters and settings.max_loras <= len(adapters):
        # It takes the index of no adapter, -1, for that of the last slot (lora/ops/torch_ops/lora_ops.py, 0.32).
        return (
            f"--max-loras {settings.max_loras}: in a batch with others, vLLM's CPU build gives requests without an "
            f"adapter the one in the last slot; leave a slot empty, with --max-loras {len(adapters) + 1}"
        )
    return None


def _layer_types(folder: Path) -> set[str]:
    """Return the kinds of layers that a model's configuration names; none where it cannot be read."""
    try:
        return set(_config(folder).get("layer_types") or ())
    except TypeError:
        return set()


def _config(folder: Path) -> dict[str, Any]:
    """Return a model's configuration, of its text part where it has several; empty where it cannot be read."""
    try:
        read = json.loads((folder / "config.json").read_bytes())
        return dict(read.get("text_config", read))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return {}
