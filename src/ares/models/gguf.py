"""The default model from a GGUF file: the folder that the hub publishes, written from 4-bit weights."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.progress import Progress


def convert(file: Path, folder: Path, progress: Progress, *, weights: bool = True) -> None:
    """Write the GGUF model as the hub publishes it: configs, fast tokenizer, and with `weights` bfloat16 safetensors.

    transformers' own GGUF loader is not used: it needs accelerate, which nothing else here needs, and the tokenizer
    that it makes for this model neither splits digits nor has a length limit.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    task = progress.add_task("Convert", total=len(reader.tensors) if weights else None)
    _write_configs(metadata, folder)
    _write_tokenizer(metadata, folder)
    if weights:
        _write_weights(reader.tensors, metadata, folder, lambda: progress.advance(task))


def _write_configs(metadata: Mapping[str, Any], folder: Path) -> None:
    special = {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],  # <|im_end|>: a chat answer stops there
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }
    config = special | {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        # GGUF keeps float32, where 1e-05 reads as 9.999999747378752e-06: back to the digits that were meant.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        # The older spelling, which transformers 4 and 5 both read.
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,  # GGUF has no output.weight
        "torch_dtype": "bfloat16",
        "vocab_size": metadata["llama.vocab_size"],
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", special)


def _write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    # What GGUF calls "smollm". transformers' conversion leaves out the digits, and then cuts several spaces before a
    # number (indented lists, tables) in another place than the model was trained on.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            # The class that takes tokenizer.json as it is; the hub's GPT2Tokenizer would build its own splitting.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
            "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
            "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
            "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "chat_template": metadata["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,  # or decoding drops the space before punctuation
            "model_max_length": metadata["llama.context_length"],
        },
    )


_TENSOR_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _write_weights(
    tensors: list[Any], metadata: Mapping[str, Any], folder: Path, advance: Callable[[], object]
) -> None:
    import gguf
    import torch
    from safetensors.torch import save_file

    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    state = {}
    for tensor in tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        *block, kind = tensor.name.removesuffix(".weight").removeprefix("blk.").split(".")
        if kind in heads:
            # GGUF interleaves the two halves of every head's rotary dimensions; transformers keeps them apart.
            rows, columns = values.shape
            halves = values.reshape(heads[kind], rows // heads[kind] // 2, 2, columns)
            values = halves.swapaxes(1, 2).reshape(rows, columns)
        name = ".".join(["model", *(["layers", *block] if block else []), _TENSOR_NAMES[kind], "weight"])
        state[name] = torch.tensor(values, dtype=torch.bfloat16)
        advance()
    path = folder / "model.safetensors"
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600, but a cache may be shared


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
