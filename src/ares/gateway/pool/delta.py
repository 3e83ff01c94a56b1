"""What an instance has generated, as its replies have it, and how a request to it can fail (vLLM 0.32)."""

from typing import Annotated

import msgspec

from ares.protocol.fields import REPETITION, REPETITION_DETECTED


class EngineLostError(Exception):
    """The instance cannot be reached, or its stream broke."""


class EngineRefusedError(Exception):
    """The instance answered with an error; `status` is its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


# Tokenizers and the index of cached prompts take no others.
_TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class TokenLogprob(msgspec.Struct):
    """One candidate token: its id and log probability."""

    token_id: _TokenId
    logprob: float


class PositionLogprobs(TokenLogprob):
    """The sampled token of one position and the candidates that were asked for."""

    top_logprobs: list[TokenLogprob] = []


class Logprobs(msgspec.Struct):
    """Log probabilities, one entry a token."""

    content: list[PositionLogprobs] | None = None


class Delta(msgspec.Struct):
    """New tokens of a stream, and why it ended if it did."""

    token_ids: list[_TokenId] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: Logprobs | None = None

    def name_repetition(self) -> None:
        """Set the finish reason of an output that repeats itself, which an instance ends by the limit of a cut."""
        if self.stop_reason == REPETITION_DETECTED:
            self.finish_reason = REPETITION
