"""`/dashboard` in a real headless browser: an operator's commands, through the real routes, and the first request."""

import asyncio
import contextlib
import json
import shlex
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.fakes import FakeInstance, instances
from tests.gateway.gateways import hold, stop_holding
from tests.gateway.http.dashboard.browser import Browser
from tests.gateway.http.dashboard.stage import Show, Stage
from tests.gateway.http.dashboard.viewing import ROWS, SHOWN, ordinary, shown
from tests.gateway.http.service import Service, serving
from tests.gateway.running import VOCABULARY
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(180)
KEY = "s3cret-of-the-operator"
GO = "command.querySelector('[type=submit], button:not([type=button])')"
ANSWER = "command.querySelector('[role=status]').textContent"


@contextlib.asynccontextmanager
async def watched(page: Browser, folder: Path, **settings: Any) -> AsyncIterator[tuple[Service, list[FakeInstance]]]:
    """A gateway whose dashboard is open."""
    async with (
        instances("prefill", "decode", "decode", vocabulary=VOCABULARY) as fakes,
        serving(fakes, folder, **settings) as service,
    ):
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        await page.open(f"http://127.0.0.1:{service.port}/dashboard")
        if "admin_key" in settings:
            await page.until("document.activeElement.id === 'key-input'")
            await page.type(KEY)
            await page.press("Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
        await page.until(SHOWN)
        yield service, fakes


# The share of a grid that none of its cells covers.
AREA = """(
    (grid, cell) => {
      const area = (e) => e.getBoundingClientRect().width * e.getBoundingClientRect().height;
      const covered = [...document.querySelectorAll(grid + ' ' + cell)].reduce((sum, e) => sum + area(e), 0);
      return 1 - covered / area(document.querySelector(grid));
    }
)"""


async def more(page: Browser, name: str) -> None:
    """Open the commands of an instance."""
    await page.until(f"!!document.querySelector('[aria-label=\"Drain or undrain {name}\"]')")
    await page.evaluate(f"document.querySelector('[aria-label=\"Drain or undrain {name}\"]').click()")
    assert await page.evaluate("command.open")


async def carried_out(page: Browser, said: str) -> None:
    """Press the button, wait for these words, and close."""
    await page.evaluate(f"{GO}.click()")
    await page.until(f"{ANSWER}.includes({json.dumps(said)})")
    assert await page.evaluate(f"{GO}.hidden && !command.querySelector('.alarm')")
    await page.evaluate("command.querySelector('[type=button]').click()")
    assert not await page.evaluate("command.open")


async def test_drain_undrain_and_preset_with_the_key(page: Browser, model_folder: Path) -> None:
    async with watched(page, model_folder, admin_key=KEY) as (service, _):
        pool = service.gateway.pool
        await more(page, "decode-0")
        await carried_out(page, "decode-0 drains; 0 requests are left")
        assert [i.name for i in pool.instances if i.state.draining] == ["decode-0"]
        # The last one that is open: the gateway's refusal is shown, and what to do about it.
        await more(page, "decode-1")
        await page.evaluate(f"{GO}.click()")
        await page.until(f"{GO}.textContent === 'Drain nevertheless'")
        assert "decode-1 is the last" in await page.evaluate(ANSWER)
        assert await page.evaluate("command.querySelector('.alarm').getAttribute('role')") == "status"
        await page.press("Escape", code="Escape", windowsVirtualKeyCode=27)
        await page.until("!command.open")
        assert [i.name for i in pool.instances if i.state.draining] == ["decode-0"]
        await page.until("document.querySelector('tr[data-state=draining] .name')?.textContent === 'decode-0'")
        await more(page, "decode-0")
        await carried_out(page, "decode-0 is in service")
        await eventually(lambda: not any(i.state.draining for i in pool.instances))
        assert await page.evaluate("preset.textContent") == "off"
        await page.evaluate("document.querySelector('#change-preset').click()")
        options = await page.evaluate("[...command.querySelectorAll('option')].map((one) => one.value)")
        assert options[0] == "off"
        assert {"ares", "llumnix"} < set(options)
        assert await page.evaluate("command.querySelector('select').value") == "off"
        await page.evaluate("command.querySelector('select').value = 'static-rr'")
        await carried_out(page, "decides by static-rr")
        await page.until("preset.textContent === 'static-rr'")
        # The key goes in a header, and stays in the tab.
        assert not [url for url in page.requested if KEY in url]
        assert await page.evaluate("[JSON.stringify(localStorage), document.cookie].join()") == "{},"


async def test_a_request_is_moved_and_refusals_are_told_in_words(page: Browser, model_folder: Path) -> None:
    async with watched(page, model_folder) as (service, fakes):
        hold(fakes, 60)
        body = {"model": "some/model", "prompt": [5, 6, 7], "max_tokens": 80}
        headers = {"x-request-id": "mine"}
        request = asyncio.create_task(service.client.post("/v1/completions", json=body, headers=headers))
        await page.until(f"{ROWS}.some((row) => row.dataset.instance)")
        session = service.gateway.sessions["mine"]
        await eventually(lambda: session.unmovable_now() is None, 20)
        source = session.instance
        assert source is not None
        target = next(i for i in service.gateway.pool.decode_instances if i is not source)
        await page.evaluate(f"{ROWS}[0].querySelector('button').click()")
        assert await page.evaluate("command.querySelector('h2').textContent") == "mine"
        assert await page.evaluate("[...command.querySelectorAll('option')].map((one) => one.value)") == [target.name]
        next(fake for fake in fakes if fake.name == target.name).hold_at = 70
        await carried_out(page, f"It runs on {target.name}; its stream stalled for")
        await page.until(f"{ROWS}[0].dataset.instance === {json.dumps(target.name)}")
        await page.evaluate(f"{ROWS}[0].querySelector('button').click()")
        stop_holding(fakes)
        assert (await request).status_code == 200
        await page.evaluate(f"{GO}.click()")
        await page.until(f"{ANSWER}.includes(\"no running request 'mine'\")")
        assert await page.evaluate("!!command.querySelector('.alarm')")
        await page.until("!document.querySelector('#first').hidden")


async def test_the_first_step_where_nothing_runs(page: Browser, model_folder: Path) -> None:
    async with watched(page, model_folder, api_keys=["client's key"], served_model_name=["it's"]) as (service, _):
        line = await page.until("!document.querySelector('#first').hidden && document.querySelector('pre').textContent")
        assert await page.evaluate("document.querySelector('#rows').hidden")
        program, stream, url, *rest = shlex.split(line)
        assert (program, stream) == ("curl", "-N")
        assert rest[:4] == ["-H", "Content-Type: application/json", "-H", "Authorization: Bearer $KEY"]
        headers = {"Content-Type": "application/json", "Authorization": "Bearer client's key"}
        reply = await service.client.post(url, content=rest[-1], headers=headers)
        assert reply.status_code == 200
        assert reply.text.endswith("data: [DONE]\n\n")


async def test_a_gateway_that_is_gone(page: Browser, stage: Stage) -> None:
    """Here the feed alone is served: every command fails."""
    stage.play(Show(decode=2, requests=3))
    await shown(page, stage)
    ordinary(page, stage)
    await more(page, "decode-1")
    await page.evaluate(f"{GO}.click()")
    await page.until(f"{ANSWER}.includes('the gateway answers 404')")
    assert await page.evaluate(f"!{GO}.hidden && !{GO}.disabled")


@pytest.mark.parametrize("width", [390, 1000, 1440])
async def test_the_dialog_and_the_first_step_fit(page: Browser, stage: Stage, width: int) -> None:
    show = Show(decode=2, requests=0)
    snapshot = show.snapshot() | {"preset": "a/long/path/" * 20}
    snapshot["instances"][1]["name"] = "decode-" + "x" * 100
    stage.send(snapshot)
    await shown(page, stage, width=width, height=844, phone=width == 390)
    await page.until("!document.querySelector('#first').hidden")
    assert await page.evaluate(f"[{AREA}('#tiles', '.tile'), {AREA}('#charts', 'figure')].every((hole) => hole < 0.06)")
    assert await page.evaluate("document.documentElement.scrollWidth") <= width
    await page.evaluate("document.querySelector('td.more button').click()")
    box = "((e) => [e.left >= 0, e.right <= innerWidth, e.bottom <= innerHeight])(command.getBoundingClientRect())"
    assert await page.evaluate(box) == [True, True, True]
    assert await page.evaluate("command.scrollWidth <= command.clientWidth")
