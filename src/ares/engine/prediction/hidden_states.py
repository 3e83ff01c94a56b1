"""The tap: the last token's final hidden state of every request, read as the model runs, without a patch.

The states are what vLLM gives `compute_logits`: one row a request, its last position, after the final norm. That call
is outside of CUDA graphs, and its rows are in the order of `ModelRunnerOutput.req_ids`. Which token a row belongs to
comes from the scheduler's own output. All of this is the same in vLLM's two model runners; only the V1 runner was run
(the V2 runner needs Triton, so that a CPU build never has it).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ares.protocol import fields


@dataclass(slots=True)
class HookedRequest:
    """A request as the worker sees it.

    Attributes
    ----------
    prompt_tokens
        Token ids of what the instance was given; the outputs of earlier instances are in it.
    position
        Tokens it has generated before the newest row; negative while its prompt is computed.
    output_tokens
        What it generated on this instance; stays empty where the runner keeps tokens on the device (asynchronous
        scheduling).
    """

    id: str
    prompt_tokens: Sequence[int]
    sampling: Any
    position: int
    output_tokens: list[int]
    generated_before: int = field(init=False)
    """Tokens at the end of the prompt that earlier instances generated, as the gateway says."""
    prefill_only: bool = field(init=False)
    """Whether another instance decodes it: its first token is its last here."""
    ahead: bool = field(init=False)
    """Whether it is no client's request, and only brings KV here ahead of one."""

    def __post_init__(self) -> None:
        # Read once: every step looks at every request.
        extra = getattr(self.sampling, "extra_args", None) or {}
        said = extra.get(fields.KV_TRANSFER_PARAMS) or {}
        if output := said.get(fields.RESUMED_TOKENS):
            self.prompt_tokens = [*self.prompt_tokens, *output]
        count = said.get(fields.GENERATED_TOKENS, 0)
        self.generated_before = count if isinstance(count, int) and 0 <= count < len(self.prompt_tokens) else 0
        self.prefill_only = bool(said.get(fields.DO_REMOTE_DECODE))
        self.ahead = bool(said.get(fields.PRECOPY))


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of the engine gave: `states` is [rows, hidden size] on the device, one row a request."""

    requests: list[HookedRequest]
    states: Any
    finished: list[HookedRequest]


def unwrapped(output: Any) -> tuple[Any, bool]:
    """Return vLLM's ModelRunnerOutput, and whether its tokens are on the host.

    Asynchronous scheduling wraps it in an object of either runner's own, and its tokens come later.
    """
    inner = getattr(output, "_model_runner_output", None) or getattr(output, "model_runner_output", None)
    return inner or output, inner is None


class HiddenStateHook:
    """Follows one worker's requests. Call `begin` before a forward pass and `end` after its tokens are sampled."""

    def __init__(self, model: Any) -> None:
        self._requests: dict[str, HookedRequest] = {}
        self._finished: list[HookedRequest] = []
        self._armed = False
        self._rows: Any = None
        self._compute_logits = model.compute_logits
        model.compute_logits = self._compute_logits_tapped

    def _compute_logits_tapped(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        # Only the first call of a step: a second one computes the log probabilities of prompts; warm-ups are no steps.
        if self._armed:
            self._armed = False
            self._rows = hidden_states
        return self._compute_logits(hidden_states, *args, **kwargs)

    def begin(self, scheduled: Any) -> None:
        """Take note of what vLLM's SchedulerOutput says of the step to come."""
        self._rows = None
        for request_id in scheduled.finished_req_ids:
            if (request := self._requests.pop(request_id, None)) is not None:
                self._finished.append(request)
        for new in scheduled.scheduled_new_reqs:
            self._requests[new.req_id] = HookedRequest(
                new.req_id, new.prompt_token_ids or (), new.sampling_params, -1, []
            )
            self._place(new.req_id, new.num_computed_tokens, scheduled)
        cached = scheduled.scheduled_cached_reqs
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self._place(request_id, computed, scheduled)
        self._armed = bool(scheduled.num_scheduled_tokens) and not scheduled.scheduled_spec_decode_tokens

    def restart(self) -> Step:
        """Forget all requests; return them as finished."""
        finished = [*self._finished, *self._requests.values()]
        self._requests, self._finished = {}, []
        return Step([], None, finished)

    def _place(self, request_id: str, computed: int, scheduled: Any) -> None:
        if (request := self._requests.get(request_id)) is not None:
            tokens = computed + scheduled.num_scheduled_tokens[request_id]
            request.position = tokens - len(request.prompt_tokens)

    def end(self, output: Any) -> Step | None:
        """Pair the rows with requests; None where this step has none (another rank, a draft, nothing to do)."""
        rows, self._rows, self._armed = self._rows, None, False
        finished, self._finished = self._finished, []
        inner, on_host = unwrapped(output)
        ids = getattr(inner, "req_ids", None)
        if rows is None or not ids or rows.shape[0] != len(ids):
            return Step([], None, finished) if finished else None
        requests = [self._requests[i] for i in ids if i in self._requests]
        if len(requests) != len(ids):
            return Step([], None, finished)
        if on_host:
            for request, tokens in zip(requests, inner.sampled_token_ids, strict=True):
                request.output_tokens += tokens
        return Step(requests, rows, finished)
