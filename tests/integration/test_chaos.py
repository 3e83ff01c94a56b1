"""Chaos on real engines: a short plan on the shared cluster, its first blow a kill."""

import pytest

from ares import local
from ares.bench.chaos.command import expected_of_real
from ares.bench.chaos.plan import Shape, make
from ares.bench.chaos.play import play
from tests.integration.client import Client

SHAPE = Shape(
    prefill=1,
    decode=2,
    per_process=1,
    streams=4,
    seconds=20.0,
    simulated=False,
    longest_prompt=400,
    longest_output=250,
    events_per_s=0.3,
    moves_per_s=3.0,
    prompts=4,
)


@pytest.mark.timeout(600)
async def test_every_invariant_holds(client: Client, cluster: local.Cluster) -> None:
    plan = make(13, SHAPE)
    assert any(event.kind == "kill" for event in plan.events)
    expected = await expected_of_real(plan, cluster.url, cluster.settings.model)
    try:
        result = await play(cluster, plan, expected)
    finally:
        await client.http.put(f"{cluster.url}/admin/v1/preset", json={"preset": "off"})
    assert result["violations"] == []
    assert result["endings"]["completed"] > 10
    assert result["done"]["kill"] >= 1
    assert any(kind.startswith("move: ") for kind in result["done"])
