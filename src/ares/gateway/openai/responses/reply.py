"""A response of `/v1/responses`: its events as tokens come, and its object.

The order of the events is that of vLLM 0.32 (openai/responses/streaming_events.py). As OpenAI has it and vLLM does not,
a response that a limit ended closes with `response.incomplete`, and one that failed with `response.failed`.
"""

import time
import uuid
from typing import Any

import msgspec

from ares.gateway.openai.blocks import Block, BlockWriter
from ares.gateway.openai.responses.requests import ResponsesRequest

_encode = msgspec.json.Encoder().encode
_PREFIXES = {"reasoning": "rs", "text": "msg", "tool_call": "fc"}
# Fields of the request that the response repeats as they are.
_REPEATED = ("instructions", "max_tool_calls", "metadata", "prompt_cache_key", "safety_identifier", "user")


class ResponseWriter(BlockWriter):
    """Writes one response.

    Parameters
    ----------
    request
        The client's.
    response_id, model
        Of the response.
    parameters
        The sampling parameters that were chosen, vLLM's names.
    maximum_tokens
        Limit of the output.
    """

    def __init__(
        self,
        request: ResponsesRequest,
        response_id: str,
        model: str,
        parameters: dict[str, Any],
        maximum_tokens: int,
    ) -> None:
        super().__init__()
        self._sequence_number = 0
        self._item_ids: list[str] = []
        self._output: list[dict[str, Any]] = []
        self._common = _common(request, response_id, model, parameters, maximum_tokens)

    def start(self) -> None:
        """Write the events before the first token."""
        for kind in ("response.created", "response.in_progress"):
            self._event(kind, response=self._response("in_progress"))

    def complete(self, usage: dict[str, Any], *, cut: bool) -> dict[str, Any]:
        """End the response, and return it; `cut`: a limit on tokens ended it."""
        self.end(cut=cut)
        status = "incomplete" if cut else "completed"
        response = self._response(status, usage=usage)
        if cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = int(time.time())
        self._event(f"response.{status}", response=response)
        return response

    def fail(self, message: str, status: int) -> None:
        """Write that the response has failed, with an HTTP status in place of the one that was sent already."""
        code = "server_error" if status >= 500 else "invalid_prompt"
        self._event("response.failed", response=self._response("failed", error={"code": code, "message": message}))

    # --- blocks ---

    def opened(self, block: Block) -> None:
        """Write the beginning of an item."""
        self._item_ids.append(f"{_PREFIXES[block.kind]}_{uuid.uuid4().hex}")
        if block.kind == "tool_call":
            block.call_id = block.call_id or f"call_{uuid.uuid4().hex}"
        item = _item(block, self._item_ids[-1], "in_progress")
        self._event("response.output_item.added", output_index=block.index, item=item)
        if block.kind != "tool_call":
            self._part_event("response.content_part.added", block, part=_part(block, ""))

    def extended(self, block: Block, text: str, logprobs: list[dict[str, Any]]) -> None:
        """Write what is new in an item."""
        if block.kind == "reasoning":
            self._part_event("response.reasoning_text.delta", block, delta=text)
        elif block.kind == "text":
            self._part_event("response.output_text.delta", block, delta=text, logprobs=logprobs)
        else:
            self._item_event("response.function_call_arguments.delta", block, delta=text)

    def closed(self, block: Block) -> None:
        """Write the end of an item."""
        text = block.text
        if block.kind == "reasoning":
            self._part_event("response.reasoning_text.done", block, text=text)
        elif block.kind == "text":
            self._part_event("response.output_text.done", block, text=text, logprobs=block.logprobs)
        else:
            self._item_event("response.function_call_arguments.done", block, arguments=text, name=block.name)
        if block.kind != "tool_call":
            self._part_event("response.content_part.done", block, part=_part(block, text))
        item = _item(block, self._item_ids[block.index], "completed" if block.complete else "incomplete")
        self._output.append(item)
        self._event("response.output_item.done", output_index=block.index, item=item)

    # --- events ---

    def _item_event(self, kind: str, block: Block, **fields: Any) -> None:
        self._event(kind, item_id=self._item_ids[block.index], output_index=block.index, **fields)

    def _part_event(self, kind: str, block: Block, **fields: Any) -> None:
        # Each item has one part.
        self._item_event(kind, block, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> None:
        body = {"type": kind, "sequence_number": self._sequence_number, **fields}
        self._sequence_number += 1
        self._send(kind, body)

    def _response(self, status: str, **fields: Any) -> dict[str, Any]:
        return {**self._common, "status": status, "output": list(self._output), **fields}


def _common(
    request: ResponsesRequest, response_id: str, model: str, parameters: dict[str, Any], maximum_tokens: int
) -> dict[str, Any]:
    """Return what a response has in all of its states."""
    reasoning, text = (
        None if given is None else given.model_dump(exclude_unset=True, by_alias=True)
        for given in (request.reasoning, request.text)
    )
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        **{name: getattr(request, name) for name in _REPEATED},
        "background": False,
        "completed_at": None,
        "error": None,
        "frequency_penalty": parameters.get("frequency_penalty", 0.0),
        "incomplete_details": None,
        "max_output_tokens": maximum_tokens,
        "parallel_tool_calls": request.parallel_tool_calls,
        "presence_penalty": parameters.get("presence_penalty", 0.0),
        "previous_response_id": None,
        "prompt": None,
        "reasoning": reasoning,
        "service_tier": (request.model_extra or {}).get("service_tier") or "auto",
        "temperature": parameters.get("temperature", 1.0),
        "text": text,
        "tool_choice": request.tool_choice if request.tools else "none",
        "tools": request.tools,
        "top_logprobs": request.top_logprobs,
        "top_p": parameters.get("top_p", 1.0),
        "truncation": "disabled",
        "usage": None,
    }


def _part(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(block.logprobs)}


def _item(block: Block, item_id: str, status: str) -> dict[str, Any]:
    begun = status == "in_progress"
    if block.kind == "tool_call":
        return {
            "type": "function_call",
            "id": item_id,
            "call_id": block.call_id,
            "name": block.name,
            "arguments": block.text,
            "status": status,
        }
    content = [] if begun else [_part(block, block.text)]
    if block.kind == "reasoning":
        return {"type": "reasoning", "id": item_id, "summary": [], "content": content, "status": status}
    return {"type": "message", "id": item_id, "role": "assistant", "content": content, "status": status}


def usage(chat: dict[str, Any]) -> dict[str, Any]:
    """Return the usage of a response, made of that of a chat; what is not counted there is 0."""
    prompt = chat.get("prompt_tokens_details") or {}
    output = chat.get("completion_tokens_details") or {}
    cached, written = prompt.get("cached_tokens") or 0, prompt.get("created_cache_tokens") or 0
    return {
        "input_tokens": chat["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
        "output_tokens": chat["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": output.get("reasoning_tokens") or 0, "tool_output_tokens": 0},
        "total_tokens": chat["total_tokens"],
    }
