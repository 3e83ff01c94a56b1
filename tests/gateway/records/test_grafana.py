"""The Grafana dashboard that ships asks for metrics that exist, by labels that they have."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ares.gateway.records.model_label import exposition
from tests.gateway.records.prometheus import TARGET, exported, filled, job, known, labels_of, prometheus, targets

FILE = Path(__file__).parents[3] / "grafana" / "ares.json"


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    return dict(json.loads(FILE.read_text()))


def expressions(board: dict[str, Any]) -> Iterator[str]:
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


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


def test_what_is_of_a_model_is_shown_by_model(board: dict[str, Any]) -> None:
    samples = known()
    for text, legend in [(one["expr"], one["legendFormat"]) for p in board["panels"] for one in p.get("targets", [])]:
        asked = re.findall(r"\b(ares_\w+)\{([^}]*)\}", text)
        assert asked, text
        of_models = {name for name, _ in asked if "model_name" in samples[name]}
        assert of_models in (set(), {name for name, _ in asked}), text
        if of_models:
            assert all('model_name=~"$model"' in selector for _, selector in asked), text
            aggregated = re.findall(r"\b(?:sum|max|min|avg|count)\b(?: by \(([^)]*)\))?", text)
            assert all("model_name" in labels for labels in aggregated), text
            assert "{{model_name}}" in legend
    assert "model" in {variable["name"] for variable in board["templating"]["list"]}


def test_what_every_gateway_reports_of_an_instance_is_shown_once(board: dict[str, Any]) -> None:
    for text in (
        one["expr"] for p in board["panels"] for one in p.get("targets", []) if "ares_instance_" in one["expr"]
    ):
        inner = re.findall(r"max by \(([^)]*)\) \((?:increase\()?ares_instance_", text)
        assert len(inner) == text.count("ares_instance_"), text
        assert all("exported_instance" in labels for labels in inner), text


@pytest.mark.timeout(180)
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_prometheus_has_data_for_every_panel_and_mixes_no_models(board: dict[str, Any], tmp_path: Path) -> None:
    pages = {"several": exposition({"one": filled(), "two": filled()}), "alone": exposition({"one": filled()})}
    samples = known()
    with contextlib.ExitStack() as stack:
        address = f"127.0.0.1:{stack.enter_context(targets(pages))}"
        jobs = [job(name, f"/{name}", address) for name in pages]
        running = stack.enter_context(prometheus(tmp_path, jobs))
        panels = [one["expr"] for p in board["panels"] for one in p.get("targets", [])]
        assert len(panels) > 40
        for text in panels:
            of_models = "model_name" in samples[re.findall(r"\bares_\w+", text)[0]]
            for chosen, shown in ((".*", {"one", "two"}), ("one", {"one"}), ("(one|two)", {"one", "two"})):
                found = running.found(text, job="several", model=chosen)
                assert {one.get("model_name") for one in found} == (shown if of_models else {None}), text
                assert not any("instance" in one for one in found), f"by gateway: {text}"
            # A gateway of one model has no such label, and the variable then no values but `All`.
            assert {one.get("model_name") for one in running.found(text, job="alone", model=".*")} == {None}
        for name, match, label in (
            ("model", 'ares_active_requests{job=~"several"}', "model_name"),
            ("instance", 'ares_instance_up{job=~"several", model_name=~"one"}', "exported_instance"),
        ):
            (variable,) = (one for one in board["templating"]["list"] if one["name"] == name)
            asked = variable["query"]["query"].replace("$job", "several").replace("$model", "one")
            assert asked == f"label_values({match}, {label})"
            expected = ["one", "two"] if name == "model" else ["x"]
            assert running.ask(f"label/{label}/values", **{"match[]": match}) == expected


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
