"""What the hidden-state hook knows of requests, from the scheduler's output and the runner's alone."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]


class Engine:
    """A hook, and the steps of a worker with one request."""

    def __init__(self) -> None:
        from ares.engine.prediction.hidden_states import HiddenStateHook

        self.model = SimpleNamespace(compute_logits=lambda states: states)
        self.hook = HiddenStateHook(self.model)

    def schedule(self, computed: int, count: int, new: dict[str, Any] | None = None) -> None:
        """Begin a step in which the request computes `count` tokens after the first `computed`."""
        fresh = [SimpleNamespace(req_id="r", num_computed_tokens=computed, **new)] if new else []
        cached = SimpleNamespace(
            req_ids=[] if new else ["r"], num_computed_tokens=[] if new else [computed], resumed_req_ids=set()
        )
        self.hook.begin(
            SimpleNamespace(
                finished_req_ids=set(),
                scheduled_new_reqs=fresh,
                scheduled_cached_reqs=cached,
                num_scheduled_tokens={"r": count},
                scheduled_spec_decode_tokens={},
            )
        )
        self.model.compute_logits(SimpleNamespace(shape=(1, 8)))

    def sample(self, output: Any) -> Any:
        """End the step; return the request."""
        step = self.hook.end(output)
        assert step is not None
        return step.requests[0]


def new(prompt: list[int], **params: Any) -> dict[str, Any]:
    sampling = SimpleNamespace(extra_args={"kv_transfer_params": params})
    return {"prompt_token_ids": prompt, "sampling_params": sampling}


def sampled(*tokens: int) -> Any:
    return SimpleNamespace(req_ids=["r"], sampled_token_ids=[list(tokens)])


def on_device(*tokens: int) -> Any:
    """What vLLM's V2 runner returns under asynchronous scheduling: the tokens come with `get_output`."""
    import torch

    from ares.engine.vllm_api import AsyncOutput, ModelRunnerOutput

    class OnDevice(AsyncOutput):
        def __init__(self) -> None:
            self.copy_event = SimpleNamespace(synchronize=lambda: None)
            self.model_runner_output = ModelRunnerOutput(req_ids=["r"], req_id_to_index={"r": 0})
            self.sampled_token_ids = torch.tensor([[*tokens, 0][:1]]).numpy()
            self.num_sampled_tokens_np = torch.tensor([len(tokens)]).numpy()
            self.sampling_mask_tensors = self.num_nans = self.logprobs_tensors = None
            self.prompt_logprobs_dict = self.prompt_token_id_logprobs_dict = {}
            self.pending_aux_output = self._has_fault = None

    return OnDevice()


def begun(prompt: list[int], **params: Any) -> Any:
    engine = Engine()
    engine.schedule(len([*prompt, *params.get("ares_output", [])]) - 1, 1, new(prompt, **params))
    return engine.sample(sampled(9))


def test_a_resumed_request_looks_like_one_with_its_output_in_the_prompt() -> None:
    """Predictor and recorder count by the whole output; they do not depend on how vLLM keeps it."""
    plain = begun([1, 2, 3, 4, 5], ares_generated=2)
    resumed = begun([1, 2, 3], ares_generated=2, ares_restore=True, ares_output=[4, 5])
    for request in (plain, resumed):
        assert list(request.prompt_tokens) == [1, 2, 3, 4, 5]
        assert request.position == 0
        assert request.generated_before == 2
        assert request.output_tokens == [9]
        assert not request.is_precopy


def test_a_precopy_is_recognised() -> None:
    assert begun([1, 2, 3], ares_ahead=True).is_precopy


def test_tokens_that_reach_the_host_after_the_step_are_not_lost() -> None:
    """Under asynchronous scheduling a step begins before the tokens of the one before are on the host."""
    engine = Engine()
    engine.schedule(0, 2, new([1, 2, 3]))
    engine.sample(chunk := on_device())
    engine.schedule(2, 1)
    request = engine.sample(first := on_device(7))
    assert chunk.get_output().sampled_token_ids == [[]]
    engine.schedule(3, 1)
    engine.sample(second := on_device(8))
    assert request.output_tokens == []
    assert first.get_output().sampled_token_ids == [[7]]
    assert request.output_tokens == [7]
    assert second.get_output().sampled_token_ids == [[8]]
    assert request.output_tokens == [7, 8]


def test_tokens_that_are_generated_again_take_the_place_of_the_first() -> None:
    """vLLM discards a token whose KV had not arrived, and computes it again."""
    engine = Engine()
    engine.schedule(2, 1, new([1, 2, 3]))
    engine.sample(sampled(7))
    engine.schedule(3, 1)
    engine.sample(sampled(8))
    engine.schedule(2, 1)
    assert engine.sample(sampled(9)).output_tokens == [9]


def test_a_preempted_request_that_the_v2_runner_gets_as_a_new_one_keeps_its_tokens() -> None:
    engine = Engine()
    engine.schedule(2, 1, new([1, 2, 3]))
    engine.sample(sampled(7))
    engine.schedule(0, 3, new([1, 2, 3]))  # computed again in parts
    engine.sample(sampled())
    engine.schedule(3, 1)
    request = engine.sample(sampled(8))
    assert request.output_tokens == [7, 8]
    assert request.position == 1
