"""The Helm chart, by Helm itself and the schemas of Kubernetes; and what it starts, by the commands that it starts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ares import config, several_models
from ares.protocol.fields import CONTROL_KEY_VARIABLE
from tests.deploy.chart import CHART, KEYS, helm, objects, pod
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
    "prometheusRule": {"enabled": True, "labels": {"release": "x"}},
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


SEVERAL: dict[str, Any] = KEYS | {
    "models": [
        {
            "name": "one",
            "model": "org/one",
            "servedModelName": ["uno", "eins"],
            "config": {"slo_ttft_s": 3},
            "instances": {"args": ["--max-model-len=4096"]},
            "decode": {"replicas": 3, "resources": {"limits": {"nvidia.com/gpu": 2}}},
        },
        {
            "name": "one-more",
            "model": "/models/two",
            "prefill": {"replicas": 2, "args": ["--seed=1"]},
            "autoscaling": {"kind": "keda", "maxReplicas": 4, "kvUsage": 0.5},
        },
    ],
    "instances": {"args": ["--seed=0"]},
    "decode": {"drainDeadlineSeconds": 7},
    "gateway": {"config": {"slo_ttft_s": 5, "preset": "ares"}},
    "serviceMonitor": {"enabled": True},
}
HPA = {"kind": "hpa", "metrics": [{"type": "Pods", "pods": {"metric": {"name": "m"}, "target": {"type": "Value"}}}]}
GOOD = {
    "by default": KEYS,
    "everything": EVERYTHING,
    "without keys of its own": {"keys": {"existingSecret": "mine"}, "networkPolicy": {"enabled": False}},
    "hpa": KEYS | {"autoscaling": HPA},
    "dns": KEYS | {"discovery": "dns", "gateway": {"config": {"service_discovery": ["api"]}}},
    "names": EVERYTHING | {"discovery": "names"},
    "the page": of_the_page(),
    "several models": SEVERAL,
    "several models by name": SEVERAL | {"discovery": "names"},
    "several models scaled": SEVERAL | {"autoscaling": {"kind": "keda", "maxReplicas": 6}},
    "simulated": KEYS
    | {"instances": {"simulate": "llama-8b-rtx4090", "image": "ares-gateway", "resources": {"limits": None}}},
}


def with_model(**entry: Any) -> dict[str, Any]:
    """Return the values of three models, the last one of these."""
    return SEVERAL | {"models": [*SEVERAL["models"], entry]}


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
    "one model and several": (SEVERAL | {"model": "org/one"}, "model has no effect beside models"),
    "a model without a name": (with_model(model="a"), "/models/2': missing property 'name'"),
    "a name for no object": (with_model(name="Qwen/Qwen3", model="a"), "/models/2/name"),
    "a name too long": (with_model(name="a" * 41, model="a"), "models.2.name: " + "a" * 41 + " is too long after ares"),
    "two models of one name": (with_model(name="one", model="a"), "models.2.name: two models are called one"),
    "two models served as one": (
        with_model(name="three", model="uno"),
        "models.2: uno is served twice: give servedModelName, names that no other model has",
    ),
    "an empty name": (with_model(name="three", model="a", servedModelName=[""]), "/models/2/servedModelName/0"),
    "a setting of all models": (
        with_model(name="three", model="a", config={"port": 1}),
        "/models/2/config': additional properties 'port' not",
    ),
    "a setting of one model": (
        SEVERAL | {"gateway": {"config": {"tokenizer": "a"}}},
        "gateway.config.tokenizer has no effect beside models: give it to one of them",
    ),
    "models beside models": (SEVERAL | {"gateway": {"config": {"models": []}}}, "gateway.config.models has no effect"),
    "one name for all instances": (
        SEVERAL | {"decode": {"args": ["--served-model-name=x"]}},
        "args of ares-one-more-decode: --served-model-name is set by the chart: give the model its servedModelName",
    ),
    "a learner of several models": (SEVERAL | {"learner": {"enabled": True}}, "a learner is of one model"),
    "a model that cannot decode": (
        with_model(name="three", model="a", decode={"replicas": 0}),
        "/models/2/decode/replicas",
    ),
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
        ("PrometheusRule", "ares"),
        *[("ConfigMap", "ares-learner"), ("StatefulSet", "ares-learner")],
    }
    assert set(objects(results["everything"])) == default | more
    assert set(objects(results["hpa"])) == default | {("HorizontalPodAutoscaler", "ares-decode")}
    rights = {(kind, "ares-gateway") for kind in ("ServiceAccount", "Role", "RoleBinding")}
    for name in ("dns", "names"):
        assert not rights & set(objects(results[name]))
    gone = {("Secret", "ares-keys"), ("NetworkPolicy", "ares-instances")}
    assert set(objects(results["without keys of its own"])) == default - gone


def test_the_alerts_are_those_of_the_rule_file(results: dict[str, dict[str, Any]]) -> None:
    file = Path(__file__).parents[2] / "grafana" / "alerts.yaml"
    # Helm reads no file outside of the chart, so that has a copy.
    assert (CHART / "alerts.yaml").read_bytes() == file.read_bytes()
    rule = objects(results["everything"])["PrometheusRule", "ares"]
    assert rule["metadata"]["labels"]["release"] == "x"
    assert rule["spec"] == yaml.safe_load(file.read_text())


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


def selected(result: dict[str, Any], selector: dict[str, Any]) -> set[str]:
    """Return the workloads whose pods a selector takes."""
    wanted = dict(selector.get("matchLabels", {} if "matchExpressions" in selector else selector))
    among = {one["key"]: one["values"] for one in selector.get("matchExpressions", ())}
    found = set()
    for (kind, name), one in objects(result).items():
        if kind in ("StatefulSet", "Deployment"):
            labels = one["spec"]["template"]["metadata"]["labels"]
            if wanted.items() <= labels.items() and all(labels.get(key) in among[key] for key in among):
                found.add(name)
    return found


@pytest.mark.parametrize("name", ["by default", "everything", "several models"])
def test_everything_selects_the_pods_of_its_own_model_and_role(results: dict[str, dict[str, Any]], name: str) -> None:
    made = objects(results[name])
    models = ("-one", "-one-more") if name == "several models" else ("",)
    groups = {f"ares{model}-{role}" for model in models for role in ("prefill", "decode")}
    gateway = {"ares-gateway"}
    learner = {"ares-learner"} if name == "everything" else set()
    assert {one for kind, one in made if kind == "StatefulSet"} == groups | learner
    for group in groups:
        assert selected(results[name], made["Service", group]["spec"]["selector"]) == {group}
        assert selected(results[name], made["StatefulSet", group]["spec"]["selector"]) == {group}
        assert selected(results[name], made["PodDisruptionBudget", group]["spec"]["selector"]) == {group}
        assert made["StatefulSet", group]["spec"]["serviceName"] == group
    assert selected(results[name], made["Service", "ares"]["spec"]["selector"]) == gateway
    for model in models:
        policy = made["NetworkPolicy", f"ares{model}-instances"]["spec"]
        own = {f"ares{model}-prefill", f"ares{model}-decode"}
        commands, kv = (one["from"][0]["podSelector"] for one in policy["ingress"][:2])
        assert selected(results[name], policy["podSelector"]) == own
        assert selected(results[name], commands) == gateway | learner
        assert selected(results[name], kv) == own  # KV goes between instances of one model only


def test_each_model_has_its_instances_and_the_gateway_finds_all(
    results: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    several = results["several models"]
    read = {}
    for model in ("one", "one-more"):
        for role in ("prefill", "decode"):
            (container,) = pod(several, "StatefulSet", f"ares-{model}-{role}")["containers"]
            given, left = parsed(container["args"])
            replicas = objects(several)["StatefulSet", f"ares-{model}-{role}"]["spec"].get("replicas")
            read[model, role] = (given["model"], given["drain_deadline"], left, replicas, container["resources"])
            assert given["role"] == role
    names, one_gpu = ["--served-model-name", "uno", "eins"], {"limits": {"nvidia.com/gpu": 1}}
    assert read == {
        ("one", "prefill"): ("org/one", 120, [*names, "--max-model-len=4096"], 1, one_gpu),
        ("one", "decode"): ("org/one", 7, [*names, "--max-model-len=4096"], 3, {"limits": {"nvidia.com/gpu": 2}}),
        ("one-more", "prefill"): ("/models/two", 120, ["--seed=1"], 2, one_gpu),
        ("one-more", "decode"): ("/models/two", 7, ["--seed=0"], None, one_gpu),
    }

    file = tmp_path / "gateway.yaml"
    file.write_text(objects(several)["ConfigMap", "ares-gateway"]["data"]["gateway.yaml"])
    loaded = config.load(file)
    one, two = loaded.of_models()
    assert (one.model, one.names, one.slo_ttft_s) == ("org/one", ["uno", "eins"], 3)
    assert (two.model, two.names, two.slo_ttft_s) == ("/models/two", ["/models/two"], 5)
    groups = ["ares-one-prefill", "ares-one-decode", "ares-one-more-prefill", "ares-one-more-decode"]
    assert loaded.service_discovery == [f"kubernetes:serving/{group}:http" for group in groups]
    file.write_text(objects(results["several models by name"])["ConfigMap", "ares-gateway"]["data"]["gateway.yaml"])
    counts = [range(count) for count in (1, 3, 2, 4)]  # the last as many as there may be
    assert config.load(file).workers == [
        f"http://{group}-{number}.{group}.serving.svc:8100"
        for group, numbers in zip(groups, counts, strict=True)
        for number in numbers
    ]


def test_models_scale_by_their_own_instances(results: dict[str, dict[str, Any]]) -> None:
    def of(name: str) -> dict[str, Any]:
        made = objects(results[name])
        return {one: made[kind, one]["spec"] for kind, one in made if kind == "ScaledObject"}

    assert set(of("several models")) == {"ares-one-more-decode"}
    scaled = of("several models scaled")
    for name, most, usage, model in (("one", 6, "0.7", "uno"), ("one-more", 4, "0.5", "/models/two")):
        spec = scaled[f"ares-{name}-decode"]
        assert spec["scaleTargetRef"]["name"] == f"ares-{name}-decode"
        assert spec["maxReplicaCount"] == most
        trigger = spec["triggers"][0]["metadata"]
        assert trigger["threshold"] == usage
        of_model = f'namespace="serving", model_name="{model}"'
        assert trigger["query"] == (
            f"avg(max by (exported_instance) (ares_instance_kv_usage_ratio{{{of_model}}}) "
            f'and on (exported_instance) ares_instance_up{{{of_model}, role=~"decode|both"}})'
        )
    (alone,) = of("everything").values()
    assert "model_name" not in alone["triggers"][0]["metadata"]["query"]


def test_a_model_may_have_what_the_gateway_lets_it_have() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    allowed = schema["properties"]["models"]["items"]["properties"]["config"]["properties"]
    own = set(several_models.OWN) | set(several_models.OVERRIDING)
    assert set(allowed) == own - {"model", "served_model_name"}  # values of their own
