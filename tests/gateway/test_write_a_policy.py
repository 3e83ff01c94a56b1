"""docs/write-a-policy.md: its examples run as they are written there, and are worth running."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ares.cli.simulate import app
from ares.gateway.records.replay import ReplayError, replay
from ares.policy import ADMISSIONS, DISPATCHERS, REBALANCERS
from ares.text_files import read_lines
from tests.gateway.gateways import Client, cluster, finish, hold, sample, stop_holding
from tests.waiting import eventually

PAGE = (Path(__file__).parents[2] / "docs" / "write-a-policy.md").read_text()


def write(folder: Path, kind: str, name: str) -> None:
    """Write the block of the page that follows the first mention of a file."""
    block = re.search(rf"`{name}`.*?```{kind}\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    (folder / name).write_text(block[1])


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The files of the page, in the working directory; the options that name them."""
    write(tmp_path, "python", "halve_the_gap.py")
    write(tmp_path, "yaml", "halve_the_gap.yaml")
    monkeypatch.chdir(tmp_path)
    yield ["--policy", "halve_the_gap.py", "--preset", "halve_the_gap.yaml"]
    REBALANCERS.forget(set(REBALANCERS) & {"halve-the-gap"})


def test_in_a_simulation_it_beats_round_robin(example: list[str]) -> None:
    arguments = ["--requests", "600", "--load", "0.9", "--preset", "static-rr", *example, "--json", "out.json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    before, after = json.loads(Path("out.json").read_text())["runs"]
    assert after["slo_share"] > before["slo_share"] + 0.2
    assert after["preemptions"] < before["preemptions"] / 2
    assert after["migrations"] > 100
    said = re.search(r"that\s+(\d+) % of the requests meet all objectives instead of (\d+) %", PAGE)
    assert said is not None
    assert [f"{run['slo_share']:.0%}" for run in (after, before)] == [f"{share}%" for share in said.groups()]


def test_in_a_sweep_of_several_processes(example: list[str]) -> None:
    arguments = ["sweep", "--requests", "100", "--loads", "0.9", "--seeds", "2", "--processes", "2", *example]
    done = CliRunner().invoke(app, [*arguments, "--json", "out.json"])
    assert done.exit_code == 0, done.output
    (point,) = json.loads(Path("out.json").read_text())["points"]
    assert point["preset"] == "halve_the_gap.yaml"
    assert point["migrations"] > 0


async def test_in_a_gateway_it_moves_and_its_decisions_are_made_again(example: list[str], model_folder: Path) -> None:
    settings = {"policies": ["halve_the_gap.py"], "preset": "halve_the_gap.yaml", "decision_log": Path("log")}
    async with cluster(model_folder, kv_blocks=200, settings=["rebalance.least_gap=0.01"], **settings) as (gateway, _):
        gateway.pool.instances[-1].state.draining = True
        clients = [Client(gateway, 500, name=f"r{n}", prompt=[10 + n] * 50) for n in range(4)]
        for client in clients:
            await client.reached(5)
        gateway.pool.instances[-1].state.draining = False
        await eventually(lambda: any(record.outcome == "moved" for record in gateway.migrations), 30)
        await finish(clients, 500)
        assert sample(gateway, "ares_controller_faults_total", part="rebalance") == 0
        assert "of memory in use here" in next(iter(gateway.migrations)).reason
    again = replay(Path("log"), None)
    assert again.decisions == again.same > 0
    assert again.made["move"] >= 1
    records = [json.loads(line) for line in read_lines(Path("log")) if line.strip()]
    assert next(one for one in records if one["kind"] == "moves")["rebalance"] == {
        "name": "halve-the-gap",
        "settings": {"least_gap": 0.01, "cooldown_s": 3.0},
    }
    REBALANCERS.forget(["halve-the-gap"])
    with pytest.raises(ReplayError, match=r"log:\d+: decided by .* 'halve-the-gap', .* --policy FILE"):
        replay(Path("log"), None)


@pytest.fixture
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The files of the other two examples, in the working directory, and presets that use them."""
    write(tmp_path, "python", "fewest_requests.py")
    write(tmp_path, "python", "one_third_free.py")
    (preset,) = re.findall(r"```yaml\n(admission:.*?)```", PAGE, re.DOTALL)
    (tmp_path / "one_third_free.yaml").write_text(preset)
    (tmp_path / "fewest_requests.yaml").write_text("dispatch: fewest-requests\n")
    monkeypatch.chdir(tmp_path)
    yield
    DISPATCHERS.forget(set(DISPATCHERS) & {"fewest-requests"})
    ADMISSIONS.forget(set(ADMISSIONS) & {"one-third-free"})


def simulated(arguments: str) -> list[Any]:
    done = CliRunner().invoke(app, [*arguments.split(), "--requests", "300", "--load", "0.9", "--json", "out.json"])
    assert done.exit_code == 0, done.output
    runs: list[Any] = json.loads(Path("out.json").read_text())["runs"]
    return runs


def test_dispatch_and_admission_in_a_simulation(others: None) -> None:
    commands = [line.strip() for line in PAGE.splitlines() if line.startswith("    ares simulate ")]
    assert len(commands) == 2
    (dispatched,), (admitted,) = (simulated(line.removeprefix("ares simulate ")) for line in commands)
    (plain,) = simulated("--preset static-least-loaded")
    assert dispatched["completed"] == admitted["completed"] == plain["completed"] == 300
    assert dispatched["slo_share"] != plain["slo_share"]
    assert admitted["preemptions"] < plain["preemptions"], "a third of memory stays free"
    (moving,) = simulated("--policy one_third_free.py --preset one_third_free.yaml")
    assert moving["migrations"] > 0
    (strict,) = simulated(f"{commands[1].removeprefix('ares simulate ')} --set admission.free=0.9")
    assert strict["ttft_s"]["p50"] > admitted["ttft_s"]["p50"]


@pytest.mark.parametrize("name", ["fewest_requests", "one_third_free"])
async def test_dispatch_and_admission_in_a_gateway(others: None, model_folder: Path, name: str) -> None:
    settings = {"policies": [f"{name}.py"], "preset": f"{name}.yaml", "decision_log": Path("log")}
    async with cluster(model_folder, kv_blocks=200, **settings) as (gateway, fakes):
        hold(fakes, 80)
        clients = [Client(gateway, 60, name=f"r{n}", prompt=[10 + n] * 50) for n in range(4)]
        for client in clients:
            await client.reached(5)
        assert [len(fake.running) for fake in fakes[1:]] == [2, 2]
        stop_holding(fakes)
        await finish(clients, 60)
        for part in ("dispatch", "admission", "rebalance"):
            assert sample(gateway, "ares_controller_faults_total", part=part) == 0
    again = replay(Path("log"), None)
    assert again.decisions == again.same > 0
    assert again.made["place"] + again.made["admit"] == 4
