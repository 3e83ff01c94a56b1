"""Commands that a file of deploy/ starts, parsed as `ares` parses them."""

from typing import Any

from typer.main import get_command

from ares.cli.main import app


def parsed(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the options of a command, and the arguments that are left for vLLM; it is not run.

    Raises
    ------
    typer.BadParameter
        There is no such command or option.
    """
    command: Any = get_command(app)
    context = command.make_context("ares", [], resilient_parsing=True)
    rest = arguments
    while hasattr(command, "list_commands"):
        name, *rest = rest
        command = command.get_command(context, name)
        assert command is not None, f"there is no command {name}"
    with command.make_context(command.name, rest, parent=context) as made:
        return dict(made.params), list(made.args)
