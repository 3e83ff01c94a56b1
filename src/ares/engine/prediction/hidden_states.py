"""The hidden-state hook: the final hidden state of every request's last token, read as the model runs.

The states are the argument of the model's `compute_logits`: one row a request, for its last position, after the final
norm. That call is outside of CUDA graphs, and its rows are in the order of `ModelRunnerOutput.req_ids`. The position
of each row follows from the scheduler's output. All of this is the same in vLLM's two model runners.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ares.protocol import fields


@dataclass(slots=True)
class HookedRequest:
    """A request as the worker knows it.

    Attributes
    ----------
    prompt_tokens
        Token ids of its prompt on this instance, with the output of earlier instances at the end.
    position
        How many tokens it had generated before the newest row; negative while its prompt is computed.
    output_tokens
        Tokens generated on this instance. With asynchronous scheduling the newest are missing, whose steps are in
        flight, and after the end there may be some that vLLM has discarded.
    generated_before
        How many tokens at the end of the prompt earlier instances generated, by the gateway's count.
    prefill_only
        Whether another instance decodes it, so that its first token is its last one here.
    is_precopy
        Whether it has no client and only copies KV to this instance.
    """

    id: str
    prompt_tokens: Sequence[int]
    sampling: Any
    position: int
    output_tokens: list[int]
    generated_before: int = field(init=False)
    prefill_only: bool = field(init=False)
    is_precopy: bool = field(init=False)

    def __post_init__(self) -> None:
        # Read once, since every step goes through all requests.
        extra = getattr(self.sampling, "extra_args", None) or {}
        params = extra.get(fields.KV_TRANSFER_PARAMS) or {}
        if output := params.get(fields.RESUMED_TOKENS):
            self.prompt_tokens = [*self.prompt_tokens, *output]
        count = params.get(fields.GENERATED_TOKENS, 0)
        self.generated_before = count if isinstance(count, int) and 0 <= count < len(self.prompt_tokens) else 0
        self.prefill_only = bool(params.get(fields.DO_REMOTE_DECODE))
        self.is_precopy = bool(params.get(fields.PRECOPY))

    def add_output(self, position: int, tokens: list[int]) -> None:
        """Note the tokens sampled at a position; those that it had there, and after it, were discarded."""
        if tokens:
            self.output_tokens[position:] = tokens


@dataclass(frozen=True, slots=True)
class Step:
    """The result of one engine step: `states` is [requests, hidden size] on the device, in the order of `requests`."""

    requests: list[HookedRequest]
    states: Any
    finished: list[HookedRequest]


def unwrapped(output: Any) -> tuple[Any, bool]:
    """Return vLLM's ModelRunnerOutput, and whether its tokens are on the host.

    With asynchronous scheduling each runner wraps it in its own class (v1/worker/gpu/async_utils.py:AsyncOutput,
    v1/worker/gpu_model_runner.py:AsyncGPUModelRunnerOutput), whose `get_output` waits for the tokens.
    """
    inner = getattr(output, "_model_runner_output", None) or getattr(output, "model_runner_output", None)
    return inner or output, inner is None


class HiddenStateHook:
    """Follows the requests of one worker. Call `begin` before a forward pass, and `end` after sampling."""

    def __init__(self, model: Any) -> None:
        self._requests: dict[str, HookedRequest] = {}
        self._finished: list[HookedRequest] = []
        self._armed = False
        self._rows: Any = None
        self._compute_logits = model.compute_logits
        model.compute_logits = self._hooked_compute_logits

    def _hooked_compute_logits(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        # Only the first call in a step: a second one computes prompt log probabilities, and warm-up runs are no steps.
        if self._armed:
            self._armed = False
            self._rows = hidden_states
        return self._compute_logits(hidden_states, *args, **kwargs)

    def begin(self, scheduled: Any) -> None:
        """Update the requests from vLLM's SchedulerOutput for the step that begins."""
        self._rows = None
        for request_id in scheduled.finished_req_ids:
            if (request := self._requests.pop(request_id, None)) is not None:
                self._finished.append(request)
        for new in scheduled.scheduled_new_reqs:
            # The V2 runner gets a request that resumes after a preemption as a new one.
            if new.req_id not in self._requests:
                self._requests[new.req_id] = HookedRequest(
                    new.req_id, new.prompt_token_ids or (), new.sampling_params, -1, []
                )
            self._set_position(new.req_id, new.num_computed_tokens, scheduled)
        cached = scheduled.scheduled_cached_reqs
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self._set_position(request_id, computed, scheduled)
        self._armed = bool(scheduled.num_scheduled_tokens) and not scheduled.scheduled_spec_decode_tokens

    def restart(self) -> Step:
        """Forget all requests; return them as finished."""
        finished = [*self._finished, *self._requests.values()]
        self._requests, self._finished = {}, []
        return Step([], None, finished)

    def _set_position(self, request_id: str, computed: int, scheduled: Any) -> None:
        if (request := self._requests.get(request_id)) is not None:
            tokens = computed + scheduled.num_scheduled_tokens[request_id]
            request.position = tokens - len(request.prompt_tokens)

    def end(self, output: Any) -> Step | None:
        """Pair the rows with requests; None where the step has none (another rank, a draft model, no work)."""
        rows, self._rows, self._armed = self._rows, None, False
        finished, self._finished = self._finished, []
        inner, on_host = unwrapped(output)
        ids = getattr(inner, "req_ids", None)
        if rows is None or not ids or rows.shape[0] != len(ids):
            return Step([], None, finished) if finished else None
        requests = [self._requests[i] for i in ids if i in self._requests]
        if len(requests) != len(ids):
            return Step([], None, finished)
        positions = [request.position for request in requests]

        def add_tokens(sampled: list[list[int]]) -> None:
            for request, position, tokens in zip(requests, positions, sampled, strict=True):
                request.add_output(position, tokens)

        if on_host:
            add_tokens(inner.sampled_token_ids)
        else:
            _when_on_host(output, add_tokens)
        return Step(requests, rows, finished)


def _when_on_host(output: Any, take: Callable[[list[list[int]]], None]) -> None:
    """Call `take` with the tokens when vLLM has waited for them, on the thread that did."""
    stock = output.get_output

    def get_output() -> Any:
        result = stock()
        take(result.sampled_token_ids)
        return result

    output.get_output = get_output
