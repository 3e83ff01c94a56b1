"""Tables on standard output whose first column is never cut."""

import os

from rich import box
from rich.console import Console
from rich.table import Table

_WIDEST = 10_000


def table(name: str, *columns: str, title: str | None = None) -> Table:
    """Make a table whose first column is never cut or wrapped; long cells of the others are wrapped."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, min_width=16)
    made.show_edge = made.pad_edge = False
    made.add_column(name, no_wrap=True)
    for column in columns:
        made.add_column(column, justify="right", overflow="fold")
    return made


def show(*parts: Table | str) -> None:
    """Print tables and lines; into a pipe or a file as wide as they are, unless COLUMNS is set."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        free = console.options.update(max_width=_WIDEST)
        console.width = max(console.width, *(console.measure(part, options=free).maximum for part in parts))
    for part in parts:
        console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
