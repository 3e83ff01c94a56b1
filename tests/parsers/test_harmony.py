"""Harmony (gpt-oss): prompts and outputs as vLLM renders and parses them.

The vocabulary is a download of OpenAI's, 3.6 MB: TIKTOKEN_ENCODINGS_BASE names a folder that holds o200k_base.tiktoken.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")

from ares.gateway.openai.body import BadRequestError
from ares.gateway.openai.text import TextModel
from tests.parsers import ours
from tests.parsers.models import EOS, TOOLS, folder, function
from tests.parsers.reference import Reference

pytestmark = pytest.mark.timeout(240)
with_vocabulary = pytest.mark.skipif(
    "TIKTOKEN_ENCODINGS_BASE" not in os.environ, reason="needs TIKTOKEN_ENCODINGS_BASE: see the top of this file"
)
FLAGS: dict[str, Any] = {
    "reasoning_parser": "openai_gptoss",
    "tool_call_parser": "openai",
    "enable_auto_tool_choice": True,
}
CALL = '<|start|>assistant<|channel|>commentary to=functions.get <|constrain|>json<|message|>{"a": "é日"}<|call|>'
OUTPUTS = [
    "<|channel|>analysis<|message|>Let me see: é日👍<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
    f"<|channel|>analysis<|message|>A call.<|end|>{CALL}",
    f"<|channel|>analysis<|message|>Two.<|end|>{CALL.replace('<|call|>', '<|end|>')}{CALL}",
    "<|channel|>analysis<|message|>Never ended",
    "<|channel|>final<|message|>An answer",
    "no channel at all",
    "<|channel|>commentary<|message|>A preamble<|end|><|channel|><|channel|><|message|>",
]
CHATS: list[dict[str, Any]] = [{}, {"tools": TOOLS}, {"tools": TOOLS, "include_reasoning": False}]
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning": "I look it up.",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "get", "arguments": '{"a": "Rome"}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "Sunny."},
    {"role": "user", "content": "é日?"},
]


@pytest.fixture(scope="module")
def vocabulary() -> Any:
    from vllm.entrypoints.openai.parser.harmony_utils import get_encoding

    return get_encoding()


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a gpt-oss model. Its tokenizer has a few bytes only: Harmony's own library reads the tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(EOS, special=True)])
    made.add_special_tokens([AddedToken(f"<|{n}|>", special=True) for n in range(250)])
    config = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}
    return folder(tmp_path_factory.mktemp("gpt-oss"), made, **config)


@with_vocabulary
@pytest.mark.parametrize("chat", CHATS)
async def test_outputs_are_those_of_vllm(at: Path, vocabulary: Any, chat: dict[str, Any]) -> None:
    parsers, reference, text = ours.parsers(at, **FLAGS), Reference(at, **FLAGS), TextModel(at)
    body = {"messages": [{"role": "user", "content": "Hi"}], **chat}
    prompt = parsers.render(body, tools="tools" in chat)
    assert prompt
    for output in OUTPUTS:
        tokens = vocabulary.encode(output, allowed_special="all")
        for size, reason in ((1, "stop"), (3, "stop"), (1, "length")):
            chunks = [tokens[n : n + size] for n in range(0, len(tokens), size)]
            found = parsers.output_format(body, prompt)
            given = ours.stream(ours.choice(text, found, prompt), chunks, reason)
            assert ours.shown(given) == ours.shown(await reference.stream(body, prompt, chunks, reason)), output
            choice = ours.choice(text, found, prompt)
            whole = ours.whole(choice, chunks, reason)
            wanted = await reference.whole(body, prompt, chunks, reason)
            (theirs,) = wanted["choices"]
            assert ours.plain(whole["message"]) == ours.plain(theirs["message"])
            assert whole["finish_reason"] == theirs["finish_reason"]
            assert choice.reasoning_tokens == wanted["usage"]["completion_tokens_details"]["reasoning_tokens"]


@with_vocabulary
@pytest.mark.parametrize("more", [{}, {"tools": TOOLS}, {"reasoning_effort": "high"}, {"tools": [function("f")]}])
async def test_prompts_are_those_of_vllm(at: Path, more: dict[str, Any]) -> None:
    parsers, reference = ours.parsers(at, **FLAGS), Reference(at, **FLAGS)
    body = {"messages": MESSAGES, **more}
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    rendered = await reference.renderer.render_chat(ChatCompletionRequest.model_validate(dict(body)))
    assert isinstance(rendered, tuple)
    ((wanted,),) = (rendered[1],)
    assert parsers.render(body, tools="tools" in more) == wanted["prompt_token_ids"]


@with_vocabulary
def test_what_the_format_has_no_place_for_is_refused(at: Path) -> None:
    parsers = ours.parsers(at, **FLAGS)
    with pytest.raises(BadRequestError, match="reasoning_effort"):
        parsers.render({"messages": MESSAGES, "reasoning_effort": "none"}, tools=False)


def test_a_vocabulary_that_cannot_be_had_is_an_error_that_says_what_to_do(at: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ares.parsers.loading import load\n"
        "from ares.config import ConfigError, GatewayConfig\n"
        "at = Path(sys.argv[1])\n"
        "config = GatewayConfig(model=str(at), workers=['http://127.0.0.1:1'], reasoning_parser='openai_gptoss')\n"
        "try: load(config, at)\n"
        "except ConfigError as error: print('refused:', error)\n"
    )
    environment = {**os.environ, "TIKTOKEN_ENCODINGS_BASE": str(tmp_path)}
    command = [sys.executable, "-c", code, str(at)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=200)
    assert "refused: the vocabulary of the Harmony format cannot be loaded" in done.stdout
    assert "TIKTOKEN_ENCODINGS_BASE" in done.stdout
