"""Data folders with a known law, written through the package's own writer."""

from pathlib import Path

import numpy as np

from ares.predictor.shards import Output, Source, half, write

HIDDEN = 8


def source(model: str = "synthetic/model", limit: int = 200) -> Source:
    return Source(model, HIDDEN, 20, limit, "temperature 0.7, top_p 1")


def folder(path: Path, outputs: int = 300, limit: int = 200, seed: int = 0, shard: int = 100) -> Path:
    """Outputs end at every token with a chance of 1/rate; the first entry of their states tells log(rate)."""
    generator = np.random.default_rng(seed)
    made = []
    for n in range(outputs):
        rate = float(generator.choice([20.0, 200.0]))
        length = int(generator.geometric(1 / rate))
        censored, length = length > limit, min(length, limit)
        positions = list(range(0, length, 20))
        states = generator.normal(size=(len(positions), HIDDEN)).astype(np.float32)
        states[:, 0] = np.log(rate)
        made.append(
            Output(f"r{n}", f"p{n % (outputs // 2)}", [1, 2, 3], [7] * length, censored, positions, list(half(states)))
        )
    for start in range(0, outputs, shard):
        write(path, source(limit=limit), made[start : start + shard])
    return path
