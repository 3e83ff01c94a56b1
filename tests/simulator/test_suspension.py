"""Suspension: long requests with slack make room for short ones, and still meet their objective."""

from dataclasses import replace

import numpy as np
import pytest

from ares.policy import SuspendSettings, preset
from ares.policy.admission import ForecastSettings
from ares.policy.admission.suspension import final_slack_s
from ares.simulator import metrics
from ares.simulator.cluster import Outcome, Simulation
from ares.simulator.error_models import ERROR_MODELS
from ares.simulator.invariants import violations
from ares.traces import Workload
from tests.simulator.test_reference import small

LONG = 2


def run(*, suspends: bool, prefill_tokens: int = 4000, **changes: float) -> Outcome:
    """Two long requests nearly fill an instance when short ones come."""
    short = 40
    arrival = np.concatenate([[0.0, 0.01], 15.0 + 0.25 * np.arange(short)])
    prompt = np.concatenate([[50, 50], np.full(short, 100)])
    output = np.concatenate([[900, 860], np.full(short, 20)])
    # A full step takes 27 ms: the long ones gain 33 ms a token on an objective of 60.
    settings = ForecastSettings(suspends=suspends, after_s=0.1, least_slack_s=0.5, urgent_s=0.3, **changes)
    chosen = replace(preset("ares-suspension"), admission_settings=settings)
    profile = small(2000)
    simulation = Simulation(
        Workload("long, then short", arrival, prompt, output),
        [profile],
        [small(prefill_tokens)],
        chosen,
        "suspending" if suspends else "waiting",
        ERROR_MODELS["exact"],
        0.05,
        ttft_s=1.0,
        tpot_s=0.06,
    )
    outcome = simulation.run()
    assert violations(outcome, prefill_tokens) == []
    return outcome


def within(outcome: Outcome) -> tuple[float, float]:
    """Shares of the short ones with a timely first token, and of the long ones with a timely pace."""
    first, each = metrics.ttft_s(outcome), metrics.tpot_s(outcome)
    return float((first[LONG:] <= 0.3).mean()), float((each[:LONG] <= 0.06).mean())


def test_the_short_start_in_time_and_the_long_still_finish_in_time() -> None:
    waiting, suspending = run(suspends=False), run(suspends=True)
    assert waiting.suspensions == 0
    assert suspending.suspensions > 0
    assert within(waiting)[0] < 1.0
    assert within(suspending) == (1.0, 1.0)


def test_the_settings_scale_with_the_objective_they_were_tuned_at() -> None:
    usual = SuspendSettings()
    strict = usual.for_objectives(usual.ttft_s / 2, 0.1)
    assert (strict.after_s, strict.least_slack_s, strict.urgent_s) == (
        usual.after_s / 2,
        usual.least_slack_s / 2,
        usual.urgent_s / 2,
    )
    assert (strict.ttft_s, strict.tpot_s, strict.longest_s) == (usual.ttft_s / 2, 0.1, usual.longest_s)


def test_where_prefill_is_too_small_the_decode_instance_resumes_them() -> None:
    outcome = run(suspends=True, prefill_tokens=600)
    assert outcome.suspensions > 0
    assert np.isfinite(outcome.finish_s).all()


def test_nobody_is_suspended_for_one_that_is_about_as_large() -> None:
    assert run(suspends=True, ratio=1e6).suspensions == 0


@pytest.mark.parametrize(
    ("generated", "elapsed", "remaining", "slack"),
    [
        (0, 0.0, 30_000, 270.0),  # 9 ms a token saved on 30,000 tokens
        (10_000, 210.0, 0, 90.0),
        (10_000, 400.0, 0, -100.0),
        (10_000, 400.0, 20_000, 80.0),  # what it lost, it can make up for
    ],
)
def test_slack(generated: float, elapsed: float, remaining: float, slack: float) -> None:
    assert final_slack_s(0.03, generated, elapsed, remaining, 0.021) == pytest.approx(slack)
