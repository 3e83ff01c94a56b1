"""Groups of commands that are imported when they are called."""

import importlib
import subprocess
import sys

import pytest
from typer.main import get_command, get_group

from ares.cli import main as cli
from ares.cli.deferred_commands import Deferred

GROUPS = {"bench": "ares.cli.bench", "simulate": "ares.cli.simulate", "predictor": "ares.cli.predictor"}
LARGE = {"numpy", "pydantic", "fastapi", "aiohttp", "uvicorn", "tokenizers", "jinja2", "torch", "transformers", "numba"}


def test_help_of_the_command_imports_nothing_large() -> None:
    script = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); from ares.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True, check=True)
    assert "Measure ARES" in done.stdout
    assert "ares.cli.main" in done.stdout.splitlines()[-1].split()
    assert not LARGE & {*done.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize(("name", "module"), GROUPS.items())
def test_a_group_is_that_of_its_module(name: str, module: str) -> None:
    top = get_command(cli.app)
    group, own = top.commands[name], get_group(importlib.import_module(module).app)  # type: ignore[attr-defined]
    assert isinstance(group, Deferred)
    assert group.module == module
    assert group.help == own.help
    with group.make_context(name, [], resilient_parsing=True) as context:
        assert [option.name for option in context.command.params] == [
            option.name for option in own.params if "completion" not in str(option.name)
        ]
        assert group.list_commands(context) == own.list_commands(context)
    done = subprocess.run([sys.executable, "-m", "ares", name, "--help"], capture_output=True, text=True, check=True)
    assert f"Usage: python -m ares {name} " in done.stdout
    assert all(command in done.stdout for command in own.list_commands(context))
