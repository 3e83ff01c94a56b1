"""Outputs of every kind, cut, nested and hostile, through each family of parsers: vLLM's own deltas, or its error."""

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")

from ares.gateway.openai.parsing import ParserFailedError
from tests.fuzz.cases import fuzz
from tests.parsers import ours
from tests.parsers.families import CHATS, FAMILIES, PROMPT, Both, load, taken
from tests.parsers.models import ids

pytestmark = pytest.mark.timeout(240)
# What the parsers look for, whole and in part, and what may stand between.
PIECES = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tools>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]"),
    *("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    *("[THINK]", "[/THINK]", "<|im_end|>", "</s>", "<tool", "_call>", "</thi", "functions.get:0"),
    *(
        '{"name": "get", "arguments": {"a": "b"}}',
        '{"name": "put", "parameters": {"n": 1}}',
        '{"name": ',
        '"arguments": ',
    ),
    *('[{"name": "get", "parameters": {}}]', '{"name": "gone", "arguments": {}}', '{"name": 5, "arguments": []}'),
    *("{", "}", "[", "]", '"', "\\", '\\"', "\\u00", ":", ",", ";", "null", "1e999", "-", '{"a":' * 40, "}" * 40),
    *("é", "日本", "👩‍💻", "\n\n", " ", "A plain answer."),
)
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), min_size=1, max_size=14).map("".join).filter(bool)
PAIRS = [(family, chat) for family in FAMILIES for chat in CHATS if taken(family, chat)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Both]]:
    """Families that are loaded, by name; what their parsers log of such outputs is of no interest."""
    logging.disable(logging.ERROR)
    yield load(tmp_path_factory.mktemp("families"))
    logging.disable(logging.NOTSET)


def streamed(both: Both, body: dict[str, Any], prompt: list[int], chunks: list[list[int]], reason: str) -> Any:
    """Return what the gateway streams; None where the parser fails on the output."""
    found = both.ours.output_format(body, prompt)
    try:
        return ours.shown(ours.stream(ours.choice(both.text, found, prompt), chunks, reason))
    except ParserFailedError:
        return None


def expected(both: Both, body: dict[str, Any], prompt: list[int], chunks: list[list[int]], reason: str) -> Any:
    """Return what vLLM streams; None where its stream ends with an error."""
    chunks_of_vllm = asyncio.run(both.reference.stream(body, prompt, chunks, reason))
    return None if "error" in chunks_of_vllm[-1] else ours.shown(chunks_of_vllm)


def whole(both: Both, body: dict[str, Any], prompt: list[int], chunks: list[list[int]], reason: str) -> Any:
    """Return the message that the gateway sends, and why it ended; None where the parser fails on the output."""
    try:
        given = ours.whole(ours.choice(both.text, both.ours.output_format(body, prompt), prompt), chunks, reason)
    except ParserFailedError:
        return None
    return ours.plain(given["message"]), given["finish_reason"]


def expected_whole(both: Both, body: dict[str, Any], prompt: list[int], chunks: list[list[int]], reason: str) -> Any:
    """Return those of vLLM; None where it raises an error."""
    try:
        (choice,) = asyncio.run(both.reference.whole(body, prompt, chunks, reason))["choices"]
    except Exception:  # of the parser: anything
        return None
    return ours.plain(choice["message"]), choice["finish_reason"]


def test_hostile_outputs(made: dict[str, Both]) -> None:
    @fuzz("outputs of models", 150, pair=st.sampled_from(PAIRS), text=TEXTS, size=st.integers(1, 6), stop=st.booleans())
    def hostile(pair: tuple[str, str], text: str, size: int, stop: bool) -> None:
        both, body = made[pair[0]], {"messages": [{"role": "user", "content": "Hi"}], **CHATS[pair[1]]}
        tokens, prompt = ids(text + ("<|im_end|>" if stop else "")), ids(PROMPT)
        chunks = [tokens[at : at + size] for at in range(0, len(tokens), size)]
        reason = "stop" if stop else "length"
        assert streamed(both, body, prompt, chunks, reason) == expected(both, body, prompt, chunks, reason)
        assert whole(both, body, prompt, chunks, reason) == expected_whole(both, body, prompt, chunks, reason)

    hostile()
