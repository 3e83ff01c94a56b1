"""The forecast from the first state: what it says later, and who may learn from it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ares.predictor import dataset, first_forecast, hazard, training  # noqa: E402 - needs torch
from ares.predictor.networks import LOGIT_SCALE, HazardNetwork  # noqa: E402 - likewise
from tests.predictor.synthetic import folder  # noqa: E402 - likewise

GRID = hazard.edges(512)


def quantiles_later(ended: torch.Tensor, elapsed: list[int]) -> torch.Tensor:
    later = first_forecast.logits(ended.expand(len(elapsed), -1), GRID, torch.tensor(elapsed))
    return hazard.quantiles(hazard.cumulative(later * LOGIT_SCALE), GRID, torch.tensor([0.1, 0.5, 0.9]))


def test_a_sure_forecast_counts_down() -> None:
    """All of it on outputs of 100 tokens: after n of them 100 - n are left, within the width of a bin there."""
    at = int(torch.searchsorted(GRID, 100.0, right=True))
    ended = torch.zeros(1, len(GRID))
    ended[0, at:] = 1.0
    low, high = float(GRID[at - 1]), float(GRID[at])
    for elapsed, (first, middle, last) in zip((0, 40, 80), quantiles_later(ended, [0, 40, 80]).tolist(), strict=True):
        assert low - elapsed - 3 <= first <= middle <= last <= high - elapsed + 3


def test_a_forecast_without_memory_stays_as_it_is() -> None:
    """Every token ends the output with the same chance: whatever has been generated, as much is still expected."""
    ended = (1 - torch.exp(-(GRID - 1) / 60))[None]
    early, late = quantiles_later(ended, [0, 150]).tolist()
    assert late == pytest.approx(early, rel=0.1)
    assert early[1] == pytest.approx(60 * np.log(2), rel=0.05)


def test_an_untrained_network_says_what_the_forecast_says() -> None:
    network = HazardNetwork(8, 512, members=2, first=1).eval()
    ended = (1 - torch.exp(-(GRID - 1) / 60))[None]
    known = first_forecast.logits(ended, GRID, torch.tensor([20]))
    features = first_forecast.inputs(torch.randn(1, 8), torch.tensor([20]), torch.tensor([7]))
    got = network.quantiles(features[0], torch.cat([features[1], known], 1))
    torch.testing.assert_close(
        got,
        hazard.quantiles(hazard.cumulative(known * LOGIT_SCALE), network.grid, network.levels),
        rtol=1e-4,
        atol=1e-3,
    )
    torch.testing.assert_close(
        network.fused().quantiles(features[0], torch.cat([features[1], known], 1)), got, rtol=1e-4, atol=1e-3
    )


def test_pairs_of_an_output_have_the_forecast_of_its_first(tmp_path: Path) -> None:
    pairs = dataset.load(folder(tmp_path))
    network = HazardNetwork(pairs.source.hidden_size, pairs.source.limit, members=1).eval()
    states = torch.from_numpy(pairs.states).float()
    known = first_forecast.of_pairs(network, states, pairs)
    output = int(pairs.output[len(pairs) // 2])
    rows = np.flatnonzero(pairs.output == output)
    first = rows[0]
    alone = torch.tensor([pairs.position[first]]), torch.tensor([pairs.prompt_length[first]])
    with torch.no_grad():
        ended = first_forecast.forecast(network, states[first : first + 1], *alone)
    for row in rows:
        elapsed = torch.tensor([int(pairs.position[row] - pairs.position[first])])
        torch.testing.assert_close(known[row : row + 1], first_forecast.logits(ended, network.grid, elapsed))


def test_forecasts_for_training_prompts_come_from_other_prompts(tmp_path: Path) -> None:
    """What became of a prompt changes the forecasts of other prompts, and not its own."""
    pairs = dataset.load(folder(tmp_path, outputs=120))
    training_pairs = pairs.only(pairs.split("train"))
    one = first_forecast.part_of(training_pairs, training.PARTS) == 0
    longer = replace(training_pairs, remaining=np.where(one, training_pairs.remaining + 100, training_pairs.remaining))
    settings = training.TrainingSettings(epochs=2, patience=2, width=8, dropouts=(0.5,))
    center, scale = torch.zeros(pairs.source.hidden_size), torch.ones(pairs.source.hidden_size)

    def forecasts(train: dataset.Pairs) -> torch.Tensor:
        parts = {"train": train, "validation": pairs.only(pairs.split("validation"))}
        data = {name: training.Data.of(part, center, scale) for name, part in parts.items()}
        torch.manual_seed(0)
        network = HazardNetwork(pairs.source.hidden_size, pairs.source.limit, members=1)
        return training.with_forecasts(network, parts, data, settings)[0]["train"].scalars

    before, after = forecasts(training_pairs), forecasts(longer)
    assert torch.equal(before[one], after[one])
    assert not torch.equal(before[~one], after[~one])
