"""A small server that plays Kubernetes' API server: lists and watches of endpoint slices and pods."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

from tests.waiting import eventually

NAMESPACE = "serving"
SLICES = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


class ApiServer:
    """Has objects by name, and tells watchers of their changes.

    Attributes
    ----------
    objects
        What a list shows.
    asked
        The queries of all requests, oldest first.
    answer
        Status and body of every answer instead of the right one.
    """

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.asked: list[dict[str, str]] = []
        self.answer: tuple[int, str] | None = None
        self._version = 1
        self._watchers: set[asyncio.Queue[str | None]] = set()

    async def watched(self) -> None:
        """Wait until somebody watches."""
        await eventually(lambda: bool(self._watchers))

    def change(self, kind: str, one: dict[str, Any]) -> None:
        """Change an object, and tell the watchers."""
        self._version += 1
        name = one["metadata"]["name"]
        one = {**one, "metadata": {**one["metadata"], "resourceVersion": str(self._version)}}
        self.objects.pop(name, None)
        if kind != "DELETED":
            self.objects[name] = one
        self.send(json.dumps({"type": kind, "object": one}))

    def send(self, line: str | None) -> None:
        """Send a line to every watcher; None ends their watches."""
        for watcher in self._watchers:
            watcher.put_nowait(line)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a request."""
        query = dict(request.query)
        self.asked.append(query)
        if self.answer is not None:
            return web.Response(status=self.answer[0], text=self.answer[1])
        if query.get("watch") != "true":
            listed = {"metadata": {"resourceVersion": str(self._version)}, "items": list(self.objects.values())}
            return web.json_response(listed)
        reply = web.StreamResponse()
        await reply.prepare(request)
        lines: asyncio.Queue[str | None] = asyncio.Queue()
        self._watchers.add(lines)
        try:
            while (line := await lines.get()) is not None:
                await reply.write(line.encode() + b"\n")
        finally:
            self._watchers.discard(lines)
        return reply


@contextlib.asynccontextmanager
async def api_server(folder: Path) -> AsyncIterator[tuple[ApiServer, Path]]:
    """Serve; yield the server, and a kubeconfig that leads to it."""
    played = ApiServer()
    app = web.Application()
    app.router.add_get(SLICES, played.handle)
    app.router.add_get(PODS, played.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "me", "user": {"token": "secret"}}],
        "contexts": [{"name": "now", "context": {"cluster": "here", "user": "me"}}],
        "current-context": "now",
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    try:
        yield played, path
    finally:
        played.send(None)
        await runner.cleanup()


def endpoint_slice(name: str, *addresses: str, ports: Any = None, **conditions: bool) -> dict[str, Any]:
    """A slice as Kubernetes makes it."""
    endpoints = [{"addresses": [address], "conditions": conditions} for address in addresses]
    return {
        "metadata": {"name": name},
        "addressType": "IPv4",
        "endpoints": endpoints or None,
        "ports": [{"name": "http", "port": 8100, "protocol": "TCP"}] if ports is None else ports,
    }


def pod(name: str, address: str | None, phase: str = "Running", **metadata: str) -> dict[str, Any]:
    """A pod, as far as it matters here."""
    return {"metadata": {"name": name, **metadata}, "status": {"phase": phase, "podIP": address}}
