"""Copy policies: which requests get a warm copy, where, and how much of the budget it takes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ares.policy import Cluster, Copies, Copyable, CopyDecision, DecisionError, copier, decide_copies, preset
from ares.policy.copies.most_saved import MostSavedSettings
from ares.policy.preset_files import make_preset, with_settings

ON = MostSavedSettings(link_bytes_s=1e6)


def cluster(
    resident: list[int], location: list[int], *, instances: int = 3, remaining: list[float] | None = None
) -> Cluster:
    """Instances of 10,000 tokens in blocks of 16."""
    rows = len(resident)
    left = np.full(rows, 500.0) if remaining is None else np.array(remaining)
    return Cluster(
        instances=tuple(f"i{n}" for n in range(instances)),
        capacity_tokens=np.full(instances, 10_000),
        promised_tokens=np.zeros(instances, np.int64),
        open=np.ones(instances, np.bool_),
        requests=tuple(f"r{n}" for n in range(rows)),
        location=np.array(location, np.int64),
        resident_tokens=np.array(resident, np.int64),
        movable=np.ones(rows, np.bool_),
        remaining_tokens=left[:, None],
        levels=(0.5,),
        block_tokens=16,
    )


def copyable(given: Cluster, **changes: Any) -> Copyable:
    rows, count = len(given.location), len(given.instances)
    usual = Copyable(
        requests=np.ones(rows, np.bool_),
        cached_tokens=np.zeros((rows, count), np.int64),
        copied_to=np.full(rows, -1),
        takes=given.open,
        under_way=np.zeros(count, np.int64),
        under_way_tokens=np.zeros(count, np.int64),
        token_s=1e-3,
        token_bytes=1.0,
        link_bytes=1e6,
    )
    return replace(usual, **changes)


def decided(given: Cluster, settings: MostSavedSettings = ON, **changes: Any) -> list[tuple[int, int, int]]:
    """Return request, target and new tokens of each copy."""
    made = decide_copies(copier("most_saved", settings), given, copyable(given, **changes))
    return [(one.request, one.target, one.tokens) for one in made]


def test_the_most_expensive_request_goes_first_to_the_emptiest_instance() -> None:
    given = cluster([1000, 2000, 300], [0, 0, 1])
    assert decided(given) == [(1, 2, 1984), (0, 1, 992), (2, 2, 288)]


def test_a_request_that_is_about_to_end_is_not_copied() -> None:
    assert decided(cluster([1000, 1000], [0, 0], remaining=[20.0, 40.0])) == [(1, 1, 992)]


def test_an_unknown_length_counts_as_long() -> None:
    given = cluster([1000, 1000], [0, 0], remaining=[40.0, float("nan")])
    assert [row for row, _, _ in decided(given)] == [1, 0]


def test_the_next_copy_brings_the_new_blocks_alone_and_stays_where_it_is() -> None:
    given = cluster([1000, 5000], [0, 2])
    cached = np.zeros((2, 3), np.int64)
    cached[0, 1] = 960
    changes: dict[str, Any] = {
        "cached_tokens": cached,
        "copied_to": np.array([1, -1]),
        "requests": np.array([True, False]),
    }
    assert decided(given, **changes) == [(0, 1, 32)]
    # Too little to be worth it.
    assert decided(given, replace(ON, least_saved_s=0.05), **changes) == []


def test_what_was_evicted_is_copied_again_and_what_a_move_left_behind_is_used() -> None:
    given = cluster([1000], [0])
    assert decided(given, copied_to=np.array([2])) == [(0, 1, 992)]
    cached = np.zeros((1, 3), np.int64)
    cached[0] = 992, 0, 640
    assert decided(given, cached_tokens=cached) == [(0, 2, 352)]
    cached[0, 2] = 64  # a system prompt
    assert decided(given, cached_tokens=cached) == [(0, 1, 992)]


def test_a_copy_on_an_instance_that_is_gone_goes_elsewhere() -> None:
    given = cluster([1000], [0])
    cached = np.zeros((1, 3), np.int64)
    cached[0, 1] = 992
    takes = np.array([True, False, True])
    assert decided(given, cached_tokens=cached, copied_to=np.array([1]), takes=takes) == [(0, 2, 992)]


def test_the_budget_of_the_link_ends_the_round() -> None:
    given = cluster([1000] * 4, [0] * 4)
    assert len(decided(given, link_bytes=1000.0)) == 2  # the second one owes
    assert decided(given, link_bytes=0.0) == []
    assert decided(given, link_bytes=-5.0) == []


def test_copies_take_no_more_than_their_share_of_the_memory() -> None:
    given = cluster([1000] * 4, [0] * 4, instances=2)
    assert len(decided(given)) == 2  # a quarter of 10,000
    cached = np.zeros((4, 2), np.int64)
    cached[:3, 1] = 800, 800, 320
    full: dict[str, Any] = {"cached_tokens": cached, "copied_to": np.array([1, 1, 1, -1])}
    assert decided(given, **full) == [(0, 1, 192), (1, 1, 192)]


def test_copies_that_are_under_way_take_their_share_as_well() -> None:
    given = cluster([1000] * 4, [0] * 4, instances=2)
    assert len(decided(given, under_way_tokens=np.array([0, 992]))) == 1
    assert decided(given, under_way_tokens=np.array([0, 1984])) == []
    assert len(decided(given, processes=2)) == 1, "each process has a part of the share"


def test_memory_that_running_requests_will_need_is_left_to_them() -> None:
    given = cluster([2000, 9000], [0, 1], instances=2, remaining=[500.0, 900.0])
    assert decided(given, requests=np.array([True, False])) == []


def test_an_instance_gets_so_many_copies_at_a_time() -> None:
    given = cluster([100] * 6, [0] * 6, instances=2)
    assert len(decided(given, replace(ON, at_once=3))) == 3
    assert len(decided(given, replace(ON, at_once=3), under_way=np.array([0, 2]))) == 1


@pytest.mark.parametrize("name", ["link_bytes_s", "memory_share"])
def test_a_budget_of_zero_is_off(name: str) -> None:
    assert not preset("ares").copies_requests
    on = with_settings(preset("ares"), ["copies.link_bytes_s=1e8"])
    assert on.copies_requests
    assert not with_settings(on, [f"copies.{name}=0"]).copies_requests


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="memory_share must be from 0 to 1"):
        make_preset({"copies": {"name": "most_saved", "memory_share": 1.5}}, {})


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ([CopyDecision(0, 0, 16, "r")], "same_instance"),
        ([CopyDecision(0, 1, 16, "r")] * 2, "repeated"),
        ([CopyDecision(1, 2, 16, "r")], "not_copyable"),
        ([CopyDecision(0, 2, 16, "r")], "closed_target"),
        ([CopyDecision(7, 1, 16, "r")], "unknown_request"),
        ([CopyDecision(0, -1, 16, "r")], "unknown_instance"),
        ([CopyDecision(0, 1, 16, "")], "reason"),
        ([CopyDecision(0, 1, -16, "r")], "tokens"),
        ([CopyDecision(0, 1, 0, "r")], "tokens"),
        ([CopyDecision(0, 1, 1001, "r")], "tokens"),
        ([CopyDecision(0, 1, float("nan"), "r")], "tokens"),  # type: ignore[arg-type]
        ([CopyDecision(0, 1, "16", "r")], "tokens"),  # type: ignore[arg-type]
        (None, "not_copies"),
    ],
)
def test_a_policy_that_decides_wrongly_is_refused(answer: Any, kind: str) -> None:
    class Wrong(Copies):
        name = "wrong"

        def decide(self, cluster: Cluster, copyable: Copyable) -> list[CopyDecision]:
            return answer  # type: ignore[no-any-return]

    given = cluster([1000, 1000], [0, 0])
    state = copyable(given, requests=np.array([True, False]), takes=np.array([True, True, False]))
    with pytest.raises(DecisionError) as caught:
        decide_copies(Wrong(), given, state)
    assert (caught.value.kind, caught.value.part) == (kind, "copies")
