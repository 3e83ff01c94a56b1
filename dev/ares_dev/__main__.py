"""`python -m ares_dev`: checks of ARES itself, for those who change it."""

import typer

from ares_dev import footprint, kills, module_tables, moves
from ares_dev.chaos import command as chaos
from ares_dev.soak import command as soak

app = typer.Typer(
    name="python -m ares_dev",
    help="Checks of ARES itself, for those who change it.",
    no_args_is_help=True,
    add_completion=False,
)
app.command("chaos")(chaos.command)
app.command("soak")(soak.command)
app.command("kills")(kills.command)
app.command("moves")(moves.command)
app.command("footprint")(footprint.command)
app.command("modules")(module_tables.command)

if __name__ == "__main__":
    app()
