"""One exposition of all processes of an address: counters and histograms as sums, gauges of instances once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

ACTIVE = "ares_active_requests"
# Gauges that count what each process has of its own; the others are of instances and of learners.
_SUMMED_GAUGES = frozenset({ACTIVE, "ares_waiting_requests", "ares_suspended_requests"})
_HIT_RATE = "vllm:gpu_prefix_cache_hit_rate"
_HITS_AND_QUERIES = ("vllm:gpu_prefix_cache_hits", "vllm:gpu_prefix_cache_queries")
_SUMMED = frozenset({"counter", "histogram"})
_Key = tuple[str, tuple[tuple[str, str], ...]]


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def merged(texts: Sequence[str], *, gauges: bool = True) -> str:
    """Merge expositions; of a gauge that is not summed, the first one counts.

    Parameters
    ----------
    texts
        The expositions.
    gauges
        Whether gauges are kept.
    """
    return _text(family for family in _families(texts).values() if gauges or family.type != "gauge")


def of_address(texts: Mapping[int, str], kept: Sequence[str], asked: int, restarts: Sequence[int]) -> str:
    """Return the exposition of an address.

    Parameters
    ----------
    texts
        Expositions of the processes that answered, by their numbers.
    kept
        Counters and histograms of those that did not.
    asked
        The process whose gauges of instances are shown.
    restarts
        How often each process was started again.
    """
    ordered = [texts[asked], *(text for process, text in texts.items() if process != asked)]
    families = _families([*ordered, *kept])
    _set_hit_rate(families)
    active = GaugeMetricFamily(
        "ares_gateway_process_active_requests", "Sequences that wait or run, by process", labels=["process"]
    )
    for process, text in sorted(texts.items()):
        active.add_metric([str(process)], _value(text, ACTIVE))
    started = CounterMetricFamily(
        "ares_gateway_process_restarts", "How often a process was started again", labels=["process"]
    )
    for process, count in enumerate(restarts):
        started.add_metric([str(process)], count)
    return _text([*families.values(), active, started])


def _families(texts: Sequence[str]) -> dict[str, Metric]:
    families: dict[str, Metric] = {}
    values: dict[str, dict[_Key, float]] = {}
    for family in (family for text in texts for family in text_string_to_metric_families(text)):
        families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        known = values.setdefault(family.name, {})
        summed = family.type in _SUMMED or family.name in _SUMMED_GAUGES
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            if summed:
                known[key] = known.get(key, 0.0) + sample.value
            elif family.name.endswith("_created"):  # when a counter began
                known[key] = min(known.get(key, sample.value), sample.value)
            else:
                known.setdefault(key, sample.value)
    for name, family in families.items():
        family.samples = [Sample(key[0], dict(key[1]), value) for key, value in values[name].items()]
    return families


def _set_hit_rate(families: Mapping[str, Metric]) -> None:
    """Set the share of cached prompt tokens by the sums of what all processes have counted."""
    if (rates := families.get(_HIT_RATE)) is None:
        return
    hits, queries = ({tuple(s.labels.items()): s.value for s in families[name].samples} for name in _HITS_AND_QUERIES)
    for number, sample in enumerate(rates.samples):
        asked = queries.get(of := tuple(sample.labels.items()), 0.0)
        rates.samples[number] = sample._replace(value=hits.get(of, 0.0) / asked if asked else 0.0)


def _value(text: str, name: str) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        if family.name == name
        for sample in family.samples
    )


def _text(families: Iterable[Metric]) -> str:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(families))
    return generate_latest(registry).decode()
