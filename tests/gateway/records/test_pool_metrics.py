"""The pool as gateways of others see it: read as production-stack's router and llm-d's endpoint picker read it."""

import asyncio
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from ares.gateway.processes.shared_counts import SharedCounts
from ares.gateway.service import Gateway
from tests.gateway.fakes import FakeInstance
from tests.gateway.gateways import Client, configuration, started
from tests.gateway.http.service import Service, serving
from tests.waiting import eventually

LABELS = {"model_name": "some/model", "engine": "0"}


async def scraped(service: Service) -> dict[str, float]:
    """Samples of vLLM's by name, which must have vLLM's labels."""
    text = (await service.client.get("/metrics")).text
    samples = [
        s for family in text_string_to_metric_families(text) for s in family.samples if s.name.startswith("vllm:")
    ]
    assert all(s.labels == LABELS for s in samples if s.name != "vllm:cache_config_info")
    assert len({s.name for s in samples}) == len(samples)
    return {s.name.removeprefix("vllm:"): s.value for s in samples}


async def test_the_load_of_the_pool(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving(fakes, model_folder) as service:
        pool = service.gateway.pool
        await eventually(lambda: all(i.open and i.state.hello for i in pool.instances))
        idle = await scraped(service)
        assert idle["num_requests_running"] == idle["num_requests_waiting"] == idle["kv_cache_usage_perc"] == 0
        for fake in fakes:
            fake.hold_at = 20
        streams = [asyncio.create_task(service.complete(max_tokens=60)) for _ in range(3)]
        await eventually(
            lambda: sum(i.state.telemetry.running for i in pool.decode_instances if i.state.telemetry) == 3
        )
        busy = await scraped(service)
        assert busy["num_requests_running"] == 3
        used = sum(i.state.telemetry.kv_blocks_used for i in pool.decode_instances if i.state.telemetry)
        blocks = sum(i.state.hello.kv_blocks for i in pool.decode_instances if i.state.hello)
        assert busy["kv_cache_usage_perc"] == busy["gpu_cache_usage_perc"] == used / blocks > 0
        for fake in fakes:
            fake.hold_at = None
        await asyncio.gather(*streams)
        ended = await scraped(service)
        assert {"num_requests_swapped", "gpu_prefix_cache_hit_rate", "cache_config_info"} <= ended.keys()
        assert ended["prefix_cache_queries_total"] == ended["gpu_prefix_cache_queries_total"]
        await service.quiet()


async def test_what_waits_for_an_instance_is_waiting(model_folder: Path) -> None:
    async with serving([], model_folder, service_discovery=["api"]) as service:
        assert (await scraped(service))["num_requests_waiting"] == 0
        service.gateway.prefix_cache.add(10, 4)
        service.gateway.prefix_cache.add(10, None)
        found = await scraped(service)
        assert (found["prefix_cache_hits_total"], found["gpu_prefix_cache_queries_total"]) == (4, 10)
        assert found["gpu_prefix_cache_hit_rate"] == 0.4


async def test_what_waits_in_any_process_is_waiting(fakes: list[FakeInstance], model_folder: Path) -> None:
    counts = SharedCounts(2)
    gateway = await started(Gateway(configuration(fakes, preset="ares"), model_folder, counts=counts))
    names = {"model_name": "some/model", "engine": "0"}

    def of_process(number: int) -> int:
        """Whatever another process than this one would see."""
        counts.process = 1 - number
        seen = counts.waiting_elsewhere
        counts.process = 0
        return seen

    counts.process = 1
    counts.set_waiting(5)
    counts.process = 0
    assert gateway.metrics.registry.get_sample_value("vllm:num_requests_waiting", names) == 5
    # Prefilled, they wait for an instance that takes them.
    for instance in gateway.pool.decode_instances:
        await gateway.drainer.drain(instance, 60.0)
    clients = [Client(gateway, name=f"r{n}") for n in range(3)]
    await eventually(lambda: gateway.controller.waiting == 3 == of_process(0), 30)
    assert gateway.metrics.registry.get_sample_value("vllm:num_requests_waiting", names) == 8
    for instance in gateway.pool.decode_instances:
        await gateway.drainer.undrain(instance)
    await asyncio.wait_for(asyncio.gather(*(client.task for client in clients)), 60)
    assert of_process(0) == 0
    await gateway.stop()
