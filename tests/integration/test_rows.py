"""The rows on which the tests of engines run are what their names say."""

import pytest

from ares.local_cluster import cluster as local
from tests.integration.conftest import GPU_DEFAULTS, row_of


@pytest.mark.gpu_defaults
def test_which_model_runner_a_row_has(cluster: local.Cluster, request: pytest.FixtureRequest) -> None:
    """Where vLLM does not find what it wants for its V2 runner, it takes the V1 runner without an error.

    That scheduling is asynchronous there follows from the tests of state: otherwise such requests would not move.
    """
    for worker in cluster.workers:
        v2 = "Using V2 Model Runner" in worker.log.read_text()
        assert v2 == (row_of(request.node) == GPU_DEFAULTS), worker.name
