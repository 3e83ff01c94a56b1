"""Prompts of chats: the same token ids as vLLM's renderer makes, or both refuse."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")

from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.renderers import hf
from vllm.renderers.chat_utils import parse_chat_messages

from ares.gateway.openai.requests import ChatRequest
from ares.gateway.openai.text import Chats, TextModel
from tests.gateway.openai.chat_templates import TEMPLATES

CONFIG: Any = SimpleNamespace(
    multimodal_config=None,
    enable_prompt_embeds=False,
    revision=None,
    code_revision=None,
    tokenizer_revision=None,
    model="a model",
    tokenizer="a model",
    trust_remote_code=False,
)


def called(*arguments: Any, **more: Any) -> dict[str, Any]:
    calls = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": given}} for given in arguments]
    return {"role": "assistant", "tool_calls": calls, **more}


def answer(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "c1", "content": content, **more}


def user(content: Any = "Is it cold? é日👩", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def text(given: Any, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": given, **more}


SYSTEM, ASSISTANT = {"role": "system", "content": " Be brief. "}, {"role": "assistant", "content": "\nNo, it \n"}
JSON = '{"city": "Oslo", "days": [1, null, 2.5], "x": {"é": true}}'
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [user()],
    "turns": [SYSTEM, user(), ASSISTANT, user(" and tomorrow ")],
    "several systems": [SYSTEM, user(), {"role": "system", "content": "Now be long."}, ASSISTANT],
    "system last": [user(), SYSTEM],
    "two users": [user("a"), user("b")],
    "text parts": [user([text("Is it"), text("cold?"), "now"])],
    "odd text parts": [user([text(""), text("a", cache_control={"type": "x"}), {"type": "refusal", "refusal": "r"}])],
    "system parts": [{"role": "system", "content": [text("a"), text("b")]}, user([text("c")])],
    "input text": [user([{"type": "input_text", "text": "a"}, {"type": "thinking", "thinking": "b"}])],
    "no parts": [user([])],
    "null": [user(None)],
    "absent": [{"role": "user"}],
    "empty": [user("")],
    "image": [user([text("a"), {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}])],
    "audio": [user([{"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}}])],
    "video": [user([{"type": "video_url", "video_url": {"url": "http://127.0.0.1:1/v"}}])],
    "unknown part": [user([{"type": "nonsense", "text": "a"}])],
    "part without type": [user([{"text": "a"}])],
    "number part": [user([5])],
    "calls": [user(), called(JSON), answer("4 C")],
    "calls with content": [user(), called(JSON, content="Let me see."), answer([text("4"), text("C")])],
    "null content": [user(), called("{}", content=None), answer(None)],
    "two calls": [user(), called(JSON, "{}"), answer("a"), answer("b")],
    "call without arguments": [user(), called(""), answer("")],
    "call of null": [user(), called(None)],
    "call of an object": [user(), called({"city": "Oslo"})],
    "call of a list": [user(), called([1])],
    "call of a list as text": [user(), called("[1]")],
    "call of a number as text": [user(), called("5")],
    "call of null as text": [user(), called("null")],
    "call of broken text": [user(), called("{'a': 1}")],
    "call of nan": [user(), called('{"a": NaN}')],
    "calls in between": [user(), called(JSON), answer("4 C"), ASSISTANT, user("thanks")],
    "no calls": [user(), {"role": "assistant", "content": "a", "tool_calls": []}],
    "null calls": [user(), {"role": "assistant", "content": "a", "tool_calls": None}],
    "unknown call": [user(), {"role": "assistant", "tool_calls": [{"id": "c1", "type": "custom"}]}],
    "tool reference": [user(), called("{}"), answer([{"type": "tool_reference", "name": "f"}, text("b")])],
    "tool by name": [user(), called("{}"), answer("4 C", name="f")],
    "developer": [{"role": "developer", "content": "Be brief."}, user()],
    "developer parts": [{"role": "developer", "content": [text("a"), text("b")], "tools": [{"x": 1}]}, user()],
    "developer and system": [SYSTEM, user(), {"role": "developer", "content": "d", "name": "n"}],
    "two developers": [{"role": "developer", "content": "a"}, {"role": "developer", "content": "b"}, user()],
    "name": [user("hi", name="ann"), {"role": "assistant", "content": "a", "name": "bot"}],
    "reasoning": [user(), {"role": "assistant", "content": "a", "reasoning": "thought"}, user("b")],
    "reasoning content": [user(), {"role": "assistant", "content": "a", "reasoning_content": "thought"}],
    "both reasonings": [user(), {"role": "assistant", "content": "a", "reasoning": "r", "reasoning_content": "rc"}],
    "null reasoning": [user(), {"role": "assistant", "content": "a", "reasoning": None, "reasoning_content": "rc"}],
    "thoughts in content": [user(), {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"}],
    "reasoning and calls": [user(), called(JSON, reasoning="r"), answer("4 C")],
    "unknown role": [{"role": "critic", "content": "bad"}],
    "special tokens": [user("<s>a</s><unk>")],
    "template text": [user("{{ messages }}{% for %}")],
    "assistant parts": [user(), {"role": "assistant", "content": [text("a"), text("No, it ")]}],
}
# vLLM refuses these; here null is absent, and arguments may be an object: the prompt is that of the other form.
LENIENT: dict[str, list[dict[str, Any]]] = {
    "null": [{"role": "user"}],
    "null content": [user(), called("{}"), answer("")],
    "call of null": [user(), called("")],
    "call of an object": [user(), called('{"city": "Oslo"}')],
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "<d> é", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "g", "parameters": {"default": None}, "strict": None}},
]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tools": {"tools": TOOLS, "tool_choice": "none"},
    "no generation prompt": {"add_generation_prompt": False, "add_special_tokens": True},
    "continued": {"add_generation_prompt": False, "continue_final_message": True},
    "no thinking": {"chat_template_kwargs": {"enable_thinking": False, "mood": None, "date_string": "1 May"}},
    "effort": {"reasoning_effort": "high", "documents": [{"title": "t", "text": "é"}]},
    "effort by variable": {"reasoning_effort": "none", "chat_template_kwargs": {"reasoning_effort": "low", "mood": 1}},
}


@pytest.fixture(scope="module")
def theirs(model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(model_folder))


@pytest.fixture(scope="module")
def ours(model_folder: Path) -> TextModel:
    return TextModel(model_folder)


def outcome(render: Any) -> list[int] | str:
    """Return the token ids, or that it was refused."""
    try:
        ids: list[int] = render()
    except Exception:
        return "refused"
    return ids


def wanted(tokenizer: Any, template: str, body: dict[str, Any], defaults: dict[str, Any]) -> list[int]:
    """Return the prompt of vLLM (renderers/online_renderer.py `preprocess_chat`, renderers/hf.py `render_messages`)."""
    request = ChatCompletionRequest.model_validate(copy.deepcopy(body))
    tools = [tool.model_dump() for tool in request.tools] if request.tools else None
    params = request.build_chat_params(template, "auto").with_defaults({"cohere_format": "cmd4", **defaults})
    form = hf.resolve_chat_template_content_format(template, tools, "auto", tokenizer, model_config=CONFIG)
    chat = parse_chat_messages(request.messages, CONFIG, form)[0]
    variables = params.get_apply_chat_template_kwargs()
    made = hf.safe_apply_chat_template(CONFIG, tokenizer, chat, tools=tools, tokenize=False, **variables)
    return list(tokenizer.encode(made, add_special_tokens=request.add_special_tokens))


def made(model: TextModel, template: str, body: dict[str, Any]) -> list[int]:
    request = ChatRequest.model_validate(copy.deepcopy(body))
    request.check_options()
    shown = model.chat_text(request.messages, request.tools, variables=request.template_variables(), template=template)
    return model.encode(shown, special=request.add_special_tokens)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_prompts_are_those_of_vllm(ours: TextModel, theirs: Any, template: str) -> None:
    wrong, rendered, refused = [], 0, 0
    for chat, messages in CHATS.items():
        for option, fields in OPTIONS.items():
            body = {"messages": messages, **fields}
            want = outcome(lambda body=body: wanted(theirs, template, body, {}))
            if chat in LENIENT:
                assert want == "refused"
                want = outcome(lambda body=body, m=LENIENT[chat]: wanted(theirs, template, body | {"messages": m}, {}))
            have = outcome(lambda body=body: made(ours, template, body))
            rendered, refused = rendered + (want != "refused"), refused + (want == "refused")
            if have != want:
                shown = [x if isinstance(x, str) else ours.decode(x) for x in (have, want)]
                wrong.append(f"{chat}, {option}: here {shown[0]!r}, vLLM {shown[1]!r}")
    assert not wrong, "\n".join(wrong[:20])
    assert rendered > 40 < refused


def test_default_variables(model_folder: Path, theirs: Any) -> None:
    template = "{{ mood }}{{ cohere_format }}{{ enable_thinking }}{{ messages[0].content }}"
    defaults = {"mood": "calm", "enable_thinking": False}
    ours = TextModel(model_folder, Chats(template, default_chat_template_kwargs=defaults))
    for variables in ({}, {"mood": "wild"}, {"mood": None}, {"mood": "auto"}, {"cohere_format": "cmd3"}):
        for effort in (None, "high"):
            body = {"messages": [user()], "chat_template_kwargs": variables, "reasoning_effort": effort}
            request = ChatRequest.model_validate(body)
            ids = ours.render_chat(request.messages, variables=request.template_variables())
            assert ids == wanted(theirs, template, body, defaults), (variables, effort)


def test_templates_by_name(model_folder: Path, theirs: Any) -> None:
    ours = TextModel(model_folder)
    templates = {"default": "d{{ messages | length }}", "tool_use": "t{{ (tools or []) | length }}", "rag": "r"}
    ours.chat_template = theirs.chat_template = templates
    try:
        for given in (None, "rag", "tool_use", "{{ messages[0].role }}"):
            for tools in (None, TOOLS):
                body = {"messages": [user()], "tools": tools}
                request = ChatRequest.model_validate(body)
                text = ours.chat_text(request.messages, request.tools, template=given)
                chosen = theirs.get_chat_template(given, tools=tools)  # as vLLM does (`resolve_chat_template`)
                shown = theirs.apply_chat_template([user()], tools=tools, chat_template=chosen, tokenize=False)
                assert text == shown, (given, tools)
    finally:
        theirs.chat_template = None
