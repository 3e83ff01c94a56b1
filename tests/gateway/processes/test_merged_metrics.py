"""Expositions of several processes as one."""

from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ares.gateway.processes import kept_metrics
from ares.gateway.processes.merged_metrics import merged, of_address


def exposition(requests: float, active: float, up: float, seconds: list[float]) -> str:
    registry = CollectorRegistry()
    Counter("ares_requests_total", "Requests", ["route"], registry=registry).labels('a "quoted"\nroute').inc(requests)
    Gauge("ares_active_requests", "Active", registry=registry).set(active)
    Gauge("ares_instance_up", "Up", ["instance"], registry=registry).labels("decode-0").set(up)
    histogram = Histogram("ares_stall_seconds", "Stall", registry=registry, buckets=(1, 2))
    for value in seconds:
        histogram.observe(value)
    return generate_latest(registry).decode()


def samples(text: str) -> dict[str, float]:
    lines = (line for line in text.splitlines() if not line.startswith("#") and "_created" not in line)
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_counts_are_summed_and_instances_shown_once() -> None:
    texts = {0: exposition(3, 1, 1, [0.5]), 1: exposition(4, 2, 0, [1.5, 9])}
    text = of_address(texts, [], asked=1, restarts=[0, 2])
    assert samples(text) == {
        'ares_requests_total{route="a \\"quoted\\"\\nroute"}': 7,
        "ares_active_requests": 3,
        'ares_instance_up{instance="decode-0"}': 0,
        'ares_stall_seconds_bucket{le="1.0"}': 1,
        'ares_stall_seconds_bucket{le="2.0"}': 2,
        'ares_stall_seconds_bucket{le="+Inf"}': 3,
        "ares_stall_seconds_count": 3,
        "ares_stall_seconds_sum": 11,
        'ares_gateway_process_active_requests{process="0"}': 1,
        'ares_gateway_process_active_requests{process="1"}': 2,
        'ares_gateway_process_restarts_total{process="0"}': 0,
        'ares_gateway_process_restarts_total{process="1"}': 2,
    }
    for line in ("# TYPE ares_requests_total counter", "# TYPE ares_stall_seconds histogram"):
        assert text.count(line) == 1


def test_the_share_of_cached_tokens_is_that_of_all() -> None:
    def of_process(hits: int, queries: int) -> str:
        registry = CollectorRegistry()
        for name, value in (("hits", hits), ("queries", queries)):
            Counter(f"vllm:gpu_prefix_cache_{name}", name, ["model_name"], registry=registry).labels("a").inc(value)
        rate = Gauge("vllm:gpu_prefix_cache_hit_rate", "Rate", ["model_name"], registry=registry)
        rate.labels("a").set(hits / queries if queries else 0.0)
        return generate_latest(registry).decode()

    name = 'vllm:gpu_prefix_cache_hit_rate{model_name="a"}'
    texts = {0: of_process(0, 0), 1: of_process(30, 40)}
    assert samples(of_address(texts, [of_process(0, 20)], asked=0, restarts=[0, 0]))[name] == 0.5
    assert samples(of_address({0: of_process(0, 0)}, [], asked=0, restarts=[0]))[name] == 0


def test_one_exposition_stays_as_it_is() -> None:
    text = exposition(3, 1, 1, [0.5])
    assert merged([text]) == text


def test_what_a_process_has_shown_is_never_taken_back(tmp_path: Path) -> None:
    assert kept_metrics.read(tmp_path, 0) == ""
    kept_metrics.begin(tmp_path, 0)
    kept_metrics.with_ended(tmp_path, 0, exposition(3, 1, 1, [0.5]), "")
    for restarts in range(1, 3):
        # It has ended: its counters are there, its gauges are not, and the next one goes on from them.
        kept = samples(kept_metrics.read(tmp_path, 0))
        assert kept['ares_requests_total{route="a \\"quoted\\"\\nroute"}'] == 3 + restarts - 1
        assert "ares_active_requests" not in kept
        ended = kept_metrics.begin(tmp_path, 0)
        assert samples(kept_metrics.read(tmp_path, 0)) == kept
        shown = samples(kept_metrics.with_ended(tmp_path, 0, exposition(1, 7, 1, []), ended))
        assert shown['ares_requests_total{route="a \\"quoted\\"\\nroute"}'] == 3 + restarts
        assert shown["ares_active_requests"] == 7
        assert shown["ares_stall_seconds_count"] == 1
