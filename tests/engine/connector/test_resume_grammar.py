"""Grammars of resumed requests: vLLM's own manager of grammars and reasoning parsers, without an engine."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
from tests.parsers.models import folder, ids

pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]
PROMPT = "<s>user: Hi</s><s>assistant: "
ANSWER = '{"a": "é日"}<|im_end|>'
# Output, whether the reasoning has ended in the prompt, and whether the grammar is reached.
OUTPUTS = {
    "reasoning": ("<think>Hm: {é}</think>" + ANSWER, False, True),
    "no reasoning": (ANSWER, True, True),
    "the instance looks at the prompt": ("<think>Hm</think>" + ANSWER, None, True),
    "never ended": ("<think>Hm, let me see", False, False),
    "ended twice": ("Hm</think>" + '{"a": "</think>"}<|im_end|>', False, True),
}


def configuration(at: Path, parser: str, **more: Any) -> Any:
    from vllm.config import DeviceConfig, ModelConfig, SchedulerConfig, StructuredOutputsConfig, VllmConfig

    shape = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": 512,
        "max_position_embeddings": 4096,
        "torch_dtype": "float32",
    }
    folder(at, **shape)
    return VllmConfig(
        model_config=ModelConfig(model=str(at), max_model_len=2048, dtype="float32"),
        scheduler_config=SchedulerConfig(
            max_model_len=2048, is_encoder_decoder=False, max_num_batched_tokens=2048, max_num_seqs=8
        ),
        device_config=DeviceConfig("cpu"),
        structured_outputs_config=StructuredOutputsConfig(backend="xgrammar", reasoning_parser=parser, **more),
    )


class Instance:
    """vLLM's manager of grammars, asked as the scheduler asks it."""

    def __init__(self, config: Any) -> None:
        from vllm.v1.structured_output import StructuredOutputManager

        from ares.engine.connector.resume_grammar import GrammarReplay

        self._config = config
        self._manager = StructuredOutputManager(config)
        self.replay = GrammarReplay(config)

    def add(self, tokens: list[int], generated: int, ended: bool | None) -> Any:
        """Add a request whose prompt ends with tokens that were generated elsewhere."""
        from vllm.sampling_params import StructuredOutputsParams

        from ares.engine.vllm_api import Request, SamplingParams

        wanted = StructuredOutputsParams(json={"type": "object", "properties": {"a": {"type": "string"}}})
        params = {"ares_generated": generated, "ares_restore": True}
        sampling = SamplingParams(max_tokens=99, structured_outputs=wanted, extra_args={"kv_transfer_params": params})
        model, structured = self._config.model_config, self._config.structured_outputs_config
        sampling.verify(model, None, structured, self._manager.tokenizer)
        request = Request("r", tokens, sampling, None, reasoning_ended=ended)
        self._manager.grammar_init(request)
        while not request.structured_output_request.is_grammar_ready:
            time.sleep(0.001)
        return request

    def allowed(self, request: Any) -> list[int]:
        """The bits of the tokens that may come next."""
        mask = self._manager.grammar_bitmask({"r": request}, ["r"], {})
        assert mask is not None
        return mask[0].tolist()

    def step(self, request: Any, token: int) -> None:
        request.append_output_token_ids(token)
        assert self._manager.accept_tokens(request, [token])


@pytest.fixture(scope="module")
def instances(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Instance]:
    """Instances by their reasoning parser, made once."""

    @functools.cache
    def made(parser: str, **more: Any) -> Instance:
        return Instance(configuration(tmp_path_factory.mktemp("instance") / "model", parser, **more))

    return made


@pytest.mark.parametrize("parser", ["deepseek_r1", "qwen3", ""])
@pytest.mark.parametrize("case", OUTPUTS)
def test_after_a_move_the_same_tokens_are_allowed(instances: Callable[..., Instance], parser: str, case: str) -> None:
    from ares.engine.connector.resume_output import resume_output

    text, ended, reached = OUTPUTS[case]
    prompt, output = ids(PROMPT), ids(text if parser else ANSWER)
    instance = instances(parser)
    request = instance.add(prompt, 0, ended)
    wanted = []
    for token in output:
        wanted.append(instance.allowed(request))
        instance.step(request, token)
    free = [-1] * len(wanted[0])
    constrained = [mask for mask in wanted if mask != free]
    assert bool(constrained) == (reached or not parser)
    for cut in range(1, len(output)):
        resumed = instance.add(prompt + output[:cut], cut, ended)
        assert resume_output(resumed, instance.replay.accept) == cut
        for position in range(cut, len(output)):
            assert instance.allowed(resumed) == wanted[position], f"cut at {cut}, token {position}"
            instance.step(resumed, output[position])
        assert resumed.structured_output_request.reasoning_ended == request.structured_output_request.reasoning_ended


def test_a_grammar_may_bind_the_reasoning_too(instances: Callable[..., Instance]) -> None:
    from ares.engine.connector.resume_output import resume_output

    instance = instances("qwen3", enable_in_reasoning=True)
    prompt, output = ids(PROMPT), ids(ANSWER)
    request = instance.add(prompt, 0, False)
    for cut, token in enumerate(output):
        if cut:
            resumed = instance.add(prompt + output[:cut], cut, False)
            assert resume_output(resumed, instance.replay.accept) == cut
            assert instance.allowed(resumed) == instance.allowed(request)
        instance.step(request, token)


def test_output_that_its_grammar_rejects_is_reported(
    instances: Callable[..., Instance], caplog: pytest.LogCaptureFixture
) -> None:
    from ares.engine.connector.resume_output import resume_output

    instance = instances("deepseek_r1")
    output = ids("Hm</think>no JSON")
    resumed = instance.add(ids(PROMPT) + output, len(output), False)
    assert resume_output(resumed, instance.replay.accept) == len(output)
    assert "rejects the output" in caplog.text
