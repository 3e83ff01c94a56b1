"""The tokens of one output, which come over two channels: each once and in order.

The stream of the reply has all of them. The step channel (`messages.StepTokens`) has them earlier, and may lose some.
"""

from collections.abc import Callable

# So many tokens are taken before the stream has brought them: a stream can be paused, the step channel cannot.
_MOST_AHEAD = 1024
# Tokens that are kept while others before them are missing.
_MOST_BEYOND = 256


class DifferentTokensError(RuntimeError):
    """The two channels have brought different tokens."""


class MergedTokens:
    """Merges both channels by the position of the tokens in the output.

    Attributes
    ----------
    early_tokens
        How many tokens the step channel has brought first.
    """

    __slots__ = ("_ahead", "_beyond", "_known", "_waiting", "early_tokens")

    def __init__(self) -> None:
        self.early_tokens = 0
        # Tokens from either channel so far; those of them that the stream has not brought yet; those not taken yet, by
        # the step that generated them.
        self._known = 0
        self._ahead: list[int] = []
        self._waiting: list[list[int]] = []
        # Steps behind a gap, which the stream will close: their position and their tokens.
        self._beyond: list[tuple[int, list[int]]] = []

    @property
    def waiting(self) -> bool:
        """Whether there is something to take."""
        return bool(self._waiting)

    def receive_step_tokens(self, position: int, token_ids: list[int]) -> None:
        """Add tokens of the step channel, `position` tokens behind the first one; what is too much is left out."""
        repeated = self._known - position
        if repeated < 0:
            kept = sum(len(others) for _, others in self._beyond)
            if token_ids and kept + len(token_ids) <= _MOST_BEYOND:
                self._beyond.append((position, token_ids))
        elif repeated < len(token_ids):
            new = token_ids[repeated:] if repeated else token_ids
            if len(self._ahead) + len(new) > _MOST_AHEAD:
                return
            self._known += len(new)
            self.early_tokens += len(new)
            self._ahead += new
            self._waiting.append(new)

    def streamed(self, token_ids: list[int]) -> None:
        """Add tokens of the stream, each as that of a step; DifferentTokensError where others have come for them."""
        ahead = self._ahead
        both = min(len(ahead), len(token_ids))
        if ahead[:both] != token_ids[:both]:
            raise DifferentTokensError("the step channel has brought other tokens than the reply")
        del ahead[:both]
        new = token_ids[both:]
        self._known += len(new)
        self._waiting += ([token] for token in new)
        if self._beyond:
            beyond, self._beyond = self._beyond, []
            for position, tokens in beyond:
                self.receive_step_tokens(position, tokens)

    def end(self) -> None:
        """Note that the stream has brought all tokens; DifferentTokensError where more than those have come."""
        if self._ahead:
            raise DifferentTokensError("the step channel has brought more tokens than the reply")

    def give(self, take: Callable[[int], bool]) -> bool:
        """Give the steps of one token to `take`, up to one that it refuses; return whether none is left."""
        waiting, taken = self._waiting, 0
        for token_ids in waiting:
            if len(token_ids) != 1 or not take(token_ids[0]):
                break
            taken += 1
        del waiting[:taken]
        return not waiting

    def take(self) -> list[list[int]]:
        """Return the tokens that were not taken yet, by the step that generated them."""
        taken, self._waiting = self._waiting, []
        return taken
