"""Residual life: what finished outputs say about those that still run."""

import random
import tracemalloc

import numpy as np
import pytest

from ares.gateway.control.lengths import LengthHistory
from ares.gateway.openai.sampling import Sampling
from ares.gateway.session.length_features import LengthFeatures, length_features


def test_quantiles_of_what_followed() -> None:
    history = LengthHistory()
    source = random.Random(1)
    lengths = [source.randint(1, 1000) for _ in range(1500)]
    for length in lengths:
        history.add(length)
    for generated in (0, 100, 500):
        longer = np.array([length - generated for length in lengths if length > generated])
        expected = np.quantile(longer, [0.1, 0.5, 0.9])
        assert history.remaining(generated) == pytest.approx(expected, rel=0.05)


def test_only_the_newest_count() -> None:
    history = LengthHistory()
    for length in [5] * 3000 + [700] * 2000:
        history.add(length)
    assert history.remaining(0) == (700, 700, 700)


def test_who_has_outlasted_all_is_expected_to_go_on_as_long_again() -> None:
    history = LengthHistory()
    for _ in range(100):
        history.add(50)
    low, middle, high = history.remaining(4000)
    assert 0 < low < middle < 4000 < high
    assert LengthHistory().remaining(0)[1] == pytest.approx(256 * np.log(2))


def of(prompt: list[int], adapter: str | None = None, salt: str | None = None) -> LengthFeatures:
    return length_features(prompt, Sampling({}, 100, adapter=adapter, cache_salt=salt))


def test_without_anything_known_all_outputs_count_as_before() -> None:
    known, unknown = LengthHistory(), LengthHistory()
    for number in range(300):
        known.add(number, of([number % 3] * 50))
        unknown.add(number)
    for generated in (0, 100, 299, 4000):
        assert known.remaining(generated) == unknown.remaining(generated)
    assert unknown.remaining(100) == (20.0, 100.0, 179.0)


def test_two_templates_separate_after_few_outputs() -> None:
    history = LengthHistory()
    short, long = [1] * 16, [2] * 16
    for number in range(5):
        history.add(30, of([*short, number]))
        history.add(2000, of([*long, number]))
    assert history.remaining(0, of([*short, 99]))[1] < 60
    assert history.remaining(0, of([*long, 99]))[1] > 1800
    compiled = LengthHistory()
    compiled.compile()
    for number in range(5):
        compiled.add(30, of([*short, number]))
        compiled.add(2000, of([*long, number]))
    for generated in (0, 20, 1000):
        assert compiled.remaining(generated, of([*long, 99])) == history.remaining(generated, of([*long, 99]))


def test_while_many_requests_run_for_each_that_has_ended_all_are_taken_alike() -> None:
    history = LengthHistory()
    history.running = 100
    for number in range(200):
        history.add(30, of([1] * 16 + [number]))
        history.add(2000, of([2] * 16 + [number]))
    short, long = of([1] * 16 + [999]), of([2] * 16 + [999])
    assert history.remaining(0, short) == history.remaining(0, long)
    history.running = 40
    history.add(30, short)
    assert history.remaining(0, short)[2] < 100
    assert history.remaining(0, long)[0] > 1500


def test_an_estimate_changes_with_every_output() -> None:
    history, features = LengthHistory(), of([1] * 40)
    before = history.remaining(0, features)
    for _ in range(20):
        history.add(3000, of([1] * 40))
    after = history.remaining(0, features)
    assert before[1] < 300
    assert after[1] > 2500
    for _ in range(100):
        history.add(20, of([1] * 40))
    assert history.remaining(0, features)[1] < 100


def test_what_was_cut_counts_as_longer() -> None:
    history = LengthHistory()
    for _ in range(50):
        history.add(100)
        history.add(200, was_cut=True)
    assert history.remaining(0)[0] == 100
    assert history.remaining(150)[0] > 50
    low, middle, high = history.remaining(5000)
    assert 1 <= low <= middle <= high


def test_equal_beginnings_are_equal_under_the_same_adapter_and_salt_only() -> None:
    prompt = list(range(3000))
    assert of(prompt).keys == of(prompt).keys
    assert len(of(prompt).keys) > len(of(prompt[:40]).keys) > 2
    by_length = set(of(prompt).keys) & set(of([7] * 3000).keys)
    assert by_length, "their lengths are equal"
    for other in (of(prompt, adapter="a"), of(prompt, salt="s")):
        assert set(other.keys) & set(of(prompt).keys) == by_length
    assert len(set(of(prompt[:64]).keys) & set(of([*prompt[:63], 9]).keys) - set(of([7] * 64).keys)) == 3


def test_memory_is_bounded() -> None:
    history, asked = LengthHistory(), of([5] * 100)
    history.compile()
    tracemalloc.start()
    for number in range(3000):
        history.add(number % 500 + 1, of([number // 2] * 40))
        history.remaining(0, of([number // 2] * 40))
        if number == 1500:
            before, _ = tracemalloc.get_traced_memory()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 12e6
    assert all(np.isfinite(history.remaining(0, asked)))


def test_two_histories_are_independent() -> None:
    short, long = LengthHistory(), LengthHistory()
    for _ in range(20):
        short.add(10)
        long.add(2000)
    for history in (short, long):
        history.add(3000, was_cut=True)
    assert short.remaining(0)[1] < 20
    assert long.remaining(0)[1] > 1500
