"""The `ares` command."""

from typing import Annotated

import typer

from ares import __version__
from ares.cli import operator as operator_cli
from ares.cli.check import check
from ares.cli.deferred_commands import Deferred
from ares.cli.errors import run_app
from ares.cli.gateway import gateway
from ares.cli.options import PASS_THROUGH
from ares.cli.up import up
from ares.cli.worker import worker

app = typer.Typer(
    name="ares",
    help="Prefill-decode disaggregated serving on stock vLLM that migrates running requests.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Their modules are imported when one of their commands is called: together they import most of ARES.
for group, module, text in (
    ("bench", "ares.cli.bench", "Measure ARES."),
    (
        "simulate",
        "ares.cli.simulate",
        "Replay a trace over a simulated prefill-decode cluster, with the policy code of the live service.",
    ),
    (
        "predictor",
        "ares.cli.predictor",
        "Train and evaluate a predictor of remaining output length, on the model's own hidden states.",
    ),
):
    app.add_typer(typer.Typer(cls=Deferred.of(module)), name=group, help=text)
for with_other_flags in (up, gateway, worker, check):
    app.command(context_settings=PASS_THROUGH)(with_other_flags)
for command in (
    operator_cli.status,
    operator_cli.migrate,
    operator_cli.drain,
    operator_cli.undrain,
    operator_cli.role,
    operator_cli.preset,
    operator_cli.replay,
):
    app.command()(command)


def main() -> None:
    """Run the command."""
    run_app(app)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ares {__version__}")
        raise typer.Exit


@app.callback()
def ares(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Handle the options before a command."""


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)
