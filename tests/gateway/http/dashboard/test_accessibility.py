"""`/dashboard` in a real headless browser: on a phone, in both colour schemes, and without a mouse."""

import pytest

from tests.gateway.http.dashboard.browser import Browser
from tests.gateway.http.dashboard.stage import Show, Stage
from tests.gateway.http.dashboard.viewing import ROWS, ordinary, shown

pytestmark = pytest.mark.timeout(180)


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
