"""What `ares predictor evaluate` does: fit the baselines, judge, time, draw."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ares.predictor import auxiliary, baselines, checkpoint, dataset, evaluation, floor, plots
from ares.predictor.checkpoint import Checkpoint
from ares.predictor.errors import PredictorError
from ares.predictor.evaluation import Judged
from ares.predictor.runtime import Predictor
from ares.predictor.training import settings_of

BATCHES = (1, 64, 256)


def chosen_baselines(text: str) -> list[str]:
    """Return the baselines that an option names; PredictorError for an unknown one."""
    if text in {"all", "none"}:
        return list(baselines.NAMES) if text == "all" else []
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in baselines.NAMES]:
        raise PredictorError(f"unknown baseline {', '.join(unknown)}: {', '.join(baselines.NAMES)}, or all")
    return names


class Comparison:
    """Models judged on the test split of one data folder; the first one added is ours."""

    def __init__(self, folder: Path, first: Path, seed: int) -> None:
        self._seed = seed
        # Before the data is read: a wrong file must not cost minutes.
        self._first = checkpoint.load(first)
        self._pairs = dataset.load(folder)
        self._test = self._pairs.only(self._pairs.split("test"))
        if not len(self._test):
            raise PredictorError(f"{folder}: no test prompts in it: collect more")
        self._training = self._pairs.only(self._pairs.split("train"))
        self._prompt_only: baselines.PromptOnly | None = None
        self._judged: list[Judged] = []
        self._micros: dict[str, dict[str, float]] = {}

    def add_checkpoint(self, name: str, path: Path) -> None:
        """Judge a checkpoint."""
        loaded = checkpoint.load(path)
        self._judged.append(evaluation.of_checkpoint(name, loaded, self._test))
        self._micros[name] = _time_checkpoint(loaded)

    def add_baseline(self, name: str) -> None:
        """Fit a baseline and judge it."""
        fitted: baselines.Baseline
        match name:
            case "global-median":
                fitted = baselines.GlobalMedian(self._training)
            case "residual-life":
                fitted = baselines.ResidualLife(self._training)
            case "max-tokens":
                fitted = baselines.MaxTokens()
            case "prompt-only" | "prompt-only-conditional":
                if self._prompt_only is None:
                    self._prompt_only = baselines.PromptOnly(self._pairs, settings_of("ours", self._seed))
                fitted = self._prompt_only.conditional() if name.endswith("conditional") else self._prompt_only
            case _:
                fitted = self._auxiliary()
        room = self._test.room[:, None].astype(float)
        self._judged.append(Judged(name, fitted.parameters, np.minimum(fitted.quantiles(self._test), room)))

    def _auxiliary(self) -> baselines.Auxiliary:
        from transformers import AutoTokenizer

        from ares import model as models

        encoder = auxiliary.Encoder()
        # Every third state of an output for its training: the texts between differ by a line, and reading them all
        # would take longer than everything else together. All of the test set is read.
        test = self._pairs.split("test")
        read = self._pairs.only(test | (self._pairs.position % (3 * self._pairs.source.every) == 0))
        tokenizer = AutoTokenizer.from_pretrained(str(models.resolve(self._pairs.source.model)))
        embedded = auxiliary.embed_pairs(encoder, read, tokenizer)
        self._micros["auxiliary"] = {
            str(batch): round(_median_micros(_embedding_of(encoder, batch), 3), 1) for batch in BATCHES
        }
        return baselines.Auxiliary(read, embedded, settings_of("ours", self._seed), encoder.parameters)

    def report(self, noise_floor: Path | None) -> dict[str, Any]:
        """Return everything that was measured."""
        result = evaluation.report(self._judged, self._test, floor.read(noise_floor)[0] if noise_floor else ())
        for model in result["models"]:
            if model["name"] in self._micros:
                model["microseconds_per_step"] = self._micros[model["name"]]
        return result

    def describe(self) -> dict[str, Any]:
        """Return what the data is, and what was trained."""
        source = self._pairs.source
        return {
            "model": source.model,
            "sampling": source.sampling,
            "limit": source.limit,
            "every": source.every,
            "outputs": len(self._pairs.requests),
            "prompts": len(set(self._pairs.prompts)),
            "pairs": len(self._pairs),
            "training_prompts": len({self._pairs.prompts[n] for n in np.unique(self._training.output)}),
            "seed": self._seed,
        }

    def draw(self, folder: Path, report: dict[str, Any]) -> None:
        """Write the pictures."""
        plots.draw(folder, self._judged, self._test, report)


def _time_checkpoint(loaded: Checkpoint) -> dict[str, float]:
    """Return microseconds of one prediction for each batch, everything that the worker does for it included."""
    result = {}
    for batch in BATCHES:
        predictor = Predictor(loaded, batch)
        states = torch.randn(batch, loaded.hidden_size).bfloat16()
        slots, position = torch.arange(batch), torch.full((batch,), 100)

        def step(
            predictor: Predictor = predictor,
            states: torch.Tensor = states,
            slots: torch.Tensor = slots,
            position: torch.Tensor = position,
        ) -> None:
            predictor.predict(slots, states, position, position)

        result[str(batch)] = round(_median_micros(step, 30), 1)
    return result


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
