"""The mock model: each token is a function of all tokens before it, so any output can be checked.

A lost, doubled or swapped token changes every token after it, however often the request moved or was resumed.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

from tokenizers import Tokenizer

# A polynomial rolling hash modulo 2^64: Knuth's MMIX multiplier, odd and thus invertible.
MULTIPLIER = 6364136223846793005
MASK = (1 << 64) - 1
# The upper bits of a product are the well mixed ones.
SHIFT = 33
_INVERSE = pow(MULTIPLIER, -1, 1 << 64)
_SEED = 0x9E3779B97F4A7C15


class VocabularyError(ValueError):
    """The model folder has no plain-text tokens or no stop token; the message names it."""


def fold(tokens: Iterable[int], state: int = _SEED) -> int:
    """Return the state after more tokens."""
    for token in tokens:
        state = (state * MULTIPLIER + token + 1) & MASK
    return state


def unfold(state: int, token: int) -> int:
    """Return the state before the newest token."""
    return (state - token - 1) * _INVERSE & MASK


def uniform(state: int, draw: int = 0) -> float:
    """Return a number in (0, 1) that depends on nothing but its arguments (splitmix64's finaliser)."""
    mixed = (state + (draw + 1) * _SEED) & MASK
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & MASK
    return ((mixed ^ (mixed >> 31)) + 0.5) / 2.0**64


def normal(state: int, draw: int = 0) -> float:
    """Return a standard normal number that depends on nothing but its arguments."""
    return NormalDist().inv_cdf(min(max(uniform(state, draw), 1e-12), 1 - 1e-12))


@dataclass(frozen=True, slots=True)
class MockModel:
    """The next token, and the length of an output, as functions of the tokens before.

    Attributes
    ----------
    ids
        The tokens that it writes: plain words of the real tokenizer, by id.
    stop
        The token that ends an output.
    vocabulary
        Number of the tokenizer's tokens; a prompt holds none beyond.
    mean_output, output_sigma
        Mean of the output lengths in tokens, and standard deviation of their logarithm.
    """

    ids: tuple[int, ...]
    stop: int
    vocabulary: int
    mean_output: float = 400.0
    output_sigma: float = 1.0

    def next_token(self, state: int) -> int:
        """Return the token that follows."""
        return self.ids[((state * MULTIPLIER & MASK) >> SHIFT) % len(self.ids)]

    def continuation(self, prompt_token_ids: Iterable[int], count: int) -> list[int]:
        """Return the `count` tokens that any instance generates after a prompt, its own end not considered."""
        state = fold(prompt_token_ids)
        output = []
        for _ in range(count):
            output.append(self.next_token(state))
            state = fold(output[-1:], state)
        return output

    def output(self, prompt_token_ids: list[int], maximum_tokens: int) -> list[int]:
        """Return the whole output of a prompt: to its own end, the stop token, or to the limit."""
        length = self.output_tokens(fold(prompt_token_ids))
        if length > maximum_tokens:
            return self.continuation(prompt_token_ids, maximum_tokens)
        return [*self.continuation(prompt_token_ids, length - 1), self.stop]

    def output_tokens(self, prompt_state: int) -> int:
        """Return the length of the output of a prompt, the stop token counted: log-normal, drawn by its hash."""
        sigma = self.output_sigma
        location = math.log(self.mean_output) - sigma * sigma / 2
        return max(1, round(math.exp(min(location + sigma * normal(prompt_state), 30.0))))


def load(folder: Path, mean_output: float = 400.0, output_sigma: float = 1.0) -> MockModel:
    """Read what is needed of a model folder: its tokenizer and its stop token.

    Raises
    ------
    VocabularyError
        There is no tokenizer.json, no plain word in it, or no stop token.
    """
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing more exact
        raise VocabularyError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error
    vocabulary = tokenizer.get_vocab_size()
    texts = tokenizer.decode_batch([[token] for token in range(vocabulary)], skip_special_tokens=True)
    ids = tuple(n for n, text in enumerate(texts) if (word := text.strip(" ")).isascii() and word.isalpha())
    if not ids:
        raise VocabularyError(f"{folder / 'tokenizer.json'} has no token that is a plain word")
    return MockModel(ids, _stop_token(folder, tokenizer), vocabulary, mean_output, output_sigma)


def _stop_token(folder: Path, tokenizer: Tokenizer) -> int:
    """Return the stop token where vLLM finds it, or as the tokenizer names it."""
    for file in ("generation_config.json", "config.json", "tokenizer_config.json"):
        try:
            read = json.loads((folder / file).read_bytes())
        except (OSError, ValueError):
            continue
        found = read.get("eos_token_id")
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int):
            return found
        token = read.get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and (named := tokenizer.token_to_id(token)) is not None:
            return int(named)
    raise VocabularyError(f"{folder} names no token that stops an output (eos_token_id)")
