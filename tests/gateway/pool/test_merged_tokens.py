"""Tokens that come over two channels: each once and in order, whichever loses, repeats or reorders some."""

import random

import pytest

from ares.gateway.pool.merged_tokens import DifferentTokensError, MergedTokens

OUTPUT = list(range(100, 400))


def flat(steps: list[list[int]]) -> list[int]:
    return [token for step in steps for token in step]


@pytest.mark.parametrize("seed", range(30))
def test_each_token_comes_once_and_in_order(seed: int) -> None:
    generator = random.Random(seed)
    merged, taken, streamed, generated = MergedTokens(), list[int](), 0, 0
    late: list[tuple[int, list[int]]] = []
    while streamed < len(OUTPUT):
        step = min(generator.choice([1, 1, 1, 3]), len(OUTPUT) - generated)
        if step:
            late.append((generated, OUTPUT[generated : generated + step]))
            generated += step
        while late and generator.random() < 0.7:
            message = late.pop(generator.choice([0, 0, 0, -1]))
            for _ in range(generator.choice([0, 1, 1, 1, 2])):
                merged.receive_step_tokens(*message)
        if generator.random() < 0.2:
            until = generator.randint(streamed, generated)
            merged.streamed(OUTPUT[streamed:until])
            streamed = until
        if generator.random() < 0.5:
            taken += flat(merged.take())
            assert taken == OUTPUT[: len(taken)]
    taken += flat(merged.take())
    assert taken == OUTPUT
    assert not merged.waiting


def test_early_tokens_keep_their_steps_and_others_come_one_by_one() -> None:
    merged = MergedTokens()
    merged.receive_step_tokens(0, [5, 6])
    merged.receive_step_tokens(2, [7])
    merged.streamed([5, 6, 7, 8, 9])
    assert merged.take() == [[5, 6], [7], [8], [9]]


def test_behind_a_gap_tokens_wait_for_the_stream_which_closes_it() -> None:
    merged = MergedTokens()
    merged.receive_step_tokens(0, [5])
    merged.receive_step_tokens(2, [7])  # that of 6 is lost
    merged.receive_step_tokens(3, [8])
    assert merged.take() == [[5]]
    assert not merged.waiting
    merged.streamed([5, 6])
    assert merged.take() == [[6], [7], [8]]


def test_an_early_message_that_overlaps_gives_only_what_is_new() -> None:
    merged = MergedTokens()
    merged.streamed([5, 6])
    merged.receive_step_tokens(1, [6, 7])
    merged.receive_step_tokens(0, [5, 6, 7])
    assert flat(merged.take()) == [5, 6, 7]


def test_other_tokens_than_those_given_are_an_error() -> None:
    merged = MergedTokens()
    merged.receive_step_tokens(0, [5, 6])
    with pytest.raises(DifferentTokensError):
        merged.streamed([5, 7])


@pytest.mark.parametrize("begin", [0, 1], ids=["in order", "behind a gap"])
def test_large_steps_that_nobody_takes_are_bounded(begin: int) -> None:
    merged, step = MergedTokens(), 1000
    for number in range(100):
        merged.receive_step_tokens(
            begin + number * step, list(range(begin + number * step, begin + (number + 1) * step))
        )
    merged.streamed([])
    early = flat(merged.take())
    assert len(early) <= 1024
    merged.streamed(list(range(5000)))
    assert early + flat(merged.take()) == list(range(5000)), "what was left out came later"


def test_empty_steps_take_no_room_behind_a_gap() -> None:
    merged = MergedTokens()
    for position in range(1, 2000):
        merged.receive_step_tokens(position, [])
    merged.receive_step_tokens(2, [7])
    merged.streamed([5, 6])
    assert flat(merged.take()) == [5, 6, 7]


def test_a_reply_that_ends_before_what_has_come_early_is_an_error() -> None:
    merged = MergedTokens()
    merged.receive_step_tokens(0, [5, 6])
    merged.streamed([5])
    with pytest.raises(DifferentTokensError):
        merged.end()
    merged.streamed([6])
    merged.end()


def test_what_nobody_takes_is_bounded() -> None:
    merged = MergedTokens()
    for position in range(100_000):
        merged.receive_step_tokens(position, [position])
    assert len(flat(merged.take())) < 2000
    merged.streamed(list(range(100_000)))
    assert flat(merged.take())[-1] == 99_999
