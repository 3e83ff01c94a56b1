"""Microseconds of one prediction."""

import statistics
import time
from collections.abc import Callable

import torch

from ares.predictor import auxiliary
from ares.predictor.checkpoint import Checkpoint
from ares.predictor.runtime import Predictor

BATCHES = (1, 64, 256)


def of_checkpoint(loaded: Checkpoint) -> dict[str, float]:
    """Return microseconds of one prediction for each batch, with all of the worker's work for it."""
    result = {}
    for batch in BATCHES:
        predictor = Predictor(loaded, batch)
        states = torch.randn(batch, loaded.hidden_size).bfloat16()
        carries = bool(predictor.forecaster())
        slots, position = torch.arange(batch), torch.full((batch,), 100)
        predictor.predict(slots, states, position, position, slots)

        def step(
            predictor: Predictor = predictor,
            states: torch.Tensor = states,
            slots: torch.Tensor = slots,
            carries: bool = carries,
            position: torch.Tensor = position,
        ) -> None:
            predictor.predict(slots, states, position, position, slots[:0])
            if carries:
                predictor.known(slots)

        result[str(batch)] = round(_median_micros(step, 30), 1)
    return result


def of_encoder(encoder: auxiliary.Encoder) -> dict[str, float]:
    """Return microseconds of reading each batch's texts once, their windows full; without the head."""
    return {str(batch): round(_median_micros(_embedding_of(encoder, batch), 3), 1) for batch in BATCHES}


def _embedding_of(encoder: auxiliary.Encoder, batch: int) -> Callable[[], None]:
    pieces = [list(range(1000, 1256))] * batch

    def step() -> None:
        for n in range(0, batch, 64):
            encoder.embed(pieces[n : n + 64])

    return step


def _median_micros(step: Callable[[], None], repeats: int) -> float:
    step()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    return 1e6 * statistics.median(times)
