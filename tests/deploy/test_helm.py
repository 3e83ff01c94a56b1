"""The Helm chart, by Helm itself and the schemas of Kubernetes; and what it starts, by the commands that it starts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ares import config
from ares.protocol.fields import CONTROL_KEY_VARIABLE
from tests.deploy.chart import KEYS, helm, objects, pod
from tests.deploy.commands import parsed

EVERYTHING: dict[str, Any] = {
    "keys": {"control": "c" * 32, "admin": "a", "api": "b,c", "worker": "d", "huggingFace": "e"},
    "image": {"registry": "registry.example.com/ares", "tag": "1", "pullSecrets": [{"name": "pull"}]},
    "gateway": {
        "config": {"shutdown_timeout_s": 99.5, "max_body_bytes": 8388608, "classes": {"chat": {"ttft_s": 2}}},
        "volumes": [{"name": "more", "emptyDir": {}}],
        "volumeMounts": [{"name": "more", "mountPath": "/more"}],
        "env": [{"name": "A", "value": "b"}],
        "podLabels": {"a": "b"},
        "podAnnotations": {"c": "d"},
        "tolerations": [{"operator": "Exists"}],
    },
    "instances": {"cache": {"persistent": True, "storageClass": "fast"}, "runtimeClassName": "nvidia", "args": ["--x"]},
    "decode": {"replicas": 3, "drainDeadlineSeconds": 7, "resources": {"limits": {"nvidia.com/gpu": 2}}},
    "learner": {"enabled": True, "config": {"first_outputs": 500}},
    "networkPolicy": {"roce": True, "metricsFrom": [{"namespaceSelector": {}}]},
    "serviceMonitor": {"enabled": True, "labels": {"release": "x"}, "endpoint": {"scheme": "https"}},
    "autoscaling": {"kind": "keda", "maxReplicas": 5},
}
PAGE = Path(__file__).parents[2] / "docs" / "kubernetes.md"


def of_the_page() -> dict[str, Any]:
    """Return the values that docs/kubernetes.md sets on its command lines, together."""
    values: dict[str, Any] = {}
    given = re.findall(r"--set\s+([\w.]+)=(\$\([^)]*\)|[^\s`]+)", PAGE.read_text())
    for name, value in given:
        *folders, last = name.split(".")
        at = values
        for folder in folders:
            at = at.setdefault(folder, {})
        at[last] = None if value == "null" else "c" * 64 if value.startswith("$(openssl rand") else value
    return values


HPA = {"kind": "hpa", "metrics": [{"type": "Pods", "pods": {"metric": {"name": "m"}, "target": {"type": "Value"}}}]}
GOOD = {
    "by default": KEYS,
    "everything": EVERYTHING,
    "without keys of its own": {"keys": {"existingSecret": "mine"}, "networkPolicy": {"enabled": False}},
    "hpa": KEYS | {"autoscaling": HPA},
    "dns": KEYS | {"discovery": "dns", "gateway": {"config": {"service_discovery": ["api"]}}},
    "names": EVERYTHING | {"discovery": "names"},
    "the page": of_the_page(),
    "simulated": KEYS
    | {"instances": {"simulate": "llama-8b-rtx4090", "image": "ares-gateway", "resources": {"limits": None}}},
}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no control key": ({}, "keys.control needs at least 32 characters"),
    "two places for keys": ({"keys": {"control": "c" * 32, "existingSecret": "x"}}, "have no effect"),
    "an unknown value": (KEYS | {"replicas": 2}, "'replicas' not allowed"),
    "an unknown value of a role": (KEYS | {"decode": {"replica": 2}}, "'replica' not allowed"),
    "a port that is none": (KEYS | {"ports": {"http": 70000}}, "/ports/http"),
    "a setting of the chart": (KEYS | {"gateway": {"config": {"port": 1}}}, "gateway.config.port is set by the chart"),
    "nothing to scale by": (KEYS | {"autoscaling": {"kind": "hpa"}}, "needs autoscaling.metrics"),
    "another way to find instances": (KEYS | {"discovery": "consul"}, "/discovery"),
    "no decode instance": (KEYS | {"decode": {"replicas": 0}}, "/decode/replicas"),
}
# Custom resources, whose schemas are no part of Kubernetes.
CUSTOM = ("monitoring.coreos.com/v1", "keda.sh/v1alpha1")


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    cases = GOOD | {name: values for name, (values, _) in BAD.items()}
    return dict(zip(cases, helm([*cases.values()]), strict=True))


@pytest.mark.parametrize("name", GOOD)
def test_lint_and_schemas(results: dict[str, dict[str, Any]], name: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    assert results[name]["error"] == ""
    assert results[name]["lint"] == []
    for one in objects(results[name]).values():
        if one["apiVersion"] not in CUSTOM:
            kubernetes_validate.validate(one, "1.32", strict=True)


@pytest.mark.parametrize("name", BAD)
def test_wrong_values_are_refused(results: dict[str, dict[str, Any]], name: str) -> None:
    assert BAD[name][1] in results[name]["error"]


def test_the_values_of_the_page(results: dict[str, dict[str, Any]]) -> None:
    assert {"image", "model", "keys", "instances"} <= of_the_page().keys()
    (container,) = pod(results["the page"], "StatefulSet", "ares-decode")["containers"]
    assert container["image"] == "REGISTRY/ares-gateway:0.1.0"
    assert container["resources"] == {}
    assert parsed(container["args"])[0]["simulate"] == "llama-8b-rtx4090"


def test_what_is_made(results: dict[str, dict[str, Any]]) -> None:
    default = {
        *[("ConfigMap", "ares-gateway"), ("Deployment", "ares-gateway"), ("PodDisruptionBudget", "ares-gateway")],
        *[
            (kind, f"ares-{role}")
            for kind in ("Service", "StatefulSet", "PodDisruptionBudget")
            for role in ("prefill", "decode")
        ],
        *[
            ("Service", "ares"),
            ("ServiceAccount", "ares"),
            *[(kind, "ares-gateway") for kind in ("ServiceAccount", "Role", "RoleBinding")],
            ("Secret", "ares-keys"),
            ("NetworkPolicy", "ares-instances"),
        ],
    }
    assert set(objects(results["by default"])) == default
    more = {
        *[("ServiceMonitor", "ares-gateway"), ("ServiceMonitor", "ares-instances"), ("ScaledObject", "ares-decode")],
        *[("ConfigMap", "ares-learner"), ("StatefulSet", "ares-learner")],
    }
    assert set(objects(results["everything"])) == default | more
    assert set(objects(results["hpa"])) == default | {("HorizontalPodAutoscaler", "ares-decode")}
    rights = {(kind, "ares-gateway") for kind in ("ServiceAccount", "Role", "RoleBinding")}
    for name in ("dns", "names"):
        assert not rights & set(objects(results[name]))
    gone = {("Secret", "ares-keys"), ("NetworkPolicy", "ares-instances")}
    assert set(objects(results["without keys of its own"])) == default - gone


def test_the_gateway_takes_its_configuration(
    results: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What Kubernetes would inject next to a Service called `ares`, if pods asked for it.
    monkeypatch.setattr("os.environ", {"ARES_PORT": "tcp://10.96.0.12:8000", "ARES_SERVICE_HOST": "10.96.0.12"})
    file = tmp_path / "gateway.yaml"
    file.write_text(objects(results["everything"])["ConfigMap", "ares-gateway"]["data"]["gateway.yaml"])
    loaded = config.load(file)
    assert (loaded.host, loaded.port, loaded.max_body_bytes) == ("0.0.0.0", 8000, 8388608)  # noqa: S104
    roles = ("prefill", "decode")
    assert loaded.service_discovery == [f"kubernetes:serving/ares-{role}:http" for role in roles]
    assert loaded.workers == []
    file.write_text(objects(results["dns"])["ConfigMap", "ares-gateway"]["data"]["gateway.yaml"])
    assert config.load(file).service_discovery == [*(f"dns:ares-{role}.serving.svc:8100" for role in roles), "api"]
    file.write_text(objects(results["names"])["ConfigMap", "ares-gateway"]["data"]["gateway.yaml"])
    loaded = config.load(file)
    decode = [f"http://ares-decode-{n}.ares-decode.serving.svc:8100" for n in range(5)]  # as many as there may be
    assert loaded.workers == ["http://ares-prefill-0.ares-prefill.serving.svc:8100", *decode]
    assert loaded.service_discovery == []
    assert pod(results["everything"], "Deployment", "ares-gateway")["enableServiceLinks"] is False


@pytest.mark.parametrize("name", ["by default", "everything", "simulated"])
def test_the_commands_exist(results: dict[str, dict[str, Any]], name: str) -> None:
    extra = ["--x"] if name == "everything" else []
    for role in ("prefill", "decode"):
        (container,) = pod(results[name], "StatefulSet", f"ares-{role}")["containers"]
        given, left = parsed(container["args"])
        assert left == extra
        assert (given["role"], given["port"], given["control_port"]) == (role, 8100, 8200)
        assert (given["name"], given["advertise_host"]) == ("$(POD_NAME)", "$(POD_IP)")
        assert {"POD_NAME", "POD_IP", CONTROL_KEY_VARIABLE} <= {one["name"] for one in container["env"]}
        assert given["simulate"] == ("llama-8b-rtx4090" if name == "simulated" else None)
    (container,) = pod(results[name], "Deployment", "ares-gateway")["containers"]
    assert parsed(container["args"])[0]["config"] == Path("/etc/ares/gateway.yaml")
    if name == "everything":
        (container,) = pod(results[name], "StatefulSet", "ares-learner")["containers"]
        assert parsed(container["args"])[0]["gateway"] == ["http://ares:8000"]


def test_a_pod_may_drain_before_it_is_killed(results: dict[str, dict[str, Any]]) -> None:
    everything = results["everything"]
    gateway = pod(everything, "Deployment", "ares-gateway")
    (container,) = gateway["containers"]
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "5"]
    assert gateway["terminationGracePeriodSeconds"] == 5 + 100 + 10  # pause, shutdown_timeout_s, slow clients
    for role, deadline in (("prefill", 120), ("decode", 7)):
        instance = pod(everything, "StatefulSet", f"ares-{role}")
        (container,) = instance["containers"]
        assert parsed(container["args"])[0]["drain_deadline"] == deadline
        assert instance["terminationGracePeriodSeconds"] == deadline + 30
        assert container["readinessProbe"]["httpGet"]["path"] == "/ares/v1/ready"
        assert container["livenessProbe"]["httpGet"]["path"] == "/health"  # which stays 200 in a drain


def test_only_instances_reach_the_ports_of_nixl(results: dict[str, dict[str, Any]]) -> None:
    policy = objects(results["everything"])["NetworkPolicy", "ares-instances"]["spec"]
    commands, kv, metrics = policy["ingress"]
    components = [peer["from"][0]["podSelector"]["matchExpressions"][0]["values"] for peer in (commands, kv)]
    assert components == [["gateway", "learner"], ["prefill", "decode"]]
    assert [port["port"] for port in commands["ports"]] == [8100, 8200]
    assert [(port["port"], port.get("endPort")) for port in kv["ports"]] == [(8300, None), (20000, 20100), (4791, None)]
    assert [port["port"] for port in metrics["ports"]] == [8100]
    (container,) = pod(results["everything"], "StatefulSet", "ares-decode")["containers"]
    assert {"name": "UCX_TCP_PORT_RANGE", "value": "20000-20100"} in container["env"]


def test_no_key_stands_in_a_command_or_configuration(results: dict[str, dict[str, Any]]) -> None:
    for (kind, _), one in objects(results["everything"]).items():
        assert kind == "Secret" or "c" * 32 not in json.dumps(one)


def test_only_gateways_that_watch_may_ask_the_api_server(results: dict[str, dict[str, Any]]) -> None:
    made = objects(results["by default"])
    gateway = pod(results["by default"], "Deployment", "ares-gateway")
    assert (gateway["serviceAccountName"], gateway["automountServiceAccountToken"]) == ("ares-gateway", True)
    (rule,) = made["Role", "ares-gateway"]["rules"]
    assert (rule["resources"], rule["verbs"]) == (["endpointslices"], ["get", "list", "watch"])
    assert made["RoleBinding", "ares-gateway"]["subjects"][0]["name"] == "ares-gateway"
    # The slices of a Service have its ports by name; it has all pods, also those that are not ready.
    for role in ("prefill", "decode"):
        service = made["Service", f"ares-{role}"]["spec"]
        assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
        assert [port["name"] for port in service["ports"]] == ["http"]
        assert pod(results["by default"], "StatefulSet", f"ares-{role}")["automountServiceAccountToken"] is False
    for name in ("dns", "names"):
        gateway = pod(results[name], "Deployment", "ares-gateway")
        assert (gateway["serviceAccountName"], gateway["automountServiceAccountToken"]) == ("ares", False)
