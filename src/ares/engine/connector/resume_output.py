"""Resume the output of requests that other instances began, as if it had been generated here.

A request that resumes after a migration arrives with its output at the end of its prompt. What vLLM derives from the
output alone would start from nothing: penalties, bad words, repetition detection, `min_tokens`, the position in a
grammar and the position of a seeded generator. vLLM itself resumes requests with output after a preemption, and a
request that is resumed here gets the same form. The scheduler's part is `resume_output`, all that the V2 runner needs:
it takes a request's tokens and the length of its prompt. The V1 runner's part is `ResumeOutputWorker`, since that
runner takes every new request to have no output.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from ares.engine.vllm_api import PlatformWorker, current_platform
from ares.protocol import fields

logger = logging.getLogger(__name__)


def carried_state(vllm_config: Any, *, by_worker: bool) -> list[str]:
    """Return which state of a request instances of this configuration resume (`messages.Hello.carries`).

    Only what has been tested, in two configurations: the V1 runner without and the V2 runner with asynchronous
    scheduling, both without speculative decoding. Seeds are carried where a draw is a function of the seed and the
    position: in the V2 runner (v1/worker/gpu/sample/gumbel.py), and in the V1 runner on a CPU, which draws one number a
    token. `by_worker` says whether the workers are `ResumeOutputWorker`.
    """
    v2 = bool(vllm_config.use_v2_model_runner)
    tested = v2 == bool(vllm_config.scheduler_config.async_scheduling) and vllm_config.speculative_config is None
    if not by_worker or not tested:
        return []
    state = [fields.CARRIES_OUTPUT]
    state.append(fields.CARRIES_STRUCTURED_OUTPUTS)
    if vllm_config.structured_outputs_config.reasoning_parser:
        # Without one, a grammar begins with the first token here, whatever the gateway knows of the reasoning.
        state.append(fields.CARRIES_STRUCTURED_OUTPUTS_AFTER_REASONING)
    if v2 or current_platform.is_cpu():
        state.append(fields.CARRIES_SEED)
    return state


def resume_output(request: Any, accept: Callable[[Any, list[int]], bool]) -> int:
    """Turn the end of the prompt of vLLM's Request back into output, if the request asks for it.

    To be called once, after vLLM has counted the prompt's tokens (`prefill_stats`) and before it sends the request to
    the workers. `num_prompt_tokens` stays as it was: the scheduler uses it for the tokens to prefill.

    Parameters
    ----------
    accept
        Takes the request's grammar over the output (`GrammarReplay.accept`); False where the grammar rejects it.

    Returns
    -------
    int
        The number of tokens.
    """
    params = request.kv_transfer_params or {}
    count = params.get(fields.GENERATED_TOKENS, 0)
    prompt = request.prompt_token_ids
    if not params.get(fields.RESUME_OUTPUT) or not isinstance(count, int) or not prompt or not 0 < count < len(prompt):
        return 0
    output = prompt[-count:]
    request.prompt_token_ids = prompt[:-count]
    request._output_token_ids.extend(output)  # noqa: SLF001 - the public view of it is read-only
    # Its limits are for the tokens that are still to come. Processes of workers check the parameters that they get, and
    # an engine ends where `min_tokens` is above `max_tokens` (sampling_params.py:_verify_args, 0.32).
    request.max_tokens += count
    request.sampling_params.max_tokens += count
    if request.sampling_params.min_tokens:
        request.sampling_params.min_tokens += count
    if request.structured_output_request is not None and not accept(request, output):
        logger.error(
            "the grammar of %s rejects the output that another instance generated under it", request.request_id
        )
    # Travels to the workers within the sampling parameters.
    params[fields.RESUMED_TOKENS] = output
    return int(count)


class SeededGenerator(torch.Generator):  # type: ignore[misc]
    """The generator of a seeded request on a CPU; its position is the number of the request's output tokens.

    vLLM's sampler draws one number for each token (v1/sample/ops/topk_topp_sampler.py:forward_cpu). It also draws for
    rows whose token is discarded, and rewinds those draws through `set_offset`, which torch does not offer on a CPU.
    """

    _seed: int
    _output: list[int]

    @classmethod
    def of(cls, state: Any) -> "SeededGenerator":
        """Return the generator of vLLM's CachedRequestState, at the end of its output."""
        generator = cls(device="cpu")
        generator._seed, generator._output = state.sampling_params.seed, state.output_token_ids
        generator.seek(len(state.output_token_ids))
        return generator

    def seek(self, count: int) -> None:
        """Set the position after this many tokens."""
        self.manual_seed(self._seed)
        if count:
            torch.randint(0, 2**31, (count,), generator=self, dtype=torch.long)

    def get_offset(self) -> int:
        """Return a base for vLLM's arithmetic, whose result `set_offset` does not use."""
        return 0

    def set_offset(self, _: int) -> None:
        """Rewind to the end of the output: vLLM has discarded a token."""
        self.seek(len(self._output))


class ResumeOutputWorker(PlatformWorker):  # type: ignore[misc]
    """The platform's worker that gives resumed requests their output."""

    _batch: Any = None

    def execute_model(self, scheduler_output: Any) -> Any:
        """Prepare the resumed requests of this step, then run the model."""
        if not self.vllm_config.use_v2_model_runner:
            batch = self.model_runner.input_batch
            if batch is not self._batch:  # the runner makes another one once it knows its KV cache
                self._batch = batch
                batch.add_request = _with_output(batch.add_request)
            if batch.generators:
                self._rewind(scheduler_output.scheduled_cached_reqs)
        return super().execute_model(scheduler_output)

    def _rewind(self, cached: Any) -> None:
        """Rewind the draws of steps whose tokens were discarded, since KV that they read had not arrived."""
        for request_id, count in zip(cached.req_ids, cached.num_output_tokens, strict=True):
            state = self.model_runner.requests[request_id]
            if isinstance(state.generator, SeededGenerator) and count < len(state.output_token_ids):
                state.generator.seek(count)


def _with_output(add_request: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def resume_and_add(state: Any) -> Any:
        _resume(state)
        return add_request(state)

    return resume_and_add


def _resume(state: Any) -> None:
    """Give vLLM's CachedRequestState the output of other instances, and its generator the position after it."""
    if state.sampling_params is None:
        return
    extra = state.sampling_params.extra_args or {}
    params = extra.get(fields.KV_TRANSFER_PARAMS) or {}
    if not state.output_token_ids:
        state.output_token_ids.extend(params.get(fields.RESUMED_TOKENS) or ())
    seeded = state.generator is not None and state.generator.device.type == "cpu"
    if seeded and not isinstance(state.generator, SeededGenerator):
        state.generator = SeededGenerator.of(state)
