"""How long an instance takes for prompts, by its telemetry."""

import random
from typing import Any

import pytest

from ares.gateway.control.cost_models import PrefillTimeModel
from ares.protocol import messages

STEP_S, TOKEN_S = 0.01, 1e-3


def telemetry(steps: int, tokens: int, busy_s: float, **changes: Any) -> messages.Telemetry:
    return messages.Telemetry(
        sequence=1,
        kv_blocks_used=0,
        running=changes.pop("running", 1),
        waiting=0,
        pinned=0,
        step_time_s=0.1,
        steps=steps,
        preemptions=0,
        rows=[],
        busy_s=busy_s,
        prompt_tokens=tokens,
        prefilling=changes.pop("prefilling", 1),
        role=changes.pop("role", "prefill"),
    )


class Instance:
    """Computes prompts, several of them in some of its steps, and reports."""

    def __init__(self, model: PrefillTimeModel, seed: int = 0) -> None:
        self.model, self.random = model, random.Random(seed)
        self.steps, self.tokens, self.busy_s = 0, 0, 0.0
        self.report()

    def compute(self, *steps: int) -> None:
        for tokens in steps:
            self.steps, self.tokens = self.steps + 1, self.tokens + tokens
            self.busy_s += (STEP_S + TOKEN_S * tokens) * self.random.uniform(0.95, 1.05)

    def report(self, **changes: Any) -> None:
        self.model.observe(telemetry(self.steps, self.tokens, self.busy_s, **changes))


def test_the_time_of_a_step_and_of_a_token() -> None:
    model = PrefillTimeModel()
    instance = Instance(model)
    assert model.coefficients is None
    assert model.mean_token_s is None
    instance.compute(1000)
    instance.report()
    assert model.coefficients == (0.0, pytest.approx(1.01e-3, rel=0.06)), "until there are more"
    for _ in range(60):
        instance.compute(
            *(instance.random.choice((1, 20, 100, 700, 2048)) for _ in range(instance.random.randint(1, 4)))
        )
        instance.report()
    assert model.coefficients == (pytest.approx(STEP_S, rel=0.2), pytest.approx(TOKEN_S, rel=0.1))
    assert model.mean_token_s == pytest.approx(instance.busy_s / instance.tokens, rel=0.2)


@pytest.mark.parametrize("changes", [{"role": "both"}, {"role": "decode"}, {"role": None}])
def test_an_instance_that_decodes_as_well_is_not_measured(changes: dict[str, Any]) -> None:
    model = PrefillTimeModel()
    instance = Instance(model)
    for _ in range(10):
        instance.compute(500)
        instance.report(**changes)
    assert model.mean_token_s is None


def test_a_report_of_nothing_new_or_of_a_restart_adds_nothing() -> None:
    model = PrefillTimeModel()
    instance = Instance(model)
    for _ in range(10):
        instance.compute(500)
        instance.report()
    before = model.coefficients
    instance.report()
    instance.steps, instance.tokens, instance.busy_s = 1, 30, 0.04
    instance.report()
    assert model.coefficients == before
