"""Whatever options of `ares simulate` are combined, each does what it says or is refused by name."""

import itertools
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ares.cli.simulate import app
from ares.policy import ADMISSIONS, DISPATCHERS, PRESETS, REBALANCERS, Preset
from ares.simulator.scenario import Scenario, run

runner = CliRunner()

PARTS = {
    "dispatch": (None, *DISPATCHERS),
    "admission": (None, *ADMISSIONS),
    "rebalance": (None, *REBALANCERS),
}
SCALE = "scale --profile llama-8b-rtx4090 --hardware a --flops 1 --memory-bytes-s 1 --out OUT"
# More than the cluster can hold, so that every part of a policy has something to decide.
BUSY = Scenario("paper", None, 120, 2, 4, "r1-qwen-7b-24gb", None, "continuous", 2.0)


def policies() -> dict[tuple[str | None, ...], Preset | None]:
    """Return the policy of every preset with every combination of parts; None where it is refused."""
    found: dict[tuple[str | None, ...], Preset | None] = {}
    for name, *parts in itertools.product(PRESETS, *PARTS.values()):
        given = dict(zip(PARTS, parts, strict=True))
        assert name is not None
        try:
            found[(name, *parts)] = replace(BUSY, **given).policy(name)  # type: ignore[arg-type]
        except ValueError as error:
            said = str(error)
            assert said.startswith(f"preset {name}: "), said
            assert " needs " in said, said
            found[(name, *parts)] = None
    return found


def outcome(policy: Preset) -> bytes:
    """Run a policy; two that give the same bytes decided the same for every request."""
    simulation, _ = BUSY.simulation("static-rr", 1.3, None, 0)
    simulation.preset = policy
    ended = simulation.run()
    return np.stack([ended.first_token_s, ended.finish_s]).tobytes()


@pytest.mark.timeout(900)
def test_no_combination_is_silently_another() -> None:
    found = policies()
    accepted = {key: policy for key, policy in found.items() if policy is not None}
    for (_, *parts), policy in accepted.items():
        for part, given in zip(PARTS, parts, strict=True):
            assert given is None or getattr(policy, part) == given
    # Everything that is accepted and differs in what was asked differs in what happens.
    different = set(accepted.values())
    # Open: four dispatches, and with known lengths those with a part that predicts; forecast: without suspension, with
    # it, and with known lengths too; the other two: with known lengths where the rebalancer predicts.
    assert len(different) == (4 * 5 + 2 * 5 + 2 * 2) + 3 * 5 + 2 * (5 + 2)
    assert len({outcome(policy) for policy in different}) == len(different)
    # And of every part each name is accepted somewhere.
    for at, names in enumerate(PARTS.values(), start=1):
        assert {key[at] for key in accepted} == set(names)


def test_every_preset_is_accepted_as_it_is() -> None:
    for name, one in PRESETS.items():
        assert one.altered() == one, name


def test_replaced_parts_make_the_presets_that_have_them() -> None:
    """Predictions are used where a part needs them, whatever the preset that it is put into."""
    assert PRESETS["static-least-loaded"].altered(rebalance="ares") == PRESETS["ares-rebalance"]
    whole = PRESETS["static-rr"].altered(dispatch="forecast", admission="forecast")
    assert whole == PRESETS["ares-admission"]
    assert PRESETS["ares"].altered(rebalance="none") == PRESETS["ares-suspension"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--preset ares --dispatch round_robin", "admission forecast needs dispatch forecast (not round_robin)"),
        ("--preset static-rr --admission past-future", "needs dispatch least_loaded (not round_robin)"),
        ("--preset ares --predictor none", "preset ares has dispatch forecast, which needs predictions"),
        ("--preset ares-oracle --dispatch round_robin --admission open --rebalance none", "it knows the true lengths"),
        ("--preset static-rr --preset ares-no-prediction --predictor exact", "--predictor changes nothing"),
        ("--preset ares-oracle --predictor noise-60", "--predictor changes nothing"),
        ("--preset static-rr --preset ares-admission --period 2", "--period changes nothing"),
        ("--preset ares --rebalance none --period 2", "--period changes nothing"),
        ("--preset ares --rebalance oracle", "policy 'oracle' is now a preset: give --preset ares-oracle"),
        ("--prefill 0 --prefill-profile r1-qwen-7b-80gb", "--prefill-profile changes nothing"),
        ("--trace paper --format csv", "--format changes nothing: paper is a built-in workload"),
        ("--trace paper --time-unit s", "--time-unit changes nothing: paper is a built-in workload"),
        ("--trace TRACE --load 1 --time-unit s", "--time-unit changes nothing: --load sets the rate"),
        ("--curves sweep.json", "--curves changes nothing"),
        ("--preset ares --preset paper --preset ares", "--preset: ares is given twice"),
        ("--slo-ttft inf", "--slo-ttft: inf is not a finite number"),
        ("--slo-tpot nan", "--slo-tpot"),
        ("--period inf", "--period: inf is not a finite number"),
        ("--preset ares --decode 8 sweep", "--decode, --preset before sweep changes nothing"),
        ("--trace paper calibrate --recording x --out y", "--trace before calibrate changes nothing"),
        ("sweep --loads 1,nan", "--loads: must be positive and finite"),
        ("sweep --loads 1,2,1.0", "--loads: 1.0 is given twice"),
        ("prefixes --trace TRACE --loads ,", "--loads: not numbers with commas"),
        ("prefixes --trace TRACE --loads 1,1", "--loads: 1.0 is given twice"),
        ("prefixes --trace TRACE --policies least_time,least_time", "--policies: least_time is given twice"),
        ("--decode 8 prefixes --trace TRACE", "--decode before prefixes changes nothing"),
        ("sweep --preset ares --preset ares", "--preset: ares is given twice"),
        ("sweep --preset static-rr --period 2", "--period changes nothing"),
        ("sweep --preset static-rr --predictor exact", "--predictor changes nothing"),
        ("sweep --prefill 0 --prefill-profile r1-qwen-7b-80gb", "--prefill-profile changes nothing"),
        ("sweep --format csv", "--format changes nothing"),
        ("sweep --plot curves.xyz", "curves.xyz: unknown kind of picture; known suffixes: "),
        ("sweep --plot curves", "curves: unknown kind of picture"),
        ("calibrate --recording RECORDING --out OUT --flops 1e12", "--flops: needs --hardware too"),
        ("calibrate --recording RECORDING --out OUT --hardware a --flops 1", "--hardware: needs --memory-bytes-s and"),
        (f"{SCALE} --model b", "--model: another model needs --weight-bytes, --kv-bytes-per-token and --kv-tokens too"),
        (f"{SCALE} --weight-bytes inf", "--weight-bytes: inf is not a finite number"),
        (f"{SCALE} --kv-tokens 0", "--kv-tokens"),
        (f"{SCALE} --flops -1", "ares simulate: --flops: Input should be greater than 0"),
        (f"{SCALE} --max-num-seqs -1", "--max-num-seqs"),
    ],
)  # fmt: skip
def test_what_would_change_nothing_is_refused(tmp_path: Path, arguments: str, said: str) -> None:
    names = {name: str(tmp_path / name.lower()) for name in ("TRACE", "RECORDING", "OUT")}
    done = runner.invoke(app, [names.get(word, word) for word in arguments.split()], env={"COLUMNS": "200"})
    assert done.exit_code == 2, done.output
    assert said in done.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--preset", "static-rr", "--preset", "ares-rebalance", "--period", "3"],
        ["--preset", "static-rr", "--preset", "ares", "--predictor", "exact"],
        ["--preset", "static-rr", "--rebalance", "ares", "--predictor", "exact", "--period", "3"],
        ["--preset", "ares", "--dispatch", "forecast", "--admission", "forecast", "--set", "admission.order=fcfs"],
    ],
)
def test_what_changes_something_for_one_of_the_presets_is_taken(arguments: list[str]) -> None:
    done = runner.invoke(app, ["--trace", "chat", "--requests", "20", *arguments])
    assert done.exit_code == 0, done.output


def test_the_oracle_knows_lengths_whatever_the_predictor() -> None:
    ends = [run(replace(BUSY, predictor=name), "ares-oracle", 1.3, None, 0)[0] for name in ("none", "exact")]
    np.testing.assert_array_equal(ends[0].finish_s, ends[1].finish_s)


BAILIAN = "".join(
    json.dumps({"chat_id": n, "parent_chat_id": -1, "timestamp": n * 0.45, "input_length": 100, "output_length": 50})
    + "\n"
    for n in range(40)
)


def test_a_trace_is_read_once_and_what_is_strange_about_it_is_said(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.json"
    trace.write_text(BAILIAN)
    arguments = ["--trace", str(trace), "--preset", "static-rr", "--preset", "static-least-loaded", "--json", str(out)]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "unlikely" not in done.output
    seconds = json.loads(out.read_text())["runs"][0]["load"]
    done = runner.invoke(app, [*arguments, "--time-unit", "ms"])
    assert "2,222 requests a second is unlikely" in done.output
    result = json.loads(out.read_text())
    assert result["runs"][0]["load"] == pytest.approx(1000 * seconds)
    assert result["scenario"]["time_unit"] == "ms"
    done = runner.invoke(app, [*arguments, "--format", "mooncake"])
    assert "fields of Bailian's traces" in done.output


def test_a_rate_cannot_be_set_where_all_arrive_at_once(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n" + "5,10,10\n" * 3)
    for arguments in (["--load", "2"], ["--rate-scale", "2"]):
        done = runner.invoke(app, ["--trace", str(trace), "--preset", "static-rr", *arguments])
        assert done.exit_code == 2
        assert "all requests arrive at once" in done.output
    assert runner.invoke(app, ["--trace", str(trace), "--preset", "static-rr"]).exit_code == 0


def test_outputs_are_looked_at_before_any_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ares.simulator.scenario.Scenario.read", lambda self: pytest.fail("it went on"))
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.json").write_text('{"points": [{"preset": "a"}], "slo": {}}')
    for arguments in (
        ["--json", str(tmp_path)],
        ["--report", str(tmp_path / "file")],
        ["--report", str(tmp_path), "--curves", str(tmp_path / "nowhere.json")],
        ["--report", str(tmp_path), "--curves", str(tmp_path / "bad.json")],
        ["sweep", "--json", str(tmp_path / "file" / "out.json")],
        ["sweep", "--plot", str(tmp_path / "file" / "out.svg")],
    ):
        done = runner.invoke(app, arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert str(tmp_path) in done.output.replace("\n", "")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "bad.json"}


def test_help_of_a_command_needs_no_extra() -> None:
    code = "import sys; sys.modules['numba'] = None; from ares.cli.simulate import app; app(['sweep', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--processes" in done.stdout


def test_a_sweep_of_a_pipe_in_several_processes(tmp_path: Path) -> None:
    pipe, out = tmp_path / "63", tmp_path / "out.json"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(BAILIAN,))
    writer.start()
    arguments = ["sweep", "--trace", str(pipe), "--preset", "static-rr", "--preset", "static-least-loaded"]
    done = runner.invoke(app, [*arguments, "--loads", "0.5,1", "--seeds", "1", "--processes", "2", "--json", str(out)])
    writer.join()
    assert done.exit_code == 0, done.output
    assert [point["load"] for point in json.loads(out.read_text())["points"]] == [0.5, 0.5, 1.0, 1.0]
