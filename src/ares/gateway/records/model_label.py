"""The metrics of several models as one exposition: each sample has the model's name, except where it is of none."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

LABEL = "model_name"
"""As in vLLM's metrics."""
# Of the whole gateway: a request may be refused before its model is known, and a learner says itself what it learns.
_OF_NO_MODEL = ("ares_http_refused", "ares_predictor_")


class _Labelled(Collector):
    def __init__(self, registries: Mapping[str, CollectorRegistry]) -> None:
        self._registries = registries

    def collect(self) -> Iterator[Metric]:
        """Yield the families of all models, each once (the interface of prometheus_client)."""
        families: dict[str, Metric] = {}
        for model, registry in self._registries.items():
            for family in registry.collect():
                known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                known.samples += family.samples if _of_no_model(family) else _labelled(family, model)
        for family in families.values():
            if _of_no_model(family):
                family.samples = list(_summed(family))
            yield family


def exposition(registries: Mapping[str, CollectorRegistry]) -> str:
    """Return the metrics of all models, by the names of which they are given; of a single one as they are."""
    if len(registries) == 1:
        (registry,) = registries.values()
        return generate_latest(registry).decode()
    whole = CollectorRegistry(auto_describe=False)
    whole.register(_Labelled(registries))
    return generate_latest(whole).decode()


def _of_no_model(family: Metric) -> bool:
    return family.name.startswith(_OF_NO_MODEL)


def _labelled(family: Metric, model: str) -> Iterator[Sample]:
    return (sample._replace(labels={**sample.labels, LABEL: model}) for sample in family.samples)


def _summed(family: Metric) -> Iterator[Sample]:
    """Return the samples, each once; when a counter began, by the first model that counted."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], Sample] = {}
    for sample in family.samples:
        key = sample.name, tuple(sorted(sample.labels.items()))
        before = found.get(key)
        if before is None:
            found[key] = sample
        elif not sample.name.endswith("_created"):
            found[key] = before._replace(value=before.value + sample.value)
    return iter(found.values())
