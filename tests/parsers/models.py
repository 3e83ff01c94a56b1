"""Model folders with the special tokens of several families, made here: nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

EOS = "<|im_end|>"
# Tokens of their own in their families' vocabularies; the second group is special, and skipped in plain text.
_ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tools>", "</tools>"]
_SPECIAL = [
    "<s>",
    "</s>",
    EOS,
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "[THINK]",
    "[/THINK]",
    "<|eot_id|>",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
]
TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content or '' }}</s>{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)


def tokenizer() -> Tokenizer:
    """Make a byte-level tokenizer without merges: a token a byte, so that characters and markers are split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken(token, normalized=False) for token in _ADDED])
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _SPECIAL])
    return made


def folder(at: Path, made: Tokenizer | None = None, **config: Any) -> Path:
    """Write a model folder with what a gateway reads."""
    at.mkdir(parents=True, exist_ok=True)
    made = made or tokenizer()
    made.save(str(at / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": EOS,
        "chat_template": TEMPLATE,
    }
    (at / "tokenizer_config.json").write_text(json.dumps(settings))
    (at / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]} | config))
    (at / "generation_config.json").write_text(json.dumps({"eos_token_id": made.token_to_id(EOS)}))
    return at


def ids(text: str, made: Tokenizer | None = None) -> list[int]:
    """Return the token ids of text; markers that are tokens become tokens."""
    return list((made or tokenizer()).encode(text).ids)


def function(name: str, **properties: Any) -> dict[str, Any]:
    """Return a tool with string parameters, or those that are given."""
    parameters = {"type": "object", "properties": properties or {"a": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": "what it does", "parameters": parameters}}


TOOLS = [function("get"), function("put", a={"type": "string"}, n={"type": "integer"})]
