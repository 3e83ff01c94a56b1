"""Joins the pieces of live outputs (`predictor/shards.py`), whatever shards they are in and in whatever order.

Of one output, the length is the largest of its pieces, and the states are those of all pieces, each position once. If a
piece ended by a stop token or by the limit, so did the output. Otherwise the newest piece decides whether the output
still runs or has left: the longest, and of several the last. That of a prefill instance, which knows no limit, is older
than one of a decode instance of the same length.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ares.predictor.shards import Outcome, Shard, Source


@dataclass(frozen=True, slots=True)
class Joined:
    """Whole outputs, and their pairs in order of output and position.

    Attributes
    ----------
    requests, prompts, outcomes
        By output.
    lengths, limits, prompt_lengths
        [outputs] tokens generated so far; most that there may be, 0 where that is unknown; and tokens of the prompt.
    prompt_tokens, output_tokens
        By output; empty where they are not recorded.
    states, output, position
        [pairs] states, the index of their output, and the tokens generated before.
    """

    source: Source
    requests: tuple[str, ...]
    prompts: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    lengths: NDArray[np.int64]
    limits: NDArray[np.int64]
    prompt_lengths: NDArray[np.int64]
    prompt_tokens: tuple[NDArray[np.int32], ...]
    output_tokens: tuple[NDArray[np.int32], ...]
    states: NDArray[np.float16]
    output: NDArray[np.int64]
    position: NDArray[np.int64]


class Pieces:
    """The pieces of all shards so far."""

    def __init__(self) -> None:
        self._source: Source | None = None
        self._requests: dict[str, int] = {}
        self._prompts: list[str] = []
        self._outcomes: list[Outcome] = []
        self._tokens: dict[str, list[NDArray[np.int32]]] = {"prompt": [], "output": []}
        # By piece.
        self._columns: dict[str, list[NDArray[Any]]] = {"output": [], "length": [], "limit": [], "prompt_length": []}
        # By pair.
        self._pairs: dict[str, list[NDArray[Any]]] = {"states": [], "output": [], "position": []}

    def add(self, shard: Shard) -> None:
        """Add the pieces of a shard; its source must be that of the others (`shards.read_files` checks)."""
        limit = max(shard.source.limit, self._source.limit if self._source is not None else 0)
        self._source = replace(shard.source, limit=limit)
        for request, prompt in zip(shard.requests, shard.prompts, strict=True):
            if request not in self._requests:
                self._requests[request] = len(self._requests)
                self._prompts.append(prompt)
        rows = np.array([self._requests[request] for request in shard.requests], np.int64)
        tensors = shard.tensors
        for kind, tokens in self._tokens.items():
            given = tensors[f"{kind}_tokens"]
            ends = np.cumsum(tensors[f"{kind}_length"])
            tokens.extend(np.split(given, ends[:-1]) if given.size else [given] * len(rows))
        self._outcomes += shard.outcomes
        columns = {"output": rows, "length": tensors["output_length"], "limit": np.array(shard.limits, np.int64)}
        for name, column in (columns | {"prompt_length": tensors["prompt_length"]}).items():
            self._columns[name].append(column.astype(np.int64))
        self._pairs["states"].append(tensors["states"])
        self._pairs["output"].append(rows[tensors["output"]])
        self._pairs["position"].append(tensors["position"].astype(np.int64))

    def join(self) -> Joined | None:
        """Return the outputs; None where there has been no shard."""
        if self._source is None:
            return None
        count = len(self._requests)
        pieces = {name: np.concatenate(column) for name, column in self._columns.items()}
        limits = np.zeros(count, np.int64)
        np.maximum.at(limits, pieces["output"], pieces["limit"])
        newest = np.zeros(count, np.int64)
        order = np.lexsort((pieces["limit"] > 0, pieces["length"]))
        newest[pieces["output"][order]] = order  # of several values for one output, numpy keeps the last
        pairs = {name: np.concatenate(column) for name, column in self._pairs.items()}
        order = np.lexsort((pairs["position"], pairs["output"]))
        output, position = pairs["output"][order], pairs["position"][order]
        fresh = (np.diff(output, prepend=-1) > 0) | (np.diff(position, prepend=-1) > 0)
        lengths = pieces["length"][newest]
        kept = fresh & (position < lengths[output])
        return Joined(
            source=self._source,
            requests=tuple(self._requests),
            prompts=tuple(self._prompts),
            outcomes=tuple(self._joined_outcomes(pieces["output"], newest)),
            lengths=lengths,
            limits=limits,
            prompt_lengths=pieces["prompt_length"][newest],
            prompt_tokens=tuple(self._tokens["prompt"][piece] for piece in newest),
            output_tokens=tuple(self._tokens["output"][piece] for piece in newest),
            states=pairs["states"][order[kept]],
            output=output[kept],
            position=position[kept],
        )

    def _joined_outcomes(self, output: NDArray[np.int64], newest: NDArray[np.int64]) -> list[Outcome]:
        outcomes = [self._outcomes[piece] for piece in newest]
        for ended in (Outcome.LIMIT, Outcome.STOP):
            for row, outcome in zip(output.tolist(), self._outcomes, strict=True):
                if outcome is ended:
                    outcomes[row] = ended
        return outcomes


def join(shards: Iterable[Shard]) -> Joined | None:
    """Return the outputs of shards; None where there is no shard."""
    pieces = Pieces()
    for shard in shards:
        pieces.add(shard)
    return pieces.join()
