"""`kubernetes:NAMESPACE/SERVICE[:PORT]` and `pods:NAMESPACE/LABELS:PORT`: instances that Kubernetes runs.

Objects are listed, then watched from there on, and listed anew when the watch ends: the list-watch of Kubernetes' own
clients (kubernetes.io/docs/reference/using-api/api-concepts, "Efficient detection of changes").
"""

import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import aiohttp

from ares.gateway.discovery.base import SourceError, checked
from ares.gateway.tuning import DEFAULT, Tuning
from ares.instance_sources import http_url

if TYPE_CHECKING:
    from kubernetes.aio import client

# Lists or watches objects; returns the reply, unread.
Request = Callable[..., Awaitable[Any]]

_SERVICE_LABEL = "kubernetes.io/service-name"
_GONE = 410  # the version to watch from is too old
_WRONG_SHAPE = (AttributeError, IndexError, KeyError, LookupError, TypeError, ValueError)


class Objects(Protocol):
    """A kind of objects that name instances."""

    labels: str
    """Selects them."""

    def request(self, api: "client.ApiClient") -> Request:
        """Return the call that lists or watches them, without reading its reply."""
        ...

    def urls(self, one: dict[str, Any]) -> Iterable[str]:
        """Return the URLs that one object names; any of `_WRONG_SHAPE` where it has another shape."""
        ...


class EndpointSlices:
    """The endpoints of a Service.

    Those that are not ready are instances, too: whether one can be used, the gateway finds out itself, and a readiness
    probe that fails under load must not end its streams. One that terminates leaves.

    Parameters
    ----------
    service
        Its name.
    port
        Name or number of the port; None takes the one named `http`, or the only one.
    """

    def __init__(self, service: str, port: str | None) -> None:
        self.labels = f"{_SERVICE_LABEL}={service}"
        self._port = port

    def request(self, api: "client.ApiClient") -> Request:
        """Return the call (see `Objects`)."""
        from kubernetes.aio import client

        call: Request = client.DiscoveryV1Api(api).list_namespaced_endpoint_slice_without_preload_content
        return call

    def urls(self, one: dict[str, Any]) -> Iterable[str]:
        """Return the URLs of one slice (see `Objects`)."""
        endpoints = one.get("endpoints") or []  # null where there is none
        if not endpoints:
            return
        port = self._chosen(one.get("ports") or [])
        for endpoint in endpoints:
            if not (endpoint.get("conditions") or {}).get("terminating"):
                # All addresses of one endpoint are interchangeable: the first one is its address.
                yield http_url(endpoint["addresses"][0], port)

    def _chosen(self, ports: list[dict[str, Any]]) -> int:
        wanted = self._port or "http"
        matching = [one for one in ports if wanted in (one.get("name"), str(one["port"]))]
        if not matching and self._port is None and len(ports) == 1:
            matching = ports
        if not matching:
            known = ", ".join(f"{one.get('name') or ''}:{one['port']}" for one in ports) or "none"
            raise SourceError(f"the Service has no port {wanted}, but {known}; give it as NAMESPACE/SERVICE:PORT")
        return int(matching[0]["port"])


class Pods:
    """Pods by their labels; those that end leave.

    Parameters
    ----------
    labels
        A label selector.
    port
        Of the instances.
    """

    def __init__(self, labels: str, port: int) -> None:
        self.labels = labels
        self._port = port

    def request(self, api: "client.ApiClient") -> Request:
        """Return the call (see `Objects`)."""
        from kubernetes.aio import client

        call: Request = client.CoreV1Api(api).list_namespaced_pod_without_preload_content
        return call

    def urls(self, one: dict[str, Any]) -> Iterable[str]:
        """Return the URL of one pod, if it has an address yet (see `Objects`)."""
        status = one.get("status") or {}
        ended = one["metadata"].get("deletionTimestamp") or status.get("phase") in ("Succeeded", "Failed")
        if status.get("podIP") and not ended:
            yield http_url(status["podIP"], self._port)


class KubernetesSource:
    """Instances by objects of one namespace.

    Parameters
    ----------
    name
        The setting.
    namespace
        Where they are.
    objects
        Which ones.
    tuning
        The gateway's times and limits.
    """

    def __init__(self, name: str, namespace: str, objects: Objects, tuning: Tuning = DEFAULT) -> None:
        self.name = name
        self._namespace = namespace
        self._objects = objects
        self._tuning = tuning

    async def states(self) -> AsyncGenerator[list[str]]:
        """Yield the URLs whenever an object has changed (see `Source`)."""
        from kubernetes.aio import client
        from kubernetes.aio.client.exceptions import ApiException, OpenApiException

        try:
            async with client.ApiClient(await _configuration()) as api:
                call = self._objects.request(api)
                while True:
                    async for known in self._listed_and_watched(call):
                        yield self._urls(known.values())
        except ApiException as error:
            raise SourceError(f"the API server answers {error.status} {error.reason}{_hint(error.status)}") from None
        except (OpenApiException, aiohttp.ClientError, TimeoutError, OSError) as error:
            raise SourceError(f"no answer of the API server: {error or type(error).__name__}") from None

    async def _listed_and_watched(self, call: Request) -> AsyncGenerator[dict[str, Any]]:
        """Yield the objects by their names, first as listed and then after each change, until the watch ends."""
        selected = {"namespace": self._namespace, "label_selector": self._objects.labels}
        answer_s, resync_s = self._tuning.kubernetes_answer_s, self._tuning.kubernetes_resync_s
        reply = await call(**selected, _request_timeout=answer_s)
        _check(reply)
        listed = _parsed(await reply.read())
        known, version = _listed(listed)
        yield known
        watch = await call(
            **selected,
            watch=True,
            resource_version=version,
            allow_watch_bookmarks=True,
            timeout_seconds=max(1, round(resync_s)),
            _request_timeout=resync_s + answer_s,
        )
        try:
            _check(watch)
            async for line in watch.content:
                event = _parsed(line)
                if event.get("type") == "ERROR":
                    if (event.get("object") or {}).get("code") == _GONE:
                        return
                    raise SourceError(f"the API server ends the watch: {event['object'].get('message')}")
                if _apply(event, known):
                    yield known
        finally:
            watch.close()

    def _urls(self, objects: Iterable[dict[str, Any]]) -> list[str]:
        try:
            return checked(sorted({url for one in objects for url in self._objects.urls(one)}))
        except _WRONG_SHAPE as error:
            raise SourceError(f"the API server sent an object of another shape ({error!r})") from None


async def _configuration() -> "client.Configuration":
    """Return how to reach the API server: from within a pod, or by the user's kubeconfig."""
    from kubernetes.aio import client, config
    from kubernetes.aio.config import ConfigException

    found = client.Configuration()
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=found)
        else:
            await config.load_kube_config(client_configuration=found)
    except (ConfigException, OSError) as error:
        raise SourceError(f"no way to Kubernetes is configured: {error}") from None
    return found


def _check(reply: aiohttp.ClientResponse) -> None:
    if reply.status != 200:
        raise SourceError(f"the API server answers {reply.status} {reply.reason}{_hint(reply.status)}")


def _hint(status: int) -> str:
    return "; the service account needs get, list and watch (docs/discovery.md)" if status in (401, 403) else ""


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise SourceError("the API server sent something that is no JSON object")
    return found


def _listed(listed: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the objects of a list by name, and its version."""
    try:
        objects = {one["metadata"]["name"]: one for one in listed["items"] or []}
        return objects, str(listed["metadata"]["resourceVersion"])
    except _WRONG_SHAPE as error:
        raise SourceError(f"the API server sent a list of another shape ({error!r})") from None


def _apply(event: dict[str, Any], known: dict[str, Any]) -> bool:
    """Apply an event of a watch; return whether it may have changed anything."""
    try:
        kind, one = event["type"], event["object"]
        if kind == "BOOKMARK":
            return False
        name = one["metadata"]["name"]
    except _WRONG_SHAPE as error:
        raise SourceError(f"the API server sent an event of another shape ({error!r})") from None
    if kind == "DELETED":
        known.pop(name, None)
    else:
        known[name] = one
    return True
