"""A message of `/v1/messages`: its events, and the whole, as vLLM 0.32 has them (anthropic/serving.py)."""

import json
import uuid
from typing import Any

import msgspec

from ares.gateway.openai.blocks import Block, BlockWriter

_encode = msgspec.json.Encoder().encode
_DELTAS = {
    "reasoning": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "tool_call": ("input_json_delta", "partial_json"),
}


class MessageWriter(BlockWriter):
    """Writes one message.

    Parameters
    ----------
    message_id, model
        Of the message.
    """

    def __init__(self, message_id: str, model: str) -> None:
        super().__init__()
        self._content: list[dict[str, Any]] = []
        self._common = {"id": message_id, "type": "message", "role": "assistant", "model": model}

    def start(self, usage: dict[str, Any]) -> None:
        """Write the events before the first token; `usage` is that of the prompt."""
        begun: dict[str, Any] = {
            **self._common,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        self._event("message_start", message=begun)
        self._event("ping")

    def complete(self, finish_reason: str | None, matched: int | str | None, usage: dict[str, Any]) -> dict[str, Any]:
        """End the message, and return it.

        Parameters
        ----------
        finish_reason, matched
            Why the output ended, and by which stop string or token, in vLLM's words.
        """
        self.end(cut=finish_reason == "length")
        reason, sequence = stop_reason(finish_reason, matched, self.blocks)
        ending = {"stop_reason": reason, "stop_sequence": sequence}
        self._event("message_delta", delta=ending, usage=usage)
        self._event("message_stop")
        # Clients may take the first block for granted.
        content = self._content or [{"type": "text", "text": ""}]
        return {**self._common, "content": content, **ending, "usage": usage}

    def fail(self, body: dict[str, Any]) -> None:
        """Write that the message has failed; `body` is that of an error reply."""
        self._send("error", body)

    # --- blocks ---

    def opened(self, block: Block) -> None:
        """Write the beginning of a content block."""
        if block.kind == "tool_call":
            block.call_id = block.call_id or f"toolu_{uuid.uuid4().hex}"
        self._event("content_block_start", index=block.index, content_block=_begun(block))

    def extended(self, block: Block, text: str, logprobs: list[dict[str, Any]]) -> None:
        """Write what is new in a content block."""
        kind, name = _DELTAS[block.kind]
        self._event("content_block_delta", index=block.index, delta={"type": kind, name: text})

    def closed(self, block: Block) -> None:
        """Write the end of a content block."""
        content = _begun(block)
        if block.kind == "reasoning":
            # Clients send it back with the block; only the API's own servers could check one.
            signature = uuid.uuid4().hex
            delta = {"type": "signature_delta", "signature": signature}
            self._event("content_block_delta", index=block.index, delta=delta)
            content |= {"thinking": block.text, "signature": signature}
        elif block.kind == "text":
            content["text"] = block.text
        else:
            read = arguments(block)
            content["input"] = {"INVALID_JSON": block.text} if read is None else read
        self._content.append(content)
        self._event("content_block_stop", index=block.index)

    def _event(self, kind: str, **fields: Any) -> None:
        self._send(kind, {"type": kind, **fields})


def _begun(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    if block.kind == "text":
        return {"type": "text", "text": ""}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}


def arguments(block: Block) -> dict[str, Any] | None:
    """Return the arguments of a call; None where they are no object, or not complete."""
    try:
        read = json.loads(block.text or "{}")
    except (ValueError, RecursionError):
        return None
    return read if isinstance(read, dict) else None


def stop_reason(
    finish_reason: str | None, matched: int | str | None, blocks: list[Block]
) -> tuple[str | None, str | None]:
    """Return Anthropic's stop reason and stop sequence.

    A stop string wins over calls of tools, unless they are complete: one that it cut short must not run.
    """
    calls = [block for block in blocks if block.kind == "tool_call"]
    if finish_reason == "length":
        return "max_tokens", None
    if calls and all(arguments(call) is not None for call in calls):
        return "tool_use", None
    if isinstance(matched, str) and finish_reason == "stop":
        return "stop_sequence", matched
    if calls or finish_reason == "tool_calls":
        return "tool_use", None
    return "end_turn", None


def usage(chat: dict[str, Any]) -> dict[str, int]:
    """Return the usage of a message, made of that of a chat: tokens of the prompt that were in a cache count apart."""
    details = chat.get("prompt_tokens_details") or {}
    named = {"cached_tokens": "cache_read_input_tokens", "created_cache_tokens": "cache_creation_input_tokens"}
    cached = {there: details[name] for name, there in named.items() if details.get(name) is not None}
    return {
        "input_tokens": max(0, chat["prompt_tokens"] - sum(cached.values())),
        **cached,
        "output_tokens": chat["completion_tokens"],
    }
