"""Error models from files, and what of an evaluation becomes one."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ares.simulator.error_model_files import error_model
from ares.simulator.error_models import ErrorModel
from ares.simulator.evaluated_error import FRACTIONS, fitted, relative_error, sigma_of

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def evaluation(errors: list[float], output: float = 400.0) -> dict[str, Any]:
    """Return the part of an evaluation that is read, for a predictor with these relative errors."""
    places = {
        f"{round(100 * part)}%": {"mae": error * output * (1 - part), "relative_mae": error}
        for part, error in zip(FRACTIONS, errors, strict=True)
    }
    return {"models": [{"name": "ours", "by_position": places}, {"name": "another"}]}


@pytest.mark.parametrize("sigma", [0.05, 0.3, 0.9, 2.0])
def test_the_error_of_a_sigma(sigma: float) -> None:
    drawn = np.abs(np.exp(sigma * np.random.default_rng(0).standard_normal(2_000_000)) - 1.0)
    assert relative_error(sigma) == pytest.approx(drawn.mean(), rel=0.02)
    assert sigma_of(relative_error(sigma)) == pytest.approx(sigma, abs=1e-9)


@pytest.mark.parametrize(("start", "end", "tokens"), [(0.9, 0.12, 60.0), (0.4, 0.7, 150.0), (0.5, 0.5, 100.0)])
def test_a_model_is_found_again_in_its_own_errors(start: float, end: float, tokens: float) -> None:
    sigmas = [end + (start - end) * math.exp(-400.0 * part / tokens) for part in FRACTIONS]
    model = fitted("again", evaluation([relative_error(sigma) for sigma in sigmas]))
    assert model.mean_output == pytest.approx(400.0)
    found = [model.end + (model.start - model.end) * math.exp(-400.0 * part / model.tokens) for part in FRACTIONS]
    assert model.start == pytest.approx(start, rel=0.02)
    assert found == pytest.approx(sigmas, rel=0.05)
    # The same share of an output, whatever its length.
    assert model.tokens_at(8000.0) == pytest.approx(20.0 * model.tokens)


def test_errors_written_by_hand_hold_for_every_workload(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"start": 0.5, "end": 0.1, "tokens": 700}')
    model = error_model(str(file))
    assert model == ErrorModel("mine", 0.5, 0.1, 700.0)
    assert model.tokens_at(123.0) == 700.0


def test_a_predictor_without_error_is_almost_exact() -> None:
    model = fitted("exact", evaluation([0.01, 0.0, 0.0, 0.0]))
    assert model.end == pytest.approx(0.001, rel=0.01)


@pytest.mark.parametrize("name", ["predictor-open", "predictor-structured"])
def test_the_evaluations_of_this_repository(name: str) -> None:
    file = RESULTS / f"{name}.json"
    model = error_model(str(file))
    at = json.loads(file.read_text())["models"][0]["by_position"]
    sigmas = [sigma_of(at[f"{round(100 * part)}%"]["relative_mae"]) for part in FRACTIONS]
    assert model.name == name
    assert model.predicts
    assert model.mean_output == pytest.approx(at["0%"]["mae"] / at["0%"]["relative_mae"])
    assert min(sigmas) - 1e-6 <= min(model.start, model.end) <= max(model.start, model.end) <= max(sigmas) + 1e-6


def without(*path: Any) -> dict[str, Any]:
    """Return an evaluation that lacks one thing."""
    made = inside = evaluation([0.5, 0.4, 0.3, 0.2])
    for part in path[:-1]:
        inside = inside[part]
    del inside[path[-1]]
    return made


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"models": []}, "models: List should have at least 1 item"),
        ({"models": "ours"}, "models: Input should be a valid list"),
        (without("models", 0, "by_position"), "models.0.by_position: Field required"),
        (without("models", 0, "by_position", "75%"), "models.0.by_position.75%: Field required"),
        (without("models", 0, "by_position", "25%", "relative_mae"), "by_position.25%.relative_mae: Field required"),
        (evaluation([0.5, 0.4, 0.3, float("nan")]), "by_position.75%.mae: Input should be a finite number"),
        (evaluation([0.5, 0.4, -0.3, 0.2]), "by_position.50%.mae: Input should be greater than or equal to 0"),
        (evaluation([0.0, 0.4, 0.3, 0.2]), "models.0.by_position.0%: mae / relative_mae must be the mean output"),
        (evaluation([1e-200, 0.4, 0.3, 0.2], 1e-9), "models.0.by_position.0%: mae / relative_mae must be the mean"),
        (evaluation([0.5, 0.4, 0.3, math.inf]), "by_position.75%.mae: Input should be a finite number"),
        (evaluation([0.5, 0.4, 0.3, 2e6]), "by_position.75%.relative_mae: Input should be less than or equal to"),
        ({"pairs": 3}, "needs the numbers start, end and tokens"),
        ([1, 2], "needs the numbers start, end and tokens"),
        ({"start": -1, "end": 0, "tokens": 1}, "must not be negative"),
    ],
)
def test_what_is_missing_is_named(content: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"mine\.json: ") as refused:
        error_model(str(file))
    assert message in str(refused.value)


def test_what_is_not_json_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text("start: 0.5")
    with pytest.raises(ValueError, match=r"mine\.json: not JSON"):
        error_model(str(file))
