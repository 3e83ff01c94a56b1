"""The alert rules that ship: they ask for what is exported, name what to read, and count nothing twice."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ares.engine import forecast_metrics
from ares.protocol.learner_report import EVENTS
from ares.protocol.messages import Telemetry
from tests.engine.control_channel import HELLO
from tests.gateway.records.prometheus import TARGET, known
from tests.test_docs import anchors

ROOT = Path(__file__).parents[3]
FILE = ROOT / "grafana" / "alerts.yaml"
UNIT_TESTS = Path(__file__).with_name("alerts.yaml")
RULES: list[dict[str, Any]] = [rule for group in yaml.safe_load(FILE.read_text())["groups"] for rule in group["rules"]]
POOL = {"namespace", "job"}
with_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def asked(expression: str) -> list[tuple[str, str]]:
    """Return the names of metrics in an expression, each with its selector."""
    return re.findall(r"\b(ares[_:]\w+)(?:\{([^}]*)\})?", expression)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_asks_for_what_is_exported_and_keeps_pools_and_models_apart(rule: dict[str, Any]) -> None:
    of_instances = forecast_metrics.values(HELLO, Telemetry(1, 0, 0, 0, 0, 0.0, 0, 0, []))
    samples = known() | {name: TARGET for name, _, _ in of_instances}
    names = asked(rule["expr"])
    assert names
    for name, selector in names:
        assert name in samples
        assert set(re.findall(r"(\w+)\s*[=!]", selector)) <= samples[name]
    of_models = all("model_name" in samples[name] for name, _ in names)
    groups = [set(re.split(r",\s*", labels)) for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", rule["expr"])]
    present = "present_over_time(ares_active_requests[1d])" in rule["expr"]  # of a gateway, of no model
    for labels in groups:
        assert labels >= POOL | ({"model_name"} if of_models and not present else set())
        assert labels <= set().union(POOL, TARGET, *samples.values())
    # Every gateway reports every instance: none is summed or counted before it is one series.
    if any(name.startswith("ares_instance_") for name, _ in names):
        assert not re.search(r"\b(?:sum|count)\b", rule["expr"])
        assert "exported_instance" in rule["expr"] or rule["expr"].count("group by") == 2


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("critical", "warning")
    texts = rule["annotations"]
    assert texts.keys() == {"summary", "description", "runbook"}
    assert not texts["summary"].endswith(".")
    assert texts["description"].endswith(".")
    assert "$labels.job" in texts["summary"]
    page, anchor = texts["runbook"].split("#")
    assert anchor in anchors((ROOT / page).read_text())
    named = set(re.findall(r"\bares_\w+", " ".join(texts.values())))
    assert all(f"`{name}`" in (ROOT / "docs" / "metrics.md").read_text() for name in named)


def test_the_names_are_unique_and_events_exist() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    for rule in RULES:
        for events in re.findall(r'event=~"([^"]*)"', rule["expr"]):
            assert set(events.split("|")) <= EVENTS


@with_promtool
def test_promtool_accepts_the_rules() -> None:
    done = subprocess.run(["promtool", "check", "rules", FILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(RULES)} rules found" in done.stdout


@with_promtool
def test_what_the_rules_say_of_made_up_series() -> None:
    done = subprocess.run(["promtool", "test", "rules", UNIT_TESTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
