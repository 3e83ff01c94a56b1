"""The Helm chart, rendered by Helm itself."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "ares"
KEYS = {"keys": {"control": "c" * 32}}
# helm-python-sdk is Helm's Go library. A process of its own: Go's runtime changes signals.
SCRIPT = """
import json, sys
import helm_python
path, cases = sys.argv[1], json.load(sys.stdin)
results = []
for values in cases:
    lint = helm_python.lint(path, values, strict=True)
    found = [m["error"] for m in lint["messages"] if m["severity"] > 1] + lint["errors"]
    try:
        with helm_python.Chart.load(path) as chart:
            chart.validate_schema(values)
            rendered, error = chart.render(values, name="ares", namespace="serving"), ""
    except helm_python.HelmError as raised:
        rendered, error = {}, str(raised)
    results.append({"lint": found, "rendered": rendered, "error": error})
json.dump(results, sys.stdout)
"""


def helm(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each of these values what Helm says of them, and the objects that it makes."""
    if importlib.util.find_spec("helm_python") is None:
        pytest.skip("helm-python-sdk is not installed")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, CHART], input=json.dumps(cases), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)
    for result in results:
        texts = [text for name, text in result["rendered"].items() if name.endswith(".yaml")]
        read = [one for text in texts for one in yaml.load_all(text, yaml.CSafeLoader) if one is not None]
        result["objects"] = {(one["kind"], one["metadata"]["name"]): one for one in read}
    return results


def objects(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the objects by kind and name."""
    found: dict[tuple[str, str], dict[str, Any]] = result["objects"]
    return found


def pod(result: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    """Return the pod of a workload."""
    found: dict[str, Any] = objects(result)[kind, name]["spec"]["template"]["spec"]
    return found
