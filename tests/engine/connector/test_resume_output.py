"""Resumed output: vLLM's own Request and sampler, without an engine."""

import pickle
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]


def request(tokens: list[int], params: dict[str, Any], **sampling: Any) -> Any:
    from ares.engine.vllm_api import Request, SamplingParams

    arguments = {"max_tokens": 10, "extra_args": {"kv_transfer_params": params}, **sampling}
    return Request("r", tokens, SamplingParams(**arguments), None)


def refuse(*_: Any) -> bool:
    raise AssertionError("the request has no grammar")


def test_the_end_of_the_prompt_becomes_output() -> None:
    from ares.engine.connector.resume_output import resume_output

    resumed = request([1, 2, 3, 4, 5], {"ares_generated": 2, "ares_restore": True}, min_tokens=3)
    assert resume_output(resumed, refuse) == 2
    assert resumed.prompt_token_ids == [1, 2, 3]
    assert list(resumed.output_token_ids) == [4, 5]
    assert list(resumed.all_token_ids) == [1, 2, 3, 4, 5]
    assert (resumed.num_output_tokens, resumed.num_tokens, resumed.num_prompt_tokens) == (2, 5, 5)
    assert resumed.max_tokens == resumed.sampling_params.max_tokens == 12
    assert resumed.sampling_params.min_tokens == 5
    assert resumed.sampling_params.extra_args["kv_transfer_params"]["ares_output"] == [4, 5]
    resumed.append_output_token_ids(6)
    assert list(resumed.output_token_ids) == [4, 5, 6]


def test_processes_of_workers_take_the_parameters() -> None:
    """They check them, and an engine ends where one refuses: with tensor parallelism, for one."""
    from ares.engine.connector.resume_output import resume_output

    resumed = request([1, 2, 3, 4, 5], {"ares_generated": 2, "ares_restore": True}, min_tokens=10)
    resume_output(resumed, refuse)
    sent = pickle.loads(pickle.dumps(resumed.sampling_params))  # noqa: S301 - our own
    assert (sent.min_tokens, sent.max_tokens) == (12, 12)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"ares_generated": 2},
        {"ares_restore": True},
        {"ares_generated": 0, "ares_restore": True},
        {"ares_generated": 5, "ares_restore": True},
        {"ares_generated": -1, "ares_restore": True},
        {"ares_generated": "2", "ares_restore": True},
    ],
)
def test_parameters_that_do_not_fit_change_nothing(params: dict[str, Any]) -> None:
    from ares.engine.connector.resume_output import resume_output

    left = request([1, 2, 3, 4, 5], params)
    assert resume_output(left, refuse) == 0
    assert left.prompt_token_ids == [1, 2, 3, 4, 5]
    assert left.num_output_tokens == 0
    assert left.max_tokens == 10


def test_the_grammar_continues_at_the_end_of_the_output() -> None:
    from ares.engine.connector.resume_output import resume_output

    accepted: list[int] = []
    resumed = request([1, 2, 3], {"ares_generated": 2, "ares_restore": True})
    resumed.structured_output_request = SimpleNamespace()
    assert resume_output(resumed, lambda _, tokens: bool(accepted.extend(tokens)) or True) == 2
    assert accepted == [2, 3]


@pytest.mark.parametrize(
    ("v2", "asynchronous", "changes", "expected"),
    [
        (False, False, {}, {"output", "seed", "structured_outputs"}),
        (True, True, {}, {"output", "seed", "structured_outputs"}),
        (False, True, {}, set()),
        (True, False, {}, set()),
        (True, True, {"speculative_config": object()}, set()),
        (
            True,
            True,
            {"structured_outputs_config": SimpleNamespace(reasoning_parser="qwen3")},
            {"output", "seed", "structured_outputs", "structured_outputs_after_reasoning"},
        ),
    ],
)
def test_only_tested_configurations_carry_state(
    v2: bool, asynchronous: bool, changes: dict[str, Any], expected: set[str]
) -> None:
    from ares.engine.connector.resume_output import carried_state
    from ares.engine.vllm_api import current_platform

    config = {
        "use_v2_model_runner": v2,
        "scheduler_config": SimpleNamespace(async_scheduling=asynchronous),
        "speculative_config": None,
        "structured_outputs_config": SimpleNamespace(reasoning_parser=""),
        **changes,
    }
    if not v2 and not current_platform.is_cpu():
        expected = expected - {"seed"}
    assert set(carried_state(SimpleNamespace(**config), by_worker=True)) == expected
    assert carried_state(SimpleNamespace(**config), by_worker=False) == []


@pytest.mark.parametrize("drawn", [0, 1, 2, 1000])
def test_a_seeded_generator_has_the_position_of_vllms_sampler(drawn: int) -> None:
    """After the sampler has drawn for so many tokens, both draw the same."""
    import torch

    from ares.engine.connector.resume_output import SeededGenerator
    from ares.engine.vllm_api import TopKTopPSampler

    sampler = TopKTopPSampler()
    if sampler.forward != sampler.forward_cpu:
        pytest.skip("not on a CPU")

    def sample(generator: torch.Generator) -> int:
        return int(sampler(torch.zeros(1, 64), {0: generator}, None, None)[0])

    stock = torch.Generator()
    stock.manual_seed(9)
    output = [sample(stock) for _ in range(drawn)]
    ours = SeededGenerator.of(SimpleNamespace(sampling_params=SimpleNamespace(seed=9), output_token_ids=output))
    following = [sample(stock) for _ in range(5)]
    assert [sample(ours) for _ in range(5)] == following
    assert len(set(following)) > 1
    ours.seek(drawn)
    assert sample(ours) == following[0]
    # The draw for a token that vLLM discards is rewound.
    ours.set_offset(ours.get_offset() - 4)
    assert sample(ours) == following[0]


def test_the_draw_of_a_discarded_token_is_rewound(monkeypatch: pytest.MonkeyPatch) -> None:
    """KV that a step read had not arrived: the scheduler drops the sampled token, and the runner too."""
    import torch

    from ares.engine.connector.resume_output import ResumeOutputWorker, SeededGenerator
    from ares.engine.vllm_api import PlatformWorker

    def state(generator: Any, output: list[int]) -> Any:
        return SimpleNamespace(
            generator=generator, output_token_ids=output, sampling_params=SimpleNamespace(seed=3, extra_args=None)
        )

    def draw(generator: torch.Generator) -> int:
        return int(torch.randint(0, 2**31, (1,), generator=generator))

    dropped = state(None, [5])
    dropped.generator = SeededGenerator.of(dropped)
    second = draw(dropped.generator)
    dropped.output_token_ids.append(6)
    going_on = state(None, [7])
    going_on.generator = SeededGenerator.of(going_on)
    monkeypatch.setattr(PlatformWorker, "execute_model", lambda *_: "output")
    worker = ResumeOutputWorker.__new__(ResumeOutputWorker)
    worker.vllm_config = SimpleNamespace(use_v2_model_runner=False)
    added: list[Any] = []
    worker.model_runner = SimpleNamespace(
        requests={"a": dropped, "b": going_on, "c": state(None, [1, 2])},
        input_batch=SimpleNamespace(add_request=added.append, generators={0: dropped.generator}),
    )
    cached = SimpleNamespace(req_ids=["a", "b", "c"], num_output_tokens=[1, 1, 0])
    assert worker.execute_model(SimpleNamespace(scheduled_cached_reqs=cached)) == "output"
    assert draw(dropped.generator) == second
    assert draw(going_on.generator) == second
    # The runner takes the token away itself, and all that depends on it.
    assert dropped.output_token_ids == [5, 6]


def test_a_new_request_gets_its_output_and_a_generator_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The V1 runner takes every new request to have no output."""
    import torch

    from ares.engine.connector.resume_output import ResumeOutputWorker
    from ares.engine.vllm_api import PlatformWorker

    monkeypatch.setattr(PlatformWorker, "execute_model", lambda *_: None)
    added: list[Any] = []
    batch = SimpleNamespace(add_request=added.append, generators={})
    worker = ResumeOutputWorker.__new__(ResumeOutputWorker)
    worker.vllm_config = SimpleNamespace(use_v2_model_runner=False)
    worker.model_runner = SimpleNamespace(requests={}, input_batch=batch)
    for _ in range(2):  # the second step must not wrap the batch again
        worker.execute_model(SimpleNamespace(scheduled_cached_reqs=None))

    def state(params: dict[str, Any], generator: Any) -> Any:
        sampling = SimpleNamespace(seed=3, extra_args={"kv_transfer_params": params})
        return SimpleNamespace(generator=generator, output_token_ids=[], sampling_params=sampling)

    resumed = state({"ares_output": [4, 5]}, torch.Generator().manual_seed(3))
    batch.add_request(resumed)
    batch.add_request(plain := state({}, None))
    assert added == [resumed, plain]
    assert (resumed.output_token_ids, plain.output_token_ids) == ([4, 5], [])
    stock = torch.Generator().manual_seed(3)
    drawn = torch.randint(0, 2**31, (3,), generator=stock)
    assert torch.randint(0, 2**31, (1,), generator=resumed.generator) == drawn[2]
