"""A data folder in memory: pairs in order of output and position, split by prompt."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ares.predictor import pieces, shards
from ares.predictor.errors import PredictorError

# Percent of the prompts; the rest is the test set.
_TRAIN, _VALIDATION = 70, 15
SPLITS = ("train", "validation", "test")
_FEWEST = 5
# With so many prompts, the smaller of those two sets has at least _FEWEST in 99 of 100 cases.
_ENOUGH = 80


def split_of(prompt: str) -> int:
    """Return the split (index into SPLITS) of a prompt, a function of its id: every command gets the same."""
    share = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") % 100
    return 0 if share < _TRAIN else 1 if share < _TRAIN + _VALIDATION else 2


def too_few_prompts(prompts: Iterable[str]) -> str | None:
    """Return an explanation where prompts (their ids) are too few to train on; None where they are enough."""
    every = set(prompts)
    counts = Counter(SPLITS[split_of(prompt)] for prompt in every)
    if min(counts["train"], counts["validation"]) >= _FEWEST:
        return None
    return (
        f"training needs {_FEWEST} prompts in the training set ({_TRAIN} % of all) and {_FEWEST} in the validation set "
        f"({_VALIDATION} %); of these {len(every)} prompts they have {counts['train']} and {counts['validation']}: "
        f"collect more, {_ENOUGH} in all nearly always do"
    )


@dataclass(frozen=True, slots=True)
class Pairs:
    """The data that predictors are trained and evaluated on.

    Attributes
    ----------
    states
        [pairs, d] float16; those of one output are consecutive, in order of position.
    output
        [pairs] index of the pair's output in what is by output: `requests`, `prompts` and all below.
    position, remaining, prompt_length
        [pairs] tokens generated, still to come, and of the prompt.
    room
        [pairs] tokens that the limit still allows: remaining <= room.
    censored
        [pairs] whether the output did not end by itself.
    lengths, limits
        [outputs] tokens generated, and most that there might have been.
    outcomes
        How each output ended.
    prompt_tokens, output_tokens
        Token ids of each output; empty where they are not recorded.
    """

    source: shards.Source
    states: NDArray[np.float16]
    output: NDArray[np.int64]
    position: NDArray[np.int64]
    remaining: NDArray[np.int64]
    prompt_length: NDArray[np.int64]
    censored: NDArray[np.bool_]
    requests: tuple[str, ...]
    prompts: tuple[str, ...]
    lengths: NDArray[np.int64]
    limits: NDArray[np.int64]
    outcomes: tuple[shards.Outcome, ...]
    prompt_tokens: tuple[NDArray[np.int32], ...]
    output_tokens: tuple[NDArray[np.int32], ...]

    def __len__(self) -> int:
        return len(self.position)

    @property
    def room(self) -> NDArray[np.int64]:
        """Tokens that the limit still allows."""
        room: NDArray[np.int64] = np.maximum(self.limits[self.output] - self.position, self.remaining)
        return room

    def require_token_ids(self, what: str) -> None:
        """Raise PredictorError where token ids are not recorded, which `what` needs."""
        lacking = sum(len(t) != n for t, n in zip(self.output_tokens, self.lengths.tolist(), strict=True))
        if lacking:
            raise PredictorError(
                f"{what} needs token ids, which were not recorded for {lacking} of {len(self.requests)} outputs: "
                "record with `ares worker --record-token-ids`, or collect with `ares predictor collect`"
            )

    def only(self, chosen: NDArray[Any]) -> "Pairs":
        """Return some of the pairs (a mask or indices in rising order); the outputs stay, so that indices hold."""
        fields = ("states", "output", "position", "remaining", "prompt_length", "censored")
        return replace(self, **{name: getattr(self, name)[chosen] for name in fields})

    def moved(self, seed: int = 0, share: float = 1.0) -> NDArray[np.bool_]:
        """Return the mask of the pairs after a move, if a share of the outputs is moved once, anywhere.

        A request's history starts empty on another instance, where its predictor sees `only` these pairs.
        """
        starts = np.flatnonzero(np.diff(self.output, prepend=-1))
        counts = np.diff(np.append(starts, len(self)))
        generator = np.random.default_rng(seed)
        at = generator.integers(1, np.maximum(counts, 2))
        at[generator.random(len(counts)) >= share] = len(self)
        order = np.arange(len(self)) - np.repeat(starts, counts)
        after: NDArray[np.bool_] = order >= np.repeat(at, counts)
        return after

    @property
    def pair_prompts(self) -> set[str]:
        """The ids of the prompts that have pairs."""
        return {self.prompts[n] for n in np.unique(self.output)}

    def split(self, name: str) -> NDArray[np.bool_]:
        """Return the mask of the pairs of one split."""
        of_output = np.array([split_of(prompt) for prompt in self.prompts], np.int64)
        chosen: NDArray[np.bool_] = of_output[self.output] == SPLITS.index(name)
        return chosen


def load(folder: Path) -> Pairs:
    """Read a data folder.

    Raises
    ------
    PredictorError
        A shard is broken, two disagree, or there are no pairs.
    """
    return _pairs(shards.read_all(folder), str(folder))


def load_files(files: Sequence[Path]) -> Pairs:
    """Read these shards, and no others of their folders; raise as `load` does."""
    return _pairs(shards.read_files(files), f"{len(files)} shards")


def _pairs(found: Iterable[shards.Shard], where: str) -> Pairs:
    joined = pieces.join(found)
    if joined is None or not len(joined.position):
        raise PredictorError(f"{where}: no pairs in it")
    ended = np.array([outcome is shards.Outcome.STOP for outcome in joined.outcomes], bool)
    return Pairs(
        source=joined.source,
        states=joined.states,
        output=joined.output,
        position=joined.position,
        remaining=joined.lengths[joined.output] - joined.position,
        prompt_length=joined.prompt_lengths[joined.output],
        censored=~ended[joined.output],
        requests=joined.requests,
        prompts=joined.prompts,
        lengths=joined.lengths,
        limits=np.where(joined.limits > 0, joined.limits, joined.source.limit),
        outcomes=joined.outcomes,
        prompt_tokens=joined.prompt_tokens,
        output_tokens=joined.output_tokens,
    )
