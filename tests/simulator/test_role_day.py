"""Roles that change in a simulated cluster: nothing is lost, no role is left without an instance, and it pays."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ares.cli.main import app
from ares.policy import PRESETS, preset
from ares.policy.roles import PressureSettings, role_policy
from ares.simulator.cluster import Outcome, Simulation
from ares.simulator.error_models import ERROR_MODELS
from ares.simulator.invariants import violations
from ares.simulator.metrics import summary
from ares.simulator.profile import load_profile
from ares.simulator.role_day import best_rate, changing_mix, compare
from ares.traces import Workload

PROFILE = load_profile("r1-qwen-7b-80gb").model_copy(update={"kv_tokens": 64_000})
INSTANCES = 4
SETTINGS = PressureSettings(cooldown_s=5.0)
SLOS = (5.0, 0.1)


def traffic(name: str, prompt: int, output: int) -> Workload:
    count = 200
    return Workload(name, np.arange(count, dtype=float), np.full(count, prompt), np.full(count, output))


LONG_PROMPTS, LONG_OUTPUTS = traffic("prompts", 8000, 20), traffic("outputs", 300, 700)


def day(load: float = 0.6, day_s: float = 240.0) -> Workload:
    rates = [load * best_rate(work, PROFILE, INSTANCES) for work in (LONG_PROMPTS, LONG_OUTPUTS)]
    return changing_mix(LONG_PROMPTS, LONG_OUTPUTS, (rates[0], rates[1]), day_s, seed=0)


def planned(work: Workload, name: str) -> Outcome:
    return Simulation(
        work, [PROFILE] * INSTANCES, [PROFILE] * INSTANCES, preset(name), name, ERROR_MODELS["continuous"],
        ttft_s=SLOS[0], tpot_s=SLOS[1], roles=role_policy("pressure", SETTINGS), decoding=2,
    ).run()  # fmt: skip


def test_the_day_has_each_traffic_alone_and_both_between() -> None:
    work = day(day_s=2400.0)
    part = np.floor(work.arrival_s / 240.0).astype(int)
    shares = [float((work.prompt_tokens[part == n] == 8000).mean()) for n in range(10)]
    alone = [float((work.prompt_tokens[part == n] == 8000).sum()) for n in range(10)]
    assert shares[0] > 0.8
    assert min(alone[4], alone[5]) < 0.05 * alone[0]
    assert alone[2] == pytest.approx(alone[7], rel=0.3)
    assert np.all(np.diff(work.arrival_s) >= 0)
    again = day(day_s=2400.0)
    assert np.array_equal(work.arrival_s, again.arrival_s)


@pytest.mark.parametrize("name", ["static-least-loaded", "ares"])
def test_roles_change_and_nothing_is_lost(name: str) -> None:
    work = day()
    outcome = planned(work, name)
    assert {change.to for change in outcome.role_changes} == {"prefill", "decode"}
    assert all(1 <= change.decode < INSTANCES for change in outcome.role_changes)
    assert all("prefill has load for" in change.reason for change in outcome.role_changes)
    assert violations(outcome, PROFILE.kv_tokens) == []
    assert planned(work, name).finish_s.tolist() == outcome.finish_s.tolist(), "a run is a function of its inputs"


def test_it_beats_the_best_fixed_ratio() -> None:
    runs = compare(
        day(), PROFILE, INSTANCES, ("static-least-loaded", PRESETS["static-least-loaded"]),
        ERROR_MODELS["continuous"], SLOS, SETTINGS,
    )  # fmt: skip
    assert [run["decode"] for run in runs] == [1, 2, 3, None]
    fixed, planner = runs[:-1], runs[-1]
    assert planner["slo_share"] > max(run["slo_share"] for run in fixed)
    assert planner == summary(planned(day(), "static-least-loaded"), 1.0, *SLOS) | {
        "decode": None, "planned": True, "changes": planner["changes"], "wall_s": planner["wall_s"],
    }  # fmt: skip


def test_by_command(tmp_path: Path) -> None:
    files = []
    for work in (LONG_PROMPTS, LONG_OUTPUTS):
        rows = zip(work.arrival_s, work.prompt_tokens, work.output_tokens, strict=True)
        file = tmp_path / f"{work.name}.csv"
        file.write_text("arrival_s,input_tokens,output_tokens\n" + "".join(f"{a},{p},{o}\n" for a, p, o in rows))
        files.append(str(file))
    out = tmp_path / "roles.json"
    given = ["simulate", "roles", "--first", files[0], "--second", files[1], "--instances", "3", "--day", "60"]
    done = CliRunner().invoke(app, [*given, "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "planned" in done.output
    result = json.loads(out.read_text())
    assert [run["planned"] for run in result["runs"]] == [False, False, True]
    for wrong, why in (
        (["--preset", "least-time"], "looks at what is cached"),
        (["--preset", "best"], "unknown preset"),
        (["--slo-ttft", "0"], "--slo-ttft must be above 0"),
    ):
        refused = CliRunner().invoke(app, [*given, *wrong])
        assert refused.exit_code == 2
        assert why in refused.output
    assert CliRunner().invoke(app, [*given, "--instances", "2"]).exit_code == 2
