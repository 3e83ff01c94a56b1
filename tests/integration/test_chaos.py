"""Chaos on real engines: a short plan on the shared ones, with a gateway of its own that throws and is lied to."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from ares.free_ports import free_port
from ares.local_cluster import cluster as local
from ares_dev.chaos.command import expected_of_real
from ares_dev.chaos.plan import Plan, make_plan
from ares_dev.chaos.run import executed_plan_file, run_plan
from tests.dev.chaos.shapes import REAL
from tests.integration.client import Client
from tests.integration.tiny_model import VOCABULARY

SEED = 62
SHAPE = msgspec.structs.replace(
    REAL,
    per_process=1,
    seconds=30.0,
    longest_prompt=400,
    longest_output=250,
    events_per_s=0.8,
    moves_per_s=4.0,
    prompts=4,
    vocabulary=VOCABULARY,
)


@pytest.fixture
def plan() -> Plan:
    """Return the plan of the seed, or the one that is to be played again."""
    again = os.environ.get("ARES_CHAOS_PLAN")
    return msgspec.json.decode(Path(again).read_bytes(), type=Plan) if again else make_plan(SEED, SHAPE)


@pytest.fixture
def chaotic(plan: Plan, cluster: local.Cluster, tmp_path: Path) -> Iterator[local.Cluster]:
    """Put the gateway that fails on purpose before the same engines; the ordinary one stays beside it."""
    settings = replace(
        cluster.settings,
        port=free_port("127.0.0.1", cluster.ports),
        preset="ares",
        gateway_module="ares_dev.chaos.gateway",
        gateway_flags=(
            *("--fault-seed", str(plan.seed), "--fault-share", "0.2"),
            *("--decision-log", str(tmp_path / "decisions.jsonl")),
        ),
    )
    beside = local.Cluster(settings, cluster.console, tmp_path, cluster.workers)
    beside.start_gateway()
    own = local.Cluster(settings, cluster.console, tmp_path, beside.processes[-1:])
    try:
        beside.await_gateway()
        yield beside
    finally:
        own.stop()


@pytest.mark.timeout(600)
async def test_every_invariant_holds(plan: Plan, client: Client, chaotic: local.Cluster) -> None:
    expected = await expected_of_real(plan, client.url, client.model)
    result = await run_plan(chaotic, plan, expected, chaotic.log_folder / "decisions.jsonl")
    assert result["violations"] == [], f"again: ARES_CHAOS_PLAN={executed_plan_file(chaotic, plan)}"
    done = result["done"]
    assert result["outcomes"]["completed"] > 10
    assert done["kill"] >= 1
    assert done["move: moved"] >= 5
    assert any(kind.startswith('fault {"telemetry"') for kind in done), "no telemetry lied"
    assert any(kind.startswith('fault {"predictions"') for kind in done), "no prediction lied"
    # Both checks of decisions had something to check.
    assert result["gateway"]["ares_controller_faults_total"] > 0
    assert result["gateway"]["ares_implausible_predictions_total"] > 0
    assert result["decisions"] > 0
