"""`python -m ares_dev lengths`: what is known of a request counts where it says something, and only there."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ares_dev.__main__ import app
from ares_dev.lengths import KEYS, TODAY, Output, compare


def made(count: int) -> list[Output]:
    """Make outputs of two templates of 50 and 800 tokens, whose prompts have one length."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, count).tolist()
    return [
        Output(
            prompt_tokens=100,
            tokens=(50, 800)[label] + int(random.integers(40)),
            was_cut=False,
            limit=1000,
            templates=(label + 10,),
            label=label + 20,
            drawn=int(random.integers(8)),
        )
        for label in labels
    ]


def test_a_template_that_decides_the_length_is_worth_most_of_the_error() -> None:
    outputs = made(200)
    rows = {row["known"]: row for row in compare(outputs, [TODAY, *KEYS], [np.arange(200)], 20, 4)}
    assert rows["template"]["crps_change"] < -0.4
    assert rows["template"]["crps_change_interval"][1] < -0.2
    assert rows["length and template"]["first_absolute"] < 0.4 * rows["all"]["first_absolute"]
    for useless in ("prompt length", "random label"):
        assert abs(rows[useless]["crps"] / rows["all"]["crps"] - 1) < 0.1
    assert rows["true label"]["crps"] == pytest.approx(rows["template"]["crps"])
    assert rows[TODAY]["crps_change"] == 0.0


def test_an_output_is_estimated_only_from_those_that_had_ended() -> None:
    alike = [Output(100, 300, False, 1000, (), 1, 2) for _ in range(60)]
    early, late = (compare(alike, ["all"], [np.arange(60)], 400, running)[0] for running in (0, 59))
    assert early["first_absolute"] < 60
    assert late["first_absolute"] == pytest.approx(abs(256 * np.log(2) - 300), rel=0.1)


def test_a_trace_is_measured_and_written(tmp_path: Path) -> None:
    trace, result = tmp_path / "trace.jsonl", tmp_path / "result.json"
    row = '{{"timestamp": {n}, "input_length": 600, "output_length": {length}, "hash_ids": [0, {block}]}}\n'
    trace.write_text("".join(row.format(n=n, length=100 + 600 * (n % 2), block=n % 2) for n in range(90)))
    arguments = ["lengths", "--trace", str(trace), "--most", "80", "--running", "4", "--json", str(result)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    found = json.loads(result.read_text())
    assert found["data"]["outputs"] == 80
    by_name = {row["known"]: row["crps"] for row in found["results"]}
    assert "true label" not in by_name
    assert by_name["template"] < 0.6 * by_name["all"]
