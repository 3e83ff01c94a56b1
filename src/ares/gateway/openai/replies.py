"""OpenAI's replies, rendered from tokens: chunks of a stream and whole bodies.

A chunk is built from a prefix and a suffix made once per choice; only the text between is encoded for each.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ares.gateway.openai.logprobs import LogprobsRenderer
from ares.gateway.openai.text import Detokenizer, TextModel
from ares.gateway.pool.delta import Delta, PositionLogprobs

encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


def usage(prompt_tokens: int, completion_tokens: int, reasoning_tokens: int | None = None) -> dict[str, Any]:
    """Return OpenAI's usage object; reasoning tokens that are not counted are None."""
    details = {} if reasoning_tokens is None else {"completion_tokens_details": {"reasoning_tokens": reasoning_tokens}}
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        **details,
    }


def event(body: Any) -> bytes:
    """Return one server-sent event."""
    return b"data: " + encode(body) + b"\n\n"


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


@dataclass(frozen=True, slots=True)
class Shown:
    """What a choice shows besides its text.

    Attributes
    ----------
    prompt_ids
        Token ids of the prompt; None: not shown.
    prompt_text
        Text of the prompt, shown with the first chunk of a chat; None: not shown.
    role
        Of the message of a chat.
    interval
        Tokens of a chunk; the first and the last one are sent at once.
    only_prompt
        Whether the output is not shown at all.
    """

    prompt_ids: list[int] | None = None
    prompt_text: str | None = None
    role: str = "assistant"
    interval: int = 1
    only_prompt: bool = False

    def of_prompt(self) -> dict[str, Any]:
        """Return the fields of a chat's reply that show its prompt."""
        fields = {"prompt_token_ids": self.prompt_ids, "prompt_text": self.prompt_text}
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(slots=True)
class _Unsent:
    """Tokens that wait for the rest of their chunk."""

    text: str = ""
    logprobs: list[PositionLogprobs] | None = None
    ids: list[int] = field(default_factory=list)
    tokens: int = 0

    def add(self, text: str, logprobs: list[PositionLogprobs] | None, ids: list[int], tokens: int) -> None:
        self.text += text
        if logprobs is not None:
            self.logprobs = [*(self.logprobs or []), *logprobs]
        self.ids = [*self.ids, *ids]
        self.tokens += tokens


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
    shown
        What else is shown.

    Attributes
    ----------
    finish_reason
        None until the choice is complete.
    slow
        Whether its next tokens may take so long that other streams would wait for them.
    """

    __slots__ = (
        "_after",
        "_all_ids",
        "_all_logprobs",
        "_before",
        "_counted_prompt",
        "_detokenizer",
        "_envelope",
        "_index",
        "_logprobs",
        "_options",
        "_parts",
        "_plain",
        "_prompt_ids",
        "_sent",
        "_token_ids",
        "_unsent",
        "finish_reason",
        "slow",
        "stop_reason",
    )

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
        shown: Shown = Shown(),
    ) -> None:
        self._envelope = envelope
        self._index = index
        self._detokenizer = detokenizer
        self._logprobs = (
            None
            if logprobs is None
            else LogprobsRenderer(text_model, logprobs, chat=envelope.chat, as_ids=tokens_as_ids)
        )
        self._token_ids = token_ids
        self._counted_prompt = counted_prompt
        self._prompt_ids: list[int] | None = None
        # Chunks with nothing but text differ only in that text.
        self._plain = not token_ids and counted_prompt is None and shown.interval == 1 and not shown.only_prompt
        self._options = shown
        self._unsent: _Unsent | None = None
        self._sent = False
        self._parts: list[str] = []
        self._all_logprobs: list[PositionLogprobs] = []
        self._all_ids: list[int] = []
        self.finish_reason: str | None = None
        self.slow = False
        self.stop_reason: int | str | None = None
        plain = self._chunk(self._shown("\0"), None, None)
        self._before, self._after = event(plain).split(b'"\\u0000"')
        # In a completion, the first chunk or the whole choice shows them.
        self._prompt_ids = None if envelope.chat else shown.prompt_ids

    @property
    def completion_tokens(self) -> int:
        """Output tokens so far; those after a stop string do not count."""
        return self._detokenizer.tokens

    @property
    def reasoning_tokens(self) -> int | None:
        """Tokens of the reasoning so far; None where they are not counted."""
        return None

    def opening(self, prefix: str = "") -> bytes:
        """Return the chunk that comes before the first token: the role, or an echoed prompt."""
        if not self._envelope.chat:
            return event(self._chunk(self._shown(prefix), None, None)) if prefix else b""
        delta = {"role": self._options.role, "content": ""}
        choice = {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}
        return event(self._envelope.body([choice], chunk=True, **self._options.of_prompt(), **self._usage()))

    def stream_token(self, token_id: int) -> bytes:
        """Add a token in the middle of an output and return its chunk.

        Empty where it is to be added by `stream`, which does the same in any case.
        """
        if not self._plain or not (text := self._detokenizer.push_known(token_id)):
            return b""
        return self._before + encode(text) + self._after

    def stream(self, batch: list[Delta]) -> bytes:
        """Add tokens and return their chunks, one for each delta that has something to show."""
        chunks = []
        for delta in batch:
            before = self._detokenizer.tokens
            text, content = self._add(delta)
            if self.finish_reason is None and content is None and self._plain:
                if text:
                    chunks.append(self._before + encode(text) + self._after)
            else:
                ids = (delta.token_ids or [])[: self._detokenizer.tokens - before]
                found = self._gather(text, content, ids, self._detokenizer.tokens - before)
                if found is not None:
                    text, content, ids = found
                    chunks.append(event(self._chunk(self._shown(text), content, ids)))
            if self.finish_reason is not None:
                break
        return b"".join(chunks)

    def _gather(
        self, text: str, content: list[PositionLogprobs] | None, ids: list[int], tokens: int
    ) -> tuple[str, list[PositionLogprobs] | None, list[int]] | None:
        """Return these tokens with those before that have not been sent; None where they wait for more."""
        if self._options.interval > 1:
            unsent = self._unsent = self._unsent or _Unsent()
            unsent.add(text, content, ids, tokens)
            if self._sent and self.finish_reason is None and unsent.tokens < self._options.interval:
                return None
            text, content, ids = unsent.text, unsent.logprobs, unsent.ids
            self._unsent, self._sent = None, True
        return text, content, ids

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
            choice["message"] = {"role": self._options.role, "content": text}
        else:
            choice["text"] = text
        choice["logprobs"] = None if self._logprobs is None else self._logprobs.render(self._all_logprobs)
        choice["finish_reason"] = self.finish_reason
        choice["stop_reason"] = self.stop_reason
        if self._token_ids:
            choice["token_ids"] = self._all_ids[: self.completion_tokens]
        return choice | self._taken_prompt_ids()

    def _add(self, delta: Delta) -> tuple[str, list[PositionLogprobs] | None]:
        before = self._detokenizer.tokens
        ids = delta.token_ids or []
        text = self._detokenizer.push(ids, stop_token=delta.finish_reason == "stop")
        if self._detokenizer.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self._detokenizer.matched
        elif delta.finish_reason is not None:
            text += self._detokenizer.finish()
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        if self._options.only_prompt:
            text = ""
        content = None
        if self._logprobs is not None and delta.logprobs is not None:
            content = (delta.logprobs.content or [])[: self._detokenizer.tokens - before]
        return text, content

    def _shown(self, text: str) -> Any:
        """Return a chunk's text in the form of its route."""
        return {"content": text} if self._envelope.chat else text

    def _chunk(self, shown: Any, content: list[PositionLogprobs] | None, ids: list[int] | None) -> dict[str, Any]:
        """Return a chunk that shows this: the delta of a chat, or text."""
        choice: dict[str, Any] = {"index": self._index, "delta" if self._envelope.chat else "text": shown}
        choice["logprobs"] = self._rendered(content)
        choice["finish_reason"] = self.finish_reason
        if self.finish_reason is not None:
            choice["stop_reason"] = self.stop_reason
        if self._token_ids:
            choice["token_ids"] = ids or []
        choice |= self._taken_prompt_ids()
        return self._envelope.body([choice], chunk=True, **self._usage())

    def _taken_prompt_ids(self) -> dict[str, Any]:
        """Return the prompt's token ids where they are to be shown and have not been yet."""
        taken, self._prompt_ids = self._prompt_ids, None
        return {} if taken is None else {"prompt_token_ids": taken}

    def _rendered(self, content: list[PositionLogprobs] | None) -> dict[str, Any] | None:
        return None if content is None or self._logprobs is None else self._logprobs.render(content)

    def _usage(self) -> dict[str, Any]:
        if self._counted_prompt is None:
            return {}
        return {"usage": usage(self._counted_prompt, self.completion_tokens, self.reasoning_tokens)}
