"""Real engines, started once for each row of the whole run: a prefill and two decode instances of a tiny random model.

A row is a configuration of vLLM. Every test of engines runs on the CPU build as it is; those marked `gpu_defaults` also
run on one with what vLLM chooses on a GPU, the V2 model runner and asynchronous scheduling (gpu_defaults/).
"""

import asyncio
import contextlib
import functools
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from unittest import mock

import aiohttp
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from ares.engine.defaults import local_flags
from ares.free_ports import free_port
from ares.local_cluster import cluster as local
from ares_dev import fork_server
from tests.integration.client import Client
from tests.integration.tiny_model import build
from tests.waiting import eventually_found

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")

FOLDER = Path(__file__).parent
# 128 blocks of 128 tokens on each instance: small enough for a test to fill.
TINY_FLAGS = ("--dtype", "float32", "--max-model-len", "4096", "--kv-cache-memory-bytes", "16M")
# They act on the gateway; the instances' own API answers without them.
GATEWAY_FLAGS = ("--enable-prompt-tokens-details", "--enable-auto-tool-choice", "--tool-call-parser", "hermes")
STOCK, GPU_DEFAULTS = "v1", "v2-async"
OWN_INSTANCES, APART = "own-instances", "test_speculative_decoding"
# Instances of the tests start in a fraction of the time so; `ares up` and restarts are tested as a user has them.
FORKED = "ares_dev.forked_engine"
RECORDINGS = "recordings"
# Gives the variables of the instances of a row.
Environments = Callable[[str], dict[str, str]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test of the shared cluster on its rows."""
    if "cluster" in metafunc.fixturenames:
        marked = metafunc.definition.get_closest_marker("gpu_defaults") is not None
        rows = (STOCK, GPU_DEFAULTS) if marked else (STOCK,)
        metafunc.parametrize("cluster", rows, indirect=True, scope="session")


class ByRow(LoadScopeScheduling):  # type: ignore[misc] # xdist ships no types
    """Gives each row of the shared cluster, and the tests with instances of their own, to a process as a whole.

    The longest file of those is apart: it and the row of the GPU's defaults take equally long, and run side by side.
    """

    def _split_scope(self, nodeid: str) -> str:
        name, _, case = nodeid.partition("[")
        if APART in name:
            return APART
        return next((row for row in (STOCK, GPU_DEFAULTS) if case.startswith(row)), OWN_INSTANCES)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByRow:
    """Schedule by row where several processes run the tests: xdist 3.8's own groups have no effect with pytest 9."""
    return ByRow(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what needs engines; run the rows one after the other, and in each what kills an instance last."""
    if not runs_at_length(config):
        on_demand = [item for item in items if item.get_closest_marker("matrix") is not None]
        items[:] = [item for item in items if item not in on_demand]
        config.hook.pytest_deselected(items=on_demand)
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.engines)
    # Tests of one file stay together, on the shared cluster or not: its own instances are started once.
    items.sort(key=lambda item: (row_of(item) == GPU_DEFAULTS, "test_instance_death" in item.path.name, item.path))


def runs_at_length(config: pytest.Config) -> bool:
    """Whether this is a run of the matrix (`make matrix`), not one of all tests."""
    return "matrix" in config.option.markexpr


@pytest.fixture(scope="session")
def at_length(request: pytest.FixtureRequest) -> bool:
    """Tell tests that want less where all tests run."""
    return runs_at_length(request.config)


def row_of(item: pytest.Item) -> str | None:
    """Return the row that a test runs on; None where it does not use the shared cluster."""
    call = getattr(item, "callspec", None)
    return call.params.get("cluster") if call is not None and FOLDER in item.path.parents else None


def one_core() -> str:
    """Return a core for an instance that is started alone: with one thread, its engine core is forked too."""
    return str(min(os.sched_getaffinity(0)))


def recordings(cluster: local.Cluster) -> Path:
    """Return the folder in which the instances of the row `GPU_DEFAULTS` record hidden states."""
    return cluster.log_folder / RECORDINGS


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the tiny model."""
    return build(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def environment_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environments]:
    """Start the fork server of a row when its variables are first asked for."""
    folder = tmp_path_factory.mktemp("fork-servers")
    with contextlib.ExitStack() as stack:

        @functools.cache
        def variables(row: str) -> dict[str, str]:
            path = os.environ.get("PYTHONPATH", "")
            own = {"PYTHONPATH": f"{FOLDER / 'gpu_defaults'}{os.pathsep}{path}"} if row == GPU_DEFAULTS else {}
            return own | stack.enter_context(fork_server.running(folder / f"{row}.log", os.environ | own))

        yield variables


@pytest.fixture(scope="session")
def cluster(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    environment_of: Environments,
) -> Iterator[local.Cluster]:
    """Run a cluster that moves nothing by itself, so that each test decides."""
    logs = tmp_path_factory.mktemp("logs")
    recorder = ("--record-hidden-states", str(logs / RECORDINGS), "--record-fraction", "1")
    settings = local.ClusterSettings(
        model=str(tiny_model),
        decode=2,
        port=free_port("127.0.0.1"),
        preset="off",
        log_folder=logs,
        worker_flags=("--drain-deadline", "30", *(recorder if request.param == GPU_DEFAULTS else ())),
        # A gateway that parses takes seconds to start.
        vllm_flags=tuple(local_flags([*TINY_FLAGS, *(GATEWAY_FLAGS if request.param == STOCK else ())])),
        worker_module=FORKED,
    )
    with mock.patch.dict(os.environ, environment_of(request.param)), local.running(settings) as running:
        yield running


async def revive(cluster: local.Cluster, client: Client) -> None:
    """Start again what an earlier test, or a first run of the same one, has killed."""
    ended = [process for process in cluster.processes if process.popen.poll() is not None]
    for process in ended:
        cluster.restart(process)

    async def all_healthy() -> bool:
        return all(instance["healthy"] for instance in (await client.status())["instances"])

    if ended:
        await eventually_found(all_healthy)


@pytest.fixture
async def client(cluster: local.Cluster, request: pytest.FixtureRequest) -> AsyncIterator[Client]:
    """Talk to the cluster; afterwards everything must be back to zero."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as http:
        slow = row_of(request.node) == GPU_DEFAULTS
        client = Client(http, cluster.url, cluster.settings.model, slow=slow)
        await revive(cluster, client)
        yield client
        await client.quiet()
        await asyncio.sleep(0)
