"""What the recorder writes of requests, step by step."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]

EVERY, END = 2, 99


def recorded(folder: Path, tokens: list[int], *, late: int, **sampling: Any) -> Any:
    """Record an output whose tokens reach the host `late` steps after they were sampled, and read it back."""
    import torch

    from ares.engine.prediction.hidden_states import HookedRequest, Step
    from ares.engine.prediction.recorder import Recorder
    from ares.predictor import dataset

    recorder = Recorder(folder, 1.0, "model", 4, 100, EVERY, END)
    request = HookedRequest(
        "r", [1, 2, 3], SimpleNamespace(**{"extra_args": None, "max_tokens": 50, **sampling}), -1, []
    )
    for position in range(len(tokens)):
        request.position = position
        if position >= late:
            request.output_tokens.append(tokens[position - late])
        recorder.step(Step([request], torch.full((1, 4), float(position)), []))
    request.output_tokens[:] = tokens
    recorder.step(Step([], None, [request]))
    recorder.close()
    return dataset.load(folder)


@pytest.mark.parametrize("late", [0, 1])
def test_a_complete_output(tmp_path: Path, late: int) -> None:
    pairs = recorded(tmp_path, [5, 6, 7, END], late=late)
    assert [list(tokens) for tokens in pairs.output_tokens] == [[5, 6, 7, END]]
    assert list(pairs.position) == [0, 2]
    assert pairs.states[:, 0].tolist() == [0, 2]
    assert not pairs.censored.any()


@pytest.mark.parametrize("late", [0, 1, 2])
def test_what_is_sampled_after_the_stop_token_is_not_output(tmp_path: Path, late: int) -> None:
    """Under asynchronous scheduling a step or two have begun before the stop token is seen."""
    pairs = recorded(tmp_path, [5, 6, END, 8, 9], late=late)
    assert [list(tokens) for tokens in pairs.output_tokens] == [[5, 6, END]]
    assert list(pairs.position) == [0, 2]
    assert not pairs.censored.any()


def test_an_output_without_a_stop_token_is_censored(tmp_path: Path) -> None:
    pairs = recorded(tmp_path, [5, END, 7], late=1, ignore_eos=True)
    assert [list(tokens) for tokens in pairs.output_tokens] == [[5, END, 7]]
    assert pairs.censored.all()


def test_drafts_beyond_the_limit_are_not_output(tmp_path: Path) -> None:
    """A step may accept more drafts than the output has room for; vLLM drops the rest."""
    pairs = recorded(tmp_path, [5, 6, 7, 8, 9], late=1, max_tokens=3)
    assert [list(tokens) for tokens in pairs.output_tokens] == [[5, 6, 7]]
    assert list(pairs.position) == [0, 2]
    assert pairs.censored.all()
