"""The text of tokens that are whole pieces of text by themselves, looked up instead of decoded in their context."""

import json
from typing import Any

from tokenizers import Tokenizer

_BROKEN = "\ufffd"


class TokenTexts(dict[int, str]):
    """The text that each token adds to any output before it; empty where that depends on what is around it.

    Filled as tokens come: about 100 bytes for each token of the vocabulary that was seen.

    What depends on the context, and has to be decoded in it: tokens with a part of a character, added tokens (which may
    be special, and skipped), tokens without text or with nothing but what a decoder strips at the start.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._added = frozenset(tokenizer.get_added_tokens_decoder())

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "TokenTexts | None":
        """Return those of a tokenizer; None where its decoder joins tokens in other ways than one after another."""
        decoder = tokenizer.decoder
        return cls(tokenizer) if decoder is not None and _joins(json.loads(decoder.__getstate__())) else None

    def __missing__(self, token: int) -> str:
        """Find the text of a token that has not come yet."""
        try:
            known = self._tokenizer.id_to_token(token) is not None
        except (OverflowError, TypeError):  # beyond 32 bits, beyond 64
            known = False
        if not known:
            return ""
        text = self[token] = "" if token in self._added else self._after_itself(token)
        return text

    def _after_itself(self, token: int) -> str:
        once, twice = (self._tokenizer.decode([token] * n, skip_special_tokens=False) for n in (1, 2))
        whole = once and _BROKEN not in twice and twice.startswith(once)
        return str(twice[len(once) :]) if whole else ""


class _NoTexts(dict[int, str]):
    """No token's text is known."""

    def __missing__(self, token: int) -> str:
        return ""


NO_TEXTS = _NoTexts()


def _joins(decoder: dict[str, Any]) -> bool:
    """Whether a decoder's text of whole tokens is that of each, but for a blank at the very start.

    `decoder` is its state in the form of `tokenizer.json`.
    """
    match decoder:
        case {"type": "Sequence", "decoders": steps}:
            return all(_joins(step) for step in steps)
        case {"type": "Replace", "pattern": {"String": text}}:
            # A longer text could lie in two tokens.
            return len(text) == 1
        case {"type": "Strip", "start": start, "stop": 0}:
            # More could reach into the second token.
            return bool(start <= 1)
        case {"type": kind}:
            return kind in ("ByteLevel", "ByteFallback", "Fuse", "Metaspace")
    return False
