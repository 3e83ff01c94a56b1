"""`python -m ares_dev clients`: clients that people use, unmodified, against a running gateway."""

import json
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ares.bench.environment import describe, write
from ares.bench.options import JsonFile
from ares.terminal import tables
from ares.terminal.progress import progress_display
from ares_dev.clients.report import Target
from ares_dev.clients.run import run
from ares_dev.clients.table import CLIENTS


def _read(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:  # noqa: S310 - the gateway that is given
            return json.load(reply)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{url}: {error}", param_hint="--url") from None


def _show(rows: dict[str, dict[str, Any]]) -> None:
    table = tables.table("client", "version", "requests", "failed", "tool calls parsed", "seconds")
    lines = []
    for name, row in rows.items():
        if not row["installed"]:
            table.add_row(name, "not installed", *[""] * 4)
            lines.append(f"{name}: {row['install']}")
            continue
        calls = row["tool_calls"]
        asked = sum(calls.values())
        parsed = f"{calls['parsed']} of {asked}" if asked else ""
        table.add_row(name, row["version"], str(row["requests"]), str(row["failed"]), parsed, str(row["seconds"]))
        lines += [f"{name}: {failure}" for failure in row["failures"]]
    tables.show(table, *lines)


def command(
    url: Annotated[str, typer.Option(help="The gateway, without /v1.")],
    model: Annotated[str, typer.Option(help="Its name of the model.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="For benchmarks that count tokens: a folder or a Hugging Face id; the model.")
    ] = None,
    client: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(CLIENTS)}.")] = None,
    environments: Annotated[
        Path | None,
        typer.Option(help="Folder of virtual environments; one named as a client is that client's.", file_okay=False),
    ] = None,
    tokens: Annotated[int, typer.Option(min=4, help="Output tokens of each plain request.")] = 16,
    limit_s: Annotated[float, typer.Option("--limit", min=1, help="Seconds after which a client is stopped.")] = 600,
    json_file: JsonFile = None,
) -> None:
    """Run the clients that are installed; status 1 if a request failed, or a client of --client is not installed.

    They use a gateway as it is: start one first, for the calls of tools with a tool parser. A client that is not
    installed is shown with what to install, and is not a success.
    """
    for name in client or ():
        if name not in CLIENTS:
            raise typer.BadParameter(f"{name!r}: expected one of {', '.join(CLIENTS)}", param_hint="--client")
    url = url.rstrip("/")
    gateway = _read(f"{url}/version")
    if model not in (served := [row["id"] for row in _read(f"{url}/v1/models")["data"]]):
        raise typer.BadParameter(f"{model!r}: the gateway serves {', '.join(served)}", param_hint="--model")
    target = Target(url, model, tokenizer or model, tokens)
    rows = {}
    with progress_display(Console(stderr=True)) as progress:
        for name in client or CLIENTS:
            task = progress.add_task(name, total=1)
            rows[name] = run(CLIENTS[name], target, environments, limit_s)
            progress.advance(task)
    _show(rows)
    # Names alone, without this machine's folders.
    about = {"benchmark": "clients", "model": Path(target.tokenizer).name, "tokens": tokens, **describe()}
    write({**about, "gateway": gateway, "clients": rows}, json_file)
    if any(row["failed"] if row["installed"] else bool(client) for row in rows.values()):
        raise typer.Exit(1)
