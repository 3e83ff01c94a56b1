"""`ares check` on real engines that a gateway serves meanwhile."""

import pytest

from ares.check import transfers
from ares.check.rows import Outcome
from ares.check.run import Plan, run
from ares.local_cluster import cluster as local
from tests.integration.client import Client
from tests.integration.conftest import GPU_DEFAULTS, row_of


@pytest.mark.gpu_defaults
@pytest.mark.timeout(300)
async def test_a_cluster_passes_with_equal_tokens_on_every_pair(
    cluster: local.Cluster, client: Client, request: pytest.FixtureRequest
) -> None:
    urls = [url for worker in cluster.workers for url in worker.instances.values()]
    on_gpu_defaults = row_of(request.node) == GPU_DEFAULTS
    # Interpreted kernels are slow.
    report = await run(Plan(urls=urls, outputs=2, tokens=64 if on_gpu_defaults else 200))
    rows = {(row.group, row.check): row for row in report.rows}
    # How fast each is says nothing here: they share two cores with the tests.
    seen = [row for row in report.rows if row.check != "time a token"]
    assert [row for row in seen if row.outcome in (Outcome.FAIL, Outcome.WARN)] == []
    for check in ("prefill-0 -> decode-1", "decode-0 -> decode-1", "decode-1 -> decode-0"):
        row = rows[transfers.GROUP, check]
        assert "tokens equal" in row.value
        assert row.figures["bytes"] > 0
    assert rows["configuration", "model runner"].value == ("V2" if on_gpu_defaults else "V1")
    assert rows["configuration", "data type"].value == "float32"
    assert rows["configuration", "NIXL"].outcome is Outcome.PASS
    # Each move once, stop-and-copy and pre-copy.
    assert {row.figures["moves"] for row in report.rows if row.check.startswith("stall of a move")} == {2}
    assert rows["transport", "speed"].figures["gib_per_s"].keys() == {"decode-0", "decode-1"}
    await client.quiet()
