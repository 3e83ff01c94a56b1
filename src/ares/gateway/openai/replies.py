"""OpenAI's replies, rendered from tokens: chunks of a stream and whole bodies.

A chunk is built from a prefix and a suffix made once per choice; only the text between is encoded for each.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ares.gateway.openai.text import Detokenizer, TextModel
from ares.gateway.pool.generate import Delta, PositionLogprobs

_encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return OpenAI's usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def event(body: Any) -> bytes:
    """Return one server-sent event."""
    return b"data: " + _encode(body) + b"\n\n"


@dataclass(slots=True)
class Envelope:
    """What all chunks of one reply share."""

    id: str
    model: str
    chat: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: list[dict[str, Any]], *, chunk: bool, **more: Any) -> dict[str, Any]:
        """Return a reply object."""
        kind = "chat.completion" if self.chat else "text_completion"
        if chunk and self.chat:
            kind += ".chunk"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more}


class Choice:
    """One choice of a reply: takes tokens in, gives out chunks or, at the end, the whole.

    Parameters
    ----------
    logprobs
        How many alternatives each token's log probabilities list; None for no log probabilities.
    token_ids
        Give the token ids too.
    tokens_as_ids
        Name tokens by their ids in log probabilities.
    counted_prompt
        Tokens of the prompt, where every chunk has the usage so far.

    Attributes
    ----------
    finish_reason
        None until the choice is complete.
    """

    def __init__(
        self,
        envelope: Envelope,
        index: int,
        detokenizer: Detokenizer,
        text_model: TextModel,
        *,
        logprobs: int | None,
        token_ids: bool = False,
        tokens_as_ids: bool = False,
        counted_prompt: int | None = None,
    ) -> None:
        self._envelope = envelope
        self._index = index
        self._detokenizer = detokenizer
        self._text_model = text_model
        self._logprobs = logprobs
        self._token_ids = token_ids
        self._tokens_as_ids = tokens_as_ids
        self._counted_prompt = counted_prompt
        # Chunks with nothing but text differ only in that text.
        self._plain = not token_ids and counted_prompt is None
        self._parts: list[str] = []
        self._all_logprobs: list[PositionLogprobs] = []
        self._all_ids: list[int] = []
        self._offset = 0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        plain = self._chunk("\0", None, None)
        self._before, self._after = event(plain).split(b'"\\u0000"')

    @property
    def completion_tokens(self) -> int:
        """Output tokens so far; those after a stop string do not count."""
        return self._detokenizer.tokens

    def opening(self, prefix: str = "") -> bytes:
        """Return the chunk that comes before the first token: the role, or an echoed prompt."""
        if not self._envelope.chat:
            return event(self._chunk(prefix, None, None)) if prefix else b""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}
        return event(self._envelope.body([choice], chunk=True, **self._usage()))

    def stream(self, batch: list[Delta]) -> bytes:
        """Add tokens and return their chunks, one for each delta that has something to show."""
        chunks = []
        for delta in batch:
            before = self._detokenizer.tokens
            text, content = self._add(delta)
            if self.finish_reason is None and content is None and self._plain:
                if text:
                    chunks.append(self._before + _encode(text) + self._after)
            else:
                ids = (delta.token_ids or [])[: self._detokenizer.tokens - before]
                chunks.append(event(self._chunk(text, content, ids)))
            if self.finish_reason is not None:
                break
        return b"".join(chunks)

    def collect(self, batch: list[Delta]) -> None:
        """Add tokens for a reply that is sent as a whole."""
        for delta in batch:
            text, content = self._add(delta)
            self._parts.append(text)
            self._all_logprobs += content or []
            self._all_ids += delta.token_ids or []
            if self.finish_reason is not None:
                return

    def whole(self, prefix: str = "") -> dict[str, Any]:
        """Return the choice of a reply that is sent as a whole; `prefix` is an echoed prompt."""
        text = prefix + "".join(self._parts)
        choice: dict[str, Any] = {"index": self._index}
        if self._envelope.chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        choice["logprobs"] = self._render(self._all_logprobs) if self._logprobs is not None else None
        choice["finish_reason"] = self.finish_reason
        choice["stop_reason"] = self.stop_reason
        if self._token_ids:
            choice["token_ids"] = self._all_ids[: self.completion_tokens]
        return choice

    def _add(self, delta: Delta) -> tuple[str, list[PositionLogprobs] | None]:
        before = self._detokenizer.tokens
        ids = delta.token_ids or []
        text = self._detokenizer.push(ids, stop_token=delta.finish_reason == "stop")
        if self._detokenizer.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self._detokenizer.matched
        elif delta.finish_reason is not None:
            text += self._detokenizer.finish()
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        content = None
        if self._logprobs is not None and delta.logprobs is not None:
            content = (delta.logprobs.content or [])[: self._detokenizer.tokens - before]
        return text, content

    def _chunk(self, text: str, content: list[PositionLogprobs] | None, ids: list[int] | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": self._index}
        if self._envelope.chat:
            choice["delta"] = {"content": text}
        else:
            choice["text"] = text
        choice["logprobs"] = self._render(content) if content is not None else None
        choice["finish_reason"] = self.finish_reason
        if self.finish_reason is not None:
            choice["stop_reason"] = self.stop_reason
        if self._token_ids:
            choice["token_ids"] = ids or []
        return self._envelope.body([choice], chunk=True, **self._usage())

    def _usage(self) -> dict[str, Any]:
        return {} if self._counted_prompt is None else {"usage": usage(self._counted_prompt, self.completion_tokens)}

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._tokens_as_ids else self._text_model.decode([token_id])

    def _render(self, content: list[PositionLogprobs]) -> dict[str, Any]:
        asked = self._logprobs or 0
        if self._envelope.chat:

            def entry(token_id: int, logprob: float) -> dict[str, Any]:
                token = self._name(token_id)
                return {"token": token, "logprob": logprob, "bytes": list(token.encode("utf-8", "replace"))}

            return {
                "content": [
                    {
                        **entry(p.token_id, p.logprob),
                        "top_logprobs": [entry(t.token_id, t.logprob) for t in p.top_logprobs[:asked]],
                    }
                    for p in content
                ]
            }
        tokens = [self._name(p.token_id) for p in content]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [p.logprob for p in content],
            "top_logprobs": [{self._name(t.token_id): t.logprob for t in p.top_logprobs[: asked + 1]} for p in content],
            "text_offset": offsets,
        }
