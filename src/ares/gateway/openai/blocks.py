"""An output as blocks, one after the other: reasoning, text, calls of tools.

Chat completions send the parts of a message as they come; `/v1/responses` and `/v1/messages` send blocks, each of them
opened, filled and closed. The order of the blocks is vLLM's (0.32, entrypoints/openai/responses/streaming_events.py and
entrypoints/anthropic/serving.py).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from ares.gateway.openai.parsing import MessageDelta, ToolCallDelta

_encode = msgspec.json.Encoder().encode
Kind = Literal["reasoning", "text", "tool_call"]


@dataclass(slots=True)
class Block:
    """One block.

    Attributes
    ----------
    index
        Its number in the output.
    call_id, name
        Of a call.
    logprobs
        The log probabilities of a text, as its route writes them.
    complete
        Whether the output went on behind it, or ended there by itself.
    """

    kind: Kind
    index: int
    call_id: str = ""
    name: str = ""
    parts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = True

    @property
    def text(self) -> str:
        """Its text so far: of a call, the JSON of its arguments."""
        return "".join(self.parts)


class BlockWriter(ABC):
    """Takes what tokens add to a message, and calls the methods of a route's form for each block.

    Attributes
    ----------
    blocks
        All blocks so far; the last one may be open.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._events: list[bytes] = []
        self._open: Block | None = None
        self._call_index: int | None = None
        # Text between the deltas of one call: a block of its own behind the call.
        self._held: list[str] = []

    def take_events(self) -> bytes:
        """Return the events since the last call, as server-sent events."""
        events = b"".join(self._events)
        self._events.clear()
        return events

    def _send(self, kind: str, body: dict[str, Any]) -> None:
        self._events.append(b"event: " + kind.encode() + b"\ndata: " + _encode(body) + b"\n\n")

    @abstractmethod
    def opened(self, block: Block) -> None:
        """Write the beginning of a block."""

    @abstractmethod
    def extended(self, block: Block, text: str, logprobs: list[dict[str, Any]]) -> None:
        """Write what is new in a block."""

    @abstractmethod
    def closed(self, block: Block) -> None:
        """Write the end of a block."""

    def add(self, delta: MessageDelta, logprobs: list[dict[str, Any]] | None = None) -> None:
        """Add a delta; `logprobs` are those of its text, or of tokens at its end that have none."""
        if delta.reasoning:
            self._extend(self._of_kind("reasoning"), delta.reasoning, [])
        if delta.content:
            if self._open is not None and self._open.kind == "tool_call":
                self._held.append(delta.content)
            else:
                self._extend(self._of_kind("text"), delta.content, logprobs or [])
        elif logprobs and self._open is not None and self._open.kind == "text":
            self._extend(self._open, "", logprobs)
        for call in delta.tool_calls:
            self._call(call)

    def end(self, *, cut: bool) -> None:
        """End the output; `cut`: by a limit, in the middle of the last block."""
        if self._open is not None and cut:
            self._open.complete = False
        self._close()

    def _call(self, call: ToolCallDelta) -> None:
        block = self._open
        if block is None or block.kind != "tool_call" or call.index != self._call_index:
            if call.name is None:
                return  # the rest of a call that is closed already
            block = self._begin("tool_call", call.id or "", call.name)
            self._call_index = call.index
        if call.arguments:
            self._extend(block, call.arguments, [])

    def _of_kind(self, kind: Kind) -> Block:
        """Return the open block if it is of a kind, or a new one."""
        return self._open if self._open is not None and self._open.kind == kind else self._begin(kind)

    def _begin(self, kind: Kind, call_id: str = "", name: str = "") -> Block:
        self._close()
        block = self._open = Block(kind, len(self.blocks), call_id, name)
        self.blocks.append(block)
        self.opened(block)
        return block

    def _extend(self, block: Block, text: str, logprobs: list[dict[str, Any]]) -> None:
        block.parts.append(text)
        block.logprobs += logprobs
        self.extended(block, text, logprobs)

    def _close(self) -> None:
        """Close the open block, and write the text held back behind it."""
        block, self._open, held = self._open, None, "".join(self._held)
        self._held.clear()
        if block is not None:
            self.closed(block)
        if held:
            self._extend(self._begin("text"), held, [])
            self._close()
