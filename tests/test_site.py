"""The documentation as a site: it is built without a warning, and loads nothing from other hosts."""

import html.parser
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


class Loaded(html.parser.HTMLParser):
    """What a browser loads with a page: scripts, styles, images, frames."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in {"script", "img", "iframe", "source", "video", "audio"} and given.get("src"):
            self.found.append(str(given["src"]))
        # A canonical address is none that is loaded.
        if tag == "link" and given.get("href") and given.get("rel") != "canonical":
            self.found.append(str(given["href"]))


def pages(site: Path) -> Iterator[tuple[Path, str]]:
    for page in sorted(site.rglob("*.html")):
        yield page, page.read_text()


def test_every_page_is_there_and_in_the_navigation(site: Path) -> None:
    made = {page.stem for page, _ in pages(site)} - {"404"}
    assert made == {page.stem for page in (ROOT / "docs").glob("*.md")}
    start = (site / "index.html").read_text()
    assert all(f'href="{name}.html"' in start for name in made - {"index"})


def test_nothing_is_loaded_from_other_hosts(site: Path) -> None:
    for page, text in pages(site):
        parser = Loaded()
        parser.feed(text)
        assert parser.found
        for address in parser.found:
            assert "//" not in address, (page, address)
            if page.stem != "404":  # which is served from anywhere
                assert (page.parent / address).is_file(), (page, address)
        # What the theme's script would load for: diagrams, and the stars of a repository.
        assert 'class="mermaid"' not in text
        assert "md-source" not in text
    for style in site.rglob("*.css"):
        assert "url(http" not in style.read_text().replace('"', "").replace("'", "")


def test_lists_and_code_are_what_they_look_like(site: Path) -> None:
    """Markdown of the site is stricter than GitHub's: a list needs an empty line before it."""
    for page, text in pages(site):
        body = text.partition("<article")[2].partition("</article>")[0]
        assert "<br />\n- " not in body
        for paragraph in body.split("<p>")[1:]:
            inside = paragraph.partition("</p>")[0]
            assert not any(line.startswith(("- ", "| ", "1. ", "```")) for line in inside.splitlines()), (page, inside)
