"""The closed forms give what a plain loop over every step gives."""

import numpy as np
import pytest

from ares.policy import preset
from ares.policy.admission import PREFILLED_KV_KEPT_S
from ares.simulator.cluster import Simulation
from ares.simulator.error_models import ERROR_MODELS
from ares.simulator.invariants import violations
from ares.simulator.profile import Profile, StepTimeModel
from ares.traces import Workload
from tests.simulator.reference import Reference

STEP_TIME = StepTimeModel(
    base_s=0.014, per_request_s=2e-5, per_resident_token_s=6.5e-6, per_prefill_token_s=1e-4, per_prefill_context_s=1e-8
)


def small(kv_tokens: int = 1600, **changes: object) -> Profile:
    fields: dict[str, object] = {
        "name": "small",
        "model": "none",
        "source": "test",
        "kv_tokens": kv_tokens,
        "kv_bytes_per_token": 50_000,
        "max_num_seqs": 12,
        "max_num_batched_tokens": 256,
        "step": STEP_TIME,
        "bandwidth_bytes_s": 1e9,
    }
    return Profile.model_validate(fields | changes)


def workload(seed: int, count: int, rate: float, longest: int = 500) -> Workload:
    random = np.random.default_rng(seed)
    arrival = np.cumsum(random.exponential(1 / rate, count))
    prompt = random.integers(1, 400, count)
    output = random.integers(1, longest, count)
    return Workload("random", arrival - arrival[0], prompt, output)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("name", "prefill", "rate"),
    [
        ("static-rr", 1, 2.0),
        ("static-rr", 1, 20.0),
        ("static-least-loaded", 2, 4.0),
        ("static-least-loaded", 1, 20.0),
        ("static-rr", 0, 3.0),
        ("static-rr", 0, 20.0),
    ],
)
def test_equals_the_reference(seed: int, name: str, prefill: int, rate: float) -> None:
    work = workload(seed, 80, rate)
    decode = [small(), small(kv_tokens=2000), small(kv_tokens=1204)]
    error = ERROR_MODELS[("continuous", "residual-life")[seed % 2]]  # these presets ask for neither
    outcome = Simulation(work, decode, [small(4000)] * prefill, preset(name), name, error).run()
    expected = Reference(work, decode, [small(4000)] * prefill, preset(name).dispatch).run()
    np.testing.assert_allclose(outcome.first_token_s, expected.first_tokens(), rtol=1e-9)
    np.testing.assert_allclose(outcome.finish_s, expected.finishes(), rtol=1e-9)
    assert outcome.preemptions == expected.preemptions
    np.testing.assert_array_equal(outcome.preempted, [r.preempted for r in expected.requests])
    if rate == 20.0:
        assert expected.preemptions > 0, "the case must cover preemption"
    assert outcome.events < expected.steps, "fewer events than steps: time is jumped over"


def test_decode_reads_the_first_token_that_prefill_has_given() -> None:
    work, decode, name = workload(1, 80, 20.0), [small(), small()], "static-rr"
    several = Workload("random", work.arrival_s, work.prompt_tokens, work.output_tokens + 1)
    rest = Workload("random", work.arrival_s, work.prompt_tokens + 1, work.output_tokens)
    from_decode = Simulation(rest, decode, [small(4000)], preset(name), name).run()
    from_prefill = Simulation(several, decode, [small(4000)], preset(name), name, first_at_prefill=True).run()
    assert (from_prefill.first_token_s > work.arrival_s).all()
    assert (from_prefill.first_token_s < from_decode.first_token_s).all()
    np.testing.assert_array_equal(from_prefill.finish_s, from_decode.finish_s)
    # One prompt after the other, whatever decode does.
    assert (np.diff(np.sort(from_prefill.first_token_s)) > STEP_TIME.base_s).all()
    # The client waits for decode between the first token and the second.
    waits = from_decode.first_token_s - from_prefill.first_token_s
    assert (from_prefill.longest_gap_s >= waits - 1e-9).all()


@pytest.mark.parametrize("from_prefill", [False, True])
def test_kv_that_waits_for_long_is_let_go_and_computed_again(from_prefill: bool) -> None:
    """As at the gateway, before its lease ends: prefill has room for others; the client has no token yet."""
    work, decode = workload(1, 80, 20.0), [small(), small()]
    chosen = preset("ares-admission")  # nobody is suspended
    outcome = Simulation(work, decode, [small(4000)], chosen, first_at_prefill=from_prefill).run()
    assert violations(outcome, 4000) == []
    waited = outcome.first_token_s - work.arrival_s >= PREFILLED_KV_KEPT_S
    assert waited.sum() > 5
    # They wait before their first token: after it, only a preemption interrupts them for long.
    assert outcome.suspensions == 0
    assert (outcome.longest_gap_s[waited] > 1.0).sum() <= outcome.preemptions
    assert np.median(outcome.longest_gap_s[waited]) < 1.0


def test_an_output_of_one_token_ends_with_its_prefill() -> None:
    work = Workload("single", np.array([0.0, 5.0]), np.array([10, 10]), np.array([1, 3]))
    outcome = Simulation(work, [small()], [small()], preset("static-rr"), first_at_prefill=True).run()
    assert outcome.finish_s[0] == outcome.first_token_s[0]
    assert outcome.finish_s[1] > outcome.first_token_s[1] + 2 * STEP_TIME.base_s


def test_without_prefill_instances_the_first_token_comes_from_decode() -> None:
    work = workload(1, 40, 3.0)
    outcomes = [
        Simulation(work, [small()], [], preset("static-rr"), "static-rr", first_at_prefill=wanted).run()
        for wanted in (False, True)
    ]
    np.testing.assert_array_equal(outcomes[0].first_token_s, outcomes[1].first_token_s)


def test_every_request_has_a_first_token_when_joining_meets_preemption() -> None:
    """Preempting a request moves another one to its slot; who joined in the same step must not be missed."""
    for seed in range(6):
        work = workload(seed, 150, 30.0, longest=900)
        outcome = Simulation(work, [small()], [small(8000)], preset("static-rr"), "static-rr").run()
        assert outcome.preemptions > 0
        assert np.isfinite(outcome.first_token_s).all()
        assert (outcome.first_token_s > work.arrival_s).all()
        assert (outcome.finish_s >= outcome.first_token_s).all()
