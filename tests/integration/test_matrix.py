"""I3-I5 under other configurations of vLLM than the other tests have, each on a cluster of its own (matrix.py).

`make matrix` runs all of them and writes what they found; the others run with `make test` too.
"""

import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp
import pytest

from ares.bench.environment import describe, write
from ares.local_cluster import cluster as local
from ares.predictor import shards
from tests.integration import matrix, matrix_models
from tests.integration.client import Client
from tests.integration.conftest import FORKED, STOCK, Environments, one_core
from tests.integration.measured_moves import measure
from tests.waiting import eventually

RECORD_VARIABLE = "ARES_MATRIX_JSON"
# Around the boundaries of blocks of 16, 32 and 128 tokens, and over several of them.
LENGTHS = (1, 31, 128, 129, 400)
# Of each output; the prompts are fewer, and the outputs shorter, where each prompt has several.
TOKENS, TOKENS_OF_ADAPTERS = 200, 120
BUSY_HOST_S = 600


@pytest.fixture(
    scope="module",
    params=[pytest.param(row, id=row.name, marks=() if row.always else pytest.mark.matrix) for row in matrix.ROWS],
)
def row(request: pytest.FixtureRequest) -> matrix.Row:
    found: matrix.Row = request.param
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, row: matrix.Row) -> Path:
    return tmp_path_factory.mktemp(row.name)


@pytest.fixture(scope="module")
def row_cluster(
    row: matrix.Row, tiny_model: Path, folder: Path, environment_of: Environments
) -> Iterator[local.Cluster]:
    with mock.patch.dict(os.environ, environment_of(STOCK)), matrix.running(row, tiny_model, folder) as running:
        yield running


@pytest.fixture
async def row_client(row_cluster: local.Cluster) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=BUSY_HOST_S)) as http:
        client = Client(http, row_cluster.url, row_cluster.settings.model)
        yield client
        await client.quiet()


@pytest.mark.timeout(BUSY_HOST_S)
async def test_moved_streams_equal_those_of_one_instance(
    row: matrix.Row, row_client: Client, folder: Path, at_length: bool
) -> None:
    begun = time.monotonic()
    lengths, tokens = (LENGTHS[1:4], TOKENS_OF_ADAPTERS) if row.adapters else (LENGTHS, TOKENS)
    found = await measure(row_client, lengths, tokens, row.modes, row.adapters)
    figures = {"what": row.what, "streams": len(found.references), **found.figures()}
    record(row.name, {**figures, "seconds": round(time.monotonic() - begun, 1)})
    assert found.wrong == 0, figures
    assert found.moved >= (2 if at_length else 1) * len(found.references), figures
    assert {what.split()[0] for what in found.moves if what.endswith(" moved")} == set(row.modes), figures
    assert found.pulled == found.expected, figures
    assert found.expired == 0, figures
    # Every prompt has another output with every adapter, so that a wrong one would be seen.
    assert len({tuple(output) for output in found.references.values()}) == len(found.references)
    if row.records:
        await recorded_once(folder / "states", len(found.references))


@pytest.mark.parametrize(
    ("build", "kind"),
    [(matrix_models.convolution, "short convolutions"), (matrix_models.latent_attention, "latent attention")],
)
def test_kinds_of_models_are_refused_before_they_are_loaded(
    build: Callable[[Path, Path], Path], kind: str, tiny_model: Path, tmp_path: Path, environment_of: Environments
) -> None:
    model = build(tiny_model, tmp_path / "model")
    settings = local.ClusterSettings(str(model), log_folder=tmp_path, worker_module=FORKED)
    with mock.patch.dict(os.environ, environment_of(STOCK)), local.workers_only(settings) as cluster:
        cluster.start_worker("decode-0", "decode", one_core())
        with pytest.raises(local.ClusterError, match="ended with status 2"):
            cluster.await_workers()
        # A forked process says more at its end than the error shows of the log.
        said = cluster.workers[0].log.read_text()
        assert re.search(rf"(?s){kind}.*serve it with `vllm serve`", said), said
        assert "Traceback" not in said


async def recorded_once(states: Path, outputs: int) -> None:
    """Check that an instance records each state of its outputs once, and not once a rank."""

    def found() -> list[tuple[str, int]]:
        read = [shards.read(file) for file in shards.files(states)]
        return [
            (shard.requests[output], position)
            for shard in read
            for output, position in zip(*(shard.tensors[n].tolist() for n in ("output", "position")), strict=True)
        ]

    await eventually(lambda: len({request for request, _ in found()}) >= outputs, 60)
    assert len(set(found())) == len(found())


def record(name: str, figures: dict[str, Any]) -> None:
    """Write the figures of a row into the file that the variable names, beside those of other rows."""
    if file := os.environ.get(RECORD_VARIABLE):
        path = Path(file)
        known = json.loads(path.read_text())["rows"] if path.exists() else {}
        write({"benchmark": "matrix", **describe(), "rows": {**known, name: figures}}, path)
