"""`/docs`: the whole API on a page that needs nothing from the internet."""

import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ares.gateway.http.api_docs import render
from tests.gateway.fakes import FakeInstance
from tests.gateway.http.dashboard.browser import Browser, NoBrowserError, browser
from tests.gateway.http.service import Service, serving


@pytest.fixture(scope="module")
async def service(model_folder: Path) -> AsyncIterator[Service]:
    async with serving([FakeInstance("absent", "both")], model_folder) as made:
        yield made


class Links(HTMLParser):
    """Everything that a page loads or leads to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        self.found |= {str(value) for name, value in attrs if name in ("src", "href", "action")}
        self.anchors |= {f"#{value}" for name, value in attrs if name == "id"}


async def test_it_shows_every_route_and_field_and_loads_nothing(service: Service) -> None:
    reply = await service.client.get("/docs")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/html")
    page, links = reply.text, Links(reply.text)
    assert links.found - links.anchors == {"openapi.json"}
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    document = (await service.client.get("/openapi.json")).json()
    for path, methods in document["paths"].items():
        for method in methods:
            assert f"<b>{method.upper()}</b> {path}" in page
    for schema in document["components"]["schemas"].values():
        for name in schema["properties"]:
            assert f"<code>{name}</code>" in page
    assert "Whether to drain the last open instance of its kind too, and not to wait" in page
    assert (await service.client.get("/redoc")).status_code == 404


async def test_its_examples_are_taken(service: Service) -> None:
    """They are refused for want of an instance, not for what they say."""
    page = (await service.client.get("/docs")).text
    for route in ("/v1/chat/completions", "/v1/completions"):
        found = re.search(rf"curl http://127.0.0.1:8000{route} .*?-d &#39;(.*?)&#39;", page, re.DOTALL)
        assert found is not None
        body = found[1].replace("&#34;", '"')
        json = {"Content-Type": "application/json"}
        assert (await service.client.post(route, content=body, headers=json)).status_code == 503


def test_what_a_schema_says_never_becomes_markup() -> None:
    schema = {"description": "<script>x</script>", "properties": {"<b>": {"type": "string", "description": "<i>"}}}
    page = render({"info": {"title": "t", "version": "1"}, "paths": {}, "components": {"schemas": {"S": schema}}})
    assert "<script>" not in page
    assert "<i>" not in page
    assert "&lt;i&gt;" in page


@pytest.mark.timeout(180)
async def test_in_a_browser(service: Service, tmp_path: Path) -> None:
    try:
        async with browser(tmp_path) as page:
            await _look(page, f"http://127.0.0.1:{service.port}/docs")
    except NoBrowserError as reason:
        pytest.skip(str(reason))


async def _look(page: Browser, url: str) -> None:
    await page.open(url)
    assert page.complaints == []
    assert page.requested == [url]
    assert "POST /v1/chat/completions" in (await page.text("h2")).replace("\n", " ")
    # The style is let in.
    assert await page.evaluate("getComputedStyle(document.querySelector('pre')).borderRadius") == "6px"
