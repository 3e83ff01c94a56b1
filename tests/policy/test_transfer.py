"""When KV goes ahead of its request."""

import pytest

from ares.policy.transfer import Link, choose_mode, copy_stall_s

# 23 KB a token at 3 GB/s, 64 MiB within a step of 35 ms: this project's CPU bench.
BENCH = Link(23_040, 3e9, 64 << 20, 0.035, 128)
# 128 KB a token over 100 Gb/s Ethernet, steps of 20 ms: an 8B model between two servers.
SERVERS = Link(131_072, 11e9, 64 << 20, 0.020, 16)


def test_a_pull_within_the_step_costs_its_own_time() -> None:
    assert copy_stall_s(1000, BENCH) == pytest.approx(0.00768)


def test_a_pull_beside_the_steps_costs_whole_steps() -> None:
    assert copy_stall_s(3500, BENCH) == pytest.approx(0.035)  # 27 ms, noticed when the step ends
    assert copy_stall_s(20_000, SERVERS) == pytest.approx(0.240)  # 238 ms


def test_short_copies_are_not_worth_going_ahead() -> None:
    assert [choose_mode(tokens, BENCH) for tokens in (1, 128, 1000, 2000)] == ["stop_and_copy"] * 4
    assert choose_mode(400, SERVERS) == "stop_and_copy"


def test_long_ones_are() -> None:
    assert choose_mode(3500, BENCH) == "pre_copy"  # it would miss a step
    assert choose_mode(8000, SERVERS) == "pre_copy"
    assert choose_mode(100_000, SERVERS) == "pre_copy"


def test_a_copy_that_the_request_outruns_gains_nothing() -> None:
    """At 100 kB/s a step's KV takes longer than the step: what is left grows with what is copied."""
    slow = Link(23_040, 1e5, 64 << 20, 0.035, 128)
    assert choose_mode(1000, slow) == "stop_and_copy"


@pytest.mark.parametrize("link", [Link(23_040, 0.0, 0, 0.035, 128), Link(23_040, 3e9, 0, 0.0, 128)])
def test_what_was_not_measured_decides_nothing(link: Link) -> None:
    assert choose_mode(100_000, link) == "stop_and_copy"


def test_only_full_blocks_can_go_ahead() -> None:
    assert choose_mode(127, Link(23_040, 1e6, 0, 0.001, 128)) == "stop_and_copy"
    assert choose_mode(129, Link(23_040, 1e8, 0, 0.001, 128)) == "pre_copy"
