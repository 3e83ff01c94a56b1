"""The tables of docs/modules.md: one line a module, from the first line of its docstring."""

import ast
from pathlib import Path
from typing import Annotated

import typer

import ares
import ares_dev

BEGIN, END = "<!-- modules {} -->", "<!-- end -->"


def first_line(file: Path) -> str:
    """Return the first line of a module's docstring."""
    said = ast.get_docstring(ast.parse(file.read_text())) or ""
    return said.partition("\n")[0]


def table(package: Path, root: Path) -> str:
    """Return the table of one package: its modules and those of its sub-packages, in order of their paths."""
    rows = [
        f"| `{file.relative_to(root)}` | {first_line(file).replace('|', chr(92) + '|')} |"
        for file in sorted(package.rglob("*.py"))
        if file.name != "__init__.py"
    ]
    return "\n".join(["| module | what it holds |", "|---|---|", *rows])


def filled(page: str) -> str:
    """Return the page with every table updated.

    Raises
    ------
    ValueError
        A package has no place on the page.
    """
    for root in (Path(ares.__file__).parent, Path(ares_dev.__file__).parent):
        inside = [root] if root.name == "ares_dev" else [each for each in sorted(root.iterdir()) if _is_package(each)]
        for package in inside:
            begin = BEGIN.format(package.name)
            if begin not in page:
                raise ValueError(f"docs/modules.md has no place {begin}")
            before, _, rest = page.partition(begin)
            after = rest.partition(END)[2]
            page = f"{before}{begin}\n{table(package, root.parent if package == root else root)}\n{END}{after}"
    return page


def _is_package(folder: Path) -> bool:
    return folder.is_dir() and any(file.name != "__init__.py" for file in folder.rglob("*.py"))


def command(page: Annotated[Path, typer.Argument(help="The page to fill.")] = Path("docs/modules.md")) -> None:
    """Update the tables of docs/modules.md, from the modules' docstrings."""
    page.write_text(filled(page.read_text()))
