"""A two-layer random model with a part of SmolLM2's tokenizer: tokens cost a few milliseconds and depend on all before.

The sampling kernels of vLLM's V2 runner are interpreted here (gpu_defaults/), at a cost for each token id of the
vocabulary: a small one makes its tokens ten times as fast.

Greedy text of a random network tends to fall into a loop, which would hide wrong KV. Wide random weights keep it
chaotic: the tests check that the output does not repeat and that it changes with the first token of the prompt.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from ares.models import resolve as model

VOCABULARY = 1024
# Tokens of the sliding window: two blocks of a CPU build.
WINDOW = 256
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}


def build(folder: Path, **sizes: int) -> Path:
    """Write the model into `folder`, which must exist; `sizes` replace its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return _write(folder, LlamaForCausalLM(LlamaConfig(**{**_SIZES, **sizes})))


def build_hybrid(folder: Path) -> Path:
    """Write a Gemma 3 of the same size, with a layer of full attention and one with a sliding window of 256 tokens."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**_SIZES, sliding_window=WINDOW, layer_types=layers, query_pre_attn_scalar=64)
    return _write(folder, Gemma3ForCausalLM(config))


def _write(folder: Path, network: Any) -> Path:
    import torch

    source = model.resolve(model.DEFAULT_MODEL)
    _write_tokenizer(source / "tokenizer.json", folder / "tokenizer.json", network.config.vocab_size)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (source / name).exists():
            shutil.copy(source / name, folder)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.0 if "embed" in name else 0.15)
    network.save_pretrained(folder)
    return folder


def _write_tokenizer(source: Path, target: Path, size: int) -> None:
    """Write the first tokens of a byte-level BPE tokenizer, whose ids are in the order of its merges."""
    tokenizer = json.loads(source.read_text())
    model = tokenizer["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < size}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    target.write_text(json.dumps(tokenizer))
