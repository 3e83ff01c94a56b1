"""`python -m ares_dev`: checks of ARES itself, for its developers."""

import typer

from ares.cli.errors import run_app
from ares_dev import (
    api_tables,
    copies,
    example_config,
    footprint,
    kills,
    lengths,
    metrics_table,
    module_tables,
    moves,
    roles,
    step_channel,
    tokenizer_classes,
)
from ares_dev.chaos import command as chaos
from ares_dev.clients import command as clients
from ares_dev.differential import command as differential
from ares_dev.learning import command as learning
from ares_dev.soak import command as soak

app = typer.Typer(
    name="python -m ares_dev",
    help="Checks of ARES itself, for its developers; they are not part of the package.\n\n"
    "`modules`, `api`, `metrics`, `example-config` and `tokenizer-classes` write tables and files from the code. All "
    "others but `clients` start a local cluster of real vLLM engines; all of these but `moves`, `copies`, `roles`, "
    "`differential`, `learning` and `step-channel` also take --simulate PROFILE, for mock engines, which need neither "
    "vLLM nor weights. `differential` compares the gateway's replies with vLLM's own; `clients` sends programs of "
    "others to a running gateway. `chaos`, `soak`, `kills`, `copies`, `roles` and `moves` compare every token with an "
    "undisturbed run, and end with status 1 if anything is lost, wrong or left. docs/chaos.md and docs/benchmarks.md "
    "say how they work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("chaos")(chaos.command)
app.command("soak")(soak.command)
app.command("kills")(kills.command)
app.command("copies")(copies.command)
app.command("roles")(roles.command)
app.command("moves", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(moves.command)
app.command("differential", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    differential.command
)
app.command("clients")(clients.command)
app.command("learning")(learning.command)
app.command("footprint")(footprint.command)
app.command("lengths")(lengths.command)
app.command("step-channel")(step_channel.command)
app.command("modules")(module_tables.command)
app.command("api")(api_tables.command)
app.command("metrics")(metrics_table.command)
app.command("example-config")(example_config.command)
app.command("tokenizer-classes")(tokenizer_classes.command)


def main() -> None:
    """Run a command; an error that its user can correct is one line and status 2, not a traceback."""
    run_app(app)


if __name__ == "__main__":
    main()
