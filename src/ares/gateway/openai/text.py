"""Text at the edge: chat templates and tokens in, incremental text and stop strings out.

A stream has one detokenizer for its whole life, in the gateway. That is why a move between instances cannot be seen in
the text: a character whose bytes, or a stop string whose letters, come from two instances is put together here.
"""

from operator import itemgetter
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ares.gateway.openai import rendering, tokenizer
from ares.gateway.openai.messages import Message, Tool, conversation, without_developer
from ares.gateway.openai.templates import knows_developer, takes_parts

# Prompt tokens that prime the decoder; a tokenizer's spacing depends on the last few only.
_PRIMING = 16
# Of an environment or a model folder, not of a client's messages.
_OUR_FAULTS = (ImportError, MemoryError, OSError, TemplateSyntaxError)


class TemplateError(ValueError):
    """The messages do not fit the model's chat template."""


class TextModel:
    """The tokenizer of the served model.

    Parameters
    ----------
    folder
        A model folder with a tokenizer that transformers can load.
    """

    def __init__(self, folder: Path) -> None:
        loaded = tokenizer.load(folder)
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.chat_template, self._special_tokens = loaded.chat_template, loaded.special_tokens

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokenise text; `special` adds what the model expects at the start of a prompt."""
        # A batch of one: `encode` keeps Python's global lock, and would block all streams even from a thread.
        return list(self.tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids)

    def render_chat(
        self,
        messages: list[Message],
        tools: list[Tool] | None = None,
        *,
        special: bool = False,
        variables: dict[str, Any] | None = None,
    ) -> list[int]:
        """Apply the chat template and tokenise, as vLLM 0.32 does (renderers/hf.py).

        Parameters
        ----------
        messages, tools
            The client's.
        special
            Add the special tokens of a prompt, although a template writes its own.
        variables
            Of the template, and settings of `rendering.render`.

        Raises
        ------
        TemplateError
            The model has no template, or the template refuses the messages.
        BadRequestError
            A message has what no template gets.
        """
        schemas = [tool.rendered() for tool in tools] if tools else None
        template = self._template(tools=schemas is not None)
        chat = conversation(messages, parts=takes_parts(template))
        if not knows_developer(template):
            chat = without_developer(chat)
        settings = {**self._special_tokens, "add_generation_prompt": True, **(variables or {}), "tools": schemas}
        try:
            text = rendering.render(template, chat, **settings)
            text.encode()  # arguments of tool calls can spell half a surrogate pair
        except _OUR_FAULTS:
            raise
        except Exception as error:  # templates are programs of the model's author: they raise anything
            raise TemplateError(f"the chat template refuses these messages: {error}") from error
        return self.encode(text, special=special)

    def _template(self, *, tools: bool) -> str:
        """Return the template of a chat with or without tools, as transformers chooses it."""
        template = self.chat_template
        if isinstance(template, dict):
            template = (tools and template.get("tool_use")) or template.get("default")
        if template is None:
            raise TemplateError("this model has no chat template: it completes prompts, at /v1/completions")
        return template

    def decode(self, ids: list[int]) -> str:
        """Text of tokens, special ones included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


class Detokenizer:
    """Incremental text of one output, cut at the first stop string.

    Follows vLLM 0.32 (v1/engine/detokenizer.py): text that could still become a stop string is held back, tokens after
    the one that completes a stop string do not count, and a stop token leaves no text.

    Parameters
    ----------
    prompt
        Token ids of the prompt.
    stop
        Stop strings.
    minimum_tokens
        Stop strings are not looked for in this many first tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        *,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        minimum_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._stream = DecodeStream(ids=prompt[-_PRIMING:], skip_special_tokens=skip_special)
        self._stop = stop
        self._include_stop = include_stop
        self._minimum_tokens = minimum_tokens
        self._longest = max(map(len, stop), default=0)
        self._held = 0 if include_stop else max(self._longest - 1, 0)
        # With stop strings: the text that is not given out, after as much given text as a match could still include.
        self._text = ""
        self._given = 0
        self._checked = 0
        self.tokens = 0
        self.matched: str | None = None

    def push(self, ids: list[int], *, stop_token: bool = False) -> str:
        """Add output tokens and return the text to give out.

        Parameters
        ----------
        ids
            New output tokens.
        stop_token
            Whether the last of them is a stop token, which counts but leaves no text.

        Returns
        -------
        str
            New text. After the call `tokens` counts the output tokens and `matched` is the stop string that ended
            the output, if one did.
        """
        shown = ids[:-1] if stop_token and not self._include_stop else ids
        if not self._stop:
            self.tokens += len(ids)
            # Nearly always a token comes alone.
            return self._step(shown[0]) if len(shown) == 1 else "".join([self._step(i) for i in shown])
        for token in shown:
            self.tokens += 1
            self._text += self._step(token)
            if self.tokens > self._minimum_tokens and self._find():
                return self._give(len(self._text))
            self._checked = len(self._text)
        self.tokens += len(ids) - len(shown)
        return self._give(len(self._text) - self._held)

    def finish(self) -> str:
        """Return the text that was held back for a stop string that did not come."""
        return self._give(len(self._text))

    def _step(self, token: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except (OverflowError, TypeError):  # beyond 32 bits, beyond 64
            # A token id beyond the vocabulary has no text (a model may have more rows than its tokenizer has tokens).
            return ""
        except Exception as error:
            if "Invalid prefix" not in str(error):
                raise
            # Invalid UTF-8 can break the stream's state (tokenizers, vLLM issue #17448): start over from this token.
            self._stream = DecodeStream(skip_special_tokens=self._skip_special)
            return self._stream.step(self._tokenizer, token) or ""

    def _find(self) -> bool:
        """Look for a stop string that ends in the characters since the last look, and cut the text there."""
        hits = []
        for text in self._stop:
            at = self._text.find(text, max(0, self._checked - len(text) + 1))
            if at >= 0:
                hits.append((at + len(text), at, text))
        if not hits:
            return False
        # The one that a token-by-token search completes first; ties go to the caller's order.
        end, start, self.matched = min(hits, key=itemgetter(0))
        self._text = self._text[: end if self._include_stop else start]
        return True

    def _give(self, until: int) -> str:
        until = max(self._given, until)
        text = self._text[self._given : until]
        self._given = until
        # Forget what no later match can reach.
        drop = max(0, min(self._given, self._checked - self._longest + 1))
        self._text = self._text[drop:]
        self._given -= drop
        self._checked -= drop
        return text
