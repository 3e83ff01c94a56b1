"""Recorded states from which the remaining length can be read, and shards of them as instances write them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ares.predictor.shards import LIVE, Outcome, Output, Source, half, write

MODEL, HIDDEN, EVERY, CONTEXT = "synthetic/model", 16, 20, 400


def source(model: str = MODEL, hidden: int = HIDDEN, every: int = EVERY) -> Source:
    return Source(model, hidden, every, CONTEXT, LIVE)


def output(
    name: str, length: int, generator: np.random.Generator, meaning: float = 1.0, outcome: Outcome | None = None
) -> Output:
    """A whole output; half of its states are the logarithm of the remaining length, times `meaning`."""
    positions = list(range(0, length, EVERY))
    states = generator.normal(size=(len(positions), HIDDEN)).astype(np.float32)
    states[:, :8] = meaning * np.log([[length - position] for position in positions])
    ended = Outcome.LIMIT if length >= CONTEXT - 3 else Outcome.STOP
    return Output(
        f"gateway/{name}",
        f"prompt-{name}",
        [1, 2, 3],
        [7] * length,
        False,
        positions,
        list(half(states)),
        outcome or ended,
        CONTEXT - 3,
    )


def outputs(count: int, seed: int, meaning: float = 1.0) -> list[Output]:
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.exponential(generator.choice([20.0, 200.0], count)), 1, CONTEXT - 3).astype(int)
    return [output(f"{seed}-{n}", int(length), generator, meaning) for n, length in enumerate(lengths)]


def shard(folder: Path, made: Iterable[Output], of: Source | None = None) -> bytes:
    """A shard's file."""
    path = write(folder, of or source(), list(made), token_ids=False)
    data = path.read_bytes()
    path.unlink()
    return data
