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
        read = json.loads((folder / "config.json").read_bytes())
        return set(read.get("text_config", read).get("layer_types") or ())
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return set()
