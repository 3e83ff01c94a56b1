"""`python -m ares_dev`: checks of ARES itself, for its developers."""

import typer

from ares.cli.errors import run_app
from ares_dev import footprint, kills, module_tables, moves
from ares_dev.chaos import command as chaos
from ares_dev.soak import command as soak

app = typer.Typer(
    name="python -m ares_dev",
    help="Checks of ARES itself, for its developers; they are not part of the package.\n\n"
    "All but `modules` start a local cluster of real vLLM engines; all but `moves` also take --simulate PROFILE, for "
    "mock engines, which need neither vLLM nor weights. `chaos`, `soak`, `kills` and `moves` compare every token with "
    "an undisturbed run, and end with status 1 if anything is lost, wrong or left. docs/chaos.md and "
    "docs/benchmarks.md say how they work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("chaos")(chaos.command)
app.command("soak")(soak.command)
app.command("kills")(kills.command)
app.command("moves", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(moves.command)
app.command("footprint")(footprint.command)
app.command("modules")(module_tables.command)


def main() -> None:
    """Run a command; an error that its user can correct is one line and status 2, not a traceback."""
    run_app(app)


if __name__ == "__main__":
    main()
