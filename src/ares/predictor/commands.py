"""What `ares predictor evaluate` does: fit the baselines, judge, draw."""

from pathlib import Path
from typing import Any

import numpy as np

from ares.predictor import auxiliary, baselines, checkpoint, dataset, evaluation, floor, plots, timing
from ares.predictor.dataset import Pairs
from ares.predictor.errors import PredictorError
from ares.predictor.evaluation import Judged
from ares.predictor.training import settings_of


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
        self._read: tuple[Pairs, Any, int] | None = None
        self._judged: list[Judged] = []
        self._micros: dict[str, dict[str, float]] = {}

    def add_checkpoint(self, name: str, path: Path) -> None:
        """Judge a checkpoint."""
        loaded = checkpoint.load(path)
        self._judged.append(evaluation.of_checkpoint(name, loaded, self._test))
        self._micros[name] = timing.of_checkpoint(loaded)

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
                    self._prompt_only = baselines.PromptOnly(self._pairs, settings_of("ours", self._seed, moved=0.0))
                fitted = self._prompt_only.conditional() if name.endswith("conditional") else self._prompt_only
            case _:
                fitted = self._auxiliary("paper" if name == "auxiliary-l1" else "ours")
        room = self._test.room[:, None].astype(float)
        self._judged.append(Judged(name, fitted.parameters, np.minimum(fitted.quantiles(self._test), room)))

    def _auxiliary(self, arch: str) -> baselines.Auxiliary:
        self._read = self._read or self._embed()
        return baselines.Auxiliary(*self._read, settings_of(arch, self._seed, moved=0.0))

    def _embed(self) -> tuple[Pairs, Any, int]:
        from transformers import AutoTokenizer

        from ares import model as models

        encoder = auxiliary.Encoder()
        # Every third state of an output for its training: the texts between differ by a line, and reading them all
        # would take longer than everything else together. All of the test set is read.
        test = self._pairs.split("test")
        read = self._pairs.only(test | (self._pairs.position % (3 * self._pairs.source.every) == 0))
        tokenizer = AutoTokenizer.from_pretrained(str(models.resolve(self._pairs.source.model, weights=False)))
        embedded = auxiliary.embed_pairs(encoder, read, tokenizer)
        self._micros["auxiliary"] = self._micros["auxiliary-l1"] = timing.of_encoder(encoder)
        return read, embedded, encoder.parameters

    def report(self, noise_floor: Path | None) -> dict[str, Any]:
        """Return everything that was measured."""
        result = evaluation.report(self._judged, self._test, floor.read(noise_floor)[0] if noise_floor else ())
        result["history_restarted"] = evaluation.restarted(self._first, self._test)
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
