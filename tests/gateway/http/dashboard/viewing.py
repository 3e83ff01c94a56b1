"""Looking at the page: what several tests ask of it."""

from typing import Any
from urllib.parse import urlsplit

from tests.gateway.http.dashboard.browser import Browser
from tests.gateway.http.dashboard.stage import Stage

SHOWN = "!document.querySelector('main').hidden"


ROWS = "[...document.querySelectorAll('.request:not([hidden])')]"


NONE = "\N{EN DASH}"


EVIL = '<img/src=x/onerror="document.title=1;window.hit=1"><script>window.hit=1</script>'


async def shown(page: Browser, stage: Stage, **viewport: Any) -> None:
    await page.open(stage.url, **viewport)
    await page.until(SHOWN)


def ordinary(page: Browser, stage: Stage) -> None:
    """The page has complained of nothing, and has asked nobody else."""
    assert page.complaints == []
    assert {urlsplit(url).netloc for url in page.requested} == {f"127.0.0.1:{stage.port}"}
