"""Policies and presets that users bring."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ares import plugins
from ares.cli.simulate import app
from ares.config import ConfigError, live_preset, load
from ares.policy import REBALANCERS, REGISTRIES

HEAD = "from ares.policy import MigrationDecision, Rebalance, register\n"
POLICY = HEAD + '@register("{name}")\nclass Mine(Rebalance):\n    def decide(self, cluster):\n        {body}\n'


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    before = {part: set(registry) for part, registry in REGISTRIES.items()}
    yield
    for part, registry in REGISTRIES.items():
        registry.forget(set(registry) - before[part])


def policy(folder: Path, name: str, body: str = "return []") -> Path:
    file = folder / f"{name}.py"
    file.write_text(POLICY.format(name=name, body=body))
    return file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nowhere_to_be_found", "cannot be loaded: ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("def broken(:", "cannot be loaded: SyntaxError: "),
        ("raise SystemExit(3)", "cannot be loaded: SystemExit: 3"),
        ("x = 1", "registers no policy: decorate a class"),
        (POLICY.format(name="ares", body="return []"), "the rebalance policy 'ares' is already registered"),
        (POLICY.format(name="half", body="return []") + "1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_a_file_that_is_no_policy_is_refused_in_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    before = set(REBALANCERS)
    for _ in range(2):  # and the second time too
        done = CliRunner().invoke(app, ["--policy", str(file), "--preset", "static-rr"])
        assert done.exit_code == 2
        assert said in done.output
        assert str(file) in done.output
        assert len(done.output.splitlines()) == 1
    assert set(REBALANCERS) == before


def test_a_file_that_is_missing_or_no_python(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.py: no such file"):
        plugins.load([tmp_path / "nowhere.py"])
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ValueError, match=r"its name must end in \.py"):
        plugins.load([tmp_path / "mine.txt"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise RuntimeError('a bug')", "rebalance policy 'bad' raised RuntimeError: a bug"),
        (
            "return [MigrationDecision(0, 0, 99, 1.0, 'x')] if len(cluster.location) else []",
            "source and target must be indices",
        ),
    ],
)
def test_a_bad_policy_ends_a_simulation_with_its_name(tmp_path: Path, body: str, said: str) -> None:
    arguments = ["--policy", str(policy(tmp_path, "bad", body)), "--preset", "static-rr", "--rebalance", "bad"]
    done = CliRunner().invoke(app, ["--requests", "20", *arguments])
    assert done.exit_code == 2
    assert "ares simulate: rebalance policy 'bad' " in done.output
    assert said in done.output


def test_a_policy_that_cannot_be_made(tmp_path: Path) -> None:
    file, preset = tmp_path / "broken.py", tmp_path / "broken.yaml"
    file.write_text(
        POLICY.format(name="broken", body="return []") + "    def __init__(self, settings):\n        1 / 0\n"
    )
    preset.write_text("rebalance: broken\n")
    done = CliRunner().invoke(app, ["--requests", "20", "--policy", str(file), "--preset", str(preset)])
    assert "ares simulate: rebalance policy 'broken' cannot be made: ZeroDivisionError" in done.output
    with pytest.raises(ConfigError, match="'broken' cannot be made"):
        load(workers=["http://127.0.0.1:1"], model="m", policies=[file], preset=str(preset))
    file = tmp_path / "undecided.py"
    file.write_text(HEAD + '@register("undecided")\nclass Mine(Rebalance):\n    pass\n')
    with pytest.raises(ValueError, match=r"Mine must define decide\(self, cluster\)"):
        plugins.load([file])


def test_a_policy_that_nothing_uses_is_refused(tmp_path: Path) -> None:
    file = str(policy(tmp_path, "idle"))
    done = CliRunner().invoke(app, ["--policy", file, "--preset", "static-rr"])
    assert done.exit_code == 2
    assert "--policy changes nothing" in done.output
    with pytest.raises(ConfigError, match=r"'preset': ares uses no policy of --policy"):
        load(workers=["http://127.0.0.1:1"], model="m", policies=[file])


def test_settings_and_files_of_a_gateway(tmp_path: Path) -> None:
    file, preset = policy(tmp_path, "live"), tmp_path / "live.yaml"
    preset.write_text("rebalance: live\n")
    base = {"workers": ["http://127.0.0.1:1"], "model": "m"}
    assert load(**base, policies=[file], preset=str(preset)).preset == str(preset)
    assert live_preset("ares").cooldown_s == 3.0
    assert live_preset("ares", ["rebalance.cooldown_s=10"]).cooldown_s == 10.0
    assert load(**base, settings=["rebalance.theta=0.2"]).settings == ["rebalance.theta=0.2"]
    with pytest.raises(ConfigError, match=r"'settings': --set rebalance.thta=1: .* unknown setting 'thta'"):
        load(**base, settings=["rebalance.thta=1"])
    preset.write_text("rebalance: {name: live, theta: 1}\n")
    with pytest.raises(ConfigError, match=r"live\.yaml: rebalance policy 'live': unknown setting 'theta'"):
        load(**base, policies=[file], preset=str(preset))


@pytest.mark.parametrize("text", ["a: [", "- 1", "rebalance: !!bool now", "\0", "{? [a] : b}"])
def test_a_preset_file_that_is_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml: ") as caught:
        plugins.preset(str(file))
    assert "\n" not in str(caught.value)


def test_installed_packages_register_by_entry_points(tmp_path: Path) -> None:
    (tmp_path / "shipped_policy.py").write_text(POLICY.format(name="shipped", body="return []"))
    about = tmp_path / "shipped-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: shipped\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{plugins.GROUP}]\nshipped = shipped_policy\n")
    code = "from ares import plugins; from ares.policy import REBALANCERS; plugins.load([]); print(*REBALANCERS)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "shipped" in done.stdout.split()


OTHERS = """from ares.policy import Admission, Dispatch, AdmissionDecision, register


@register("{name}")
class Placing(Dispatch):
    def choose(self, cluster, tokens, remaining):
        {choose}


@register("{name}")
class Holding(Admission):
    def decide(self, cluster, candidates, running):
        {decide}
"""
ADMIT = "return [AdmissionDecision('admit', n, {place}, 'x') for n in range(len(candidates.tokens))]"


def others(folder: Path, choose: str = "return 0", decide: str = "return []") -> str:
    file = folder / "both.py"
    file.write_text(OTHERS.format(name="both", choose=choose, decide=decide))
    return str(file)


def test_one_file_registers_policies_of_several_kinds(tmp_path: Path) -> None:
    file = others(tmp_path)
    plugins.load([file])
    assert all("both" in REGISTRIES[part] for part in ("dispatch", "admission"))
    assert "both" not in REBALANCERS
    broken = tmp_path / "broken.py"
    broken.write_text(OTHERS.format(name="half", choose="return 0", decide="return []") + "1 / 0")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        plugins.load([broken])
    assert not any("half" in registry for registry in REGISTRIES.values())


@pytest.mark.parametrize(
    ("choose", "said"),
    [
        ("raise RuntimeError('a bug')", "dispatch policy 'both' raised RuntimeError: a bug"),
        ("return 99", "dispatch policy 'both' chose 99: give an index from 0 to 3"),
        ("return float('nan')", "dispatch policy 'both' chose nan: give an index"),
        ("return None", "dispatch policy 'both' chose no instance, and some are open"),
    ],
)
def test_a_bad_dispatch_ends_a_simulation_with_its_name(tmp_path: Path, choose: str, said: str) -> None:
    arguments = ["--policy", others(tmp_path, choose=choose), "--preset", "static-rr", "--dispatch", "both"]
    done = CliRunner().invoke(app, ["--requests", "20", *arguments])
    assert done.exit_code == 2
    assert f"ares simulate: {said}" in done.output


@pytest.mark.parametrize(
    ("decide", "said"),
    [
        ("raise RuntimeError('a bug')", "admission policy 'both' raised RuntimeError: a bug"),
        ("return None", "admission policy 'both' must return a list of AdmissionDecision, not None"),
        (ADMIT.format(place=99), "instance must be an index from 0 to 3"),
        (ADMIT.format(place=0) + " * 2", "the request is named twice"),
        (ADMIT.format(place="float('nan')"), "instance must be an index"),
    ],
)
def test_a_bad_admission_ends_a_simulation_with_its_name(tmp_path: Path, decide: str, said: str) -> None:
    arguments = ["--policy", others(tmp_path, decide=decide), "--admission", "both", "--preset", "static-least-loaded"]
    done = CliRunner().invoke(app, ["--requests", "20", *arguments])
    assert done.exit_code == 2
    assert "ares simulate: admission policy 'both' " in done.output
    assert said in done.output


def test_an_own_dispatch_decides_as_the_one_that_is_built_in(tmp_path: Path) -> None:
    """Asked in Python, the rule of `round_robin` comes to what the event loop decides by itself."""
    file, out = tmp_path / "ring.py", tmp_path / "out.json"
    file.write_text(
        "from ares.policy import Dispatch, register\n"
        "from ares.policy.dispatch.round_robin import RoundRobin\n\n\n"
        '@register("ring")\nclass Ring(RoundRobin):\n'
        "    def choose(self, *given):\n        return super().choose(*given)\n\n\n"
        "assert Ring.rule != RoundRobin.rule\n"
    )
    arguments = ["--requests", "200", "--preset", "static-rr", "--json", str(out)]
    times = []
    for more in ([], ["--policy", str(file), "--dispatch", "ring"]):
        assert CliRunner().invoke(app, [*arguments, *more]).exit_code == 0
        (run,) = json.loads(out.read_text())["runs"]
        times.append(
            {name: run[name] for name in ("ttft_s", "tpot_s", "preemptions", "events", "simulated_s") if name in run}
        )
    assert times[0] == times[1]


def test_an_admission_that_admits_no_request_is_stuck(tmp_path: Path) -> None:
    arguments = ["--policy", others(tmp_path), "--admission", "both", "--preset", "static-least-loaded"]
    done = CliRunner().invoke(app, ["--requests", "20", *arguments])
    assert done.exit_code != 0
    assert "stuck at" in (done.output + str(done.exception))
