"""What the hidden-state hook knows of requests, from the scheduler's output alone."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]


def begun(prompt: list[int], computed: int, scheduled: int, params: dict[str, Any]) -> Any:
    from ares.engine.prediction.hidden_states import HiddenStateHook

    model = SimpleNamespace(compute_logits=lambda states: states)
    hook = HiddenStateHook(model)
    new = SimpleNamespace(
        req_id="r",
        prompt_token_ids=prompt,
        num_computed_tokens=computed,
        sampling_params=SimpleNamespace(extra_args={"kv_transfer_params": params}),
    )
    cached = SimpleNamespace(req_ids=[], num_computed_tokens=[])
    hook.begin(
        SimpleNamespace(
            finished_req_ids=set(),
            scheduled_new_reqs=[new],
            scheduled_cached_reqs=cached,
            num_scheduled_tokens={"r": scheduled},
            scheduled_spec_decode_tokens={},
        )
    )
    rows = SimpleNamespace(shape=(1, 8))
    model.compute_logits(rows)
    step = hook.end(SimpleNamespace(req_ids=["r"], sampled_token_ids=[[9]]))
    assert step is not None
    return step.requests[0]


def test_a_resumed_request_looks_like_one_with_its_output_in_the_prompt() -> None:
    """Predictor and recorder count by the whole output; they do not depend on how vLLM keeps it."""
    plain = begun([1, 2, 3, 4, 5], 4, 1, {"ares_generated": 2})
    resumed = begun([1, 2, 3], 4, 1, {"ares_generated": 2, "ares_restore": True, "ares_output": [4, 5]})
    for request in (plain, resumed):
        assert list(request.prompt_tokens) == [1, 2, 3, 4, 5]
        assert request.position == 0
        assert request.generated_before == 2
        assert request.output_tokens == [9]
        assert not request.is_precopy


def test_a_precopy_is_recognised() -> None:
    assert begun([1, 2, 3], 2, 1, {"ares_ahead": True}).is_precopy
