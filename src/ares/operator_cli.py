"""The operator's commands: what runs where, moves and presets on command, and decisions made again."""

import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ares.keys import KeyFileError, read_key

_errors = Console(stderr=True)
_KEY_VARIABLE = "ARES_ADMIN_KEY"

Url = Annotated[str, typer.Option(envvar="ARES_URL", help="Where the gateway answers.")]
KeyFile = Annotated[
    Path | None, typer.Option(help=f"File with the key of the admin routes; without one, {_KEY_VARIABLE} is read.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def fail(message: str, status: int = 2) -> NoReturn:
    """Print an error and end."""
    _errors.print(f"error: {message}", style="bold red", markup=False, highlight=False)
    sys.exit(status)


def status(
    url: Url = "http://127.0.0.1:8000",
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Show instances, running requests and recent moves."""
    read = _call(f"{url}/admin/v1/status", key_file)
    if as_json:
        typer.echo(json.dumps(read, indent=2))
        return
    console = Console()
    console.print(f"gateway: {read['gateway']}, controller: {_turns(read['controller'])}", highlight=False)
    console.print(_table("instances", _INSTANCES, read["instances"]))
    console.print(_table("requests", _REQUESTS, read["requests"]))
    console.print(_table("recent moves", _MOVES, read["migrations"][-10:]))


def migrate(
    request: Annotated[str, typer.Argument(help="Id of a running request (see `ares status`).")],
    to: Annotated[str, typer.Option("--to", help="Name of the decode instance to move it to.")],
    mode: Annotated[str, typer.Option(help="How its KV gets there: auto, stop_and_copy or pre_copy.")] = "auto",
    url: Url = "http://127.0.0.1:8000",
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Move a running request to another decode instance."""
    record = _call(f"{url}/admin/v1/migrations", key_file, {"request_id": request, "target": to, "mode": mode})
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    else:
        Console().print(_table("move", _MOVES, [record]))
    if record["outcome"] != "moved":
        sys.exit(1)


def drain(
    instance: Annotated[str, typer.Argument(help="Name of the instance (see `ares status`).")],
    deadline: Annotated[float, typer.Option(min=0, help="Seconds until what is left is broken off.")] = 60.0,
    wait: Annotated[bool, typer.Option("--wait", help="Return when nothing is left there.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even if it is the last open one of its kind.")] = False,
    url: Url = "http://127.0.0.1:8000",
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Give an instance no more work, and move out what runs there."""
    path = f"{url}/admin/v1/instances/{urllib.parse.quote(instance, safe='')}/drain"
    record = _call(path, key_file, {"deadline_s": deadline} | ({"force": True} if force else {}))
    if wait:
        record["left"] = _until_empty(instance, deadline + _AFTER_DEADLINE_S, url, key_file)
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    else:
        typer.echo(f"{instance} drains; left there: {record['left']}")
    if wait and record["left"]:
        sys.exit(1)


def undrain(
    instance: Annotated[str, typer.Argument(help="Name of the instance (see `ares status`).")],
    url: Url = "http://127.0.0.1:8000",
    key_file: KeyFile = None,
) -> None:
    """Let an instance take work again."""
    _call(f"{url}/admin/v1/instances/{urllib.parse.quote(instance, safe='')}/undrain", key_file, {})
    typer.echo(f"{instance} takes requests")


def preset(
    name: Annotated[str | None, typer.Argument(help="Preset to switch to (docs/policy.md); none: show it.")] = None,
    url: Url = "http://127.0.0.1:8000",
    key_file: KeyFile = None,
) -> None:
    """Show or switch the policy preset of a running gateway."""
    if name is None:
        typer.echo(_call(f"{url}/admin/v1/status", key_file)["preset"])
    else:
        typer.echo(_call(f"{url}/admin/v1/preset", key_file, {"preset": name}, "PUT")["preset"])


def replay(
    log: Annotated[Path, typer.Argument(help="Decision log of `ares gateway --decision-log`.")],
    preset: Annotated[str | None, typer.Option(help="Decide by this preset instead of the logged one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make the decisions of a log again: the same preset decides the same, another says what it would have done.

    Ends with status 1 where the logged preset decides otherwise than logged.
    """
    from ares.gateway.replay import ReplayError
    from ares.gateway.replay import replay as again

    try:
        size = log.stat().st_size
        with Progress(console=_errors, transient=True) as bar:
            task = bar.add_task(f"replaying {log.name}", total=size)
            result = again(log, preset, lambda read: bar.update(task, completed=read))
    except (ReplayError, ValueError, OSError) as error:
        fail(str(error))
    if as_json:
        shown = {
            "decisions": result.decisions,
            "same": result.same,
            "logged": dict(result.logged),
            "made": dict(result.made),
            "differences": result.differences,
        }
        typer.echo(json.dumps(shown, indent=2))
    else:
        table = Table("decided", "as logged", f"by {preset}" if preset else "again")
        for kind in sorted({*result.logged, *result.made}):
            table.add_row(kind, str(result.logged[kind]), str(result.made[kind]))
        console = Console()
        console.print(table)
        console.print(f"{result.same} of {result.decisions} decisions came out as logged")
    if preset is None and result.same != result.decisions:
        sys.exit(1)


def _turns(controller: dict[str, Any]) -> str:
    """Say who decides moves."""
    if controller["where"] != "elsewhere":
        return str(controller["where"])
    who = f" ({controller['holder']})" if controller["holder"] else ""
    return f"elsewhere{who}, for {controller['missed_periods']} periods"


# What was broken off at the deadline is gone soon after; what is left then belongs to nobody who listens.
_AFTER_DEADLINE_S = 15.0
_POLL_S = 0.2


def _until_empty(instance: str, timeout_s: float, url: str, key_file: Path | None) -> int:
    """Wait until nothing is left on an instance, and return how much is."""
    until = time.monotonic() + timeout_s
    with _errors.status("") as shown:
        while True:
            rows = {row["name"]: row for row in _call(f"{url}/admin/v1/status", key_file)["instances"]}
            row = rows.get(instance)
            if row is None or not row["healthy"]:
                return 0  # it has ended
            if not row["draining"]:
                fail(f"{instance} drains no longer", 1)
            left: int = row["left"]
            if not left or time.monotonic() > until:
                return left
            shown.update(f"{instance}: {left} left")
            time.sleep(_POLL_S)


def _key(file: Path | None) -> str | None:
    try:
        return read_key(file) if file is not None else os.environ.get(_KEY_VARIABLE)
    except KeyFileError as error:
        fail(str(error))


def _call(
    url: str, key_file: Path | None, body: dict[str, Any] | None = None, method: str | None = None
) -> dict[str, Any]:
    key = _key(key_file)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310 - the operator's own URL
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310 - likewise
            read: dict[str, Any] = json.load(reply)
            return read
    except urllib.error.HTTPError as error:
        try:
            message = json.load(error)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = str(error)
        fail(message, 1)
    except OSError as error:
        fail(f"no gateway at {url}: {error}; start one with `ares up`, or give --url", 1)


Row = dict[str, Any]


def _state(row: Row) -> str:
    return "silent" if not row["healthy"] else "draining" if row["draining"] else "ok"


def _memory(row: Row) -> str | None:
    return f"{row['kv_blocks_used'] / row['kv_blocks']:.0%}" if row.get("kv_blocks") else None


def _where(row: Row) -> str:
    return str(row["instance"] if row["state"] == "decoding" else row["state"])


def _to_come(row: Row) -> str | None:
    middle, high = row.get("remaining_p50"), row.get("remaining_p90")
    return f"{middle:,.0f} ({high:,.0f})" if middle is not None and high is not None else None


def _stall_ms(row: Row) -> float | None:
    return 1e3 * row["stall_s"] if row["stall_s"] is not None else None


def _field(name: str) -> Callable[[Row], Any]:
    return lambda row: row.get(name)


# What fits a terminal of 80 columns; --json has every field.
_INSTANCES = {
    "instance": _field("name"),
    "role": _field("role"),
    "state": _state,
    "running": _field("running"),
    "waiting": _field("waiting"),
    "KV": _memory,
    "to come": _field("predicted_remaining_tokens"),
    "preempted": _field("preemptions"),
}
_REQUESTS = {
    "request": _field("id"),
    "where": _where,
    "output": _field("output_tokens"),
    "to come (P90)": _to_come,
    "moves": _field("moves"),
    "stays, for": _field("reason"),
}
_MOVES = {
    "request": _field("request_id"),
    "way": lambda row: f"{row['source']} → {row['target']}",
    "why": _field("reason"),
    "outcome": _field("outcome"),
    "stall ms": _stall_ms,
}


def _table(title: str, columns: dict[str, Callable[[Row], Any]], rows: list[Row]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), min_width=16)
    for number, name in enumerate(columns if rows else ("none",)):
        table.add_column(name, overflow="fold", no_wrap=number < 2)
    for row in rows:
        table.add_row(*(_cell(read(row)) for read in columns.values()))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, float) else str(value)
