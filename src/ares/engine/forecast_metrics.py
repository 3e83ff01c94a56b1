"""The forecast of an instance in its own `/metrics`, for routers and autoscalers of others (docs/other-gateways.md)."""

from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ares.predicted_load import layout_of, predicted_peak, predicted_remaining
from ares.protocol import messages

Reports = tuple[messages.Hello | None, messages.Telemetry | None]


def values(hello: messages.Hello, load: messages.Telemetry) -> Iterator[tuple[str, str, float]]:
    """Yield names, descriptions and values of the gauges.

    Where nothing is predicted, the peak is what the requests hold now, and nothing is said of what remains.
    """
    layout = layout_of(hello)
    capacity = layout.capacity_tokens(hello.kv_blocks)
    peak = predicted_peak(load, layout)
    if peak is None:
        peak = float(sum(layout.kv_tokens(row.resident) for row in load.rows))
    yield "ares:kv_capacity_tokens", "Tokens that fit the instance's KV memory", capacity
    yield (
        "ares:predicted_peak_tokens",
        "Most tokens that the requests will have in KV at once, by the medians of their predictions, if none joins",
        peak,
    )
    yield (
        "ares:predicted_peak_kv_usage_ratio",
        "The predicted peak as a share of the capacity; above 1 the instance will run out of memory",
        peak / capacity if capacity else 0.0,
    )
    remaining = predicted_remaining(load) if load.rows else 0.0
    if remaining is not None:
        yield (
            "ares:predicted_remaining_tokens",
            "Tokens that the requests of the instance will still generate, by the medians of their predictions",
            remaining,
        )
    yield "ares:draining", "1 while the instance drains: it takes no new requests", float(load.draining)


class ForecastCollector(Collector):
    """Adds the gauges to a registry of prometheus_client.

    Parameters
    ----------
    newest
        Returns the instance's newest reports; before the first ones there are no gauges.
    """

    def __init__(self, newest: Callable[[], Reports]) -> None:
        self._newest = newest

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauges (the interface of prometheus_client)."""
        hello, load = self._newest()
        if hello is not None and load is not None:
            for name, text, value in values(hello, load):
                yield GaugeMetricFamily(name, text, value)

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Name nothing ahead of time: there may be no gauge yet."""
        return iter(())
