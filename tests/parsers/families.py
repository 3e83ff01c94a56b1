"""Families of parsers: their flags, outputs of such models, chats, and both sides that parse them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ares.gateway.openai.text import TextModel
from tests.parsers import ours
from tests.parsers.models import TOOLS, folder
from tests.parsers.reference import Reference

PROMPT = "<s>user: Hi</s><s>assistant: "
NAMED = {"type": "function", "function": {"name": "get"}}
ANSWERS = ["", "A plain answer: é, 日本, 👩‍💻.", "{", "[]"]
THOUGHTS = [
    "<think>Let me see: é日👍</think>\n\nAn answer.",
    "Not opened</think>An answer.",
    "<think>Never closed, cut",
    "<think></think>",
    "<think>One</think>Two<think>Three</think>Four",
]
HERMES = [
    'Sure.<tool_call>\n{"name": "get", "arguments": {"a": "é日 \\"quoted\\" }"}}\n</tool_call>',
    '<tool_call>{"name": "get","arguments":{}}</tool_call><tool_call>{"name":"put", "arguments": {"n": 3}}</tool_call>',
    '<tool_call>{"name": "get", "arguments": {"a": "cut',
    "<tool_call>no JSON</tool_call>",
    '<tool_call>{"arguments": {"a": 1}, "name": "get"}</tool_call> and more',
]
KIMI = (
    "Sure.<|tool_calls_section_begin|>"
    '<|tool_call_begin|>functions.get:0<|tool_call_argument_begin|>{"a": "é"}<|tool_call_end|>'
    '<|tool_call_begin|>functions.put:1<|tool_call_argument_begin|>{"n": 1}<|tool_call_end|>'
    "<|tool_calls_section_end|>"
)
FORCED = ['[{"name": "get", "parameters": {"a": "é"}}, {"name": "put", "parameters": {"n": 1}}]', '{"a": "é"}']


@dataclass
class Family:
    """Flags of a gateway, and outputs of such a model."""

    flags: dict[str, Any]
    outputs: list[str]
    config: dict[str, Any] = field(default_factory=dict)


def calling(name: str, **more: Any) -> dict[str, Any]:
    return {"tool_call_parser": name, "enable_auto_tool_choice": True, **more}


FAMILIES = {
    "deepseek_r1": Family({"reasoning_parser": "deepseek_r1"}, THOUGHTS),
    "qwen3": Family({"reasoning_parser": "qwen3"}, THOUGHTS),
    "hermes": Family(calling("hermes"), [*HERMES, *FORCED]),
    "qwen3 and hermes": Family(
        calling("hermes", reasoning_parser="qwen3"),
        [*THOUGHTS, *HERMES, *(f"<think>Hm é.</think>\n{call}" for call in (*HERMES, *FORCED))],
    ),
    "deepseek_r1 and hermes": Family(
        calling("hermes", reasoning_parser="deepseek_r1"), [f"Hm é.</think>\n{call}" for call in (*HERMES, *FORCED)]
    ),
    "llama3_json": Family(
        calling("llama3_json"),
        [
            '{"name": "get", "parameters": {"a": "é日"}}',
            '<|python_tag|>{"name": "get", "parameters": {"a": "1"}}; {"name": "put", "parameters": {"n": 2}}',
            '{"name": "get", "parameters": {"a": "cut',
            '{"name": "get", "arguments": [1, 2]}',
            *FORCED,
        ],
    ),
    "mistral": Family(
        calling("mistral"),
        [
            '[TOOL_CALLS]get[ARGS]{"a": "é日"}',
            'Well.[TOOL_CALLS]get[ARGS]{"a": "1"}[TOOL_CALLS]put[ARGS]{"n": 2}',
            '[TOOL_CALLS] [{"name": "get", "arguments": {"a": "1"}}, {"name": "put", "arguments": {"n": 2}}]',
            '[TOOL_CALLS]get[ARGS]{"a": "cut',
            *FORCED,
        ],
    ),
    "kimi_k2": Family(
        calling("kimi_k2"),
        [
            KIMI,
        ],
        {"model_type": "kimi_k2"},
    ),
}
CHATS: dict[str, dict[str, Any]] = {
    "no tools": {},
    "auto": {"tools": TOOLS},
    "one call": {"tools": TOOLS, "parallel_tool_calls": False},
    "none": {"tools": TOOLS, "tool_choice": "none"},
    "required": {"tools": TOOLS, "tool_choice": "required"},
    "named": {"tools": TOOLS, "tool_choice": NAMED},
    "hidden": {"tools": TOOLS, "include_reasoning": False},
    "not thinking": {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}},
    "effort": {"tools": TOOLS, "reasoning_effort": "low"},
    "a format": {"tools": TOOLS, "response_format": {"type": "json_object"}},
}


@dataclass
class Both:
    """The gateway's parsers and vLLM's server of one family."""

    ours: Any
    reference: Reference
    text: TextModel


def load(at: Path) -> dict[str, Both]:
    """Load every family, into model folders below this one."""
    found: dict[str, Both] = {}
    texts: dict[str, TextModel] = {}
    for name, family in FAMILIES.items():
        model = folder(at / name.replace(" ", "-"), **family.config)
        text = texts.setdefault("all", TextModel(model))
        found[name] = Both(ours.parsers(model, **family.flags), Reference(model, **family.flags), text)
    return found


def taken(name: str, chat: str) -> bool:
    """Whether a family takes such a chat."""
    return "tool_call_parser" in FAMILIES[name].flags or "tools" not in CHATS[chat]
