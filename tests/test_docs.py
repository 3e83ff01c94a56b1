"""Links between the pages of the documentation, and from the README."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def anchors(page: str) -> set[str]:
    """The anchors of a page as GitHub makes them of its headings, and those that it writes itself."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading.lower())).replace(" ", "-") for heading in headings}
    return made | set(re.findall(r'<a id="([^"]+)"', page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target, anchor in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file = page.parent / target if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file.read_text())):
            broken.append(f"{target}#{anchor}")
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_deploy_exist(page: Path) -> None:
    named = set(re.findall(r"\bdeploy/[\w./@-]*\w", page.read_text()))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_headings_become_anchors() -> None:
    assert anchors("# The `ares` preset, in *short*\n## A/B\n") == {"the-ares-preset-in-short", "ab"}


def test_every_hop_through_the_code_exists() -> None:
    page = (ROOT / "docs" / "modules.md").read_text()
    hops = page[page.index("## Three ways through the code") : page.index("## Every module")]
    named = set(re.findall(r"`([^`]+)`", hops))
    files = {name for name in named if name.endswith(".py")}
    assert len(files) > 20
    assert [name for name in files if not (ROOT / "src" / "ares" / name).is_file()] == []
    source = "\n".join(path.read_text() for path in sorted((ROOT / "src" / "ares").rglob("*.py")))
    defined = set(re.findall(r"(?:def|class) (\w+)", source))
    names = {name for name in named - files if name not in {"file", "kv_transfer_params"}}
    assert [name for name in names if not set(name.split(".")) <= defined] == []
