"""`ares predictor learn`, and what an operator does with its folder: `history`, `rollback` and `freeze`."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from ares import extras, logs
from ares.cli.options import LogFormat, LogLevel
from ares.protocol.keys import read_key
from ares.terminal import tables
from ares.terminal.progress import progress_display
from ares.terminal.signals import signal_as_interrupt

_errors = Console(stderr=True)
# Where output goes to a file, how far the learner is becomes a line this often.
_LINE_S = 60.0

Folder = Annotated[Path, typer.Option(help="The learner's folder.", envvar="ARES_LEARNER_FOLDER")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def learn(
    gateway: Annotated[
        list[str] | None, typer.Option(help="Base URL of a gateway, whose instances are learned from; may be repeated.")
    ] = None,
    worker: Annotated[list[str] | None, typer.Option(help="Base URL of a further instance; may be repeated.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder of the learner: recorded states, versions, history.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model to learn for; by default that of the first recorded states.")
    ] = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(help="Checkpoint that instances were started with and that does not ship; may be repeated."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings; variables and flags take precedence.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a training; by default 1.")] = None,
    nice: Annotated[int | None, typer.Option(help="Niceness, 0 to 19; by default 10.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting of docs/learning.md, as first_outputs=500; may be repeated."),
    ] = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
    control_key_file: Annotated[
        Path | None, typer.Option(help="File with the control channel's key; or ARES_CONTROL_KEY.")
    ] = None,
    admin_key_file: Annotated[
        Path | None, typer.Option(help="File with the key of the gateways' admin routes; or ARES_ADMIN_KEY.")
    ] = None,
    worker_api_key_file: Annotated[
        Path | None, typer.Option(help="File with the instances' own API key; or ARES_WORKER_API_KEY.")
    ] = None,
) -> None:
    """Let the predictor learn from the requests that a cluster serves.

    Start the instances with `ares worker --learn`, and this next to a gateway: ares predictor learn --gateway
    http://127.0.0.1:8000 --folder learned. It takes the hidden states that the instances record, trains a predictor
    when there is enough, and tries it on requests that came later, against the one in use and against a curve without
    a model. Only what is clearly better is sent to the instances, and what gets clearly worse is taken back. Serving
    never waits for it (docs/learning.md).
    """
    extras.require("torch", "safetensors")

    from ares.learner import service
    from ares.learner.settings import Keys, assignments, load

    given: dict[str, Any] = {"gateways": gateway, "workers": worker, "folder": folder, "model": model}
    given |= {"checkpoints": checkpoint, "threads": threads, "nice": nice}
    given |= {"log_format": log_format, "log_level": log_level}
    found = load(
        config, assignments(settings or []) | {name: value for name, value in given.items() if value is not None}
    )
    files = {"control_key": control_key_file, "admin_key": admin_key_file, "worker_api_key": worker_api_key_file}
    keys = Keys(**{name: read_key(file) for name, file in files.items() if file is not None})  # type: ignore[arg-type] # text becomes a SecretStr
    os.setpriority(os.PRIO_PROCESS, 0, max(found.nice, os.getpriority(os.PRIO_PROCESS, 0)))
    signal_as_interrupt()
    with _display(found.log_format, found.log_level) as show:
        logging.getLogger(__name__).info("learning in %s", found.folder)
        try:
            service.run(found, keys, show)
        except KeyboardInterrupt:
            logging.getLogger(__name__).info("stopped")


def history(folder: Folder, as_json: AsJson = False) -> None:
    """Show what a learner has trained, promoted, demoted and refused, the newest event last."""
    from ares.learner import folder as folders
    from ares.learner import history as events
    from ares.learner.errors import LearnerError

    where = folders.Folder(folder)
    found = events.read(where.history)
    if not found and not where.exists():
        raise LearnerError(f"{folder}: no learner has worked here; give the --folder of ares predictor learn")
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = tables.table("time", "event", "version", "what")
    table.columns[3].justify = "left"
    for event in found:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        table.add_row(when, event["event"], str(event.get("version", ""))[:12], event["text"])
    tables.show(table)


def rollback(
    folder: Folder,
    version: Annotated[
        str, typer.Argument(help="Version to go back to, or its beginning, or curve; by default the one before.")
    ] = "",
) -> None:
    """Make an earlier version the champion; instances get it within seconds where the learner runs.

    Later versions may be promoted again when they are better: `ares predictor freeze` prevents that.
    """
    _command(folder, "rollback", version)


def freeze(folder: Folder, off: Annotated[bool, typer.Option("--off", help="Learn again.")] = False) -> None:
    """Keep the champion as it is: nothing is trained, promoted or demoted until `--off`."""
    _command(folder, "unfreeze" if off else "freeze")


def _command(folder: Path, command: str, version: str = "") -> None:
    from ares.learner import commands
    from ares.learner.folder import Folder as LearnerFolder

    typer.echo(commands.carry_out(LearnerFolder(folder), commands.Command(command=command, version=version)))


@contextlib.contextmanager
def _display(form: logs.Format, level: logs.Level) -> Iterator[Callable[[str], None]]:
    """Yield what shows how far the learner is: a line that changes on a terminal, elsewhere lines of the log."""
    if form == "text" and _errors.is_terminal and not _errors.is_dumb_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with progress_display(_errors, *columns, transient=True) as progress:
            handler = RichHandler(console=progress.console, show_path=False, markup=False)
            logging.basicConfig(level=level.upper(), format="%(message)s", handlers=[handler])
            task = progress.add_task("starting", total=None)
            yield lambda line: progress.update(task, description=line)
        return
    logs.configure(form, level, "%(asctime)s %(levelname)s %(message)s")
    yield _Lines()


class _Lines:
    """Lines of the log about how far the learner is: when it does something else, and otherwise once a minute."""

    def __init__(self) -> None:
        self._doing, self._due = "", 0.0

    def __call__(self, line: str) -> None:
        doing = line.partition(":")[0].partition(",")[0]
        if doing != self._doing or time.monotonic() >= self._due:
            self._doing, self._due = doing, time.monotonic() + _LINE_S
            logging.getLogger(__name__).info("%s", line)
