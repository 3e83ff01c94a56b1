"""Which requests go through a proxy, and which do not."""

import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from ares.local_cluster import cluster as local
from ares.terminal.http_client import ProxyError, open_direct, open_url, proxy_of
from tests.http_server import answering

NO_TARGET = "http://127.0.0.1:9"
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[str]:
    """Answers with what it is asked for: a proxy is asked for a whole URL, anything else for a path."""
    with answering(lambda request: (200, request.path.encode())) as url:
        yield url


def read(url: str) -> str:
    with open_url(urllib.request.Request(url), timeout=5) as reply:  # noqa: S310 - our own
        return str(reply.read().decode())


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_loopback_is_asked_directly(name: str, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, NO_TARGET)
    assert read(f"{server}/here") == "/here"
    with open_direct(f"{server}/here", timeout=5) as reply:
        assert reply.read() == b"/here"
    process = local.ManagedProcess("gateway", server, None, [], None, None)  # type: ignore[arg-type] # only its URL is read
    assert process.ready()


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_another_host_is_asked_by_the_proxy(name: str, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, server)
    assert read("http://gateway.example:8000/here") == "http://gateway.example:8000/here"


def test_our_own_process_is_asked_directly_wherever_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", NO_TARGET)
    with pytest.raises(urllib.error.URLError, match=r"Name or service|resolution|not known"):
        open_direct("http://gateway.invalid:8000/health", timeout=5)


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("http://127.0.0.1:8000", None),
        ("http://127.8.9.1", None),
        ("http://localhost:8000", None),
        ("http://LOCALHOST.:8000", None),
        ("http://one.localhost:8000", None),
        ("http://[::1]:8000", None),
        ("http://0.0.0.0:8000", None),
        ("https://127.0.0.1:8000", None),
        ("http://10.0.0.1:8000", "http://proxy:1"),
        ("https://10.0.0.1:8000", "http://proxy:2"),
        ("http://127.example:8000", "http://proxy:1"),
        ("http://localhost.example:8000", "http://proxy:1"),
        ("http://in.the.company:8000", None),
    ],
)
def test_the_proxy_of_a_url(url: str, proxy: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:1")
    monkeypatch.setenv("all_proxy", "http://proxy:2")
    monkeypatch.setenv("no_proxy", ".company,other.host")
    assert proxy_of(url) == proxy


def test_a_socks_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:1080")
    with pytest.raises(ProxyError, match="SOCKS"):
        read("http://gateway.example:8000/here")
