"""The whole pool in vLLM's metrics, for gateways of others that take this one as one vLLM server.

Names, labels and meanings are those of vLLM 0.32 (v1/metrics/loggers.py), as llm-d's endpoint picker and KServe read
them; those with `gpu_` in their names, and the swapped requests, are vLLM's older ones, which vLLM production-stack and
others still read (production-stack, src/vllm_router/stats/engine_stats.py).
"""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ares.gateway.pool.instance import Instance

_LABELS = ["model_name", "engine"]
# vLLM numbers the engines of one server; the pool is one.
_ENGINE = "0"


class PrefixCache:
    """How many prompt tokens the prefill instances were asked for, and how many of those they had cached."""

    def __init__(self) -> None:
        self.queries = 0
        self.hits = 0

    def add(self, prompt_tokens: int, cached_tokens: int | None) -> None:
        """Count a prompt; None where no prefill instance has said how much it had cached."""
        if cached_tokens is not None:
            self.queries += prompt_tokens
            self.hits += min(cached_tokens, prompt_tokens)


class PoolCollector(Collector):
    """Adds the metrics to a registry of prometheus_client.

    Parameters
    ----------
    model
        The name that clients call the model by.
    instances
        Returns the instances of the pool.
    waiting
        Returns how many requests wait in the gateway itself, in all its processes.
    prefix_cache
        Counts what was cached.
    """

    def __init__(
        self,
        model: str,
        instances: Callable[[], Iterable[Instance]],
        waiting: Callable[[], int],
        prefix_cache: PrefixCache,
    ) -> None:
        self._labels = [model, _ENGINE]
        self._instances = instances
        self._waiting = waiting
        self._cache = prefix_cache

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics (the interface of prometheus_client)."""
        loads = [
            (i, i.state.hello, i.state.telemetry) for i in self._instances() if i.state.hello and i.state.telemetry
        ]
        decode = [(hello, load) for i, hello, load in loads if i.role != "prefill"]
        total = sum(hello.kv_blocks * hello.block_size for hello, _ in decode)
        used = sum(load.kv_blocks_used * hello.block_size for hello, load in decode)
        usage = used / total if total else 0.0
        yield self._gauge(
            "vllm:num_requests_running",
            "Number of requests in model execution batches.",
            sum(load.running for *_, load in loads),
        )
        yield self._gauge(
            "vllm:num_requests_waiting",
            "Number of requests waiting to be processed.",
            sum(load.waiting for *_, load in loads) + self._waiting(),
        )
        # Of the decode instances: on prefill instances KV only waits to be pulled.
        yield self._gauge("vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", usage)
        yield self._gauge("vllm:gpu_cache_usage_perc", "The same, by its older name.", usage)
        yield self._gauge("vllm:num_requests_swapped", "Always 0: vLLM swaps no requests any more.", 0)
        hits, queries = self._cache.hits, self._cache.queries
        for prefix in ("vllm:", "vllm:gpu_"):
            yield self._counter(f"{prefix}prefix_cache_queries", "Prefix cache queries, in tokens.", queries)
            yield self._counter(f"{prefix}prefix_cache_hits", "Prefix cache hits, in tokens.", hits)
        yield self._gauge(
            "vllm:gpu_prefix_cache_hit_rate", "Prefix cache hits by queries.", hits / queries if queries else 0.0
        )
        if decode:
            block_size = min(hello.block_size for hello, _ in decode)
            info = GaugeMetricFamily(
                "vllm:cache_config_info",
                "Blocks of the decode instances.",
                labels=["engine", "block_size", "num_gpu_blocks"],
            )
            info.add_metric([_ENGINE, str(block_size), str(total // block_size)], 1)
            yield info

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        found = GaugeMetricFamily(name, text, labels=_LABELS)
        found.add_metric(self._labels, value)
        return found

    def _counter(self, name: str, text: str, value: float) -> CounterMetricFamily:
        found = CounterMetricFamily(name, text, labels=_LABELS)
        found.add_metric(self._labels, value)
        return found
