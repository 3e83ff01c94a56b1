"""docs/write-a-policy.md: its example runs as it is written there, and is worth running."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ares.gateway.replay import ReplayError, replay
from ares.policy import REBALANCERS
from ares.simulator.cli import app
from ares.text_files import read_lines
from tests.gateway.fakes import eventually
from tests.gateway.test_controller import cluster
from tests.gateway.test_service import Client, sample

PAGE = (Path(__file__).parents[2] / "docs" / "write-a-policy.md").read_text()


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The files of the page, in the working directory; the options that name them."""
    for kind, name in (("python", "halve_the_gap.py"), ("yaml", "halve_the_gap.yaml")):
        (block,) = re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)
        assert f"`{name}`" in PAGE
        (tmp_path / name).write_text(block)
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
    said = re.search(r"that\s+(\d+) % of the requests meet both objectives instead of (\d+) %", PAGE)
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
        gateway.pool.instances[-1].draining = True
        clients = [Client(gateway, 500, name=f"r{n}", prompt=[10 + n] * 50) for n in range(4)]
        for client in clients:
            await client.reached(5)
        gateway.pool.instances[-1].draining = False
        await eventually(lambda: any(record.outcome == "moved" for record in gateway.migrations), 30)
        for client in clients:
            await client.finish()
            client.check(500)
        assert sample(gateway, "ares_controller_faults_total", part="rebalance") == 0
        assert "of memory in use here" in gateway.migrations[0].reason
    again = replay(Path("log"), None)
    assert again.decisions == again.same > 0
    assert again.made["move"] >= 1
    assert json.loads(next(read_lines(Path("log"))))["rebalance"] == {
        "name": "halve-the-gap",
        "settings": {"least_gap": 0.01, "cooldown_s": 3.0},
    }
    REBALANCERS.forget(["halve-the-gap"])
    with pytest.raises(ReplayError, match=r"log:1: decided by .* 'halve-the-gap', .* --policy FILE"):
        replay(Path("log"), None)
