"""The statistics of a trial, on losses with a known difference."""

import numpy as np
import pytest

from ares.learner.trial import CHALLENGER, CHAMPION, CURVE, Difference, Scored, Verdict, difference, longest, look, mean


def scored(count: int, better: float, seed: int = 0, long_better: float | None = None) -> list[Scored]:
    """Outputs on which the challenger's loss is lower by `better` tokens a pair, on the longest fifth by another."""
    generator = np.random.default_rng(seed)
    made = []
    for n in range(count):
        length = int(generator.integers(20, 1000))
        pairs = 1 + length // 20
        gain = long_better if long_better is not None and length > 800 else better
        noise = generator.normal(0, 20)
        base = 100.0 * pairs
        made.append(
            Scored(
                f"p{n}",
                length,
                pairs,
                {CURVE: base + 30 * pairs, CHAMPION: base, CHALLENGER: base + (noise - gain) * pairs},
            )
        )
    return made


def test_a_better_challenger_is_promoted() -> None:
    found = look(scored(300, better=15), 0.99, 30, last=False)
    assert found.verdict is Verdict.PROMOTE
    assert found.overall.low < found.overall.mean < found.overall.high < 0


def test_a_worse_one_is_rejected_at_once() -> None:
    assert look(scored(300, better=-15), 0.99, 30, last=False).verdict is Verdict.REJECT


@pytest.mark.parametrize(("last", "verdict"), [(False, Verdict.CONTINUE), (True, Verdict.REJECT)])
def test_one_that_is_no_better_is_rejected_in_the_end(last: bool, verdict: Verdict) -> None:
    assert look(scored(300, better=0), 0.99, 30, last=last).verdict is verdict


def test_one_that_is_worse_for_long_outputs_is_not_promoted() -> None:
    found = look(scored(600, better=60, long_better=-30), 0.99, 30, last=False)
    assert found.overall.better
    assert found.long.worse
    assert found.verdict is Verdict.CONTINUE


def test_few_prompts_decide_nothing() -> None:
    same = [Scored(f"p{n % 20}", one.length, one.pairs, one.losses) for n, one in enumerate(scored(300, better=15))]
    found = look(same, 0.99, 30, last=False)
    assert found.overall.prompts == 20
    assert found.verdict is Verdict.CONTINUE


@pytest.mark.parametrize(("last", "verdict"), [(False, Verdict.CONTINUE), (True, Verdict.PROMOTE)])
def test_few_prompts_of_long_outputs_do_not_reject(last: bool, verdict: Verdict) -> None:
    long = [Scored("the same", 5000, 25, {CURVE: 1000.0, CHAMPION: 1000.0, CHALLENGER: 1000.1}) for _ in range(80)]
    found = look([*scored(300, better=15), *long], 0.99, 30, last=last)
    assert found.long.worse
    assert found.long.prompts == 1
    assert found.verdict is verdict


def test_more_outputs_of_the_same_prompts_say_nothing_more() -> None:
    once = scored(100, better=0)
    apart = [Scored(f"{n}-{one.prompt}", one.length, one.pairs, one.losses) for n in range(4) for one in once]
    narrow, single, repeated = (difference(rows, CHALLENGER, CHAMPION, 0.99) for rows in (apart, once, once * 4))
    assert repeated.high - repeated.low == pytest.approx(single.high - single.low)
    assert narrow.high - narrow.low < 0.6 * (single.high - single.low)


def test_the_same_data_give_the_same_interval() -> None:
    rows = scored(200, better=3)
    assert difference(rows, CHALLENGER, CHAMPION, 0.99, 1) == difference(rows, CHALLENGER, CHAMPION, 0.99, 1)
    assert difference(rows, CHALLENGER, CHAMPION, 0.99, 1) != difference(rows, CHALLENGER, CHAMPION, 0.99, 2)


def test_without_a_difference_an_interval_is_seldom_clear_of_zero() -> None:
    clear = 0
    for seed in range(100):
        found = difference(scored(150, better=0, seed=seed), CHALLENGER, CHAMPION, 0.99)
        clear += found.better or found.worse
    assert clear <= 6  # 1 is expected; more than 6 of 100 come once in 10,000 times


def test_means_are_over_pairs() -> None:
    rows = [Scored("a", 10, 1, {CURVE: 10.0}), Scored("b", 90, 3, {CURVE: 90.0})]
    assert mean(rows, CURVE) == 25.0
    assert [one.length for one in longest(rows)] == [90]


def test_a_difference_in_words() -> None:
    shown = Difference(-1.234, -2.0, -0.5, 10, 9)
    assert str(shown) == "-1.2 [-2.0, -0.5]"
    assert shown.numbers("difference") == {"difference": -1.234, "difference_low": -2.0, "difference_high": -0.5}
