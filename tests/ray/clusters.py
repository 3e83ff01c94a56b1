"""A Ray cluster of several raylets on this machine, and an application of ours in it."""

import asyncio
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster

from ares.free_ports import free_port
from tests.waiting import eventually_found

APPLICATION = "ares"
# Of Serve's proxy, and of the programs of this environment.
PORT = free_port("127.0.0.1")
PROGRAMS = Path(sys.executable).parent
START_S = 180.0


class DeploymentError(Exception):
    """Serve has given an application up; the message is what it says of it."""


@dataclass(frozen=True, slots=True)
class InstanceProcess:
    """The process of an instance, the actor that it is a child of, and the raylet that has started that."""

    name: str
    url: str
    process: psutil.Process
    actor: psutil.Process
    raylet: psutil.Process


def node(cpus: int) -> dict[str, Any]:
    """Return the arguments of a raylet."""
    return {"num_cpus": cpus, "object_store_memory": 100 << 20}


def raylet_of(node: Any) -> int:
    """Return the process id of a node's raylet."""
    return int(node.all_processes["raylet"][0].process.pid)


@contextmanager
def raylets(count: int, cpus: int) -> Iterator[Cluster]:
    """Start a cluster with this many raylets, and Serve in it, without an application."""
    arguments = node(cpus)
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **arguments})
    try:
        for _ in range(count - 1):
            cluster.add_node(**arguments)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, namespace="serve", log_to_driver=False)
        # Raylets of one machine cannot each have a proxy at the same port.
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": PORT})
        yield cluster
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


@asynccontextmanager
async def application(*, route_prefix: str = "/", **arguments: Any) -> AsyncIterator[str]:
    """Deploy the application, wait until it can decode, and yield its URL."""
    try:
        deploy(route_prefix=route_prefix, **arguments)
        url = f"http://127.0.0.1:{PORT}{route_prefix.rstrip('/')}"
        await eventually_found(lambda: is_ready(url))
        yield url
    finally:
        await asyncio.to_thread(serve.delete, APPLICATION)


def deploy(*, route_prefix: str = "/", replicas: dict[str, int] | None = None, **arguments: Any) -> None:
    """Deploy the application, or change it, as a user does with a file, and wait until it runs.

    Parameters
    ----------
    replicas
        `num_replicas` of deployments that the file overrides.

    Raises
    ------
    DeploymentError
        Serve has given up.
    """
    config = {
        "name": APPLICATION,
        "route_prefix": route_prefix,
        "import_path": "ares.ray.app:build",
        "args": arguments,
        "deployments": [{"name": name, "num_replicas": count} for name, count in (replicas or {}).items()],
    }
    address = ray.get_runtime_context().gcs_address
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(yaml.safe_dump({"applications": [config]}))
        file.flush()
        command = [PROGRAMS / "serve", "run", "--non-blocking", "--address", address, file.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
    if done.returncode:
        raise DeploymentError(done.stdout + done.stderr)
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        found = serve.status().applications[APPLICATION]
        text = "\n".join([found.message, *(one.message for one in found.deployments.values())])
        if found.status == "RUNNING":
            return
        if found.status == "DEPLOY_FAILED":
            raise DeploymentError(text)
        time.sleep(0.1)
    raise TimeoutError(text)


async def is_ready(url: str) -> bool:
    """Whether a gateway answers that it can decode."""
    async with httpx.AsyncClient(timeout=30) as http:
        try:
            return (await http.get(f"{url}/ready")).status_code == 200
        except httpx.ConnectError:
            return False


def processes() -> list[InstanceProcess]:
    """Return the instances of this machine whose actors live."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "--name" not in words or words[1:4] != ["-m", "ares", "worker"]:
            continue
        value = dict(itertools.pairwise(words))
        parents = process.parents()
        if len(parents) > 1 and "raylet" in parents[1].name():
            where = f"http://{value['--host']}:{value['--port']}"
            found.append(InstanceProcess(value["--name"], where, process, *parents[:2]))
    return found


def decoding() -> list[InstanceProcess]:
    """Return those that decode."""
    return [one for one in processes() if one.name.startswith("decode")]


async def tokens(url: str, model: str, prompt: list[int], count: int) -> AsyncIterator[int]:
    """Stream a completion of `count` tokens, and yield each as it arrives."""
    body = {"model": model, "prompt": prompt, "max_tokens": count, "stream": True}
    body |= {"ignore_eos": True, "return_token_ids": True}
    async with (
        httpx.AsyncClient(timeout=httpx.Timeout(60)) as http,
        http.stream("POST", f"{url}/v1/completions", json=body) as reply,
    ):
        if reply.status_code != 200:
            raise AssertionError(f"{reply.status_code}: {(await reply.aread()).decode()}")
        async with aclosing(reply.aiter_lines()) as lines:
            async for line in lines:
                data = line.removeprefix("data: ")
                if data in ("", "[DONE]"):
                    continue
                event = json.loads(data)
                assert "error" not in event, event
                for choice in event["choices"]:
                    for token in choice["token_ids"] or ():
                        yield token


async def get(url: str) -> Any:
    """Return what a route answers."""
    async with httpx.AsyncClient(timeout=30) as http:
        return (await http.get(url)).json()


def kill(process: psutil.Process) -> None:
    """Kill a process, as the kernel does when memory is short."""
    process.send_signal(signal.SIGKILL)
