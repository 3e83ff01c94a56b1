"""The hidden-state hook: the final hidden state of every request's last token, read as the model runs.

The states are the argument of the model's `compute_logits`: one row a request, for its last position, after the final
norm. That call is outside of CUDA graphs, and its rows are in the order of `ModelRunnerOutput.req_ids`. The position
of each row follows from the scheduler's output. All of this is the same in vLLM's two model runners.

In a step with drafts (speculative decoding) a request has one row for each draft and one more. The newest that counts
is that of the last accepted draft, which is known once the step's tokens are on the host. With asynchronous scheduling
that is after the step, and such a request appears in what a later step returns.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

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
    drafted
        Whether it has had drafts since its prompt was computed: vLLM's count of its tokens may then include drafts in
        flight, and its positions follow from `generated`.
    generated
        How many tokens it had generated after the newest step with drafts whose tokens are on the host.
    generated_before
        How many tokens at the end of the prompt earlier instances generated, by the gateway's count.
    resumed
        How many of them vLLM takes for output of this instance, limits included (engine/connector/resume_output.py).
    prefill_only
        Whether another instance decodes it, so that its first token is its last one here.
    is_precopy
        Whether it has no client and only copies KV to this instance.
    key
        The key that a gateway gave it; None where it has none.
    first_forecast
        The forecast that came with it (engine/prediction/carried_forecast.py), not checked.
    """

    id: str
    prompt_tokens: Sequence[int]
    sampling: Any
    position: int
    output_tokens: list[int]
    drafted: bool = False
    generated: int = 0
    generated_before: int = field(init=False)
    resumed: int = field(init=False)
    prefill_only: bool = field(init=False)
    is_precopy: bool = field(init=False)
    key: str | None = field(init=False)
    first_forecast: Any = field(init=False)

    def __post_init__(self) -> None:
        # Read once, since every step goes through all requests.
        extra = getattr(self.sampling, "extra_args", None) or {}
        params = extra.get(fields.KV_TRANSFER_PARAMS) or {}
        output = params.get(fields.RESUMED_TOKENS) or []
        self.resumed = len(output)
        if output:
            self.prompt_tokens = [*self.prompt_tokens, *output]
        count = params.get(fields.GENERATED_TOKENS, 0)
        self.generated_before = count if isinstance(count, int) and 0 <= count < len(self.prompt_tokens) else 0
        self.prefill_only = bool(params.get(fields.DO_REMOTE_DECODE))
        self.is_precopy = bool(params.get(fields.PRECOPY))
        key = params.get(fields.KEY)
        self.key = key if isinstance(key, str) else None
        self.first_forecast = params.get(fields.FIRST_FORECAST)

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


@dataclass(frozen=True, slots=True)
class AcceptedRows:
    """The newest row that counts of each request, after a step with drafts, and the position of that row."""

    requests: list[HookedRequest]
    positions: list[int]
    states: Any


@dataclass(frozen=True, slots=True)
class DraftedRows:
    """The rows of requests in a step after which their tokens have to be counted.

    Attributes
    ----------
    before
        Tokens that each had generated before the step; None where the steps before it tell.
    first
        The first row of each.
    """

    requests: list[HookedRequest]
    before: list[int | None]
    first: list[int]
    rows: Any

    def accept(self, sampled: list[list[int]]) -> AcceptedRows:
        """Return the rows that count, now that each request's tokens of the step are known."""
        requests, positions, newest = [], [], []
        for request, before, first, tokens in zip(self.requests, self.before, self.first, sampled, strict=True):
            start = request.generated if before is None else before
            request.add_output(start, tokens)
            request.generated = start + len(tokens)
            if tokens:
                requests.append(request)
                positions.append(request.generated - 1)
                newest.append(first + len(tokens) - 1)
        return AcceptedRows(requests, positions, self.rows[newest] if newest else None)


class HiddenStateHook:
    """Follows the requests of one worker. Call `begin` before a forward pass, and `end` after sampling."""

    def __init__(self, model: Any) -> None:
        self._requests: dict[str, HookedRequest] = {}
        self._finished: list[HookedRequest] = []
        self._scheduled: dict[str, int] = {}
        self._drafts: dict[str, int] = {}
        # Filled on the thread that waits for the tokens.
        self._accepted: deque[AcceptedRows] = deque()
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
        self._scheduled = scheduled.num_scheduled_tokens
        self._drafts = {name: len(drafts) for name, drafts in scheduled.scheduled_spec_decode_tokens.items()}
        for request_id in scheduled.finished_req_ids:
            if (request := self._requests.pop(request_id, None)) is not None:
                self._finished.append(request)
        for new in scheduled.scheduled_new_reqs:
            # The V2 runner gets a request that resumes after a preemption as a new one.
            if new.req_id not in self._requests:
                self._requests[new.req_id] = HookedRequest(
                    new.req_id, new.prompt_token_ids or (), new.sampling_params, -1, []
                )
            self._set_position(new.req_id, new.num_computed_tokens, resumed=True)
        cached = scheduled.scheduled_cached_reqs
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self._set_position(request_id, computed, resumed=request_id in cached.resumed_req_ids)
        self._armed = bool(scheduled.num_scheduled_tokens)

    def restart(self) -> Step:
        """Forget all requests; return them as finished."""
        finished = [*self._finished, *self._requests.values()]
        self._requests, self._finished = {}, []
        return Step([], None, finished)

    def _set_position(self, request_id: str, computed: int, *, resumed: bool) -> None:
        if (request := self._requests.get(request_id)) is None:
            return
        count = self._scheduled[request_id]
        request.position = computed + count - len(request.prompt_tokens)
        # Several tokens without drafts are computed again: vLLM counts exactly from there.
        if resumed or (count > 1 and request_id not in self._drafts):
            request.drafted = False

    def end(self, output: Any) -> Step | None:
        """Pair the rows with requests; None where there are none (another rank, a draft model, no work)."""
        rows, self._rows, self._armed = self._rows, None, False
        finished, self._finished = self._finished, []
        inner, on_host = unwrapped(output)
        ids = getattr(inner, "req_ids", None) or ()
        requests = [self._requests[i] for i in ids if i in self._requests]
        per_request = [1 + self._drafts.get(i, 0) for i in ids]
        if rows is None or not ids or len(requests) != len(ids) or rows.shape[0] != sum(per_request):
            return self._result([], None, finished)
        drafted, counted, states = self._split(requests, rows)
        positions = [request.position for request in counted]
        places = {request_id: n for n, request_id in enumerate(ids)}

        def add_tokens(sampled: list[list[int]]) -> None:
            for request, position in zip(counted, positions, strict=True):
                request.add_output(position, sampled[places[request.id]])
            if drafted.requests:
                self._accepted.append(drafted.accept([sampled[places[request.id]] for request in drafted.requests]))

        if on_host:
            add_tokens(inner.sampled_token_ids)
        else:
            _when_on_host(output, add_tokens)
        return self._result(counted, states, finished)

    def _split(self, requests: list[HookedRequest], rows: Any) -> tuple[DraftedRows, list[HookedRequest], Any]:
        """Separate the rows whose requests have drafts; return also the other requests, and their rows."""
        drafted = DraftedRows([], [], [], rows)
        others, other_rows, row = [], [], 0
        for request in requests:
            drafts = self._drafts.get(request.id, 0)
            if drafts or request.drafted:
                drafted.requests.append(request)
                drafted.before.append(None if request.drafted else request.position - drafts)
                drafted.first.append(row)
                request.drafted = True
            else:
                others.append(request)
                other_rows.append(row)
            row += 1 + drafts
        states = rows if not drafted.requests else rows[other_rows] if others else None
        return drafted, others, states

    def _result(self, requests: list[HookedRequest], states: Any, finished: list[HookedRequest]) -> Step | None:
        """Return these requests, and those of a step before whose drafts have been counted since; None for nothing."""
        if self._accepted:
            accepted = self._accepted.popleft()
            # Not one that has ended since, or that is computed again and may be among `requests`.
            running = [n for n, r in enumerate(accepted.requests) if r.drafted and self._requests.get(r.id) is r]
            if running:
                kept = accepted.states[running]
                states = kept if states is None else torch.cat([states, kept])
                requests = requests + [accepted.requests[n] for n in running]
                for n in running:
                    accepted.requests[n].position = accepted.positions[n]
        return Step(requests, states, finished) if requests or finished else None


def _when_on_host(output: Any, take: Callable[[list[list[int]]], None]) -> None:
    """Call `take` with the tokens when vLLM has waited for them, on the thread that did."""
    stock = output.get_output

    def get_output() -> Any:
        result = stock()
        take(result.sampled_token_ids)
        return result

    output.get_output = get_output
