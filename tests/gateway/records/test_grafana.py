"""The Grafana dashboard that ships asks for metrics that exist, by labels that they have."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric

from ares.gateway.records.metrics import Metrics

FILE = Path(__file__).parents[3] / "grafana" / "ares.json"
# Prometheus' own, of the scraped target; ours of the same name becomes `exported_instance`.
TARGET = {"job", "instance"}


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    return dict(json.loads(FILE.read_text()))


def expressions(board: dict[str, Any]) -> Iterator[str]:
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def exported() -> list[Metric]:
    """Every metric of the gateway, with a sample of each of its series."""
    metrics = Metrics()
    for metric in vars(metrics).values():
        for count in range(1, 5):  # a metric takes exactly as many values as it has labels
            with contextlib.suppress(AttributeError, ValueError):
                metric.labels(*["x"] * count)
    found = list(metrics.registry.collect())
    assert all(metric.samples for metric in found)
    return found


def labels_of(metric: Metric) -> list[str]:
    return [name for name in metric.samples[0].labels if name != "le"]


def known() -> dict[str, set[str]]:
    """The labels of every sample that the gateway can export, by its name."""
    samples: dict[str, set[str]] = {}
    for metric in exported():
        for sample in metric.samples:
            if not sample.name.endswith("_created"):
                labels = {"exported_instance" if name == "instance" else name for name in sample.labels}
                samples[sample.name] = labels
    return samples


def test_every_metric_and_label_exists(board: dict[str, Any]) -> None:
    samples = known()
    asked = set()
    for text in expressions(board):
        for name, selector in re.findall(r"\b(ares_\w+)(?:\{([^}]*)\})?", text):
            assert name in samples, text
            assert set(re.findall(r"(\w+)\s*=~?", selector)) <= samples[name] | TARGET, text
            asked.add(name)
        grouped = {label for names in re.findall(r"by \(([^)]*)\)", text) for label in re.split(r",\s*", names)}
        assert grouped <= set().union(*samples.values()), text
    # Whatever is exported is on it.
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in samples}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked} == families


def test_panels_and_variables(board: dict[str, Any]) -> None:
    assert board["title"] == "ARES"
    assert board["schemaVersion"] >= 36
    assert [v["name"] for v in board["templating"]["list"] if v["type"] == "datasource"] == ["datasource"]
    panels = [p for p in board["panels"] if p["type"] != "row"]
    assert len({p["id"] for p in board["panels"]}) == len(board["panels"])
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["targets"]
        assert len({t["refId"] for t in panel["targets"]}) == len(panel["targets"])
        assert panel["fieldConfig"]["defaults"]["unit"]
        place = panel["gridPos"]
        covered = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in covered) < 24
        assert not covered & cells, f"{panel['title']} lies over another"
        cells |= covered
    names = {f"${v['name']}" for v in board["templating"]["list"]} | {"$__rate_interval"}
    assert {name for text in expressions(board) for name in re.findall(r"\$\w+", text)} <= names


def test_the_documentation_lists_every_metric() -> None:
    table = (FILE.parents[1] / "docs" / "metrics.md").read_text()
    for metric in exported():
        name = metric.name + ("_total" if metric.type == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in labels_of(metric)) or "-"
        assert f"| `{name}` ({metric.type}) | {labels} | {metric.documentation} |" in table
