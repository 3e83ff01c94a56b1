"""Messages, tools and templates: what the gateway makes of them is what vLLM makes of them."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

vllm = pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest  # noqa: E402
from vllm.renderers import hf  # noqa: E402
from vllm.renderers.chat_utils import parse_chat_messages  # noqa: E402

from ares.gateway.openai.messages import conversation, without_developer  # noqa: E402
from ares.gateway.openai.requests import ChatRequest  # noqa: E402
from ares.gateway.openai.templates import takes_parts  # noqa: E402
from tests.gateway.openai.test_templates import PARTS, TEXT  # noqa: E402

CONFIG: Any = SimpleNamespace(
    multimodal_config=None,
    enable_prompt_embeds=False,
    revision=None,
    code_revision=None,
    tokenizer_revision=None,
    trust_remote_code=False,
)


class Tokenizer:
    """A tokenizer that returns the messages which vLLM hands to a chat template."""

    name_or_path = "a model"

    def get_chat_template(self, template: str, **_: object) -> str:
        return template

    def apply_chat_template(self, conversation: list[dict[str, Any]], **_: object) -> list[dict[str, Any]]:
        return conversation


TOKENIZER: Any = Tokenizer()
CALL = {"type": "function", "id": "a", "function": {"name": "f", "arguments": '{"x": [1, null], "y": "é"}'}}
BROKEN = {"type": "function", "id": "a", "index": 0, "function": {"name": "f", "arguments": "{"}}
TEXTS = [{"type": "text", "text": "a", "cache_control": {"x": 1}}, "b", {"type": "text", "text": ""}]
OTHERS = [
    {"type": "input_text", "text": "i"},
    {"type": "output_text", "text": "o"},
    {"type": "thinking", "thinking": "t", "closed": True},
    {"type": "refusal", "refusal": "r"},
]
USER, SYSTEM = {"role": "user", "content": "u"}, {"role": "system", "content": "s"}
DEVELOPER = {"role": "developer", "content": [{"type": "text", "text": "d"}, {"type": "text", "text": "e"}]}
CHATS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "user"}, {"role": "user", "content": []}, {"role": "user", "content": ""}],
    [{"role": "user", "content": TEXTS}, {"role": "system", "content": TEXTS}, {"role": "critic", "content": TEXTS}],
    [{"role": "user", "content": OTHERS}, {"role": "assistant", "content": OTHERS[3:]}],
    [USER, {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}],
    [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "a", "content": TEXTS}],
    [USER, {"role": "assistant", "content": "x", "tool_calls": []}, {"role": "tool", "content": "y"}],
    [{"role": "assistant", "content": "x", "tool_calls": None, "refusal": None, "audio": None, "annotations": []}],
    [{"role": "assistant", "content": "x", "tool_calls": [BROKEN], "reasoning_content": "r"}],
    [{"role": "assistant", "content": "x", "reasoning": "r"}, {"role": "user", "content": "x", "reasoning": "r"}],
    [{"role": "user", "content": "x", "name": "ann"}, {"role": "tool", "name": "f", "content": "y", "more": 1}],
    [{"role": "tool", "tool_call_id": "a", "content": [{"type": "tool_reference", "name": "f"}, "b"]}],
    [DEVELOPER, USER],
    [SYSTEM, USER, DEVELOPER, {**DEVELOPER, "name": "n", "tools": [{"type": "function"}]}],
    [USER, SYSTEM],
]
TOOLS = [
    {"type": "function", "function": {"name": "f"}},
    {
        "function": {"name": "f", "parameters": {"default": None}, "strict": None, "more": 1, "description": "d"},
        "more": 1,
    },
    {"type": "function", "function": {"parameters": {}, "name": "f", "strict": True, "defer_loading": False}},
    {"type": "function", "function": {"name": "f"}, "defer_loading": True},
]
SHIPPED = sorted((Path(vllm.__file__).parent / "transformers_utils" / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("messages", CHATS)
def test_messages(messages: list[dict[str, Any]], parts: bool) -> None:
    theirs = ChatCompletionRequest.model_validate({"messages": copy.deepcopy(messages)})
    wanted: Any = parse_chat_messages(theirs.messages, CONFIG, "openai" if parts else "string")[0]
    made = conversation(ChatRequest.model_validate({"messages": messages}).messages, parts=parts)
    # As text: a template may write out the fields, in their order.
    assert json.dumps(made) == json.dumps(wanted)
    if any(message["role"] == "developer" for message in messages):
        # This template does not know the role "developer".
        wanted = hf.safe_apply_chat_template(CONFIG, TOKENIZER, wanted, chat_template="{{ messages }}", tokenize=False)
    assert json.dumps(without_developer(made)) == json.dumps(wanted)


def test_tools() -> None:
    body = {"messages": [USER], "tools": TOOLS}
    wanted = [tool.model_dump() for tool in ChatCompletionRequest.model_validate(copy.deepcopy(body)).tools or []]
    assert json.dumps([tool.rendered() for tool in ChatRequest.model_validate(body).tools or []]) == json.dumps(wanted)


@pytest.mark.parametrize("template", [*TEXT.values(), *PARTS.values(), *(path.read_text() for path in SHIPPED)])
def test_what_templates_take(template: str) -> None:
    content_format = hf.resolve_chat_template_content_format(template, None, "auto", TOKENIZER, model_config=CONFIG)
    assert takes_parts(template) == (content_format == "openai")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"reasoning_effort": "none"},
        {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False, "a": None}},
        {
            "documents": [{"title": "t", "text": "x"}],
            "chat_template_kwargs": {"documents": [], "reasoning_effort": "low"},
        },
        {"add_generation_prompt": False, "continue_final_message": True},
    ],
)
def test_variables_of_templates(fields: dict[str, Any]) -> None:
    body = {"messages": [USER], **fields}
    wanted = ChatCompletionRequest.model_validate(copy.deepcopy(body)).build_chat_params(None, "auto")
    assert ChatRequest.model_validate(body).template_variables() == wanted.chat_template_kwargs
