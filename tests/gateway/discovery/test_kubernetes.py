"""Instances that Kubernetes runs, by its official client over a server that plays the API server."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ares.gateway.discovery.base import SourceError
from ares.gateway.discovery.kubernetes import EndpointSlices, KubernetesSource, Objects, Pods
from ares.gateway.tuning import Tuning
from tests.gateway.discovery.api_server import NAMESPACE, ApiServer, api_server, endpoint_slice, pod
from tests.gateway.discovery.following import following

pytest.importorskip("kubernetes.aio", reason="needs the extra `discovery`")

QUICK = Tuning(kubernetes_resync_s=60, kubernetes_answer_s=5)


@pytest.fixture
async def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ApiServer]:
    async with api_server(tmp_path) as (served, config):
        monkeypatch.setattr("kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(config))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        yield served


def source(objects: Objects | None = None, tuning: Tuning = QUICK) -> KubernetesSource:
    return KubernetesSource("kubernetes", NAMESPACE, objects or EndpointSlices("decode", None), tuning)


async def test_the_endpoints_of_a_service_are_listed_and_watched(api: ApiServer) -> None:
    api.change("ADDED", endpoint_slice("decode-a", "10.0.0.1", "10.0.0.2", ready=False))
    api.change("ADDED", endpoint_slice("decode-b"))
    async with following(source()) as found:
        assert await found.next() == ["http://10.0.0.1:8100", "http://10.0.0.2:8100"]
        await api.watched()
        listed, watch = api.asked
        assert listed["labelSelector"] == watch["labelSelector"] == "kubernetes.io/service-name=decode"
        assert (watch["resourceVersion"], watch["timeoutSeconds"]) == ("3", "60")
        api.change("MODIFIED", endpoint_slice("decode-b", "10.0.0.3"))
        assert await found.next() == ["http://10.0.0.1:8100", "http://10.0.0.2:8100", "http://10.0.0.3:8100"]
        api.send(json.dumps({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "9"}}}))
        api.change("MODIFIED", endpoint_slice("decode-b", "10.0.0.3", terminating=True))
        assert await found.next() == ["http://10.0.0.1:8100", "http://10.0.0.2:8100"]
        api.change("DELETED", endpoint_slice("decode-a"))
        assert await found.next() == []


@pytest.mark.parametrize(
    "ending", [None, json.dumps({"type": "ERROR", "object": {"code": 410, "message": "too old"}})], ids=["end", "410"]
)
async def test_after_a_watch_everything_is_listed_anew(api: ApiServer, ending: str | None) -> None:
    async with following(source()) as found:
        assert await found.next() == []
        await api.watched()
        api.objects["decode-a"] = endpoint_slice("decode-a", "10.0.0.1")  # nobody is told
        api.send(ending)
        assert await found.next() == ["http://10.0.0.1:8100"]


async def test_pods_by_their_labels(api: ApiServer) -> None:
    api.change("ADDED", pod("decode-0", "10.0.0.1"))
    api.change("ADDED", pod("decode-1", None, "Pending"))
    api.change("ADDED", pod("decode-2", "10.0.0.2", "Failed"))
    async with following(source(Pods("app=ares,role=decode", 8100))) as found:
        assert await found.next() == ["http://10.0.0.1:8100"]
        assert api.asked[0]["labelSelector"] == "app=ares,role=decode"
        await api.watched()
        api.change("MODIFIED", pod("decode-1", "fd00::1"))
        assert await found.next() == ["http://10.0.0.1:8100", "http://[fd00::1]:8100"]
        api.change("MODIFIED", pod("decode-0", "10.0.0.1", deletionTimestamp="2026-11-29T20:00:00Z"))
        assert await found.next() == ["http://[fd00::1]:8100"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((403, "{}"), "the API server answers 403 Forbidden; the service account needs get, list and watch"),
        ((500, "{}"), "the API server answers 500"),
        ((200, "<html>"), "the API server sent something that is no JSON object"),
        ((200, "[" * 100_000), "no JSON object"),
        ((200, "{}"), "a list of another shape"),
        ((200, '{"metadata": {"resourceVersion": "1"}, "items": [{"metadata": 1}]}'), "a list of another shape"),
        (
            (200, '{"metadata": {"resourceVersion": "1"}, "items": [{"metadata": {"name": "a"}, "endpoints": [1]}]}'),
            "the Service has no port http, but none",
        ),
    ],
)
async def test_broken_answers(api: ApiServer, answer: tuple[int, str], said: str) -> None:
    api.answer = answer
    async with following(source()) as found:
        assert re.search(said, str(await found.next()))
        api.answer = None
        await found.until([])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "no JSON object"),
        ("{}", "an event of another shape"),
        ('{"type": "ADDED", "object": {"metadata": null}}', "an event of another shape"),
        (
            '{"type": "ERROR", "object": {"code": 500, "message": "overload"}}',
            "the API server ends the watch: overload",
        ),
        (
            '{"type": "ADDED", "object": {"metadata": {"name": "b"}, "endpoints": 1, "ports": [{"port": 1}]}}',
            "another shape",
        ),
    ],
)
async def test_broken_events(api: ApiServer, line: str, said: str) -> None:
    async with following(source()) as found:
        await found.next()
        await api.watched()
        api.send(line)
        assert said in str(await found.next())
        assert await found.next() == []


async def test_an_api_server_that_is_away(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (tmp_path / "kubeconfig").read_text()
    dead = tmp_path / "dead"
    dead.write_text(text.replace("http://127.0.0.1:", "http://127.0.0.1:1#"))
    monkeypatch.setattr("kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(dead))
    async with following(source()) as found:
        assert str(await found.next()).startswith("no answer of the API server: ")
    monkeypatch.setattr("kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    async with following(source()) as found:
        assert str(await found.next()).startswith("no way to Kubernetes is configured: ")


@pytest.mark.parametrize(
    ("port", "ports", "chosen"),
    [
        (None, [{"port": 9000}], 9000),
        (None, [{"name": "metrics", "port": 1}, {"name": "http", "port": 2}], 2),
        ("metrics", [{"name": "metrics", "port": 1}, {"name": "http", "port": 2}], 1),
        ("2", [{"name": "metrics", "port": 1}, {"name": "http", "port": 2}], 2),
    ],
)
def test_the_port_of_a_service(port: str | None, ports: list[dict[str, object]], chosen: int) -> None:
    one = endpoint_slice("a", "10.0.0.1", ports=ports)
    assert list(EndpointSlices("decode", port).urls(one)) == [f"http://10.0.0.1:{chosen}"]


def test_a_port_that_the_service_does_not_have_is_named() -> None:
    one = endpoint_slice("a", "10.0.0.1", ports=[{"name": "a", "port": 1}, {"name": "b", "port": 2}])
    with pytest.raises(SourceError, match="no port http, but a:1, b:2; give it as NAMESPACE/SERVICE:PORT"):
        list(EndpointSlices("decode", None).urls(one))
