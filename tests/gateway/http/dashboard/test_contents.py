"""`/dashboard` in a real headless browser: what it shows of a cluster."""

import json
from typing import Any

import pytest

from tests.gateway.http.dashboard.browser import Browser
from tests.gateway.http.dashboard.stage import Show, Stage
from tests.gateway.http.dashboard.viewing import EVIL, NONE, ROWS, ordinary, shown

pytestmark = pytest.mark.timeout(180)


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
    lost = {"number": 7, "instance": "decode-1", "url": "http://h:1", "state": "lost", "why": "is lost: <b>why</b>"}
    stage.send(show.snapshot(), changes=[lost | {"at": move["started_at"] + 60}])
    line = await page.until("document.querySelector('#moves li.change')?.innerText")
    for part in ("decode-1", "lost", "is lost: <b>why</b>"):
        assert part in line
    assert await page.evaluate("document.querySelector('#moves li').className") == "change"
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
        "[...document.querySelectorAll('#charts canvas')].every((c) =>"
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
    await page.until(f"{ROWS}.some((row) => row.getAttribute('aria-rowindex') === '2000')")
    smallest = min(show.requests, key=lambda r: r["resident_tokens"])["resident_tokens"]
    # The page may still be reading older snapshots: the largest request, waited for above, is the same in many of them.
    tokens = "row.querySelector('.tokens').textContent.split(' + ')[0]"
    await page.until(f"{ROWS}.some((row) => {tokens} === {json.dumps(str(smallest))})")
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
    labels = await page.evaluate("[...document.querySelectorAll('#instances th button')].map((b) => b.ariaLabel)")
    assert [label.split(":")[0].split(", ")[1] for label in labels] == ["ready", "draining", "not ready", "ready"]
    assert "2 not ready" in await page.text("#instances-count")
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


async def test_with_several_models_instances_name_theirs_and_take_its_requests(page: Browser, stage: Stage) -> None:
    show = Show(decode=4, requests=6)
    snapshot = show.snapshot()
    for one in snapshot["instances"]:
        one["model"] = "org/two" if one["name"] in ("decode-2", "decode-3") else "one"
    models = {one["name"]: one["model"] for one in snapshot["instances"]}
    snapshot["requests"]["model"] = [models.get(name, "one") for name in snapshot["requests"]["instance"]]
    stage.send(snapshot)
    await shown(page, stage)
    await page.until(f"{ROWS}.length === 6")
    names = "[...document.querySelectorAll('#instances button.plain')].map((e) => e.innerText).filter((t) => t !== '⋯')"
    assert [text.split()[-1] for text in await page.evaluate(names)] == ["one"] * 3 + ["org/two"] * 2
    await page.evaluate(f"{ROWS}[0].querySelector('button').click()")
    first = await page.evaluate(f"{ROWS}[0].children[0].textContent")
    model = snapshot["requests"]["model"][snapshot["requests"]["id"].index(first)]
    where = snapshot["requests"]["instance"][snapshot["requests"]["id"].index(first)]
    offered = await page.until("[...document.querySelectorAll('#command option')].map((e) => e.value)")
    assert offered == [name for name, own in models.items() if own == model and name not in (where, "prefill-0")]
