"""`/dashboard` in a real headless browser: a feed that breaks, falls silent, is paused or wants a key."""

import asyncio
import json
from pathlib import Path

import pytest

from tests.gateway.fakes import instances
from tests.gateway.gateways import hold, stop_holding
from tests.gateway.http.dashboard.browser import Browser
from tests.gateway.http.dashboard.stage import Show, Stage
from tests.gateway.http.dashboard.viewing import ROWS, SHOWN, shown
from tests.gateway.http.service import serving
from tests.gateway.running import VOCABULARY
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(180)


async def test_old_data_is_called_old_and_the_page_comes_back(page: Browser, stage: Stage) -> None:
    show = Show(decode=2, requests=3)
    stage.play(show)
    await shown(page, stage)
    assert await page.evaluate("document.querySelector('#banner').hidden")
    stage.refusing = True
    stage.hang_up()
    banner = await page.until(
        "!document.querySelector('#banner').hidden && document.querySelector('#banner').innerText"
    )
    assert "No data since" in banner
    await page.until("document.querySelector('#banner').innerText.includes('closed for a test')")
    assert (await page.text("#connection")).startswith("stale")
    stage.refusing = False
    show.step()
    stage.play(show)
    await page.until("document.querySelector('#banner').hidden && connection.dataset.state === 'live'")


async def test_a_feed_that_falls_silent_is_called_old(page: Browser, stage: Stage) -> None:
    stage.play(Show(decode=2, requests=3))
    await shown(page, stage)
    await page.until("connection.dataset.state === 'stale'")
    assert stage.viewers == 1
    # A connection on which nothing comes is given up for another.
    await page.until("performance.getEntriesByType('resource').filter((e) => e.name.endsWith('/events')).length")
    await eventually(lambda: len(stage.given) > 1, 30)


async def test_pause_holds_what_is_shown(page: Browser, stage: Stage) -> None:
    show = Show(decode=2, requests=3)
    stage.play(show)
    await shown(page, stage)
    await page.press("p")
    held = await page.text("#rows")
    assert await page.evaluate("pause.getAttribute('aria-pressed')") == "true"
    show.step(500)
    stage.play(show)
    stage.send(show.snapshot() | {"preset": "other"})
    await page.evaluate("new Promise((done) => setTimeout(done, 300))")
    assert await page.text("#rows") == held
    await page.evaluate("pause.click()")
    await page.until("preset.textContent === 'other'")


async def test_the_key_is_asked_for_kept_in_the_tab_and_sent_in_a_header(page: Browser, stage: Stage) -> None:
    stage.key = "s3cret"
    stage.play(Show(decode=2, requests=3))
    await page.open(stage.url)
    await page.until("document.querySelector('#key')?.hidden === false")
    await page.until("document.activeElement.id === 'key-input'")
    for attempt in ("wrong", "s3cret"):
        await page.type(attempt)
        await page.press("Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
        if attempt == "wrong":
            await page.until("document.querySelector('#key-note').textContent.includes('refuses')")
    await page.until(SHOWN)
    assert stage.given == [None, "Bearer wrong", "Bearer s3cret"]
    assert not [url for url in page.requested if "s3cret" in url]
    assert await page.evaluate("[JSON.stringify(localStorage), document.cookie].join()") == "{},"
    await page.call("Page.reload")
    await eventually(lambda: stage.given[3:] == ["Bearer s3cret"], 30)
    await page.until(f"{SHOWN} && !forget.hidden")
    await page.evaluate("forget.click()")
    await page.until("document.querySelector('#key')?.hidden === false && document.querySelector('main').hidden")
    assert await page.evaluate("sessionStorage.length") == 0


async def test_over_a_real_gateway(page: Browser, model_folder: Path) -> None:
    """Requests that run and move over fake instances, through the real routes."""
    evil = '"><img/src=x/onerror=window.hit=1>'
    async with (
        instances("prefill", "decode", "decode", vocabulary=VOCABULARY) as fakes,
        serving(fakes, model_folder) as service,
    ):
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        hold(fakes, 60)
        await page.open(f"http://127.0.0.1:{service.port}/dashboard")
        await page.until(SHOWN)
        body = {"model": "some/model", "prompt": [5, 6, 7], "max_tokens": 80}
        headers = {"x-request-id": evil}
        request = asyncio.create_task(service.client.post("/v1/completions", json=body, headers=headers))
        await page.until(f"{ROWS}.some((row) => row.children[0].textContent === {json.dumps(evil)})")
        sequence = service.gateway.sessions[evil]
        await eventually(lambda: sequence.unmovable_now() is None, 20)
        source = sequence.instance
        target = next(i for i in service.gateway.pool.decode_instances if i is not source)
        # It generates a little more there, and waits again.
        next(fake for fake in fakes if fake.name == target.name).hold_at = 70
        order = {"request_id": evil, "target": target.name}
        assert (await service.client.post("/admin/v1/migrations", json=order)).json()["outcome"] == "moved"
        line = await page.until("document.querySelector('#moves li:not(.change)')?.innerText")
        assert evil in line
        assert f"→ {target.name}" in line
        assert "commanded" in line
        await page.until(
            f"{ROWS}.some((row) => row.querySelector('.instance').textContent === {json.dumps(target.name)})"
        )
        stop_holding(fakes)
        assert (await request).status_code == 200
        await page.until("document.querySelectorAll('canvas')[1].getAttribute('aria-label').includes(' ms')")
        assert not await page.evaluate("window.hit")
        assert page.complaints == []
        await page.call("Page.navigate", url="about:blank")
