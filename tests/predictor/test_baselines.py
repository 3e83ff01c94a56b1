"""Baselines that are trained: what they may know, and what they may not."""

import numpy as np
import pytest

from ares.predictor import dataset, metrics
from ares.predictor.baselines import Auxiliary, PromptOnly, with_embeddings
from ares.predictor.dataset import Pairs
from ares.predictor.training import settings_of
from tests.predictor import synthetic

WIDTH = 6


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return dataset.load(synthetic.folder(tmp_path_factory.mktemp("data"), outputs=200))


def embedded(pairs: Pairs, values: np.ndarray) -> Pairs:
    """Pairs as an encoder reads them, which finds one number in each text."""
    states = np.zeros((len(pairs), WIDTH), np.float16)
    states[:, 0] = values / 100
    return with_embeddings(pairs, states)


def error(quantiles: metrics.Array, pairs: Pairs) -> float:
    return float(metrics.absolute_error(quantiles, pairs.remaining.astype(float)).mean())


def test_an_encoder_that_reads_the_prompt_alone_counts_down_from_it(pairs: Pairs) -> None:
    lengths = (pairs.position + pairs.remaining).astype(float)
    # What it reads later is wrong: only the prompt counts.
    read = embedded(pairs, np.where(pairs.position == 0, lengths, 10_000.0))
    fitted = PromptOnly(read, settings_of("paper", epochs=300, patience=300), encoder_parameters=5)
    test = pairs.only(pairs.split("test"))
    quantiles = fitted.quantiles(test)
    assert error(quantiles, test) < 0.3 * float(np.abs(lengths - np.median(lengths)).mean())
    for output in np.unique(test.output):
        rows = np.flatnonzero(test.output == output)
        first = quantiles[rows[0]]
        expected = np.maximum(first - test.position[rows][:, None], 0.5)
        np.testing.assert_allclose(quantiles[rows], expected, atol=1e-6)


def test_an_encoder_that_reads_the_text_again_follows_it(pairs: Pairs) -> None:
    read = embedded(pairs, pairs.remaining.astype(float))
    fitted = Auxiliary(pairs, read.states, 5, settings_of("paper", epochs=60, patience=60))
    test = pairs.only(pairs.split("test"))
    assert error(fitted.quantiles(test), test) < 0.3 * float(test.remaining.mean())


def test_parameters_of_the_encoder_count(pairs: Pairs) -> None:
    few = settings_of("paper", epochs=1)
    read = embedded(pairs, pairs.remaining.astype(float))
    with_encoder, without = PromptOnly(read, few, encoder_parameters=1000), PromptOnly(read, few)
    assert with_encoder.parameters - without.parameters == 1000
