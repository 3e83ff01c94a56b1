"""Tables in Markdown from recorded results, put into the pages where they belong.

A table stands between `<!-- NAME -->` and `<!-- end -->`; everything between is replaced.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def result(name: str) -> Any:
    """Read one recorded result."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def table(head: str, rows: list[list[str]]) -> str:
    """Return a table in Markdown; the columns of `head` are apart by |."""
    columns = head.split("|")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines)


def renew(page: Path, marker: str, made: str) -> None:
    """Put a table where the page has its marker; a page without it is left as it is."""
    block = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- end -->)", re.DOTALL)
    page.write_text(block.sub(lambda found: f"{found[1]}{made}\n{found[2]}", page.read_text()))
