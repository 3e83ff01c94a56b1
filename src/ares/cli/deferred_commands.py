"""Groups of commands whose module is imported when one of them is called, or their help is asked for."""

import importlib
from functools import cached_property
from typing import Any, cast

import typer
import typer.main
from typer.core import TyperGroup


class Deferred(TyperGroup):
    """A group that stands for the `app` of a module; it knows its own name and help without it."""

    module: str

    @classmethod
    def of(cls, module: str) -> "type[Deferred]":
        """Return the class of the group of a module."""
        return type(cls.__name__, (cls,), {"module": module})

    @cached_property
    def _group(self) -> TyperGroup:
        # Below another, as everywhere: a group takes how it looks from that, and has no options of its own for a shell.
        above = typer.Typer(add_completion=False)
        above.add_typer(importlib.import_module(self.module).app, name=self.name)
        return cast(TyperGroup, typer.main.get_group(above).commands[str(self.name)])

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        """Read the command line as the group itself does: all that follows is then the group's."""
        return self._group.make_context(*arguments, **settings)

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands."""
        return self._group.list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, or None where there is none of this name."""
        return self._group.get_command(ctx, cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of the group itself."""
        self._group.format_help(ctx, formatter)
