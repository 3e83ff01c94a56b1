"""Hidden states under speculative decoding: each request's row after its last accepted draft, and its position."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]

PROMPT = [11, 12, 13, 14]


class Worker:
    """A hook in the steps of a worker; the row of a request's n-th token is [request, n]."""

    def __init__(self) -> None:
        from ares.engine.prediction.hidden_states import HiddenStateHook

        self.model = SimpleNamespace(compute_logits=lambda states: states)
        self.hook = HiddenStateHook(self.model)
        self.ids: list[str] = []

    def begin(
        self,
        computed: dict[str, int],
        drafts: dict[str, int],
        *,
        true: dict[str, int] | None = None,
        new: Iterable[str] = (),
        resumed: Iterable[str] = (),
        finished: Iterable[str] = (),
        counts: dict[str, int] | None = None,
    ) -> None:
        """Begin a step: a token and `drafts` after `computed` for each; `true` is what is computed, if not that."""
        import torch

        self.ids = list(computed)
        counts = {name: (counts or {}).get(name, 1 + drafts.get(name, 0)) for name in computed}
        cached = [name for name in computed if name not in new]
        sampling = SimpleNamespace(extra_args={})
        self.hook.begin(
            SimpleNamespace(
                finished_req_ids=set(finished),
                scheduled_new_reqs=[
                    SimpleNamespace(
                        req_id=name,
                        num_computed_tokens=computed[name],
                        prompt_token_ids=PROMPT,
                        sampling_params=sampling,
                    )
                    for name in new
                ],
                scheduled_cached_reqs=SimpleNamespace(
                    req_ids=cached,
                    num_computed_tokens=[computed[name] for name in cached],
                    resumed_req_ids=set(resumed),
                ),
                num_scheduled_tokens=counts,
                scheduled_spec_decode_tokens={name: [-1] * count for name, count in drafts.items() if count},
            )
        )
        rows = []
        for name in self.ids:
            last = (true or {}).get(name, computed[name]) + counts[name] - 1
            rows += [[ord(name), last - drafts.get(name, 0) + n] for n in range(1 + drafts.get(name, 0))]
        self.model.compute_logits(torch.tensor(rows, dtype=torch.float32))

    def end(self, output: Any) -> dict[str, tuple[int, int]]:
        """End the step; return for each request of the result its position and its row's token, both by the prompt."""
        step = self.hook.end(output)
        if step is None or step.states is None:
            return {}
        assert [chr(int(state[0])) for state in step.states] == [request.id for request in step.requests]
        rows = [int(state[1]) - (len(PROMPT) - 1) for state in step.states]
        return {r.id: (r.position, row) for r, row in zip(step.requests, rows, strict=True)}

    def on_host(self, *tokens: list[int]) -> Any:
        return SimpleNamespace(req_ids=self.ids, sampled_token_ids=list(tokens))

    def on_device(self, *tokens: list[int]) -> Any:
        """What asynchronous scheduling returns: its `get_output` waits for the tokens."""
        inner = SimpleNamespace(req_ids=self.ids, sampled_token_ids=[])
        later = SimpleNamespace(sampled_token_ids=list(tokens))
        return SimpleNamespace(model_runner_output=inner, get_output=lambda: later)


def test_the_row_of_the_last_accepted_draft() -> None:
    worker = Worker()
    worker.begin({"a": 0, "b": 0}, {}, new=["a", "b"], counts={"a": 4, "b": 4})
    assert worker.end(worker.on_host([1], [1])) == {"a": (0, 0), "b": (0, 0)}
    for accepted in range(4):
        worker.begin({"a": 4, "b": 4}, {"a": 3, "b": 2})
        found = worker.end(worker.on_host([2] * (accepted + 1), [3]))
        assert found == {"a": (1 + accepted, 1 + accepted), "b": (1, 1)}
        # Again from the start: vLLM computes them anew.
        worker.begin({"a": 0, "b": 0}, {}, resumed=["a", "b"], counts={"a": 4, "b": 4})
        worker.end(worker.on_host([1], [1]))


def test_positions_go_on_from_the_accepted_tokens() -> None:
    worker = Worker()
    worker.begin({"a": 0}, {}, new=["a"], counts={"a": 4})
    worker.end(worker.on_host([1]))
    generated = 1
    for accepted in (3, 0, 2, 1):
        worker.begin({"a": len(PROMPT) + generated - 1}, {"a": 3})
        generated += accepted + 1
        assert worker.end(worker.on_host(list(range(accepted + 1)))) == {"a": (generated - 1, generated - 1)}


def test_a_step_with_drafts_and_a_prompt_gives_both() -> None:
    worker = Worker()
    worker.begin({"a": 0}, {}, new=["a"], counts={"a": 4})
    worker.end(worker.on_host([1]))
    worker.begin({"a": 4, "b": 0}, {"a": 3}, new=["b"], counts={"a": 4, "b": 4})
    assert worker.end(worker.on_host([5, 6], [7])) == {"b": (0, 0), "a": (2, 2)}


def test_asynchronous_steps_are_counted_when_their_tokens_are_known() -> None:
    """A step begins while the drafts of the one before are in flight, and vLLM counts all of them as computed."""
    worker = Worker()
    worker.begin({"a": 0}, {}, new=["a"], counts={"a": 4})
    first = worker.on_device([1])
    assert worker.end(first) == {"a": (0, 0)}
    worker.begin({"a": 4}, {"a": 3})
    first.get_output()
    second = worker.on_device([2, 3])
    assert worker.end(second) == {}  # two of three drafts are rejected
    worker.begin({"a": 8}, {"a": 3}, true={"a": 6})
    second.get_output()
    third = worker.on_device([4])
    assert worker.end(third) == {"a": (2, 2)}
    worker.begin({"a": 10}, {"a": 3}, true={"a": 7})
    third.get_output()
    fourth = worker.on_device([5, 6, 7, 8])
    assert worker.end(fourth) == {"a": (3, 3)}
    worker.begin({"b": 0}, {}, new=["b"], counts={"b": 4})
    fourth.get_output()
    assert worker.end(worker.on_device([1])) == {"b": (0, 0), "a": (7, 7)}


def test_a_request_that_has_ended_is_not_in_a_later_result() -> None:
    worker = Worker()
    worker.begin({"a": 0}, {}, new=["a"], counts={"a": 4})
    worker.end(worker.on_host([1]))
    worker.begin({"a": 4}, {"a": 3})
    worker.end(last := worker.on_device([2, 3]))
    last.get_output()
    worker.begin({"b": 0}, {}, new=["b"], finished=["a"], counts={"b": 4})
    assert worker.end(worker.on_device([1])) == {"b": (0, 0)}


def test_a_preempted_request_is_counted_anew() -> None:
    worker = Worker()
    worker.begin({"a": 0}, {}, new=["a"], counts={"a": 4})
    worker.end(worker.on_host([1]))
    worker.begin({"a": 4}, {"a": 3})
    worker.end(stale := worker.on_device([2, 3, 4]))
    # Its step in flight is dropped: it had one token, and is computed again with it.
    worker.begin({"a": 0}, {}, resumed=["a"], counts={"a": 5})
    stale.get_output()
    resumed = worker.on_device([2])
    assert worker.end(resumed) == {"a": (1, 1)}
    resumed.get_output()
    worker.begin({"a": 5}, {"a": 3})
    assert worker.end(worker.on_host([3, 4])) == {"a": (3, 3)}
