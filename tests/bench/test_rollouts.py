"""Batches of rollouts: all at once, measured to their ends."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ares.bench.rollouts import batch, summary
from ares.cli.main import app
from ares.traces import synthetic
from ares.traces.workload import Workload


def test_a_batch_arrives_at_once_with_several_outputs_for_each_prompt() -> None:
    work = synthetic("paper", 10, seed=1)
    made = batch(work, 4)
    assert not made.arrival_s.any()
    assert (made.output_tokens == work.output_tokens).all()
    first, second, third = (int(work.prompt_tokens[n]) for n in (0, 4, 8))
    assert made.prompt_tokens.tolist() == [first] * 4 + [second] * 4 + [third] * 2
    assert (batch(work, 1).prompt_tokens == work.prompt_tokens).all()
    templates = np.arange(10).reshape(10, 1)
    named = Workload("w", work.arrival_s, work.prompt_tokens, work.output_tokens, templates=templates)
    shared = batch(named, 4).templates
    assert shared is not None
    assert shared.ravel().tolist() == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]


def test_a_preset_is_compared_batch_by_batch() -> None:
    names = ("p50_s", "p90_s", "p99_s", "tokens_per_s", "idle_share", "moves", "suspensions")
    rest = dict.fromkeys(names, 1.0)
    baseline = [{"last_s": value, **rest} for value in (100.0, 200.0, 400.0)]
    runs = [{"last_s": value, **rest} for value in (90.0, 100.0, 396.0)]
    found = summary(runs, baseline)
    assert (found["last_s"], found["last_by_baseline"]) == (100.0, 0.9)
    assert found["ratios"] == [0.9, 0.5, 0.99]


@pytest.mark.timeout(240)
def test_the_command(tmp_path: Path) -> None:
    given = ["bench", "rollouts", "--trace", "chat", "--requests", "12", "--samples", "3", "--decode", "2"]
    path = tmp_path / "out.json"
    done = CliRunner().invoke(app, [*given, "--batches", "2", "--preset", "static-rr", "--json", str(path)])
    assert done.exit_code == 0, done.output
    result = json.loads(path.read_text())
    assert (result["baseline"], result["requests"], result["decode"]) == ("static-rr", 12, 2)
    runs = result["runs"]["static-rr"]
    assert len(runs) == 2
    assert all(0 < run["p50_s"] <= run["p99_s"] <= run["last_s"] for run in runs)
    assert result["presets"]["static-rr"]["last_by_baseline"] == 1.0


def test_a_preset_that_is_none_is_said_in_a_line() -> None:
    done = CliRunner().invoke(app, ["bench", "rollouts", "--preset", "unheard-of", "--batches", "1"])
    assert done.exit_code == 2
    assert "unknown preset 'unheard-of'" in " ".join(done.output.split())
