"""What a worker records of hidden states for a check: of one gateway's requests, and no more than it may keep."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch: the predictor extra")


def request(key: str | None, prompt: int, position: int) -> Any:
    from ares.engine.prediction.hidden_states import HookedRequest

    sampling = SimpleNamespace(extra_args={"kv_transfer_params": {"ares_key": key}} if key else None)
    return HookedRequest(key or "other", list(range(prompt)), sampling, position, [])


def step(*requests: Any) -> Any:
    import torch

    from ares.engine.prediction.hidden_states import Step

    return Step(list(requests), torch.arange(2.0 * len(requests)).reshape(-1, 2), [])


def test_states_of_the_gateway_that_asked_by_the_tokens_before_them() -> None:
    from ares.engine.prediction.recorded_states import RecordedStates

    record = RecordedStates("check")
    record.add(step(request("other/1/1", 9, 0), request("check/1/1", 5, 0), request(None, 3, 0)), 0.5)
    record.add(step(request("check/1/1", 5, 1)), 0.25)
    record.add(step(request("check/2/1", 5, -1)), 0.25)  # its prompt is still computed
    record.add(step(request("other/1/1", 9, 1)), 0.25)
    assert record.take() == {"states": {"5": [2.0, 3.0], "6": [0.0, 1.0]}, "steps": 2, "predictor_s": 0.75}
    assert record.take() == {"states": {}, "steps": 0, "predictor_s": 0.0}


def test_a_record_that_is_not_taken_stays_small() -> None:
    from ares.engine.prediction.recorded_states import RecordedStates

    record = RecordedStates("check")
    for position in range(2000):
        record.add(step(request("check/1/1", 5, position)), 0.0)
    assert len(record.take()["states"]) == 256
