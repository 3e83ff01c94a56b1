"""The alert rules in a Prometheus that scrapes two gateways and three instances, all processes of their own."""

import asyncio
import contextlib
import io
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from rich.console import Console

from ares.free_ports import free_port
from ares.local_cluster import cluster as local
from tests.gateway.conftest import byte_tokenizer, model_folder  # noqa: F401 - fixtures
from tests.gateway.learner_reports import event, report
from tests.gateway.records.prometheus import Prometheus, job, prometheus
from tests.gateway.records.test_alerts import FILE, RULES, asked
from tests.integration.client import Client
from tests.waiting import eventually_found

pytestmark = [
    pytest.mark.timeout(480),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]
EXPRESSIONS = {rule["alert"]: rule["expr"] for rule in RULES}
PROMPT = list(range(10, 60))
# Its decisions fail, which the metrics count and an alert reports.
POLICY = """
from ares.policy import Rebalance, register


@register("broken")
class Broken(Rebalance):
    def decide(self, cluster):
        raise RuntimeError("broken on purpose")
"""


class Running:
    """Two gateways of one pool, and the Prometheus."""

    def __init__(self, clients: list[Client], cluster: local.Cluster, asked: Prometheus) -> None:
        self.clients = clients
        self.cluster = cluster
        self._prometheus = asked

    async def ask(self, path: str, **parameters: str) -> Any:
        return await asyncio.to_thread(self._prometheus.ask, path, **parameters)

    async def rows(self, expression: str) -> list[dict[str, str]]:
        """Return the labels of what an expression gives now, without the metric's name."""
        result = (await self.ask("query", query=expression))["result"]
        return [{k: v for k, v in one["metric"].items() if k != "__name__"} for one in result]

    async def kill(self, name: str) -> None:
        (process,) = (one for one in self.cluster.processes if name == one.name)
        process.popen.kill()
        await asyncio.to_thread(process.popen.wait)

    async def becomes(self, alert: str, row: dict[str, str]) -> None:
        """Wait until the expression of an alert gives this row alone."""

        found: list[dict[str, str]] = []
        try:
            async with asyncio.timeout(60):
                while (found := await self.rows(EXPRESSIONS[alert])) != [row]:  # noqa: ASYNC110 - no event
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise AssertionError(f"{alert}: {found}") from None


@pytest.fixture
async def running(model_folder: Path, tmp_path: Path) -> AsyncIterator[Running]:  # noqa: F811
    (tmp_path / "broken.py").write_text(POLICY)
    (tmp_path / "broken.yaml").write_text("dispatch: round_robin\nrebalance: {name: broken}\n")
    settings = local.ClusterSettings(
        str(model_folder), log_folder=tmp_path, simulate="llama-8b-rtx4090", vllm_flags=("--speed", "4"), per_process=1
    )
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)))
        cluster = stack.enter_context(local.workers_only(settings, Console(file=io.StringIO())))
        cluster.start_workers()
        instances = [url for process in cluster.processes for url in process.instances.values()]
        command = ["gateway", "--model", str(model_folder), "--period-s", "0.1"]
        command += ["--policy", str(tmp_path / "broken.py"), "--preset", str(tmp_path / "broken.yaml")]
        for instance in instances:
            command += ["--worker", instance]
        urls = []
        for name in ("gateway-a", "gateway-b"):
            cluster.ports.append(free_port("127.0.0.1", cluster.ports))
            urls.append(f"http://127.0.0.1:{cluster.ports[-1]}")
            cluster.start(name, urls[-1], [*command, "--port", str(cluster.ports[-1])])
        clients = [Client(http, url, str(model_folder)) for url in urls]

        async def ready() -> bool:
            with contextlib.suppress(aiohttp.ClientError):
                found = [row["healthy"] for client in clients for row in (await client.status())["instances"]]
                return len(found) == 6 and all(found)
            return False

        await eventually_found(ready, 240)
        of_gateways, of_instances = ([url.removeprefix("http://") for url in some] for some in (urls, instances))
        jobs = [job("pool", "/metrics", *of_gateways), job("instances", "/metrics", *of_instances)]
        yield Running(clients, cluster, stack.enter_context(prometheus(tmp_path, jobs, FILE)))


async def test_every_rule_has_data_and_counts_once_what_two_gateways_report(running: Running) -> None:
    first, second = running.clients
    # A move, a refused request, and a learner's report: what makes series of everything that has labels.
    output, stream = first.stream("moved", PROMPT, 400)
    await output.reach(20)
    assert (await first.move_on("moved") or {})["outcome"] == "moved"
    assert (await stream).error is None
    await second.complete(PROMPT, 20)
    async with first.http.post(f"{first.url}/v1/completions", json=first.body(PROMPT, 5, model="other")) as reply:
        assert reply.status == 404
    for client in running.clients:
        learned = report(model=client.model, events=[])
        async with client.http.put(f"{client.url}/admin/v1/predictor", json=learned) as reply:
            assert reply.status in (200, 204), await reply.text()
        learned["events"] = [event(1, "error")]
        learned["events"][0]["time"] = learned["time"]
        async with client.http.put(f"{client.url}/admin/v1/predictor", json=learned) as reply:
            assert reply.status in (200, 204), await reply.text()

    names = {name for text in EXPRESSIONS.values() for name, _ in asked(text)}

    async def complete() -> bool:
        with contextlib.suppress(OSError):
            return all([await running.rows(name) for name in sorted(names)])
        return False

    await eventually_found(complete)

    async def evaluated() -> list[dict[str, Any]]:
        groups = (await running.ask("rules"))["groups"]
        found = [rule for group in groups for rule in group["rules"]]
        return found if all(rule["health"] != "unknown" for rule in found) else []

    rules = await eventually_found(evaluated)
    assert {rule["name"]: rule["health"] for rule in rules} == dict.fromkeys(EXPRESSIONS, "ok")

    # Nothing is wrong but what was made so.
    pool = {"job": "pool"}
    await running.becomes("AresControllerFaults", pool | {"part": "rebalance"})
    for alert in EXPRESSIONS.keys() - {"AresControllerFaults"}:
        assert await running.rows(EXPRESSIONS[alert]) == [], alert

    # Both gateways say so, and it is one alert.
    await running.kill("decode-1")
    await running.becomes("AresInstanceDown", pool | {"exported_instance": "decode-1", "role": "decode"})
    assert await running.rows(EXPRESSIONS["AresNoDecodeInstance"]) == []
    await running.kill("decode-0")
    await running.becomes("AresNoDecodeInstance", pool)
    await running.kill("gateway-b")
    await running.becomes("AresGatewayDown", pool | {"instance": second.url.removeprefix("http://")})
    assert await running.rows(EXPRESSIONS["AresNoGateway"]) == []
    await running.kill("gateway-a")
    await running.becomes("AresNoGateway", pool)

    async def alerts() -> list[dict[str, Any]]:
        found = (await running.ask("alerts"))["alerts"]
        return found if any(one["labels"]["alertname"] == "AresNoGateway" for one in found) else []

    texts = yaml.safe_dump([one["annotations"] for one in await eventually_found(alerts)])
    assert "No gateway of the pool pool answers" in texts
    assert "error" not in texts.lower().replace("has the error", "")
