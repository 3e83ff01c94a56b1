"""What the step channel saves, measured here on a mock engine: what is counted, and how it is put together."""

import asyncio

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ares.local_cluster import cluster as local
from ares.models.resolve import DEFAULT_MODEL
from ares_dev import step_channel
from ares_dev.__main__ import app


def run(api_s: float, reader_s: float, wall_s: float) -> step_channel.Run:
    return step_channel.Run(api_s, 2 * api_s, reader_s, wall_s, 0.9)


def test_figures_are_medians_by_thousand_tokens() -> None:
    runs = {
        "token": [run(4, 1, 10), run(6, 2, 12), run(5, 9, 11)],
        "step": [run(2, 0.5, 9)] * 3,
        "whole": [run(1, 0.25, 8)] * 3,
    }
    case = step_channel.case(4, 5000, runs)
    assert case["api_server_cpu_ms_per_1000_tokens"] == {"token": 250, "step": 100, "whole": 50}
    assert case["engine_cpu_ms_per_1000_tokens"]["token"] == 500
    assert case["gateway_reading_cpu_ms_per_1000_tokens"] == {"token": 100, "step": 25, "whole": 12.5}
    assert case["step_ms"] == {"token": 2.2, "step": 1.8, "whole": 1.6}
    assert case["share_over_the_step_channel"] == 0.9


@pytest.mark.timeout(240)
def test_all_ways_are_measured_on_an_instance() -> None:
    settings = local.ClusterSettings(model=DEFAULT_MODEL, simulate="llama-8b-rtx4090")
    with local.workers_only(settings, Console(quiet=True)) as cluster:
        cluster.start_mock("instance", "both", 1)
        cluster.await_workers()
        (process,) = cluster.workers
        (case,) = asyncio.run(step_channel.measure(process, [2], 5, 1, Console(quiet=True)))
    assert case["streams"] == 2
    for figures in ("api_server_cpu_ms_per_1000_tokens", "gateway_reading_cpu_ms_per_1000_tokens", "step_ms"):
        assert set(case[figures]) == {"token", "step", "whole"}
    assert all(ms > 1 for ms in case["step_ms"].values())
    assert case["share_over_the_step_channel"] > 0.5


@pytest.mark.parametrize("given", [["--streams", "0"], ["--tokens", "1"], ["--rounds", "0"]])
def test_options_out_of_range_are_refused(given: list[str]) -> None:
    done = CliRunner().invoke(app, ["step-channel", *given])
    assert done.exit_code == 2
    assert given[0] in done.output
