"""A data folder in memory: pairs in order of output and position, split by prompt."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ares.predictor import shards
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
        [pairs] index of the pair's output in `requests`, `prompts`, `prompt_tokens` and `output_tokens`.
    position, remaining, prompt_length
        [pairs] tokens generated, still to come, and of the prompt.
    room
        [pairs] tokens that the limit still allows: remaining <= room.
    censored
        [pairs] whether the output did not end by itself.
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
    prompt_tokens: tuple[NDArray[np.int32], ...]
    output_tokens: tuple[NDArray[np.int32], ...]

    def __len__(self) -> int:
        return len(self.position)

    @property
    def room(self) -> NDArray[np.int64]:
        """Tokens that the limit still allows."""
        return np.maximum(self.source.limit - self.position, self.remaining)

    def only(self, chosen: NDArray[Any]) -> "Pairs":
        """Return some of the pairs (a mask or indices in rising order); the outputs stay, so that indices hold."""
        fields = ("states", "output", "position", "remaining", "prompt_length", "censored")
        kept = {name: getattr(self, name)[chosen] for name in fields}
        rest = {n: getattr(self, n) for n in ("source", "requests", "prompts", "prompt_tokens", "output_tokens")}
        return Pairs(**kept, **rest)

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
    parts: dict[str, list[NDArray[Any]]] = {}
    requests: dict[str, int] = {}
    prompts: list[str] = []
    tokens: dict[str, list[NDArray[np.int32]]] = {"prompt": [], "output": []}
    source: shards.Source | None = None
    for shard in shards.read_all(folder):
        source = shard.source
        tensors = shard.tensors
        # A request that is in two shards (one folder copied into another) counts once.
        fresh = np.array([request not in requests for request in shard.requests], bool)
        number = np.cumsum(fresh) - 1 + len(requests)
        for kind, lists in tokens.items():
            ends = np.cumsum(tensors[f"{kind}_length"])[:-1]
            lists += [part for part, new in zip(np.split(tensors[f"{kind}_tokens"], ends), fresh, strict=True) if new]
        for request, prompt, new in zip(shard.requests, shard.prompts, fresh, strict=True):
            if new:
                requests[request] = len(requests)
                prompts.append(prompt)
        kept = fresh[tensors["output"]] & (tensors["remaining"] > 0)
        row = tensors["output"][kept]
        order = np.lexsort((tensors["position"][kept], row))
        row = row[order]
        columns = {
            "states": tensors["states"][kept][order],
            "output": number[row],
            "position": tensors["position"][kept][order].astype(np.int64),
            "remaining": tensors["remaining"][kept][order].astype(np.int64),
            "prompt_length": tensors["prompt_length"][row].astype(np.int64),
            "censored": tensors["censored"][row].astype(bool),
        }
        for name, column in columns.items():
            parts.setdefault(name, []).append(column)
    assert source is not None  # noqa: S101 - for the type checker: read_all yields at least one
    joined = {name: np.concatenate(column) for name, column in parts.items()}
    if not len(joined["position"]):
        raise PredictorError(f"{folder}: no pairs in it")
    return Pairs(
        source=source,
        requests=tuple(requests),
        prompts=tuple(prompts),
        prompt_tokens=tuple(tokens["prompt"]),
        output_tokens=tuple(tokens["output"]),
        **joined,
    )
