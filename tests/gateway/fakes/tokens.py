"""The tokens of the fakes: those of the mock engine's model, whose outputs end only where a test says."""

from ares.mock_engine.model import MockModel

EOS = 2
FIRST_ORDINARY = 3


def mock_model(vocabulary: int) -> MockModel:
    """Return the model of the fakes: it writes every token but the special ones, and never ends an output itself."""
    return MockModel(tuple(range(FIRST_ORDINARY, vocabulary)), EOS, vocabulary, mean_output=1e12, output_sigma=0.0)


def expected(prompt: list[int], count: int, *, vocabulary: int = 256, eos_at: int | None = None) -> list[int]:
    """Return what one undisturbed instance generates."""
    model = mock_model(vocabulary)
    before_eos = count if eos_at is None or eos_at < len(prompt) else eos_at - len(prompt)
    if before_eos >= count:
        return model.continuation(prompt, count)
    return [*model.continuation(prompt, before_eos), EOS]
