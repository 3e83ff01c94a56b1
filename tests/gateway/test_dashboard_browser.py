"""`/dashboard` in a real headless browser."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.gateway.browser import Browser, NoBrowserError, browser
from tests.gateway.fakes import eventually, instances
from tests.gateway.http.service import serving
from tests.gateway.running import VOCABULARY
from tests.gateway.stage import Show, Stage

pytestmark = pytest.mark.timeout(180)

SHOWN = "!document.querySelector('main').hidden"
ROWS = "[...document.querySelectorAll('.request:not([hidden])')]"
NONE = "\N{EN DASH}"
EVIL = '<img/src=x/onerror="document.title=1;window.hit=1"><script>window.hit=1</script>'


@pytest.fixture(scope="module")
async def page(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    try:
        async with browser(tmp_path_factory.mktemp("browser")) as started:
            yield started
    except NoBrowserError as reason:
        pytest.skip(str(reason))


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with Stage().open() as opened:
        yield opened


async def shown(page: Browser, stage: Stage, **viewport: Any) -> None:
    await page.open(stage.url, **viewport)
    await page.until(SHOWN)


def ordinary(page: Browser, stage: Stage) -> None:
    """The page has complained of nothing, and has asked nobody else."""
    assert page.complaints == []
    assert {urlsplit(url).netloc for url in page.requested} == {f"127.0.0.1:{stage.port}"}


async def test_the_page_shows_the_cluster_and_lives(page: Browser, stage: Stage) -> None:
    show = Show(decode=3, requests=20)
    first = stage.play(show)
    await shown(page, stage)
    names = await page.evaluate("[...document.querySelectorAll('#instances .name')].map((e) => e.textContent)")
    assert names == ["prefill-0", "decode-0", "decode-1", "decode-2"]
    assert await page.text("#preset") == "ares"
    assert await page.text("#connection") == "live"
    ids = await page.evaluate(f"{ROWS}.map((row) => row.children[0].textContent)")
    assert sorted(ids) == sorted(first["requests"]["id"])

    largest = max(first["requests"]["resident_tokens"])
    assert str(largest) in (await page.text(".request .tokens")).split(" + ")[0]
    # The widths of the bars of the first row are its tokens, on one scale.
    place = first["requests"]["resident_tokens"].index(largest)
    widths = await page.evaluate(
        "['prompt', 'output'].map((name) => document.querySelector(`.request .${name}`).getBoundingClientRect().width)"
    )
    prompt = first["requests"]["prompt_tokens"][place]
    assert widths[0] / sum(widths) == pytest.approx(prompt / largest, abs=0.02)

    request = show.requests[0]
    move = show.move(request) | {"reason": "ares: a reason", "outcome": "moved", "stall_s": 0.042}
    show.step()
    stage.play(show, [move])
    line = await page.until("document.querySelector('#moves li')?.innerText")
    for part in (request["id"], f"{move['source']} → {move['target']}", "moved", "stall 42 ms", "ares: a reason"):
        assert part in line
    await page.until(f"document.querySelector('#model').textContent && {ROWS}.length === 20")
    kv = show.snapshot()["instances"][1]
    share = f"{100 * kv['kv_blocks_used'] / kv['kv_blocks']:.0f} %"
    assert (await page.text("#instances tbody tr:nth-child(2) td.number")) == share
    ordinary(page, stage)


async def test_charts_draw_and_tell_their_values(page: Browser, stage: Stage) -> None:
    show = Show()
    stage.play(show)
    await shown(page, stage)
    for _ in range(30):
        show.step()
        stage.play(show)
    told = f"p99 {1000 * show.snapshot()['recent']['tpot_s']['p99']:.0f} ms"
    await page.until(f"document.querySelectorAll('canvas')[1].getAttribute('aria-label').endsWith({json.dumps(told)})")
    painted = (
        "[...document.querySelectorAll('canvas')].every((c) =>"
        " c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v > 150))"
    )
    assert await page.evaluate(painted)
    # An arrow key reads older samples, of all charts at the same time.
    label = "document.querySelector('canvas').getAttribute('aria-label')"
    newest = await page.evaluate(label)
    await page.evaluate("document.querySelector('canvas').focus()")
    for _ in range(12):
        await page.press("ArrowLeft")
    assert await page.evaluate(label) != newest
    await page.press("Escape")
    assert await page.evaluate(label) == newest


async def test_two_thousand_requests_on_64_instances_scroll_and_do_not_pile_up(page: Browser, stage: Stage) -> None:
    show = Show(decode=64, requests=2000)
    stage.play(show)
    await shown(page, stage)
    await page.until("document.querySelector('#rows').getAttribute('aria-rowcount') === '2000'")
    assert await page.evaluate(f"{ROWS}.length") < 100
    assert await page.evaluate("document.querySelectorAll('#instances tbody tr').length") == 65

    async def played(seconds: int) -> int:
        """Play on; return how many elements the page has then."""
        for _ in range(seconds):
            show.step()
            stage.play(show)
        await page.until(latest(show))
        return int(await page.evaluate("document.getElementsByTagName('*').length"))

    def latest(show: Show) -> str:
        newest = max(show.requests, key=lambda r: r["resident_tokens"])
        return f"document.querySelector('.request').title.startsWith({json.dumps(newest['id'])})"

    before = await played(10)
    after = await played(40)
    assert after - before < 40 * 8 + 200  # moves come, up to 200 of them; nothing else
    await page.evaluate("document.querySelector('#rows').scrollTop = 1e9")
    smallest = min(show.requests, key=lambda r: r["resident_tokens"])["resident_tokens"]
    await page.until(f"{ROWS}.some((row) => row.getAttribute('aria-rowindex') === '2000')")
    texts = await page.evaluate(f"{ROWS}.map((row) => row.querySelector('.tokens').textContent)")
    assert str(smallest) in {text.split(" + ")[0] for text in texts}
    ordinary(page, stage)


async def test_filter_and_order(page: Browser, stage: Stage) -> None:
    show = Show(decode=3, requests=30)
    first = stage.play(show)
    await shown(page, stage)
    await page.press("/")
    await page.type("decode-1")
    here = sum(name == "decode-1" for name in first["requests"]["instance"])
    await page.until(f"{ROWS}.length === {here}")
    assert await page.text("#requests-count") == f"{here} of 30"
    await page.evaluate("document.querySelector('#instances tbody tr:nth-child(4) button').click()")
    there = sum(name == "decode-2" for name in first["requests"]["instance"])
    await page.until(f"document.querySelector('#requests-count').textContent === '{there} of 30'")
    await page.evaluate("document.querySelector('#instances tbody tr:nth-child(4) button').click()")
    await page.until(f"{ROWS}.length === 30")
    await page.evaluate("order.value = 'longest to go'; order.dispatchEvent(new Event('change'))")
    longest = max(range(30), key=lambda i: first["requests"]["remaining_p50"][i])
    await page.until(f"{ROWS}[0].children[0].textContent === {json.dumps(first['requests']['id'][longest])}")


async def test_states_and_health_are_told_in_words(page: Browser, stage: Stage) -> None:
    show = Show(decode=3, requests=10)
    for request, state in zip(show.requests, ["waiting", "suspended", "moving", "prefill"], strict=False):
        request["state"] = state
    snapshot = show.snapshot() | {"waiting": 41, "suspended": 7}
    snapshot["instances"][1]["draining"] = True
    snapshot["instances"][2] = {"name": "decode-1", "role": "decode", "url": "http://x:1", "healthy": False}
    stage.send(snapshot)
    await shown(page, stage)
    states = await page.evaluate(f"{ROWS}.map((row) => row.children[2].textContent)")
    assert {"waiting", "suspended", "moving", "prefill"} <= set(states)
    tile = await page.text(".tile .note")
    assert "41 waiting" in tile
    assert "7 suspended" in tile
    labels = await page.evaluate("[...document.querySelectorAll('#instances button')].map((b) => b.ariaLabel)")
    assert [label.split(":")[0].split(", ")[1] for label in labels] == ["healthy", "draining", "lost", "healthy"]
    assert "2 not healthy" in await page.text("#instances-count")
    ordinary(page, stage)


async def test_a_status_without_predictions_and_states_is_shown_too(page: Browser, stage: Stage) -> None:
    snapshot = Show(decode=2, requests=5).snapshot()
    del snapshot["requests"]["state"]
    for name in ("remaining_p10", "remaining_p50", "remaining_p90"):
        snapshot["requests"][name] = [None] * 5
    for one in snapshot["instances"]:
        one["predicted_peak_tokens"] = None
    nothing = {"count": 0, "p50": None, "p90": None, "p99": None}
    error = {"count": 0, "mean_absolute": None, "p90_absolute": None, "bias": None}
    snapshot["recent"] |= {
        "ttft_s": nothing,
        "tpot_s": nothing,
        "longest_gap_s": nothing,
        "prediction_error_tokens": error,
    }
    stage.send(snapshot)
    await shown(page, stage)
    text = await page.text("main")
    for wrong in ("NaN", "undefined", "null", "Infinity"):
        assert wrong not in text
    stage.send(snapshot | {"requests": {}, "requests_total": 0, "instances": []})
    await page.until(f"{ROWS}.length === 0")
    ordinary(page, stage)


async def test_what_comes_from_clients_stays_text(page: Browser, stage: Stage) -> None:
    show = Show(decode=2, requests=3)
    request = show.requests[0]
    request["id"] = EVIL
    snapshot = show.snapshot() | {"model": EVIL, "preset": EVIL}
    snapshot["instances"][1]["name"] = EVIL
    stage.send(snapshot, [show.move(request) | {"reason": EVIL, "target": EVIL}])
    await shown(page, stage)
    await page.until("!!document.querySelector('#moves li')")
    stage.send(snapshot)
    assert EVIL in await page.evaluate(f"{ROWS}.map((row) => row.children[0].textContent)")
    assert await page.evaluate("document.querySelectorAll('img, script:not([src])').length") == 0
    assert not await page.evaluate("window.hit")
    ordinary(page, stage)


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


async def test_a_phone_shows_it_without_scrolling_sideways(page: Browser, stage: Stage) -> None:
    show = Show(decode=8, requests=100)
    show.requests[0]["id"] = "x" * 128
    stage.play(show, [show.move(show.requests[0]) | {"reason": "y" * 300}])
    await shown(page, stage, width=390, height=844, phone=True)
    await page.until(f"{ROWS}.length")
    assert await page.evaluate("innerWidth") == 390
    assert await page.evaluate("document.documentElement.scrollWidth") == 390
    wide = "[...document.querySelectorAll('main > *')].filter((e) => e.getBoundingClientRect().right > 390).length"
    assert await page.evaluate(wide) == 0
    usable = "[...document.querySelectorAll('header button, input, select')]"
    assert await page.evaluate(f"{usable}.map((e) => e.offsetHeight).filter((high) => high && high < 32)") == []
    ordinary(page, stage)


@pytest.mark.parametrize("scheme", ["dark", "light"])
async def test_contrast(page: Browser, stage: Stage, scheme: str) -> None:
    """Text against its ground, by WCAG's formula: 4.5 at least."""
    show = Show(decode=3, requests=10)
    snapshot = show.snapshot()
    snapshot["instances"][1] |= {"draining": True, "waiting": 2}
    stage.send(snapshot, [show.move(show.requests[0]), show.move(show.requests[1]) | {"outcome": "returned"}])
    await shown(page, stage)
    await page.media(scheme)
    await page.until(f"matchMedia('(prefers-color-scheme: {scheme})').matches")
    poor = await page.evaluate(CONTRAST)
    assert poor == []
    ground = await page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(ground) < 40) == (scheme == "dark")


CONTRAST = """
(() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = numbers(color).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!/^color/.test(color) && (numbers(color)[3] ?? 1) === 1) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const poor = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(ground(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) poor.push([walker.currentNode.textContent, element.className, contrast]);
  }
  return poor;
})()
"""


async def test_the_model_behind_the_page(page: Browser, stage: Stage) -> None:
    """The pure part, in the engine that runs it."""
    await page.open(stage.url)

    async def run(body: str) -> Any:
        return await page.evaluate(f"import('/dashboard/model.js').then((m) => {{ {body} }})")

    pieces = ["event: a\nda", "ta: [1,", " 2]\n", "\n: ping\n\nevent: b\ndata: {}\n\ndata: 3"]
    parsed = await run(f"const p = new m.EventParser(); return {json.dumps(pieces)}.map((text) => p.push(text))")
    assert parsed == [[], [], [], [{"event": "a", "data": [1, 2]}, {"event": "b", "data": {}}]]
    endless = "const p = new m.EventParser(); try { p.push('x'.repeat(17 << 20)) } catch { return 'refused' }"
    assert await run(endless) == "refused"

    ring = """
        const h = new m.History(["a"], 3);
        const empty = h.nearest(5);
        for (const t of [1, 2, 3, 10]) h.push(t, { a: t });
        return [empty, h.length, [0, 1, 2].map((k) => h.series.a[h.at(k)]), [0, 2, 6, 7, 99].map((t) => h.nearest(t))];
    """
    assert await run(ring) == [-1, 3, [10, 3, 2], [2, 2, 1, 0, 0]]

    counts = [0, 9999, 10000, 123456, 99999999, None, -12.4]
    assert await run(f"return {json.dumps(counts)}.map(m.count)") == [
        "0",
        "9999",
        "10.0k",
        "123k",
        "100.0M",
        NONE,
        "-12",
    ]
    times = [0.0042, 0.25, 0.9996, 12.345, None]
    assert await run(f"return {json.dumps(times)}.map(m.seconds)") == ["4.2 ms", "250 ms", "1.00 s", "12.3 s", NONE]
    assert await run("return [0, 0.3, 1, 1.2, 47, 2000].map(m.ceiling)") == [1, 0.5, 1, 1.5, 50, 2000]
    pauses = await run("return [0, 1, 2, 50].map((n) => m.backoff(n, 1))")
    assert pauses == [0.5, 1, 2, 10]


async def test_everything_that_can_be_used_has_a_name(page: Browser, stage: Stage) -> None:
    show = Show(decode=2, requests=3)
    stage.play(show, [show.move(show.requests[0])])
    await shown(page, stage)
    await page.call("Accessibility.enable")
    tree = (await page.call("Accessibility.getFullAXTree"))["nodes"]
    await page.call("Accessibility.disable")
    used = {"button", "textbox", "searchbox", "combobox", "table", "image", "img", "region", "list"}
    nodes = [n for n in tree if not n["ignored"] and n["role"]["value"] in used]
    assert {"button", "searchbox", "combobox"} <= {n["role"]["value"] for n in nodes}
    nameless = [n["role"]["value"] for n in nodes if not n.get("name", {}).get("value")]
    assert [role for role in nameless if role not in {"table", "list"}] == []


async def test_over_a_real_gateway(page: Browser, model_folder: Path) -> None:
    """Requests that run and move over fake instances, through the real routes."""
    evil = '"><img/src=x/onerror=window.hit=1>'
    async with (
        instances("prefill", "decode", "decode", vocabulary=VOCABULARY) as fakes,
        serving(fakes, model_folder) as service,
    ):
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in service.gateway.pool.instances), 15)
        for fake in fakes[1:]:
            fake.hold_at = 60
        await page.open(f"http://127.0.0.1:{service.port}/dashboard")
        await page.until(SHOWN)
        body = {"model": "some/model", "prompt": [5, 6, 7], "max_tokens": 80}
        headers = {"x-request-id": evil}
        request = asyncio.create_task(service.client.post("/v1/completions", json=body, headers=headers))
        await page.until(f"{ROWS}.some((row) => row.children[0].textContent === {json.dumps(evil)})")
        sequence = service.gateway.sessions[evil]
        await eventually(lambda: sequence.unmovable_reason() is None, 20)
        source = sequence.instance
        target = next(i for i in service.gateway.pool.decode() if i is not source)
        # It generates a little more there, and waits again.
        next(fake for fake in fakes if fake.name == target.name).hold_at = 70
        order = {"request_id": evil, "target": target.name}
        assert (await service.client.post("/admin/v1/migrations", json=order)).json()["outcome"] == "moved"
        line = await page.until("document.querySelector('#moves li')?.innerText")
        assert evil in line
        assert f"→ {target.name}" in line
        assert "commanded" in line
        await page.until(
            f"{ROWS}.some((row) => row.querySelector('.instance').textContent === {json.dumps(target.name)})"
        )
        for fake in fakes[1:]:
            fake.hold_at = None
        assert (await request).status_code == 200
        await page.until("document.querySelectorAll('canvas')[1].getAttribute('aria-label').includes(' ms')")
        assert not await page.evaluate("window.hit")
        assert page.complaints == []
        await page.call("Page.navigate", url="about:blank")
