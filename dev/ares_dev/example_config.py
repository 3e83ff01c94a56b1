"""deploy/gateway.yaml: every setting of a gateway with what it means, from the settings themselves."""

import ast
import inspect
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import SecretStr

from ares.config import GatewayConfig

# What a gateway cannot do without; all other settings are comments, with their defaults.
_GIVEN = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "workers": ["http://10.0.0.1:8100", "http://10.0.0.2:8100"],
}
_HEAD = """\
# Every setting of `ares gateway --config FILE`. A line that begins with `# ` and a name is a setting with its default,
# or with an example where it has none ("e.g."). ARES_* variables come before this file, flags before both
# (docs/operations.md). Keys belong into files or variables that only the gateway can read (docs/security.md).
# Made by `python -m ares_dev example-config`.
"""


def example() -> str:
    """Return the file."""
    return "\n".join([_HEAD, *(_setting(name, said) for name, said in _documented())])


_NAMES = GatewayConfig.model_fields.keys()


def _documented() -> list[tuple[str, str]]:
    """Return the settings in order, each with the text below it."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(GatewayConfig))).body
    assert isinstance(definition, ast.ClassDef)  # noqa: S101 - what was asked for
    found = []
    for node, after in zip(definition.body, [*definition.body[1:], ast.Pass()], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in _NAMES:
            said = after.value if isinstance(after, ast.Expr) else None
            text = str(said.value) if isinstance(said, ast.Constant) else ""
            found.append((node.target.id, text))
    return found


def _setting(name: str, said: str) -> str:
    field = GatewayConfig.model_fields[name]
    value, mark = _GIVEN.get(name), ""
    if name not in _GIVEN:
        value = field.get_default(call_default_factory=True)
        if not value and value is not False and value != 0 and field.examples:
            value, mark = field.examples[0], "  # e.g."
    comment = textwrap.wrap(said, 116)
    line = f"{name}: {_written(value)}"
    return "\n".join([*(f"## {text}" for text in comment), line if name in _GIVEN else f"# {line}{mark}", ""])


def _written(value: Any) -> str:
    if isinstance(value, SecretStr):
        raise TypeError("a key has no default")
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False).strip()
    return text.removesuffix("...").strip()


def command(file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("deploy/gateway.yaml")) -> None:
    """Write deploy/gateway.yaml, from the gateway's settings."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(example())
