"""A Ray cluster of several raylets on this machine, and an application of ours in it."""

import itertools
import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster

from ares.free_ports import free_port
from ares.ray.app import build
from ares.ray.settings import Settings

APPLICATION = "ares"


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
    """Start a cluster with this many raylets, and Serve in it, whose endpoint is `url()`."""
    arguments = node(cpus)
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **arguments})
    try:
        for _ in range(count - 1):
            cluster.add_node(**arguments)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, namespace="serve", log_to_driver=False)
        # Raylets of one machine cannot each have a proxy at the same port.
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": free_port("127.0.0.1")})
        yield cluster
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


@contextmanager
def application(**settings: Any) -> Iterator[str]:
    """Run the application until it is ready; yield its URL."""
    prefix = settings.pop("route_prefix", "/")
    try:
        run(prefix, **settings)
        yield url(prefix)
    finally:
        serve.delete(APPLICATION)


def message() -> str:
    """Return what Serve says of the application's deployments."""
    application = serve.status().applications[APPLICATION]
    return "\n".join([application.message, *(one.message for one in application.deployments.values())])


def run(prefix: str = "/", **settings: Any) -> None:
    """Deploy the application, or change it, and wait until it runs."""
    serve.run(build(Settings(**settings)), name=APPLICATION, route_prefix=prefix)


def url(prefix: str) -> str:
    """Return where Serve's proxy has an application."""
    from ray.serve.context import _get_global_client

    options = _get_global_client().http_config
    return f"http://{options.host}:{options.port}{prefix.rstrip('/')}"


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
