"""The command line: what it writes, and how it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ares.bench.decision import app as bench
from ares.cli.simulate import app
from ares.policy import preset
from ares.simulator import calibrate as calibration
from ares.simulator.cluster import Simulation
from ares.simulator.profile import Hardware, Profile, load_profile, profile_names
from ares.simulator.validate import validate
from tests.simulator.test_reference import small, workload

runner = CliRunner()


@pytest.mark.timeout(900)  # the first to run on a new machine compiles the event loop
def test_json_has_every_field_and_is_repeatable(tmp_path: Path) -> None:
    arguments = ["--trace", "chat", "--requests", "200", "--decode", "2", "--prefill", "1", "--load", "0.8"]
    arguments += ["--preset", "static-rr", "--preset", "ares", "--seed", "3", "--json"]
    results = []
    for name in ("a.json", "b.json"):
        done = runner.invoke(app, [*arguments, str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        # Nobody sees a progress bar here: what runs is told in lines.
        assert re.search(r"^static-rr.*: started$.*^ares.*: done after \d+ s$", done.stderr, re.MULTILINE | re.DOTALL)
        results.append(json.loads((tmp_path / name).read_text()))
    for run in results[0]["runs"]:
        assert run["completed"] == run["requests"] == 200
        assert run["load"] == pytest.approx(0.8)
        assert 0 < run["ttft_s"]["p50"] <= run["ttft_s"]["p99"]
        assert 0 < run["tpot_s"]["p50"] <= run["tpot_s"]["p99"]
        assert run["goodput_rps"] >= 0
        for field in ("throughput_rps", "preemptions", "oom_events", "migrations", "migrated_bytes", "imbalance"):
            assert run[field] >= 0
        assert run["simulated_s"] > 0
    for result in results:
        for run in result["runs"]:
            del run["wall_s"], run["decision_ms"]
    assert results[0]["runs"] == results[1]["runs"]
    assert set(results[0]["provenance"]) >= {"ares", "commit", "python", "numpy", "numba", "machine"}


@pytest.mark.timeout(900)
def test_gaps_count_unless_none_is_said_and_classes_have_their_own(tmp_path: Path) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text("classes:\n  batch: {share: 0.5, ttft_s: 1000, tpot_s: 1000, gap_s: none}\n")
    crowd = ["--trace", "chat", "--requests", "150", "--decode", "1", "--prefill", "1", "--load", "1.5"]
    crowd += ["--preset", "ares", "--slo-ttft", "1000", "--slo-tpot", "1000"]

    def result(*more: str) -> dict[str, Any]:
        done = runner.invoke(app, [*crowd, *more, "--json", "-"])
        assert done.exit_code == 0, done.output
        return dict(json.loads(done.stdout))

    short, none = result("--slo-gap", "0.001"), result("--slo-gap", "none")
    assert (short["slo"]["gap_s"], short["runs"][0]["slo_share"]) == (0.001, 0.0)
    assert (none["slo"]["gap_s"], none["runs"][0]["slo_share"]) == (None, 1.0)
    assert result()["slo"]["gap_s"] == 2.0
    both = result("--slo-gap", "0.001", "--classes", str(file))
    classes = both["runs"][0]["classes"]
    assert {name: part["slo_share"] for name, part in classes.items()} == {"default": 0.0, "batch": 1.0}
    assert both["scenario"]["classes"]["batch"]["gap_s"] == "none"
    shown = runner.invoke(app, [*crowd, "--classes", str(file)])
    assert "  batch" in shown.stdout
    for wrong in ("0", "inf", "soon"):
        refused = runner.invoke(app, [*crowd, "--slo-gap", wrong])
        assert refused.exit_code == 2
        assert "--slo-gap" in refused.output


@pytest.mark.parametrize("predictor", ["residual-life", "benchmarks/results/predictor-open.json"])
def test_without_a_predictor_and_with_an_evaluated_one(predictor: str) -> None:
    root = Path(__file__).parents[2]
    named = str(root / predictor) if predictor.endswith(".json") else predictor
    arguments = ["--trace", "chat", "--requests", "150", "--decode", "2", "--prefill", "1", "--preset", "ares"]
    done = runner.invoke(app, [*arguments, "--predictor", named, "--json", "-"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["runs"][0]["completed"] == 150


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "nowhere.csv"], "nowhere.csv"),
        (["--trace", "paper", "--preset", "nope"], "unknown preset 'nope'"),
        (["--trace", "paper", "--profile", "nope"], "nope: no such profile"),
        (["--trace", "paper", "--predictor", "nope"], "nope: no such error model"),
        (
            ["--preset", "ares", "--set", "admission.order=nope"],
            "order must be one of fcfs, shortest_memory_time, not 'nope'",
        ),
        (["--trace", "paper", "--load", "1", "--rate-scale", "1"], "--load and --rate-scale"),
        (["--trace", "paper", "--seed", "-1"], "--seed"),
        (["sweep", "--loads", "1,two"], "--loads"),
        (["calibrate", "--recording", "nowhere", "--out", "x.json"], "nowhere: not a recording"),
        (["validate", "--recording", "nowhere", "--profile", "x"], "nowhere: not a recording"),
    ],
)
def test_bad_input_ends_with_2_and_a_name(arguments: list[str], message: str) -> None:
    done = runner.invoke(app, arguments)
    assert done.exit_code == 2
    assert message in done.output


def test_an_instance_smaller_than_a_request_and_bad_profiles(tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    path.write_text(small(1600).model_dump_json())
    done = runner.invoke(app, ["--trace", "paper", "--requests", "50", "--profile", str(path)])
    assert done.exit_code == 2
    assert "kv_tokens: an instance holds 1600 tokens, one request needs" in done.output
    fields = json.loads(path.read_text())
    fields["step"]["base_s"] = -1
    path.write_text(json.dumps(fields))
    done = runner.invoke(app, ["--trace", "paper", "--profile", str(path)])
    assert done.exit_code == 2
    assert "tiny.json: step.base_s: Input should be greater than 0" in done.output


def test_sweep_and_report(tmp_path: Path) -> None:
    common = ["--trace", "chat", "--requests", "60", "--decode", "2", "--prefill", "1"]
    swept, drawn = tmp_path / "sweep.json", ["--plot", str(tmp_path / "curves.svg")]
    done = runner.invoke(
        app,
        ["sweep", *common, "--loads", "0.5,1", "--seeds", "2", "--preset", "static-rr", "--json", str(swept), *drawn],
    )
    assert done.exit_code == 0, done.output
    points = json.loads(swept.read_text())["points"]
    assert [(p["load"], p["seeds"]) for p in points] == [(0.5, 2), (1.0, 2)]
    assert points[0]["goodput_rps_ci"] >= 0
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    done = runner.invoke(app, [*common, "--preset", "ares", "--report", str(tmp_path), "--curves", str(swept)])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "index.html").read_text()
    assert "data:image/png;base64," in page
    assert "src=" not in page, "nothing is loaded from elsewhere"


def recording(directory: Path, profile: Profile) -> None:
    """Write what a recorder would have seen of a simulated engine."""
    work = workload(7, 80, 6.0)
    outcome = Simulation(work, [profile], [], preset("static-rr")).run()
    rows = zip(
        work.arrival_s, work.prompt_tokens, work.output_tokens, outcome.first_token_s, outcome.finish_s, strict=True
    )
    lines = [
        {"input_toks": int(n), "output_toks": int(o), "arrival_time": 1e9 + float(t), "queued_ts": 50 + float(t)}
        | {"first_token_ts": 50 + float(first), "last_token_ts": 50 + float(last)}
        for t, n, o, first, last in rows
    ]
    directory.mkdir()
    (directory / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    engine = {"max_num_seqs": profile.max_num_seqs, "max_num_batched_tokens": profile.max_num_batched_tokens}
    cache = {"num_gpu_blocks": profile.kv_tokens // 16 + 1, "block_size": 16}
    (directory / "meta.json").write_text(json.dumps({"engine_kwargs": engine, "kv_cache": cache}))


def test_the_engine_that_made_a_recording_validates_exactly(tmp_path: Path) -> None:
    recording(tmp_path / "run", small(3200))
    path = tmp_path / "small.json"
    path.write_text(small(3200).model_dump_json())
    out = tmp_path / "errors.json"
    arguments = ["validate", "--recording", str(tmp_path / "run"), "--profile", str(path), "--json", str(out)]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    for measure in ("ttft_s", "tpot_s", "e2e_s"):
        for name in ("mean", "p50", "p99"):
            # The recorder's clocks carry seven digits at 1e9 s.
            assert abs(result[measure][name]["error"]) < 1e-4
    assert abs(result["throughput_rps"]["error"]) < 1e-4


def test_calibration_predicts_requests_it_has_not_seen(tmp_path: Path) -> None:
    """The coefficients themselves trade off against each other in so short a recording; the times must not."""
    recording(tmp_path / "run", small(3200))
    profile, _ = calibration.calibrate(tmp_path / "run", "even", None, "found", lambda done: None, 150)
    assert profile.kv_tokens == 3200
    path = tmp_path / "found.json"
    path.write_text(profile.model_dump_json())
    result = validate(tmp_path / "run", str(path), "odd")
    for measure in ("ttft_s", "tpot_s", "e2e_s"):
        assert abs(result[measure]["mean"]["error"]) < 0.1
    assert abs(result["throughput_rps"]["error"]) < 0.1


def test_scaling_follows_bandwidth_and_compute() -> None:
    profile = small(3200).model_copy(
        update={"weight_bytes": 1e10, "hardware": Hardware(name="a", memory_bytes_s=1e12, flops=1e14)}
    )
    target = Hardware(name="b", memory_bytes_s=4e12, flops=2e14)
    scaled = calibration.scaled(profile, target, "b", None, None, None, None, None)
    # 10 of the 14 ms read the weights; the 4 ms beside them stay.
    assert scaled.step.base_s == pytest.approx(0.004 + 0.0025)
    assert scaled.step.per_resident_token_s == pytest.approx(profile.step.per_resident_token_s / 4)
    assert scaled.step.per_prefill_token_s == pytest.approx(profile.step.per_prefill_token_s / 2)


def test_shipped_profiles_load() -> None:
    assert len(profile_names()) >= 4
    for name in profile_names():
        profile = load_profile(name)
        assert profile.name == name
        assert profile.kv_tokens % profile.block_size == 0


def test_bench_decision(tmp_path: Path) -> None:
    out = tmp_path / "decision.json"
    done = runner.invoke(
        bench, ["decision", "--decode", "8", "--requests", "16", "--decisions", "5", "--json", str(out)]
    )
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert (result["decode"], result["requests"]) == (8, 16)
    assert 0 < result["p50_ms"] <= result["p99_ms"]
    assert result["moves"] > 0
    assert runner.invoke(bench, ["decision", "--preset", "nope"]).exit_code == 2


@pytest.mark.timeout(900)
def test_prefix_caches_need_a_trace_that_names_blocks(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.json"
    rows = [
        {"timestamp": 3000 * n, "input_length": 1100, "output_length": 20, "hash_ids": [n % 2, 2 + n % 2, 10 + n]}
        for n in range(12)
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--trace", str(trace), "--preset", "least-time", "--prefill", "1", "--decode", "1", "--json", str(out)]
    done = runner.invoke(app, [*given, "--prefix-caching"])
    assert done.exit_code == 0, done.output
    (run,) = json.loads(out.read_text())["runs"]
    # All but the first turn of both chats find two blocks.
    assert run["prefix_caches"]["prefill_cached_tokens"] == run["prefix_caches"]["pull_cached_tokens"] == 10 * 1024
    refused = runner.invoke(app, given)
    assert refused.exit_code == 2
    assert "--prefix-caching" in refused.output
    refused = runner.invoke(app, ["--trace", "paper", "--prefix-caching"])
    assert refused.exit_code == 2
    assert "--prefix-caching changes nothing: paper is a built-in workload" in refused.output
