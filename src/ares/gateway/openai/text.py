"""Text at the edge: chat templates and tokens in, incremental text and stop strings out.

A stream has one detokenizer for its whole life, in the gateway. That is why a move between instances cannot be seen in
the text: a character whose bytes, or a stop string whose letters, come from two instances is put together here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateSyntaxError
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ares.gateway.openai import limits, rendering, tokenizer
from ares.gateway.openai.body import BadRequestError
from ares.gateway.openai.messages import Message, Tool, conversation, without_developer
from ares.gateway.openai.templates import knows_developer, takes_parts
from ares.gateway.openai.token_texts import NO_TEXTS, TokenTexts

# Prompt tokens that prime the decoder; a tokenizer's spacing depends on the last few only.
_PRIMING = 16
# Of an environment or a model folder, not of a client's messages.
_OUR_FAULTS = (ImportError, MemoryError, OSError, TemplateSyntaxError)


class TemplateError(ValueError):
    """The messages do not fit the model's chat template."""


class Truncation(NamedTuple):
    """How many tokens of a prompt are kept, and of which of its ends, as in vLLM's ``truncation_side``.

    Without a side, the end is kept, and so are the special tokens that the tokenizer adds.
    """

    tokens: int
    side: Literal["left", "right"] | None = None

    def apply(self, ids: list[int]) -> list[int]:
        """Return the ids that are kept."""
        if self.side == "right":
            return ids[: self.tokens]
        return ids[max(0, len(ids) - self.tokens) :]


@dataclass(frozen=True, slots=True)
class Chats:
    """How an operator has chats rendered: vLLM's flags of these names.

    Attributes
    ----------
    chat_template
        Jinja source, or the name of one of the model's templates, in place of the model's default.
    content_format
        Whether templates get text (``string``) or parts (``openai``); ``auto``: what each takes.
    default_chat_template_kwargs
        Variables of the template where a request sets none.
    """

    chat_template: str | None = None
    content_format: Literal["auto", "string", "openai"] = "auto"
    default_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)


class TextModel:
    """The tokenizer of the served model.

    Parameters
    ----------
    folder
        A model folder with a tokenizer that transformers can load.
    chats
        How chats are rendered.
    """

    def __init__(self, folder: Path, chats: Chats | None = None) -> None:
        loaded = tokenizer.load(folder)
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.chat_template, self._special_tokens = loaded.chat_template, loaded.special_tokens
        self._chats = chats or Chats()
        self._space = _space(self.tokenizer)
        self.token_texts = TokenTexts.of(self.tokenizer)

    def encode(self, text: str, *, special: bool = True, truncation: Truncation | None = None) -> list[int]:
        """Tokenise text; `special` adds what the model expects at the start of a prompt."""
        if truncation is not None and special and truncation.side is None:
            return self._encode_truncated(text, truncation)
        # A batch of one: `encode` keeps Python's global lock, and would block all streams even from a thread.
        ids = list(self.tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids)
        return ids if truncation is None else truncation.apply(ids)

    def _encode_truncated(self, text: str, truncation: Truncation) -> list[int]:
        encoding = self.tokenizer.encode_batch([text], add_special_tokens=False)[0]
        room = max(0, truncation.tokens - self.tokenizer.num_special_tokens_to_add(is_pair=False))
        encoding.truncate(room, direction="left")
        return truncation.apply(self.tokenizer.post_process(encoding, add_special_tokens=True).ids)

    def chat_text(
        self,
        messages: list[Message],
        tools: list[Tool] | None = None,
        *,
        variables: dict[str, Any] | None = None,
        template: str | None = None,
    ) -> str:
        """Apply the chat template, as vLLM 0.32 does (renderers/hf.py).

        Parameters
        ----------
        messages, tools
            The client's.
        variables
            Of the template, and settings of `rendering.render`.
        template
            Jinja source, or the name of one of the model's templates, in place of the operator's or the model's own.

        Raises
        ------
        TemplateError
            The model has no template, or the template refuses the messages.
        BadRequestError
            A message has what no template gets.
        """
        schemas = [tool.rendered() for tool in tools] if tools else None
        source = self._template(template or self._chats.chat_template, tools=schemas is not None)
        try:
            parts = (
                takes_parts(source) if self._chats.content_format == "auto" else self._chats.content_format == "openai"
            )
        except TemplateSyntaxError as error:
            if template is None:
                raise
            raise TemplateError(f"the request's chat_template is none: {error}") from error
        chat = conversation(messages, parts=parts)
        if not knows_developer(source):
            chat = without_developer(chat)
        settings = {
            **self._special_tokens,
            "add_generation_prompt": True,
            **self._variables(variables),
            "tools": schemas,
        }
        try:
            text = rendering.render(source, chat, **settings)
            text.encode()  # arguments of tool calls can spell half a surrogate pair
        except _OUR_FAULTS:
            raise
        except Exception as error:  # templates are programs of the model's author: they raise anything
            raise TemplateError(f"the chat template refuses these messages: {error}") from error
        return text

    def render_chat(
        self,
        messages: list[Message],
        tools: list[Tool] | None = None,
        *,
        special: bool = False,
        variables: dict[str, Any] | None = None,
    ) -> list[int]:
        """Apply the chat template and tokenise; `special` adds special tokens, although a template writes its own.

        The other parameters and what is raised are those of `chat_text`.
        """
        return self.encode(self.chat_text(messages, tools, variables=variables), special=special)

    def bad_words(self, words: list[str]) -> int:
        """Count the tokens of bad words as vLLM forbids them: each with a space before it too (sampling_params.py).

        Raises
        ------
        BadRequestError
            They are more than an engine takes, or one of them has no token.
        """
        sequences: list[list[int]] = []
        for word in dict.fromkeys(words):
            plain, spaced = (self.encode(prefix + word.lstrip(), special=False) for prefix in ("", " "))
            if not plain:
                raise BadRequestError(f"bad_words: {word!r} has no token", "bad_words")
            sequences.append(plain)
            if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
                sequences.append(spaced)
        tokens = sum(map(len, sequences))
        for count, most, what in (
            (
                len(sequences),
                limits.MAXIMUM_BAD_WORDS,
                "words, with and without a space before (VLLM_MAX_NUM_BAD_WORDS)",
            ),
            (tokens, limits.MAXIMUM_BAD_WORD_TOKENS, "tokens in all (VLLM_MAX_BAD_WORDS_TOTAL_TOKENS)"),
        ):
            if count > most:
                raise BadRequestError(f"bad_words: {count}; at most {most} {what}", "bad_words")
        return tokens

    def _variables(self, given: dict[str, Any] | None) -> dict[str, Any]:
        """Return the template's variables; a request's own count unless they are null or "auto" (`merge_kwargs`)."""
        own = {name: value for name, value in (given or {}).items() if value is not None and value != "auto"}
        return {"cohere_format": "cmd4", **self._chats.default_chat_template_kwargs, **own}

    def _template(self, given: str | None, *, tools: bool) -> str:
        """Return the template of a chat with or without tools, as transformers chooses it."""
        own = self.chat_template
        if isinstance(own, dict):
            own = own.get(given or ("tool_use" if tools else "default"), given or own.get("default"))
        elif given is not None:
            own = given
        if own is None:
            raise TemplateError("this model has no chat template: it completes prompts, at /v1/completions")
        return own

    def decode(self, ids: list[int]) -> str:
        """Text of tokens, special ones included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def token(self, token_id: int) -> str:
        """Text of a token alone, with the spaces at its start, which the decoder of a SentencePiece model strips."""
        text = self.decode([token_id])
        if self._space is None:
            return text
        piece = str(self.tokenizer.id_to_token(token_id) or "")
        spaces = len(piece) - len(piece.lstrip(self._space))
        return " " * (spaces - (len(text) - len(text.lstrip(" ")))) + text


def _space(tokenizer: Tokenizer) -> str | None:
    """Return the letter that stands for a space in a SentencePiece model's tokens; None for other models."""
    if tokenizer.pre_tokenizer is None:
        return None
    state = json.loads(tokenizer.pre_tokenizer.__getstate__())
    steps = state.get("pretokenizers", []) if state["type"] == "Sequence" else [state]
    return next((str(step["replacement"]) for step in steps if step["type"] == "Metaspace"), None)


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
    texts
        What tokens add to any text; None: each is decoded in its context, to the same text.
    """

    __slots__ = (
        "_checked",
        "_given",
        "_held",
        "_include_stop",
        "_longest",
        "_minimum_tokens",
        "_skip_special",
        "_stop",
        "_stream",
        "_text",
        "_texts",
        "_tokenizer",
        "_unseen",
        "_whole",
        "matched",
        "tokens",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        *,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        minimum_tokens: int = 0,
        texts: TokenTexts | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._texts: Mapping[int, str] = NO_TEXTS if texts is None else texts
        self._stream = DecodeStream(ids=prompt[-_PRIMING:], skip_special_tokens=skip_special)
        # Whether all tokens so far have given their text, and the last of them where the stream has not seen it.
        self._whole = False
        self._unseen: int | None = None
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

    def push_known(self, token: int) -> str:
        """Add a token whose text is known and of which nothing is held back; return its text.

        Empty where it is to be added by `push`, which does the same in any case.
        """
        text = self._texts[token] if self._whole and not self._stop else ""
        if text:
            self._unseen = token
            self.tokens += 1
        return text

    def _step(self, token: int) -> str:
        if self._whole and (text := self._texts[token]):
            self._unseen = token
            return text
        if self._unseen is not None:
            # As the stream would be: once a token has given its text, it keeps that token alone.
            self._stream = DecodeStream(ids=[self._unseen], skip_special_tokens=self._skip_special)
            self._unseen = None
        text = self._decode(token)
        self._whole = bool(text)
        return text

    def _decode(self, token: int) -> str:
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


class UnspacedDetokenizer(Detokenizer):
    """A detokenizer that shows special tokens, and puts no spaces between them (vLLM's FastIncrementalDetokenizer)."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], **options: Any) -> None:
        super().__init__(tokenizer, prompt, skip_special=False, **options)
        self._added = {token: added.content for token, added in tokenizer.get_added_tokens_decoder().items()}
        self._after_added = False

    def push_known(self, token: int) -> str:
        """Add a token whose text is known, as any detokenizer."""
        text = super().push_known(token)
        if text:  # that of an added token is not
            self._after_added = False
        return text

    def _step(self, token: int) -> str:
        text = super()._step(token)
        added = self._added.get(token)
        if added is not None and self._after_added:
            text = added
        self._after_added = added is not None
        return text
