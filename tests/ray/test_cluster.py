"""Streams through an application of Ray Serve on several raylets, while its actors and raylets die."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from ares.free_ports import free_port
from ares.mock_engine import model as mock_model
from tests.gateway.conftest import byte_tokenizer, model_folder  # noqa: F401 - fixtures
from tests.waiting import eventually, eventually_found

pytest.importorskip("ray", reason="needs Ray: the ray extra (make test-ray)")
from tests.ray import clusters

pytestmark = pytest.mark.timeout(300)
PROMPT = list(range(10, 60))
TOKENS = 300
WAIT_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three raylets of two CPUs each: one may die."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARES_CONTROL_KEY", "0123456789abcdef" * 2)  # actors inherit it from their raylets
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with clusters.raylets(3, 2) as made:
            yield made


@pytest.fixture
def settings(cluster: Any, model_folder: Path) -> dict[str, Any]:  # noqa: F811
    return {
        "model": str(model_folder),
        "prefill": 1,
        "decode": 2,
        "per_node": 1,
        "simulate": "llama-8b-rtx4090",
        "gateway": {"preset": "off"},
        "drain_s": 5,
    }


class Streams:
    """Some streams at once, each of another prompt, whose tokens are checked at the end."""

    def __init__(self, url: str, folder: Path, count: int = 6) -> None:
        self._folder = folder
        self.prompts = [[10 + n, *PROMPT] for n in range(count)]
        self.outputs: list[list[int]] = [[] for _ in self.prompts]
        self._tasks = [
            asyncio.create_task(self._read(url, prompt, output))
            for prompt, output in zip(self.prompts, self.outputs, strict=True)
        ]

    async def _read(self, url: str, prompt: list[int], output: list[int]) -> None:
        async with aclosing(clusters.tokens(url, str(self._folder), prompt, TOKENS)) as arriving:
            async for token in arriving:
                output.append(token)  # noqa: PERF401 - seen while they arrive

    async def begin(self) -> None:
        """Wait until all of them are in decode."""
        await eventually(lambda: all(len(output) > 5 for output in self.outputs), WAIT_S)

    async def finish(self) -> None:
        """Wait for their ends: no token is missing, wrong or there twice."""
        await asyncio.gather(*self._tasks)
        model = mock_model.load(self._folder)
        assert self.outputs == [model.continuation(prompt, TOKENS) for prompt in self.prompts]


async def arrived(instances: list[clusters.InstanceProcess]) -> list[int]:
    return [(await clusters.get(f"{one.url}/simulate/counters"))["arrived"] for one in instances]


async def test_streams_outlive_an_actor_that_is_killed_and_its_successor_is_used(
    settings: dict[str, Any],
    model_folder: Path,  # noqa: F811
) -> None:
    async with clusters.application(**settings) as url:
        streams = Streams(url, model_folder)
        await streams.begin()
        before = clusters.decoding()
        assert len({one.raylet.pid for one in before}) == 2  # per_node
        clusters.kill(before[0].actor)
        await streams.finish()

        async def successor() -> list[clusters.InstanceProcess]:
            names = (await clusters.get(f"{url}/version"))["instances"]
            known = {one.name for one in before}
            return [one for one in clusters.decoding() if one.name in names and one.name not in known]

        new = await eventually_found(successor, WAIT_S)
        again = Streams(url, model_folder)
        await again.finish()
        assert await arrived(new) > [0]


async def test_a_gateway_outside_of_the_application_finds_its_instances(
    cluster: Any,
    settings: dict[str, Any],
    model_folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    port = free_port("127.0.0.1")
    command = ["-m", "ares", "gateway", "--model", str(model_folder), "--preset", "off", "--port", str(port)]
    command += ["--service-discovery", "ray:ares", "--shutdown-timeout-s", "0"]
    async with clusters.application(**settings):
        gateway = await asyncio.create_subprocess_exec(sys.executable, *command)
        try:
            await eventually_found(lambda: clusters.is_ready(f"http://127.0.0.1:{port}"), WAIT_S)
            await Streams(f"http://127.0.0.1:{port}", model_folder).finish()
        finally:
            gateway.terminate()
            await gateway.wait()


async def test_a_client_that_leaves_ends_its_request_under_a_prefix_of_the_route(
    settings: dict[str, Any],
    model_folder: Path,  # noqa: F811
) -> None:
    async with clusters.application(**settings, route_prefix="/llm") as url:
        # As long as a test may take: nothing but the client's end can end it.
        async with aclosing(clusters.tokens(url, str(model_folder), PROMPT, 20_000)) as arriving:
            async for _ in arriving:
                break

        async def aborted() -> bool:
            counted = [await clusters.get(f"{one.url}/simulate/counters") for one in clusters.decoding()]
            return sum(each["aborted"] for each in counted) == 1 and not any(each["generating"] for each in counted)

        await eventually_found(aborted, WAIT_S)


async def test_streams_outlive_the_removal_of_an_instance_by_a_new_configuration(
    settings: dict[str, Any],
    model_folder: Path,  # noqa: F811
) -> None:
    async with clusters.application(**settings) as url:
        streams = Streams(url, model_folder)
        await streams.begin()
        before = {one.name: one.process.pid for one in clusters.processes()}
        await asyncio.to_thread(clusters.deploy, **settings, replicas={"Decode": 1})
        await streams.finish()
        await eventually(lambda: len(clusters.decoding()) == 1, WAIT_S)
        after = {one.name: one.process.pid for one in clusters.processes()}
        assert after.items() < before.items()  # the others have not been started again


async def test_streams_outlive_a_raylet_and_its_instances_start_on_another_one(
    cluster: Any,
    settings: dict[str, Any],
    model_folder: Path,  # noqa: F811
) -> None:
    del settings["per_node"]  # two raylets are left
    async with clusters.application(**settings, cpus=0.5) as url:
        streams = Streams(url, model_folder)
        await streams.begin()
        before = clusters.decoding()
        lost = next(node for node in cluster.worker_nodes if clusters.raylet_of(node) in {i.raylet.pid for i in before})
        cluster.remove_node(lost, allow_graceful=False)
        await streams.finish()
        await eventually(lambda: len(clusters.decoding()) == 2, WAIT_S)
        await Streams(url, model_folder).finish()
    cluster.add_node(**clusters.node(2))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"decode": 9}, "decode instances: 9 with 1 CPUs and 0 GPUs each, at most 1 on a node do not fit, only 3 do"),
        ({"decoding": 9}, "decoding"),
        ({"prefill": 0, "decode": 1, "flags": "--no-such-flag"}, "--no-such-flag"),
    ],
)
async def test_what_cannot_be_deployed_says_why(settings: dict[str, Any], wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(clusters.DeploymentError) as caught:
        async with clusters.application(**settings | wrong):
            pytest.fail("it runs")
    assert said in str(caught.value)
