"""A recording of a gateway's run is what the simulator reads."""

from pathlib import Path

import pytest

from tests.gateway.gateways import (
    Client,
    cluster,
)


@pytest.mark.timeout(300)  # the simulator may have to be compiled first
async def test_a_recording_of_the_run(model_folder: Path, tmp_path: Path) -> None:
    from ares.simulator.recording import read_recording

    folder = tmp_path / "run"
    async with cluster(model_folder, record=folder) as (gateway, _):
        clients = [Client(gateway, 50 + n, name=f"r{n}") for n in range(3)]
        for client in clients:
            await client.finish()
    recording = read_recording(folder)
    assert sorted(recording.workload.output_tokens.tolist()) == [50, 51, 52]
    assert (recording.first_token_s < recording.finish_s).all()
    assert (recording.meta["decode_instances"], recording.meta["preset"]) == (2, "ares")
    pytest.importorskip("numba", reason="the simulator needs its extra")
    from ares.simulator.validate import validate

    assert validate(folder, "llama-8b-rtx4090", "all")["ttft_s"]["p50"]["simulated"] > 0
