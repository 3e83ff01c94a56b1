"""What the chart starts, run over mock engines: it gets ready by its probes, serves, and ends within its grace time."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ares.free_ports import free_port
from tests.deploy.chart import KEYS, helm, objects, pod
from tests.gateway.conftest import byte_tokenizer, model_folder  # noqa: F401 - fixtures
from tests.gateway.discovery.api_server import api_server, endpoint_slice

LOOPBACK = "127.0.0.1"


class Pod:
    """A container of a pod as a process of this machine: on loopback, and on ports that are free."""

    def __init__(self, spec: dict[str, Any], name: str, folder: Path, replaced: dict[str, str], secret: dict[str, str]):
        (container,) = spec["containers"]
        self.grace_s: int = spec["terminationGracePeriodSeconds"]
        self.port = free_port(LOOPBACK)
        replaced = {"$(POD_NAME)": name, "$(POD_IP)": LOOPBACK, "0.0.0.0": LOOPBACK} | replaced  # noqa: S104
        ports = {f"--port={container['ports'][0]['containerPort']}": f"--port={self.port}"}
        ports |= {f"--control-port={one['containerPort']}": "--control-port=0" for one in container["ports"]}
        arguments = []
        for argument in container["args"]:
            text = ports.get(argument, argument)
            for old, new in replaced.items():
                text = text.replace(old, new)
            arguments.append(text)
        self._probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness")}
        keys = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in container["env"] if "secretKeyRef" in str(one)}
        self.environment = {name: secret[key["key"]] for name, key in keys.items() if key["key"] in secret}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ARES_")}
        self.log = folder / f"{name}.log"
        # Where a Service is called `ares` and service links are on, which is the default of Kubernetes.
        injected = {"ARES_PORT": "tcp://10.96.0.12:8000", "ARES_SERVICE_HOST": "10.96.0.12"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ares", *arguments],
                env=kept | injected | self.environment,
                stdout=log,
                stderr=log,
            )

    def ask(self, path: str, body: dict[str, Any] | None = None) -> str:
        request = urllib.request.Request(
            f"http://{LOOPBACK}:{self.port}{path}",
            json.dumps(body).encode() if body is not None else None,
            {"Content-Type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as reply:
            return str(reply.read().decode())

    def until_ready(self) -> None:
        deadline = time.monotonic() + 90
        for path in self._probes.values():
            while True:
                with contextlib.suppress(OSError):
                    self.ask(path)
                    break
                assert time.monotonic() < deadline, self.log.read_text()
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.05)


@contextlib.contextmanager
def played_api_server(folder: Path, slices: list[dict[str, Any]]) -> Iterator[Path]:
    """Play the API server of a cluster that has these endpoint slices; yield a kubeconfig that leads to it."""
    ends, started = threading.Event(), threading.Event()
    found: list[Path] = []

    async def play() -> None:
        async with api_server(folder) as (played, kubeconfig):
            played.objects = {one["metadata"]["name"]: one for one in slices}
            found.append(kubeconfig)
            started.set()
            await asyncio.to_thread(ends.wait)

    thread = threading.Thread(target=lambda: asyncio.run(play()), daemon=True)
    thread.start()
    assert started.wait(60)
    try:
        yield found[0]
    finally:
        ends.set()
        thread.join(60)


@contextlib.contextmanager
def started(
    result: dict[str, Any], groups: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Pod, dict[str, Pod]]]:
    """Start a pod of each group of instances and a gateway; yield them when all of them are ready."""
    secret = objects(result)["Secret", "ares-keys"]["stringData"]
    configuration = yaml.safe_load(objects(result)["ConfigMap", "ares-gateway"]["data"]["gateway.yaml"])
    with contextlib.ExitStack() as stack:
        pods = {}
        for group in groups:
            name = f"{group}-0"
            pods[name] = Pod(pod(result, "StatefulSet", group), name, folder, {}, secret)
            stack.callback(pods[name].process.kill)
        # Kubernetes names the ports of an endpoint as the Service does.
        port_names = [objects(result)["Service", group]["spec"]["ports"][0]["name"] for group in groups]
        slices = [
            endpoint_slice(f"ares-{n}", LOOPBACK, ports=[{"name": name, "port": one.port}])
            for n, (one, name) in enumerate(zip(pods.values(), port_names, strict=True))
        ]
        monkeypatch.setenv("KUBECONFIG", str(stack.enter_context(played_api_server(folder, slices))))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        file = folder / "gateway.yaml"
        replaced = {"/etc/ares/gateway.yaml": str(file)}
        port = free_port(LOOPBACK)
        file.write_text(yaml.safe_dump(configuration | {"host": LOOPBACK, "port": port}))
        gateway = Pod(pod(result, "Deployment", "ares-gateway"), "ares-gateway", folder, replaced, secret)
        stack.callback(gateway.process.kill)
        gateway.port = port
        for one in (*pods.values(), gateway):
            one.until_ready()
        deadline = time.monotonic() + 90
        while {one["name"] for one in instances(gateway) if one["healthy"]} != {*pods}:  # it is ready when one decodes
            assert time.monotonic() < deadline, gateway.log.read_text()
            time.sleep(0.05)
        yield gateway, pods


def instances(gateway: Pod) -> list[dict[str, Any]]:
    return list(json.loads(gateway.ask("/admin/v1/status"))["instances"])


@pytest.mark.timeout(240)
def test_what_the_chart_starts_serves_and_drains(
    model_folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("kubernetes.aio", reason="needs the extra `discovery`")
    values = {
        "model": str(model_folder),
        "decode": {"replicas": 1},
        "instances": {"simulate": "llama-8b-rtx4090", "drainDeadlineSeconds": 5},
        "gateway": {"config": {"preset": "static-rr", "shutdown_timeout_s": 5}},
    }
    (result,) = helm([KEYS | values])
    with started(result, ["ares-prefill", "ares-decode"], tmp_path, monkeypatch) as (gateway, pods):
        reply = json.loads(gateway.ask("/v1/completions", {"prompt": "Once", "max_tokens": 4, "ignore_eos": True}))
        assert reply["usage"]["completion_tokens"] == 4
        assert "ARES_PORT is tcp://10.96.0.12:8000, which Kubernetes sets" in gateway.log.read_text()
        for one in (gateway, *pods.values()):
            one.process.send_signal(signal.SIGTERM)
        for one in (gateway, *pods.values()):
            assert one.process.wait(one.grace_s) in {0, -signal.SIGTERM}, one.log.read_text()


@pytest.mark.timeout(240)
def test_what_the_chart_starts_serves_several_models(
    model_folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("kubernetes.aio", reason="needs the extra `discovery`")
    second = shutil.copytree(model_folder, tmp_path / "second")
    values = {
        "models": [
            {"name": "one", "model": str(model_folder), "servedModelName": ["uno", "eins"]},
            {"name": "two", "model": str(second), "instances": {"args": ["--max-model-len=2048"]}},
        ],
        "prefill": {"replicas": 0},  # decode instances prefill, too
        "instances": {"simulate": "llama-8b-rtx4090"},
        "gateway": {"config": {"preset": "static-rr"}},
    }
    (result,) = helm([KEYS | values])
    with started(result, ["ares-one-decode", "ares-two-decode"], tmp_path, monkeypatch) as (gateway, pods):
        names = {one["name"]: one["model"] for one in instances(gateway)}
        assert names == {"ares-one-decode-0": "uno", "ares-two-decode-0": str(second)}
        for model, name in (("eins", "ares-one-decode-0"), (str(second), "ares-two-decode-0")):
            before = {name: pods[name].ask("/metrics") for name in pods}
            reply = json.loads(gateway.ask("/v1/completions", {"model": model, "prompt": "Once", "max_tokens": 4}))
            assert reply["model"] == ("uno" if model == "eins" else model)
            assert {one for one in pods if generated(pods[one].ask("/metrics")) > generated(before[one])} == {name}


def generated(metrics: str) -> float:
    lines = [line for line in metrics.splitlines() if line.startswith("vllm:generation_tokens_total")]
    assert lines
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
