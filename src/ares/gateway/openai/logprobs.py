"""Log probabilities in OpenAI's forms, with the text of each token as vLLM 0.32 writes it (v1/engine/logprobs.py).

The texts of the tokens join to the text of the output: a token that ends within a character has none, and the one that
completes the character has all of it.
"""

from collections import deque
from typing import Any

from ares.gateway.openai.text import TextModel
from ares.gateway.pool.delta import PositionLogprobs, TokenLogprob

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# No character has more bytes, and no token is shorter than one.
_LONGEST_CHARACTER = 4


class LogprobsRenderer:
    """Renders the log probabilities of one output, position after position.

    Parameters
    ----------
    count
        Alternatives of each position; -1: all that there are.
    chat
        Whether in the form of chats, or of text completions.
    as_ids
        Whether tokens are named ``token_id:ID``.
    """

    def __init__(self, text_model: TextModel, count: int, *, chat: bool, as_ids: bool = False) -> None:
        self._text_model = text_model
        self._count = count
        self._chat = chat
        self._as_ids = as_ids
        self._before: deque[int] = deque(maxlen=_LONGEST_CHARACTER)
        self._offset = 0

    def render(self, positions: list[PositionLogprobs]) -> dict[str, Any]:
        """Return the next positions as the ``logprobs`` of a choice."""
        if self._chat:
            return {"content": [self._of_chat(position) for position in positions]}
        rows = [self._of_text(position) for position in positions]
        offsets = []
        for name, _ in rows:
            offsets.append(self._offset)
            self._offset += len(name)
        return {
            "tokens": [name for name, _ in rows],
            "token_logprobs": [position.logprob for position in positions],
            "top_logprobs": [top for _, top in rows],
            "text_offset": offsets,
        }

    def _of_chat(self, position: PositionLogprobs) -> dict[str, Any]:
        top = position.top_logprobs if self._count == -1 else position.top_logprobs[: self._count]
        text = self._text(position.token_id)
        entry = {
            # As in vLLM, the bytes are the token's own even where it is named by its id, those of alternatives are not.
            **self._entry(self._name(position.token_id, text), position.logprob),
            "bytes": list(text.encode("utf-8", "replace")),
            "top_logprobs": [self._entry(self._named(one), one.logprob) for one in top],
        }
        self._before.append(position.token_id)
        return entry

    def _of_text(self, position: PositionLogprobs) -> tuple[str, dict[str, float]]:
        top = self._of_position(position)
        name = self._named(position)
        names = {self._named(one): one.logprob for one in top}
        self._before.append(position.token_id)
        return name, names

    def _of_position(self, position: PositionLogprobs) -> list[TokenLogprob]:
        """Return the sampled token, which comes first, and the likeliest ones, of which it may be one."""
        top = position.top_logprobs
        if self._count == -1 or len(top) <= self._count:
            return top
        among_them = top[0].logprob >= top[self._count].logprob
        return top[: self._count + (0 if among_them and self._count else 1)]

    @staticmethod
    def _entry(name: str, logprob: float) -> dict[str, Any]:
        return {"token": name, "logprob": logprob, "bytes": list(name.encode("utf-8", "replace"))}

    def _named(self, token: TokenLogprob) -> str:
        return self._name(token.token_id, "" if self._as_ids else self._text(token.token_id))

    def _name(self, token_id: int, text: str) -> str:
        return f"token_id:{token_id}" if self._as_ids else text

    def _text(self, token_id: int) -> str:
        """Return the text that a token adds to those before it; empty where it ends within a character."""
        text = self._text_model.token(token_id)
        return self._completed(token_id) if text.endswith(_INCOMPLETE) else text

    def _completed(self, token_id: int) -> str:
        decode = self._text_model.decode
        before = list(self._before)
        for count in range(1, len(before) + 1):
            context = before[-count:]
            text = decode([*context, token_id])
            if text.endswith(_INCOMPLETE):
                continue
            clean = len(context)
            while clean and decode([context[clean - 1]]).endswith(_INCOMPLETE):
                clean -= 1
            return text[_common(decode(context[:clean]) if clean else "", text) :]
        return ""


def _common(first: str, second: str) -> int:
    """Return how many characters two texts begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
