"""A two-layer random model with SmolLM2's tokenizer: tokens cost a few milliseconds and depend on all that came before.

Greedy text of a random network tends to fall into a loop, which would hide wrong KV. Wide random weights keep it
chaotic: the tests check that the output does not repeat and that it changes with the first token of the prompt.
"""

import shutil
from pathlib import Path

from ares.models import resolve as model


def build(folder: Path) -> Path:
    """Write the model into `folder`, which must exist."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    source = model.resolve(model.DEFAULT_MODEL)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (source / name).exists():
            shutil.copy(source / name, folder)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    network = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.0 if "embed" in name else 0.15)
    network.save_pretrained(folder)
    return folder
