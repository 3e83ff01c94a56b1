"""The tables of `ares status` and `ares migrate`: they fit the terminal, and have whole lines in a pipe.

Where names are too long, they are shown in a short form that `ares migrate` and `ares drain` take; `--json` has all.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ares.names import short_version, shortened

Row = dict[str, Any]
# For a pipe: no line is broken.
_UNLIMITED = 10_000
# How many characters a name may have, where whole names do not fit.
_LIMITS = (32, 24, 20, 16, 12)
_GAP = "  "
_MOVES_SHOWN = 10
# Width of the border of a table with one column.
_EDGES = 2


def console() -> Console:
    """Return where to print: as wide as the terminal or COLUMNS, and without limit into a pipe or a file."""
    made = Console()
    return made if made.is_terminal or "COLUMNS" in os.environ else Console(width=_UNLIMITED)


@dataclass(frozen=True, slots=True)
class _Names:
    """How each name on the page is shown."""

    requests: dict[str, str]
    instances: dict[str, str]

    def at_most(self, limit: int) -> "_Names":
        """Return shorter forms of the same names."""
        return _Names(shortened(self.requests, limit), shortened(self.instances, limit))


def instances(read: Row, to: Console) -> None:
    """Print the instances of a gateway's status, of several models in a table each."""
    names = _status_names(read)
    rows = read["instances"]
    # Where a learner or an instance has something to show of the predictor.
    learns = bool(read.get("learners")) or any(row.get("predictor") for row in rows)
    of_models = {f"instances of {model['name']}": model["name"] for model in read.get("models", ())}
    for title, model in (of_models or {"instances": None}).items():
        _instances(title, [row for row in rows if row.get("model") == model], names, to, learns=learns)
    for row in read.get("models", ()):
        if row.get("why"):
            to.print(Text(f"{row['name']} is not ready: {row['why']}"))
    for row in rows:
        if row.get("why"):
            to.print(Text(f"{row['name']}: {row['why']}"))
        if row.get("differs_in"):
            to.print(Text(f"{row['name']} differs from most in {row['differs_in']}: no request moves to or from it"))


def _instances(title: str, rows: list[Row], names: _Names, to: Console, *, learns: bool) -> None:
    wide = _table(title, _INSTANCES | _PREDICTOR, rows, names)
    if learns and _fits(wide, to):
        to.print(wide)
        return
    to.print(_fitting(to, names, lambda shown: _table(title, _INSTANCES, rows, shown)))
    if learns:
        to.print(Text(f"versions of the predictor: {_versions(rows)}"))


def roles(read: Row, to: Console) -> None:
    """Print what the planner of roles says, where there is one."""
    for of_model in read.get("models") or [read]:
        plan = of_model.get("roles") or {}
        if plan.get("planner", "off") == "off":
            continue
        advice = plan["advice"]
        does = f"; {advice['instance']} should become {advice['role']}" if advice else ""
        name = f" of {of_model['name']}" if "models" in read else ""
        to.print(Text(f"roles{name} ({plan['planner']}): {plan['reason'] or 'not planned yet'}{does}"))


def _versions(rows: list[Row]) -> str:
    """Return which instances run which version of the predictor."""
    by_version: dict[str, list[str]] = {}
    for row in rows:
        if "predictor" in row:
            by_version.setdefault(short_version(row["predictor"]) or "none", []).append(row["name"])
    return "; ".join(f"{version} on {', '.join(names)}" for version, names in by_version.items()) or "unknown"


def requests(read: Row, to: Console) -> None:
    """Print the requests and the last moves of a gateway's status."""
    moves, names = read["migrations"][-_MOVES_SHOWN:], _status_names(read)
    title = "requests; remaining tokens: median (P90)"
    to.print(_fitting(to, names, lambda shown: _table(title, _REQUESTS, read["requests"], shown)))
    to.print(_moves("recent moves", moves, names, to))


def move(record: Row, to: Console) -> None:
    """Print one move."""
    to.print(_moves("move", [record], _names([], [], [record]), to))


def _status_names(read: Row) -> _Names:
    return _names(read["instances"], read["requests"], read["migrations"][-_MOVES_SHOWN:])


def _names(instances: list[Row], requests: list[Row], moves: list[Row]) -> _Names:
    ids = [row["id"] for row in requests] + [row["request_id"] for row in moves]
    places = [row["name"] for row in instances] + [row[end] for row in moves for end in ("source", "target")]
    places += [row["instance"] for row in requests if row["instance"] is not None]
    return _Names({name: name for name in ids}, {name: name for name in places})


# --- cells ---

Read = Callable[[Row, _Names], Any]


def _state(row: Row, _: _Names) -> str:
    if not row["healthy"]:
        return "not ready"
    return "leaving" if row.get("leaving") else "draining" if row["draining"] else "ready"


def _role(row: Row, _: _Names) -> str:
    return f"{row['role']} → {row['next_role']}" if row.get("next_role") else str(row["role"])


def _memory(row: Row, _: _Names) -> str | None:
    return f"{row['kv_blocks_used'] / row['kv_blocks']:.0%}" if row.get("kv_blocks") else None


def _version(row: Row, _: _Names) -> str | None:
    return short_version(row.get("predictor", "")) or None


def _where(row: Row, names: _Names) -> str:
    return names.instances[row["instance"]] if row["state"] == "decode" else str(row["state"])


def _remaining(row: Row, _: _Names) -> str | None:
    middle, high = row.get("remaining_p50"), row.get("remaining_p90")
    return f"{middle:,.0f} ({high:,.0f})" if middle is not None and high is not None else None


def _ends(row: Row, names: _Names) -> str:
    return f"{names.instances[row['source']]} → {names.instances[row['target']]}"


def _stall_ms(row: Row, _: _Names) -> float | None:
    return 1e3 * row["stall_s"] if row["stall_s"] is not None else None


def _field(name: str) -> Read:
    return lambda row, _: row.get(name)


_INSTANCES: dict[str, Read] = {
    "instance": lambda row, names: names.instances[row["name"]],
    "role": _role,
    "state": _state,
    "running": _field("running"),
    "waiting": _field("waiting"),
    "KV": _memory,
    "remaining": _field("predicted_remaining_tokens"),
    "preemptions": _field("preemptions"),
}
_PREDICTOR: dict[str, Read] = {"predictor": _version}
_REQUESTS: dict[str, Read] = {
    "request": lambda row, names: names.requests[row["id"]],
    "instance": _where,
    "output": _field("output_tokens"),
    "remaining": _remaining,
    "moves": _field("moves"),
    "cannot move": _field("reason"),
}
_MOVES: dict[str, Read] = {
    "request": lambda row, names: names.requests[row["request_id"]],
    "move": _ends,
    "reason": _field("reason"),
    "outcome": _field("outcome"),
    "stall ms": _stall_ms,
}


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, float) else str(value)


# --- tables ---


def _table(title: str, columns: dict[str, Read], rows: list[Row], names: _Names) -> Table:
    table = empty_table(title)
    for number, name in enumerate(columns if rows else ("none",)):
        # Names and reasons come first and last, and may be folded; the columns between are short.
        table.add_column(name, overflow="fold", no_wrap=0 < number < len(columns) - 1)
    for row in rows:
        table.add_row(*(Text(_cell(read(row, names))) for read in columns.values()))
    return table


def _moves(title: str, rows: list[Row], names: _Names, to: Console) -> Table:
    """Show moves with the reason in a column, where there is room for it, or else below each move."""
    wide = _table(title, _MOVES, rows, names)
    if not rows or _fits(wide, to):
        return wide
    return _fitting(to, names, lambda shown: _with_reasons_below(title, rows, shown, to.width))


def _with_reasons_below(title: str, rows: list[Row], names: _Names, width: int) -> Table:
    columns = {name: read for name, read in _MOVES.items() if name != "reason"}
    cells = [[_cell(read(row, names)) for read in columns.values()] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(columns, *cells, strict=True)]

    def line(row: Iterable[str]) -> str:
        return _GAP.join(set_cell_size(cell, width) for cell, width in zip(row, widths, strict=True))

    table = empty_table(title)
    table.add_column(line(columns), overflow="fold")
    for row, record in zip(cells, rows, strict=True):
        reason = Padding(Text(_cell(record["reason"])), (0, 0, 0, len(_GAP)))
        # Constrained: a reason is wrapped at the width of the table, and shortens no name.
        table.add_row(Group(Text(line(row)), Constrain(reason, width - _EDGES)))
    return table


def empty_table(title: str | None) -> Table:
    """Return a table in the style of all tables here."""
    return Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, min_width=16
    )


def _fitting(to: Console, names: _Names, make: Callable[[_Names], Table]) -> Table:
    """Shorten names until a table fits, as far as they can be."""
    table = make(names)
    for limit in _LIMITS:
        if _fits(table, to):
            break
        table = make(names.at_most(limit))
    return table


def _fits(table: RenderableType, to: Console) -> bool:
    return Measurement.get(to, to.options.update(max_width=_UNLIMITED), table).maximum <= to.width
