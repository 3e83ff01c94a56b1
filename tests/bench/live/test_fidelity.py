"""The simulator asked about recorded runs."""

import json
from dataclasses import asdict
from pathlib import Path

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("numba", reason="needs the simulate extra")

from ares.bench.live import fidelity, saved
from ares.bench.live.observed_errors import observed_errors
from ares.cli.bench import app
from ares.policy import preset
from tests.bench.live import recorded_run


def test_a_run_of_engines_that_keep_to_a_law_is_predicted() -> None:
    run = recorded_run.run(150)
    figures = fidelity.compare([run], None, seeds=6)["presets"][0]["figures"]
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        assert figures[name]["mean"]["within"], (name, figures[name])
        assert figures[name]["p50"]["within"], (name, figures[name])
        # There is no noise in the run, so that the interval is narrow.
        assert figures[name]["p99"]["error"] == pytest.approx(0.0, abs=0.05), name
    assert all(figures[name]["measured"] == figures[name]["simulated"] == 0 for name in fidelity.COUNTS)


def test_a_run_that_was_slower_than_its_cost_models_is_not_within() -> None:
    real = fidelity.measured(recorded_run.run(40))
    slower = fidelity.Figures(
        {name: values * 1.04 for name, values in real.times.items()}, {"moves": 4, "suspensions": 2, "preemptions": 0}
    )
    said = fidelity.compare_figures([real, real], [[slower, slower], [slower, slower]])
    assert said["e2e_s"]["mean"]["error"] == pytest.approx(0.04)
    assert not said["e2e_s"]["mean"]["within"]
    assert said["e2e_s"]["p50"]["within"]
    assert not said["e2e_s"]["p99"]["within"]
    assert [said[name]["within"] for name in fidelity.COUNTS] == [False, False, True]


def test_a_percentile_is_held_against_the_interval_over_seeds() -> None:
    real = fidelity.measured(recorded_run.run(40))
    made = [
        [fidelity.Figures({name: values * factor for name, values in real.times.items()}, real.counts)]
        for factor in (0.8, 0.9, 1.2)
    ]
    said = fidelity.compare_figures([real], made)["tpot_s"]
    assert said["p99"]["within"]
    assert said["p99"]["low"] < said["p99"]["measured"] < said["p99"]["high"]
    assert not said["mean"]["within"]


def test_the_settings_are_those_of_the_gateway() -> None:
    run = recorded_run.run(20)
    assert fidelity.preset_in_force(run.settings).rebalance == "none"
    settings = run.settings | {"preset": asdict(preset("ares")), "slo_ttft_s": 5.0, "cooldown_s": 4.5}
    chosen = fidelity.preset_in_force(settings)
    assert chosen.admission_settings == preset("ares").for_objectives(5.0).admission_settings
    assert chosen.admission_settings != preset("ares").admission_settings
    assert chosen.rebalance_settings.cooldown_s == 4.5
    with pytest.raises(ValueError, match="recorded by another version"):
        fidelity.preset_in_force(settings | {"preset": settings["preset"] | {"colour": "red"}})


def predicting(run: saved.SavedRun, sigma: float) -> saved.SavedRun:
    generator = np.random.default_rng(1)
    lengths = {one.name: len(one.ticks) for one in run.requests}

    def seen(name: str, view: saved.RequestView) -> saved.RequestView:
        left = lengths[name] - view.output_tokens
        return msgspec.structs.replace(view, remaining=left * float(np.exp(sigma * generator.standard_normal())))

    samples = [
        msgspec.structs.replace(one, where={name: seen(name, view) for name, view in one.where.items()})
        for one in run.samples
    ]
    return msgspec.structs.replace(run, samples=samples)


def test_the_predictor_is_the_one_that_the_engines_had() -> None:
    run = recorded_run.run(100)
    assert fidelity.predictor_of(run, None).residual_life
    with pytest.raises(ValueError, match="the engines of this run predicted nothing"):
        fidelity.predictor_of(run, "exact")
    fitted = observed_errors(predicting(run, 0.5))
    assert (fitted.start, fitted.end) == pytest.approx((0.5, 0.5), rel=0.25)
    assert fidelity.predictor_of(predicting(run, 0.5), "exact").name == "exact"


def test_the_command_reads_what_was_saved(tmp_path: Path) -> None:
    file, out = tmp_path / "runs.json", tmp_path / "fidelity.json"
    saved.write_runs(
        saved.SavedRuns(saved.FORMAT, {"model": "m"}, [recorded_run.run(60, seed=n) for n in (0, 1)]), file
    )
    done = CliRunner().invoke(app, ["fidelity", str(file), "--seeds", "3", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "static-rr: 2 runs, measured and simulated" in done.output
    load = json.loads(out.read_text())["loads"][0]
    assert [entry["requests"] for entry in load["runs"]] == [60, 60]
    assert load["presets"][0]["figures"]["ttft_s"]["mean"]["within"]
    wrong = CliRunner().invoke(app, ["fidelity", str(tmp_path / "nowhere.json")])
    assert wrong.exit_code == 2
    assert "nowhere.json" in wrong.output
