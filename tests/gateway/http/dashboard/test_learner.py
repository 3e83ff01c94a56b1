"""`/dashboard` in a real headless browser: the learner of the predictor."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.fakes import instances
from tests.gateway.http.dashboard.browser import Browser
from tests.gateway.http.dashboard.stage import Show, Stage
from tests.gateway.http.dashboard.test_accessibility import CONTRAST
from tests.gateway.http.dashboard.viewing import EVIL, NONE, SHOWN, ordinary, shown
from tests.gateway.http.service import serving
from tests.gateway.learner_reports import CHALLENGER, CHAMPION, NOW, event, losses, report
from tests.gateway.running import VOCABULARY
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(180)
VISIBLE = "!document.querySelector('#learner').hidden"
LABEL = "document.querySelector('#learner canvas').getAttribute('aria-label')"


def learner(**fields: Any) -> dict[str, Any]:
    return report() | {"age_s": 1.0, "old": False} | fields


def seen(age_s: float = 1.0, **fields: Any) -> dict[str, Any]:
    """A snapshot of a cluster whose second decode instance has another version than the champion."""
    snapshot = Show(decode=3, requests=5).snapshot()
    for one, version in zip(snapshot["instances"], [CHAMPION, CHAMPION, CHALLENGER, ""], strict=True):
        one["predictor"] = version
    return snapshot | {"learner_ages_s": {"host-1": age_s, "other": 300.0}, "learner_old_s": 60.0} | fields


async def test_nothing_is_shown_where_no_learner_reports(page: Browser, stage: Stage) -> None:
    stage.send(seen())
    await shown(page, stage)
    await page.until("document.querySelectorAll('#instances tbody tr').length === 4")
    assert not await page.evaluate(VISIBLE)
    titles = await page.evaluate("[...document.querySelectorAll('#instances th button')].map((b) => b.title)")
    assert [f"predictor {CHAMPION[:12]}" in title for title in titles] == [True, True, False, False]
    assert "predictor none" in titles[3]
    ordinary(page, stage)


async def test_champion_challenger_losses_and_events(page: Browser, stage: Stage) -> None:
    history = [losses(n, curve=120.0, champion=100.0 - n, challenger=None if n < 10 else 95.0) for n in range(30)]
    events = [event(n, "trained") for n in range(3)] + [event(3, "promoted")]
    stage.send(seen(), learners=[learner(losses=history, events=events)])
    await shown(page, stage)
    await page.until(VISIBLE)
    state = await page.text("#learner-state")
    assert "trial · 1234 outputs recorded, 1500 needed · learner host-1" in state
    rows = await page.evaluate(
        "[...document.querySelectorAll('#learner tbody tr')].map((row) => [...row.children].map((c) => c.textContent))"
    )
    assert [[row[0], row[1], row[2], row[4]] for row in rows] == [
        ["curve", NONE, NONE, "120.0"],
        ["champion", CHAMPION[:12], "812", "71.0"],
        ["challenger", CHALLENGER[:12], "1400", "95.0"],
    ]
    others = await page.text("#learner-others")
    assert others == f"another version than the champion: decode-1 ({CHALLENGER[:12]}), decode-2 (none)"
    lines = await page.evaluate("[...document.querySelectorAll('#learner-events li')].map((line) => line.innerText)")
    assert len(lines) == 4
    assert "promoted: the loss is 3 tokens" in lines[0]  # the newest first
    # A new one comes on top, the oldest one leaves, and the others stay as they are.
    await page.evaluate("document.querySelectorAll('#learner-events li').forEach((line) => { line.known = true })")
    stage.send(seen(), learners=[learner(losses=history, events=[*events[1:], event(4, "demoted")])])
    await page.until("document.querySelector('#learner-events li').innerText.includes('demoted')")
    known = await page.evaluate("[...document.querySelectorAll('#learner-events li')].map((line) => !!line.known)")
    assert known == [False, True, True, True]
    ordinary(page, stage)


async def test_the_chart_has_the_losses_over_time(page: Browser, stage: Stage) -> None:
    history = [losses(n, curve=120.0, champion=100.0 - n, challenger=None if n < 10 else 95.0) for n in range(30)]
    stage.send(seen(), learners=[learner(losses=history)])
    await shown(page, stage)
    newest = await page.until(f"{LABEL}?.endsWith('challenger 95') && {LABEL}")
    assert newest.endswith("curve 120, champion 71, challenger 95")
    painted = (
        "(() => { const c = document.querySelector('#learner canvas');"
        " return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v > 150); })()"
    )
    await page.until(painted)
    await page.evaluate("document.querySelector('#learner canvas').focus()")
    for _ in range(25):  # the first one points at the newest
        await page.press("ArrowLeft")
    assert (await page.evaluate(LABEL)).endswith(f"curve 120, champion 95, challenger {NONE}")
    await page.press("Escape")
    stage.send(seen(), learners=[learner(losses=[*history[1:], losses(30, champion=60.0)])])
    await page.until(f"{LABEL}.includes('champion 60')")
    ordinary(page, stage)


async def test_a_learner_that_is_gone_is_marked(page: Browser, stage: Stage) -> None:
    stage.send(seen(), learners=[learner(), learner(learner="other")])
    await shown(page, stage)
    await page.until(VISIBLE)
    assert "also other (no report for 300 s)" in await page.text("#learner-state")
    assert await page.evaluate("learner.dataset.state") == "reports"
    stage.send(seen(75.9))
    await page.until("learner.dataset.state === 'old'")
    assert (await page.text("#learner-state")).startswith("no report for 75 s; before: trial")
    # It reports again.
    stage.send(seen(0.1), learners=[learner(doing="training")])
    await page.until("learner.dataset.state === 'reports'")
    assert (await page.text("#learner-state")).startswith("training ·")
    ordinary(page, stage)


async def test_a_curve_without_losses_and_events(page: Browser, stage: Stage) -> None:
    curve = {"version": "", "kind": "curve", "trained_outputs": 0, "since": NOW}
    sent = learner(champion=curve, challenger=None, losses=[], events=[], doing="collecting", frozen=True)
    snapshot = seen()
    for one in snapshot["instances"]:
        one["predictor"] = ""
    stage.send(snapshot, learners=[sent])
    await shown(page, stage)
    await page.until(VISIBLE)
    text = await page.text("#learner")
    assert "collecting · frozen" in text
    for wrong in ("NaN", "undefined", "null", "Infinity", "challenger\t"):
        assert wrong not in text
    assert await page.evaluate("document.querySelector('#learner-others').hidden")
    ordinary(page, stage)


async def test_what_a_learner_reports_stays_text(page: Browser, stage: Stage) -> None:
    evil = learner(learner=EVIL, doing=EVIL, events=[event(1) | {"event": EVIL, "text": EVIL}])
    stage.send(seen(), learners=[evil])
    await shown(page, stage)
    await page.until(VISIBLE)
    assert EVIL in await page.evaluate("document.querySelector('#learner-events').textContent")
    assert await page.evaluate("document.querySelectorAll('img, script:not([src])').length") == 0
    assert not await page.evaluate("window.hit")
    ordinary(page, stage)


@pytest.mark.parametrize("scheme", ["dark", "light"])
async def test_it_can_be_read_and_fits(page: Browser, stage: Stage, scheme: str) -> None:
    kinds = ("promoted", "demoted", "trained", "error")
    events = [event(n, kind) | {"text": "x" * 300} for n, kind in enumerate(kinds)]
    stage.send(seen(), learners=[learner(events=events)])
    await shown(page, stage, width=390, height=844, phone=True)
    await page.media(scheme)
    await page.until(f"{VISIBLE} && matchMedia('(prefers-color-scheme: {scheme})').matches")
    assert await page.evaluate("document.documentElement.scrollWidth") == 390
    wide = "[...document.querySelectorAll('#learner *')].filter((e) => e.getBoundingClientRect().right > 390).length"
    assert await page.evaluate(wide) == 0
    assert await page.evaluate(CONTRAST) == []


async def test_over_a_real_gateway(page: Browser, model_folder: Path) -> None:
    async with (
        instances("prefill", "decode", vocabulary=VOCABULARY) as fakes,
        serving(fakes, model_folder) as service,
    ):
        fakes[0].predictor = fakes[1].predictor = CHAMPION
        pool = service.gateway.pool
        await eventually(lambda: all(i.state.telemetry and i.state.telemetry.predictor for i in pool.instances), 15)
        await page.open(f"http://127.0.0.1:{service.port}/dashboard")
        await page.until(SHOWN)
        assert not await page.evaluate(VISIBLE)
        await service.client.put("/admin/v1/predictor", json=report())
        await page.until(VISIBLE)
        assert await page.evaluate("document.querySelector('#learner-others').hidden")
        await service.client.put("/admin/v1/predictor", json=report(doing="training", champion=report()["challenger"]))
        await page.until("document.querySelector('#learner-state').textContent.startsWith('training')")
        names = json.dumps(f"prefill-0 ({CHAMPION[:12]}), decode-0 ({CHAMPION[:12]})")
        await page.until(f"document.querySelector('#learner-others').textContent.includes({names})")
        assert page.complaints == []
        await page.call("Page.navigate", url="about:blank")
