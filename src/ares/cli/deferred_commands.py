"""Groups of commands whose module is imported when one of them is called, or their help is asked for."""

import importlib
from functools import cached_property
from typing import Any, cast

import typer
import typer.main
from typer.core import TyperGroup


class Deferred(TyperGroup):
    """A group that stands for the `app` of a module, with a name and a help that need no import of it."""

    module: str

    @classmethod
    def of(cls, module: str) -> "type[Deferred]":
        """Return the class of the group of a module."""
        return type(cls.__name__, (cls,), {"module": module})

    @cached_property
    def _group(self) -> TyperGroup:
        # As a sub-command of another app: a group takes its style from that, and has no options for shell completion.
        above = typer.Typer(add_completion=False)
        above.add_typer(importlib.import_module(self.module).app, name=self.name)
        return cast(TyperGroup, typer.main.get_group(above).commands[str(self.name)])

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        """Parse the command line with the group itself."""
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
