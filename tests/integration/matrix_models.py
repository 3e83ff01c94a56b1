"""Tiny models of other kinds than tiny_model.py, with its tokenizer, and LoRA adapters of it."""

import json
import shutil
from pathlib import Path
from typing import Any

from tests.integration.tiny_model import VOCABULARY

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
ADAPTER_RANK = 8


def sliding_window(base: Path, folder: Path) -> Path:
    """Write a Gemma 3 whose layers but one see the last 128 tokens: two kinds of KV cache."""
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    config = Gemma3TextConfig(
        **_SIZES,
        num_hidden_layers=len(kinds),
        num_key_value_heads=1,
        head_dim=64,
        sliding_window=128,
        layer_types=kinds,
        query_pre_attn_scalar=64,
    )
    return _write(config, base, folder)


def latent_attention(base: Path, folder: Path) -> Path:
    """Write a DeepSeek-V2 without experts: multi-head latent attention, one latent vector of KV a token."""
    from transformers import DeepseekV2Config

    config = DeepseekV2Config(
        **_SIZES,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        moe_intermediate_size=64,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=2,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
    )
    return _write(config, base, folder)


def convolution(base: Path, folder: Path) -> Path:
    """Write an LFM2: every other layer is a convolution with a state in place of KV."""
    from transformers import Lfm2Config

    config = Lfm2Config(
        **_SIZES,
        num_hidden_layers=4,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"] * 2,
        block_auto_adjust_ff_dim=False,
        # vLLM reads them (model_executor/models/lfm2.py, 0.32), and transformers does not write them.
        conv_dim=_SIZES["hidden_size"],
        conv_dim_out=_SIZES["hidden_size"],
        block_dim=_SIZES["hidden_size"],
        block_ff_dim=_SIZES["intermediate_size"],
    )
    return _write(config, base, folder)


def adapter(base: Path, folder: Path, seed: int) -> Path:
    """Write a LoRA adapter of the tiny model, as peft writes one, that changes nearly every token."""
    import torch
    from safetensors.torch import save_file

    sizes = json.loads((base / "config.json").read_text())
    hidden, width = sizes["hidden_size"], sizes["head_dim"]
    outputs = {"q_proj": width * sizes["num_attention_heads"], "v_proj": width * sizes["num_key_value_heads"]}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(sizes["num_hidden_layers"]):
        for name, size in outputs.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(ADAPTER_RANK, hidden, generator=generator) * 0.1
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(size, ADAPTER_RANK, generator=generator) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": ADAPTER_RANK, "lora_alpha": 2 * ADAPTER_RANK, "target_modules": list(outputs)}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "bias": "none", "task_type": "CAUSAL_LM"}))
    return folder


def _write(config: Any, base: Path, folder: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    for name in _TOKENIZER:
        if (base / name).exists():
            shutil.copy(base / name, folder)
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.0 if "embed" in name else 0.15)
    network.save_pretrained(folder)
    return folder
