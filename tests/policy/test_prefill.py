"""Prefill policies: where a prompt is computed, with what is cached, queued and decoded there."""

import tracemalloc
from typing import Any

import numpy as np
import pytest

from ares.policy import DecisionError, Places, Prefill, choose_place, prefill_policy
from ares.policy.prefill.least_time import LeastTimeSettings


def places(count: int = 3, decodes: int = 0, **changes: Any) -> Places:
    """Equal instances, the last ones to decode on; `changes` to single fields."""
    values: dict[str, Any] = {
        "instances": tuple(f"i{n}" for n in range(count)),
        "open": np.ones(count, dtype=np.bool_),
        "requests": np.zeros(count, dtype=np.int64),
        "decoding": np.zeros(count, dtype=np.int64),
        "cached_tokens": np.zeros(count, dtype=np.int64),
        "queued_tokens": np.zeros(count, dtype=np.int64),
        "base_s": np.full(count, 0.01),
        "token_s": np.full(count, 1e-3),
        "decodes": np.arange(count) >= count - decodes,
        "step_s": np.where(np.arange(count) >= count - decodes, 0.02, 0.0),
        "slack_s": np.where(np.arange(count) >= count - decodes, 0.2, 0.0),
    }
    return Places(**(values | {name: np.array(given) for name, given in changes.items()}))


def chosen(name: str, given: Places, tokens: int = 1000, times: int = 1) -> list[int | None]:
    policy = prefill_policy(name)
    return [choose_place(policy, given, tokens) for _ in range(times)]


@pytest.mark.parametrize("name", ["fewest_requests", "round_robin", "longest_prefix", "least_time"])
def test_equal_instances_take_turns(name: str) -> None:
    assert chosen(name, places(), times=7) == [0, 1, 2, 0, 1, 2, 0]
    assert chosen(name, places(open=[False, True, True]), times=3) == [1, 2, 1]
    assert chosen(name, places(open=[False] * 3)) == [None]


def test_names_of_instances_that_are_gone_are_forgotten() -> None:
    policy = prefill_policy("round_robin")

    def choose(*names: str) -> int | None:
        return choose_place(policy, places(len(names), instances=names), 1000)

    for number in range(3000):
        choose(f"gone{number}")
    tracemalloc.start()
    for number in range(3000):
        choose(f"once{number}")
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 400_000, "of what 3000 names and numbers take"
    assert [choose("a", "b") for _ in range(4)] == [0, 1, 0, 1]


def test_what_each_looks_at() -> None:
    busy = places(requests=[2, 0, 1], cached_tokens=[900, 0, 500], queued_tokens=[3000, 0, 100])
    assert chosen("round_robin", busy) == [0]
    assert chosen("fewest_requests", busy) == [1]
    assert chosen("longest_prefix", busy) == [0]
    assert chosen("least_time", busy) == [2], "600 tokens to compute, against 1000 and 3100"


def test_the_longest_prefix_counts_where_it_is_long_enough_and_the_load_even_enough() -> None:
    assert chosen("longest_prefix", places(requests=[2, 0, 1], cached_tokens=[299, 0, 0])) == [1]
    assert chosen("longest_prefix", places(requests=[2, 0, 1], cached_tokens=[300, 0, 0])) == [0]
    assert chosen("longest_prefix", places(requests=[65, 0, 1], cached_tokens=[900, 0, 0])) == [1]


def test_a_decode_instance_computes_a_short_rest_itself() -> None:
    cached = [900, 0, 0, 990]
    assert chosen("least_time", places(4, 1, cached_tokens=cached)) == [3]
    assert chosen("least_time", places(4, 1, cached_tokens=[900, 0, 0, 700])) == [0], "beyond its slack"
    busy = [0, 0, 0, 500]
    assert chosen("least_time", places(4, 1, cached_tokens=cached, decoding=busy)) == [0], "too many would wait"
    queued = [0, 0, 0, 200]
    assert chosen("least_time", places(4, 1, cached_tokens=cached, queued_tokens=queued)) == [0], "no herd"
    policy = prefill_policy("least_time", LeastTimeSettings(on_decode=False))
    assert choose_place(policy, places(4, 1, cached_tokens=cached), 1000) == 0


def test_what_a_decode_instance_has_been_sent_counts_against_its_objective() -> None:
    """Each prompt is short, and all of them before its next report would be in one step."""
    held = places(2, 1, requests=[9, 0], queued_tokens=[90_000, 0])
    assert chosen("least_time", held, tokens=100) == [1]
    sent = places(2, 1, requests=[9, 2], queued_tokens=[90_000, 150])
    assert chosen("least_time", sent, tokens=100) == [0], "a slack of 200 tokens"


def test_a_shared_prefix_does_not_hold_its_prompts_on_one_instance() -> None:
    """With one idle instance nobody waits for the prefix that it computes once more."""
    few = places(requests=[40, 0, 0], cached_tokens=[1980, 0, 0], queued_tokens=[800, 0, 0], base_s=[0.005] * 3)
    assert chosen("least_time", few, tokens=2000) == [0]
    many = places(requests=[400, 0, 0], cached_tokens=[1980, 0, 0], queued_tokens=[8000, 0, 0], base_s=[0.005] * 3)
    assert chosen("least_time", many, tokens=2000) == [1]
    everywhere = places(requests=[400, 350, 370], cached_tokens=[1980, 0, 0], queued_tokens=[8000, 7000, 7400])
    assert chosen("least_time", everywhere, tokens=2000) == [0], "its work would delay all that come later"


def test_requests_that_decode_on_an_instance_that_prefills_wait_for_the_prompt() -> None:
    both = places(cached_tokens=[0, 0, 100], decoding=[0, 0, 150])
    assert chosen("least_time", both) == [0]
    assert chosen("least_time", places(cached_tokens=[0, 0, 100])) == [2]
    assert chosen("fewest_requests", both, times=4) == [0, 1, 0, 1]
    # What decodes there does not wait for prompts on other instances.
    queued = places(requests=[9, 0, 0], queued_tokens=[4000, 0, 0], cached_tokens=[500, 0, 0], decoding=[0, 0, 150])
    assert chosen("least_time", queued) == [1]


def test_a_transfer_counts() -> None:
    given: dict[str, Any] = {"cached_tokens": [1000, 0, 0, 850]}
    assert chosen("least_time", places(4, 1, **given)) == [0]
    assert chosen("least_time", places(4, 1, transfer_s=2e-3, **given)) == [3]


@pytest.mark.parametrize("name", ["fewest_requests", "least_time"])
def test_what_it_remembers_is_enough_to_choose_again(name: str) -> None:
    policy, other = prefill_policy(name), prefill_policy(name)
    choose_place(policy, places(), 10)
    other.remember(policy.memory())
    assert choose_place(policy, places(), 10) == choose_place(other, places(), 10) == 1


@pytest.mark.parametrize(
    ("answer", "kind"),
    [(None, "no_instance"), (7, "unknown_instance"), ("i0", "unknown_instance"), (0, "closed_instance")],
)
def test_a_wrong_answer_is_an_error(answer: Any, kind: str) -> None:
    class Wrong(Prefill):
        name = "wrong"

        def choose(self, places: Places, tokens: int) -> int | None:
            given: int | None = answer
            return given

    with pytest.raises(DecisionError) as error:
        choose_place(Wrong(), places(open=[False, True, True]), 10)
    assert error.value.kind == kind


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="delay_weight"):
        LeastTimeSettings(delay_weight=-1.0)
