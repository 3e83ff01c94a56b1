"""The work of `ares predictor evaluate`: fit the baselines, evaluate, draw."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ares.models import resolve as models
from ares.models.cache import ModelError
from ares.predictor import auxiliary, baselines, checkpoint, dataset, evaluation, floor, plots, timing
from ares.predictor.dataset import Pairs
from ares.predictor.errors import PredictorError
from ares.predictor.evaluation import Evaluated
from ares.predictor.training import settings_of

AUXILIARY = ("auxiliary", "auxiliary-l1", "auxiliary-prompt-l1")


def chosen_baselines(text: str) -> list[str]:
    """Return the baselines that an option names, each once; PredictorError for an unknown one, or one not installed."""
    if text in {"all", "none"}:
        return list(baselines.NAMES) if text == "all" else []
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in baselines.NAMES]:
        raise PredictorError(f"unknown baseline {', '.join(unknown)}: {', '.join(baselines.NAMES)}, or all, or none")
    if not_installed := [name for name in names if name in AUXILIARY and auxiliary.missing()]:
        raise PredictorError(f"--baselines {', '.join(not_installed)}: {auxiliary.missing()}; or leave it out")
    return names


class Comparison:
    """Models evaluated on the test split of one data folder; the first checkpoint is ours.

    All input is checked by the constructor: before any baseline is fitted, and before the data is read where possible.

    Parameters
    ----------
    folder
        The data.
    checkpoints
        Those to evaluate, by name.
    noise_floor
        What `ares predictor noise-floor` wrote.

    Raises
    ------
    PredictorError
        One of them cannot be read, or does not fit the data.
    """

    def __init__(self, folder: Path, checkpoints: Mapping[str, Path], noise_floor: Path | None, seed: int) -> None:
        self._seed = seed
        loaded = {name: checkpoint.load(path) for name, path in checkpoints.items()}
        self._prefixes = floor.read(noise_floor)[0] if noise_floor is not None else []
        self._first = next(iter(loaded.values()))
        self._pairs = dataset.load(folder)
        source = self._pairs.source
        for path, one in zip(checkpoints.values(), loaded.values(), strict=True):
            try:
                one.check(source.model, source.hidden_size, source.hidden_state)
            except PredictorError as error:
                raise PredictorError(f"{path}: {error}") from error
        self._test = self._pairs.only(self._pairs.split("test"))
        if not len(self._test):
            count = len(self._pairs.pair_prompts)
            raise PredictorError(f"{folder}: none of its {count} prompts is in the test set (15 %): collect more")
        evaluation.rows_of(self._prefixes, self._test)
        self._training = self._pairs.only(self._pairs.split("train"))
        self._skipped: dict[str, str] = {}
        self._prompt_only: baselines.PromptOnly | None = None
        self._read: tuple[Pairs, Any, int] | None = None
        self._evaluated: list[Evaluated] = []
        self._micros: dict[str, dict[str, float]] = {}
        for name, one in loaded.items():
            self._evaluated.append(evaluation.of_checkpoint(name, one, self._test))
            self._micros[name] = timing.of_checkpoint(one)

    def obstacles(self, names: Sequence[str]) -> dict[str, str]:
        """Return why some baselines cannot be fitted here, by name."""
        reasons = ((name, self._obstacle(name)) for name in names)
        return {name: why for name, why in reasons if why is not None}

    def _obstacle(self, name: str) -> str | None:
        if name == "max-tokens":
            return None
        if name in {"global-median", "residual-life"}:
            return None if len(self._training) else "there are no training prompts"
        if name not in AUXILIARY:
            return dataset.too_few_prompts(self._pairs.only(self._pairs.position == 0).pair_prompts)
        if why := auxiliary.missing() or dataset.too_few_prompts(self._pairs.pair_prompts):
            return why
        try:
            self._pairs.require_token_ids("it")
            self._tokenizer()
        except PredictorError as error:
            return str(error)
        except (ModelError, OSError, ValueError) as error:
            return f"it needs the tokenizer of {self._pairs.source.model}: {error}"
        return None

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(models.resolve(self._pairs.source.model, weights=False)))

    def skip(self, name: str, why: str) -> None:
        """Leave a baseline out; the result and the pictures say so."""
        self._skipped[name] = why

    def add_baseline(self, name: str) -> None:
        """Fit a baseline and evaluate it."""
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
            case "auxiliary-prompt-l1":
                fitted = self._auxiliary_prompt()
            case _:
                fitted = self._auxiliary("paper" if name == "auxiliary-l1" else "ours")
        room = self._test.room[:, None].astype(float)
        self._evaluated.append(Evaluated(name, fitted.parameters, np.minimum(fitted.quantiles(self._test), room)))

    def _auxiliary(self, arch: str) -> baselines.Auxiliary:
        self._read = self._read or self._embed()
        return baselines.Auxiliary(*self._read, settings_of(arch, self._seed, moved=0.0))

    def _auxiliary_prompt(self) -> baselines.PromptOnly:
        encoder = auxiliary.Encoder()
        prompts = self._pairs.only(self._pairs.position == 0)
        embedded = auxiliary.embed_pairs(encoder, prompts, self._tokenizer())
        self._micros["auxiliary-prompt-l1"] = timing.of_encoder(encoder)
        settings = settings_of("paper", self._seed)
        return baselines.PromptOnly(baselines.with_embeddings(prompts, embedded), settings, encoder.parameters)

    def _embed(self) -> tuple[Pairs, Any, int]:
        encoder = auxiliary.Encoder()
        # Every third state of an output for its training: the texts between differ by a line, and reading them all
        # would take longer than everything else together. All of the test set is read.
        test = self._pairs.split("test")
        read = self._pairs.only(test | (self._pairs.position % (3 * self._pairs.source.every) == 0))
        embedded = auxiliary.embed_pairs(encoder, read, self._tokenizer())
        self._micros["auxiliary"] = self._micros["auxiliary-l1"] = timing.of_encoder(encoder)
        return read, embedded, encoder.parameters

    def report(self) -> dict[str, Any]:
        """Return all results, and the baselines that were left out."""
        result = evaluation.report(self._evaluated, self._test, self._prefixes)
        result["skipped"] = [{"baseline": name, "reason": why} for name, why in self._skipped.items()]
        result |= evaluation.changes_of_instance(self._first, self._test)
        for model in result["models"]:
            if model["name"] in self._micros:
                model["microseconds_per_step"] = self._micros[model["name"]]
        return result

    def describe(self) -> dict[str, Any]:
        """Return the origin and the size of the data."""
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
        plots.draw(folder, self._evaluated, self._test, report)
