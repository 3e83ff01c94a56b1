"""`/tokenize` and `/detokenize`: bodies and replies, as vLLM 0.32 has them (entrypoints/serve/tokenize/protocol.py)."""

from typing import Any

from pydantic import BaseModel, Field, StrictBool

from ares.gateway.openai.body import BadRequestError, Body, Listed
from ares.gateway.openai.messages import Message, Tool
from ares.gateway.openai.requests import ChatRequest, CompletionRequest
from ares.gateway.openai.text import TextModel


class TokenizeRequest(Body):
    """`POST /tokenize`: of a prompt, or of the messages of a chat. Fields that a chat request has too mean the same."""

    model: str | None = None
    prompt: str | None = None
    messages: Listed[Message] | None = Field(default=None, min_length=1)
    add_special_tokens: StrictBool | None = None
    """By default true for a prompt, and false for a chat, whose template writes its own."""
    return_token_strs: StrictBool = False
    """Give the tokens as the tokenizer names them, too."""
    tools: Listed[Tool] | None = None
    add_generation_prompt: StrictBool = True
    continue_final_message: StrictBool = False
    chat_template_kwargs: dict[str, Any] | None = None

    def generation_request(self) -> ChatRequest | CompletionRequest:
        """Return the request with this prompt.

        Raises
        ------
        BadRequestError
            There is no prompt, or there are two; or a field is not offered.
        """
        if (self.prompt is None) == (self.messages is None):
            raise BadRequestError("give prompt or messages, one of the two", "prompt")
        kind = ChatRequest if self.prompt is None else CompletionRequest
        own = {name: getattr(self, name) for name in self.model_fields_set & type(self).model_fields.keys()}
        own.pop("return_token_strs", None)
        for name in own.keys() - kind.model_fields.keys():
            raise BadRequestError(f"{name} belongs to messages, not to a prompt", name)
        # They are looked at only to refuse those that are not offered.
        other = {name: value for name, value in (self.model_extra or {}).items() if name not in kind.model_fields}
        made = kind.model_construct(**own, **other)
        made.check_text()
        made.check_options()
        return made


class TokenizeReply(BaseModel):
    """The reply of `POST /tokenize`; `max_model_len` is null before any instance is known."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Listed[int]

    def text(self, model: TextModel) -> str:
        """Return the text of the tokens, special ones included; BadRequestError where there is no such token."""
        size = model.tokenizer.get_vocab_size()
        if not all(0 <= token < size for token in self.tokens):
            raise BadRequestError(f"token ids must lie between 0 and {size - 1}", "tokens")
        return model.decode(self.tokens)


class DetokenizeReply(BaseModel):
    """The reply of `POST /detokenize`."""

    prompt: str
