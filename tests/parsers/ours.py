"""The gateway's side of a chat over given tokens, and both sides' replies in one form, to compare them."""

import json
import re
from pathlib import Path
from typing import Any

from ares.config import GatewayConfig
from ares.gateway.openai.parsed_replies import ParsedChoice
from ares.gateway.openai.parsing import OutputFormat
from ares.gateway.openai.replies import Envelope
from ares.gateway.openai.text import Detokenizer, TextModel
from ares.gateway.pool.delta import Delta
from ares.parsers.chat import ChatParsers
from ares.parsers.loading import load

# The random part of ids: vLLM's own, and those of Mistral's models.
_RANDOM = re.compile(r"(?<=^chatcmpl-tool-)[0-9a-f]{16,}$|^[A-Za-z0-9]{9}$")


def parsers(folder: Path, **flags: Any) -> ChatParsers:
    """Load parsers."""
    loaded = load(GatewayConfig(model=str(folder), workers=["http://127.0.0.1:1"], **flags), folder)
    assert isinstance(loaded, ChatParsers)
    return loaded


def choice(
    text: TextModel, found: OutputFormat, prompt: list[int], *, stop: tuple[str, ...] = (), **options: Any
) -> ParsedChoice:
    """Make the choice of a reply."""
    detokenizer = Detokenizer(text.tokenizer, prompt, skip_special=found.skip_special_tokens, stop=stop)
    return ParsedChoice(
        Envelope("id", "model", chat=True),
        0,
        detokenizer,
        text,
        parser=found.parser(),
        hides_reasoning=found.hides_reasoning,
        counts_reasoning=True,
        **{"logprobs": None, **options},
    )


def deltas(chunks: list[list[int]], reason: str) -> list[Delta]:
    """Return what an instance sends."""
    made = [Delta(token_ids=chunk) for chunk in chunks]
    made[-1].finish_reason = reason
    return made


def stream(made: ParsedChoice, chunks: list[list[int]], reason: str) -> list[dict[str, Any]]:
    """Return the chunks that the gateway streams."""
    text = b""
    for delta in deltas(chunks, reason):
        text += made.stream([delta])
        if made.finish_reason is not None:
            break
    return [json.loads(line.removeprefix("data: ")) for line in text.decode().split("\n\n") if line]


def whole(made: ParsedChoice, chunks: list[list[int]], reason: str) -> dict[str, Any]:
    """Return the choice that the gateway sends as a whole."""
    for delta in deltas(chunks, reason):
        made.collect([delta])
        if made.finish_reason is not None:
            break
    return made.whole()


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message or its delta without what is empty, ids by their form, and reasoning under one name."""
    found = {name: value for name, value in message.items() if value not in (None, [], "") and name != "role"}
    if "reasoning_content" in found:
        assert found.pop("reasoning_content") == found.get("reasoning")
    for call in found.get("tool_calls", []):
        if call.get("id") is not None:
            call["id"] = _RANDOM.sub("*", call["id"])
        for name in [name for name in ("id", "type") if call.get(name) is None]:
            call.pop(name, None)
        call["function"] = {n: v for n, v in (call.get("function") or {}).items() if v is not None}
    return found


def shown(chunks: list[dict[str, Any]]) -> list[Any]:
    """Return what a stream shows: the deltas that show something, and the end."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    found = [(plain(c["delta"]), c.get("finish_reason"), c.get("stop_reason")) for c in choices]
    return [part for part in found if part != ({}, None, None)]
